"""Admission of a point by the probability of a breach, and the nearest admitted one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
import pytest

from optuna_quota import Limits
from optuna_quota._footprint.footprint import joint_breach
from optuna_quota._records import Interval
from optuna_quota._sampler.admission import is_audit_due, nearest_admitted, PointAdmission


LIMITS = Limits(memory="2GiB", wall_time=60, cpu_time=90)


class Fixed:
    """Has the same probability of a breach at every point, or that of the parameter ``x``."""

    def __init__(self, breaches: Mapping[str, float], medians: Mapping[str, float]) -> None:
        self._breaches, self._medians = breaches, medians

    def breaches(
        self, points: Sequence[Mapping[str, Any]], limits: Limits
    ) -> dict[str, np.ndarray]:
        return {
            name: np.array([point.get("x", each) for point in points])
            for name, each in self._breaches.items()
        }

    def intervals(self, params: Mapping[str, Any]) -> dict[str, Interval]:
        return {name: Interval(each, each, each) for name, each in self._medians.items()}


def admission_of(
    breaches: Mapping[str, float], medians: Mapping[str, float], **arguments: Any
) -> PointAdmission:
    return PointAdmission(Fixed(breaches, medians), LIMITS, **arguments, threshold=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("breaches", "probability"),
    [
        ({}, 0.0),
        ({"memory": 0.3}, 0.3),
        ({"wall_time": 0.3, "cpu_time": 0.4}, 0.4),
        ({"memory": 0.5, "wall_time": 0.5}, 0.75),
        ({"memory": 0.5, "gpu_memory": 0.5, "wall_time": 0.0}, 0.75),
        ({"memory": 1.0, "wall_time": 0.0}, 1.0),
    ],
)
def test_times_rise_together_and_memory_is_independent(
    breaches: dict[str, float], probability: float
) -> None:
    assert joint_breach(breaches) == pytest.approx(probability)


@pytest.mark.parametrize(("probability", "admitted"), [(0, True), (0.5, True), (0.51, False)])
def test_a_point_is_admitted_up_to_the_threshold(probability: float, admitted: bool) -> None:
    judge = admission_of({"memory": probability}, {"memory": 1e9}, past=[], space={}).judge
    assert judge({"n": 1}).admitted is admitted
    assert bool(judge({"n": 1}).reason) is not admitted


def test_a_refusal_names_the_resource_that_is_most_likely_breached() -> None:
    medians = {"memory": 3.0 * 2**30, "wall_time": 70.0}
    admission = admission_of({"memory": 0.93, "wall_time": 0.6}, medians, past=[], space={})
    verdict = admission.judge({"n": 1})
    assert not verdict.admitted
    assert (verdict.resource, verdict.limit, verdict.median) == ("memory", 2 * 2**30, 3 * 2**30)
    assert verdict.reason == (
        "Memory limit likely exceeded: 3 GiB projected, 2 GiB allowed, probability 97%."
    )


@pytest.mark.parametrize(("known", "admitted"), [({"n": 1}, True), ({"n": 1, "x": 0.9}, False)])
def test_a_partial_point_is_refused_only_if_its_cheapest_completion_is(
    known: dict[str, Any], admitted: bool
) -> None:
    past = [{"n": 1, "x": 0.8}, {"n": 2, "x": 0.9}]
    space = {"x": FloatDistribution(0, 1)}
    admission = admission_of({"memory": 1.0}, {"memory": 1e9}, past=past, space=space)
    assert admission.judge(known).admitted is admitted


@pytest.mark.parametrize(
    ("share", "n_refusals", "n_audits"), [(0.0, 100, 0), (0.05, 100, 5), (0.5, 10, 5), (1.0, 7, 7)]
)
def test_audits_are_a_bounded_share(share: float, n_refusals: int, n_audits: int) -> None:
    done = 0
    for refusals in range(1, n_refusals + 1):
        done += is_audit_due(refusals, done, share)
        assert done <= share * refusals + 0.5
    assert done == n_audits


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
    admission = PointAdmission(expected, Limits(wall_time=1.0), [], SPACE, threshold=0.5)
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
