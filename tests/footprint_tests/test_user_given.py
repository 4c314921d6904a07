"""Calibration of a user's footprint on the study's trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from optuna_quota import Footprint, Limits, project, Strategy, Usage
from optuna_quota._footprint.user_given import (
    CalibratedFootprint,
    FootprintCalibrator,
    UserFootprint,
)
from tests.footprint_tests.test_footprint import draw_rows, truth


ROWS = draw_rows(12, seed=3, noise=0.05)
LARGE = {"width": 1024, "depth": 8, "kind": "b"}


def a_third(params: Mapping[str, Any]) -> Usage:
    usage = truth(dict(params))
    return Usage(memory=(usage.memory or 0) / 3, wall_time=(usage.wall_time or 0) / 3)


def nonsense(params: Mapping[str, Any]) -> Usage:
    jump = float(np.exp(8 * np.sin(1e4 * np.log(params["width"]))))
    return Usage(memory=1e9 * jump, wall_time=jump)


def corrected(function: Any) -> CalibratedFootprint:
    return FootprintCalibrator(UserFootprint(function)).calibrate(Footprint.fit(ROWS), ROWS)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [(Limits(memory=4e9), 0), (Limits(memory=4e9 - 1), 1), (Limits(wall_time=20), 1)],
)
def test_a_peak_may_equal_its_limit_and_a_total_that_reaches_it_is_used_up(
    limits: Limits, expected: float
) -> None:
    assert UserFootprint(Usage(memory=4e9, wall_time=20)).probability({}, limits) == expected


def test_a_constant_factor_is_calibrated_everywhere() -> None:
    expected = truth(LARGE)
    found = corrected(a_third).intervals(LARGE)
    for name in ("memory", "wall_time"):
        amount = expected.get(name)
        assert found[name].median == pytest.approx(amount, rel=0.15)
        assert found[name].lower < amount < found[name].upper
        assert found[name].upper < 1.5 * found[name].median
    limits = Limits(memory=(expected.memory or 0) / 2)
    assert UserFootprint(a_third).probability(LARGE, limits) == 0
    assert corrected(a_third).probability(LARGE, limits) > 0.9


def test_a_useless_formula_is_not_used() -> None:
    learned = Footprint.fit(ROWS)
    found = corrected(nonsense)
    for row in draw_rows(10, seed=4):
        assert found.intervals(row.params) == learned.intervals(row.params)


def test_draws_agree_with_the_intervals_and_feed_a_projection() -> None:
    found = corrected(a_third)
    drawn = found.draw([LARGE], 400, 0)
    assert np.median(drawn["wall_time"]) == pytest.approx(truth(LARGE).wall_time, rel=0.2)
    points = [row.params for row in draw_rows(40, seed=6)]
    total = sum(truth(dict(point)).wall_time or 0 for point in points)
    rows = {row.resource: row for row in project(Strategy(40), found, points=points).resources}
    assert rows["trial_time"].median == pytest.approx(total, rel=0.2)


def test_resources_known_to_one_side_are_kept() -> None:
    def with_energy(params: Mapping[str, Any]) -> Usage:
        return Usage(energy=7.0)

    found = corrected(with_energy)
    assert found.intervals(LARGE)["energy"].median == 7.0
    assert found.intervals(LARGE)["memory"] == Footprint.fit(ROWS).intervals(LARGE)["memory"]


def test_a_function_of_a_missing_parameter_raises() -> None:
    with pytest.raises(KeyError):
        corrected(a_third).breaches([{"depth": 2}], Limits(memory=1e9))
