"""Of several points, the one worth most for its cost is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np
import pytest

from optuna_quota._footprint.resource_model import fit_resource, ResourceData, ResourceModel
from optuna_quota._sampler.ranking import Choice, choose, MAX_FITTED, Medians, Points, Row
from tests.sampler_tests.ranked_studies import cost_of, medians, rows, SPACE


def chosen_of(
    known: Sequence[Row], points: Points, usage: Medians, left: Mapping[str, float]
) -> Choice:
    return choose(known, points, usage, left, lambda data, _: fit_resource(data))


def test_of_points_alike_the_cheaper_is_chosen_and_of_equal_cost_the_better() -> None:
    left = {"cpu_time": 100.0}
    alike = [{"x": 0.7, "dear": 1.0}, {"x": 0.7, "dear": 0.0}]
    assert chosen_of(rows(30), alike, medians, left).chosen == 1
    equal = [{"x": 0.1, "dear": 0.5}, {"x": 0.7, "dear": 0.5}, {"x": 0.95, "dear": 0.5}]
    chosen, reason = chosen_of(rows(30), equal, medians, left)
    assert chosen == 1
    assert reason.startswith("improves by ")
    assert reason.endswith(f" for {cost_of(equal[0]) / 100:.2g} of what is left")


def test_the_largest_share_of_what_is_left_of_any_total_counts() -> None:
    points = [{"x": 0.7, "dear": 0.5}, {"x": 0.7, "dear": 0.5}]

    def two(_: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        return {
            "cpu_time": np.array([1.0, 2.0]),
            "wall_time": np.array([8.0, 2.0]),
            "memory": np.array([1.0, 1e12]),
        }

    assert chosen_of(rows(30), points, two, {"cpu_time": 10.0, "wall_time": 10.0}).chosen == 1
    assert chosen_of(rows(30), points, two, {"cpu_time": 10.0, "wall_time": 1e4}).chosen == 0
    assert chosen_of(rows(30), points, two, {"cpu_time": 10.0}).chosen == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300])
def test_an_extreme_value_does_not_break_the_ranking(value: float) -> None:
    known = [*rows(10), Row({"x": 0.2, "dear": 0.2}, SPACE, value)]
    points = [{"x": 0.7, "dear": 1.0}, {"x": 0.7, "dear": 0.0}]
    assert chosen_of(known, points, medians, {"cpu_time": 1.0}).chosen == 1


def test_used_up_totals_and_free_points_leave_a_choice() -> None:
    points = [{"x": 0.7, "dear": 1.0}, {"x": 0.7, "dear": 0.0}]
    assert chosen_of(rows(10), points, medians, {"cpu_time": 0.0}).chosen == 1

    def none(_: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        return {"cpu_time": np.array([1.0, 0.0])}

    assert chosen_of(rows(10), points, none, {"cpu_time": 1.0}).chosen == 1
    # A user's function may say other resources of these points than of earlier trials.
    assert chosen_of(rows(30), [{"x": 0.1}, {"x": 0.7}], none, {"wall_time": 1.0}).chosen == 1


def test_at_most_a_hundred_trials_are_fitted_the_best_among_them() -> None:
    known = [Row({"x": 0.7, "dear": 0.5}, SPACE, -1.0), *rows(1_000)]
    seen: list[tuple[ResourceData, int]] = []

    def fit(data: ResourceData, n_rows: int) -> ResourceModel:
        seen.append((data, n_rows))
        return fit_resource(data)

    choose(known, [dict.fromkeys(SPACE, 0.5)], medians, {"cpu_time": 1.0}, fit)
    [(data, n_rows)] = seen
    assert (len(data.amounts), n_rows) == (MAX_FITTED, 1_001)
    assert data.amounts[0] == data.amounts.min()
