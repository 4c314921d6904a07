"""The admitted point nearest to a refused one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
import pytest

from optuna_quota import Limits
from optuna_quota._footprint.footprint import Interval
from optuna_quota._sampler.admission import PointAdmission
from optuna_quota._sampler.nearest_point import nearest_admitted


LIMITS = Limits(wall_time=1.0)
SPACE: dict[str, BaseDistribution] = {
    "x": FloatDistribution(0, 1),
    "y": FloatDistribution(0, 1),
    "kind": CategoricalDistribution(["plain", "huge"]),
}


class Slope:
    """Breaches with a probability that grows with ``x``, no less than ``least``."""

    def __init__(self, least: float = 0.0) -> None:
        self._least = least

    def breaches(
        self, points: Sequence[Mapping[str, Any]], limits: Limits
    ) -> dict[str, np.ndarray]:
        x = np.array([1.0 if point["kind"] == "huge" else point["x"] for point in points])
        return {"wall_time": np.maximum(x, self._least)}

    def intervals(self, params: Mapping[str, Any]) -> dict[str, Interval]:
        return {"wall_time": Interval(0.5, 1.0, 2.0)}


def nearest(
    point: Mapping[str, Any], expected: Slope, fixed: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    admission = PointAdmission(expected, LIMITS, [], SPACE, threshold=0.5)
    return nearest_admitted(admission, point, SPACE, fixed or {}, np.random.default_rng(0))


def test_a_replacement_keeps_a_margin_to_the_threshold() -> None:
    found = nearest({"x": 0.8, "y": 0.5, "kind": "plain"}, Slope())
    assert found is not None
    # At most half of the threshold, and close to that: what is further below is further away.
    assert 0.2 < found["x"] <= 0.25
    assert found["kind"] == "plain"


def test_without_a_margin_a_point_at_the_threshold_is_taken() -> None:
    found = nearest({"x": 0.8, "y": 0.5, "kind": "plain"}, Slope(least=0.4))
    assert found is not None
    assert 0.4 < found["x"] <= 0.5


def test_no_point_is_returned_where_none_is_admitted() -> None:
    assert nearest({"x": 0.8, "y": 0.5, "kind": "plain"}, Slope(least=0.6)) is None


@pytest.mark.parametrize("fixed", ["x", "kind"])
def test_fixed_parameters_are_kept(fixed: str) -> None:
    point = {"x": 0.1, "y": 0.5, "kind": "huge"}
    found = nearest(point, Slope(), {fixed: point[fixed]})
    if fixed == "kind":
        assert found is None
    else:
        assert found is not None
        assert found["kind"] == "plain"
        assert found["x"] == 0.1
