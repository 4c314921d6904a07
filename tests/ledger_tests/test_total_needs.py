"""What is left of totals for one trial, what its point needs of them, and when the study ends."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from optuna_quota import Limits, Quota
from optuna_quota._ledger.grant import (
    extension_requests,
    initial_requests,
    left_for_trial,
    refuse_exhausted,
    revise_grant,
)


@pytest.mark.parametrize(
    ("quota", "granted", "free", "left"),
    [
        (Quota(trial_time=10), {"trial_time": 1}, {"trial_time": 2}, {"wall_time": 3}),
        (Quota(cpu_time=10), {"cpu_time": 1}, {"cpu_time": 0}, {"cpu_time": 1}),
        (
            Quota(wall_time=10, trial_time=9),
            {"wall_time": 0, "trial_time": 0},
            {"wall_time": 2, "trial_time": 4},
            {"wall_time": 2},
        ),
        # Half a unit of money at two an hour.
        (
            Quota(cost=9, prices={"gpu_time": 2}),
            {"cost": 0.25},
            {"cost": 0.25},
            {"gpu_time": 900},
        ),
        (Quota(n_trials=9, energy=5), {"n_trials": 1, "energy": 1}, {"energy": 1}, {}),
        (Quota(memory="9B"), {"memory": 1}, {"memory": 1}, {}),
    ],
)
def test_what_is_left(
    quota: Quota,
    granted: Mapping[str, float],
    free: Mapping[str, float],
    left: Mapping[str, float],
) -> None:
    assert left_for_trial(quota, granted, free) == left


def test_a_slice_becomes_what_the_point_needs() -> None:
    quota = Quota(trial_time=10, cpu_time=10)
    granted = {"trial_time": 5.0, "cpu_time": 1.0, "n_trials": 1.0}
    smaller, larger = revise_grant(quota, Limits(), granted, {"wall_time": 2, "cpu_time": 3})
    assert smaller == {"trial_time": 2} and larger == {"cpu_time": 3}
    # A trial ends at its limit.
    limits = Limits(cpu_time=2)
    _, larger = revise_grant(quota, limits, granted, {"wall_time": 5, "cpu_time": 3})
    assert larger == {"cpu_time": 2}
    free = {"cpu_time": 9.0}
    [request] = extension_requests(quota, limits, granted, larger, free, 0, exactly=True).values()
    assert request.least == request.most == 2


def test_what_a_trial_has_used_is_not_released() -> None:
    quota, granted = Quota(trial_time=10, cpu_time=10), {"trial_time": 9.0, "cpu_time": 9.0}
    expected, used = {"wall_time": 1.0, "cpu_time": 1.0}, {"wall_time": 4.0, "cpu_time": 8.0}
    smaller, larger = revise_grant(quota, Limits(), granted, expected, used)
    assert smaller == {"trial_time": 5.0} and larger == {"cpu_time": 10.0}


def test_a_trial_starts_with_the_least_that_any_point_needs() -> None:
    quota = Quota(trial_time=10)
    needs = {"wall_time": 2.0}
    [request] = initial_requests(quota, Limits(), {}, {"trial_time": 3}, 3, needs=needs).values()
    assert request.least == 2


def test_the_study_ends_when_nothing_fits_and_says_what_is_left() -> None:
    quota = Quota(trial_time=10)
    used, needs = {"trial_time": 9.0}, {"wall_time": 1.25}
    assert refuse_exhausted(quota, used, {}) is None
    refusal = refuse_exhausted(quota, used, {}, needs=needs)
    assert refusal is not None and refusal.final
    assert refusal.reason == (
        "The quota of 10 s of trial time has no room for another trial, which takes at least "
        "1.25 s: 9 s used, 1 s left."
    )
