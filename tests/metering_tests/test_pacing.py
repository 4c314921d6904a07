"""When to measure next."""

from __future__ import annotations

import math

import pytest

from optuna_quota._metering.timing import next_due
from optuna_quota._metering.timing import sampling_interval


@pytest.mark.parametrize(
    ("headroom", "growth", "expected"),
    [
        (None, 4e9, 0.1),  # no ceiling
        (8e9, 4e9, 0.1),  # in plenty
        (2e8, 4e9, 0.05),
        (2e7, 4e9, 0.005),
        (1e3, 4e9, 0.0005),  # at the ceiling
        (-5e8, 4e9, 0.0005),  # over it
        (2e8, 8e9, 0.025),  # a trial that was seen to grow faster is watched more closely
        (2e8, 0.0, 0.1),
    ],
)
def test_the_wait_is_the_time_that_the_headroom_lasts(
    headroom: float | None, growth: float, expected: float
) -> None:
    assert sampling_interval(headroom, growth, longest=0.1, shortest=0.0005) == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    ("due", "now", "period", "expected"),
    [
        (10.0, 9.0, 0.1, 10.0),  # not due yet
        (10.0, 10.03, 0.1, 10.1),  # late by less than a period: no drift
        (10.0, 10.0, 0.1, 10.1),
        (10.0, 15.04, 0.1, 15.1),  # after a stall the missed ones are left out
        (10.0, 10.0, math.inf, math.inf),
    ],
)
def test_deadlines_stay_on_their_grid(
    due: float, now: float, period: float, expected: float
) -> None:
    assert next_due(due, now, period) == pytest.approx(expected)
    assert next_due(due, now, period) > now or due > now
