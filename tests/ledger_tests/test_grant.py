"""What a trial asks for before it runs, and while it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import pytest

from optuna_quota import Limits, Quota
from optuna_quota._ledger.grant import (
    extension_requests,
    initial_requests,
    left_for_trial,
    refuse_exhausted,
    RequestedBy,
    revise_grant,
)
from optuna_quota._ledger.protocol import ResourceRequest
from optuna_quota._limits import quota_from_amounts


GIB = 2.0**30


@pytest.mark.parametrize("resource", ["memory", "gpu_memory", "cpu_cores"])
@pytest.mark.parametrize(
    ("limit", "bound", "n_jobs", "promised"),
    [
        (3.0, None, None, 3.0),
        (3.0, None, 4, 3.0),
        (3.0, 2.0, 4, 2.0),
        (3.0, 5.0, 4, 3.0),
        (None, 2.0, None, 2.0),
        (None, 3.0, 4, 3.0),
        (None, None, 4, 2.0),
        (None, None, None, 8.0),
        (9.0, None, None, 8.0),
    ],
)
def test_held_resources_are_granted_as_a_whole_before_a_trial_starts(
    resource: str,
    limit: float | None,
    bound: float | None,
    n_jobs: int | None,
    promised: float,
) -> None:
    wants = initial_requests(
        quota_from_amounts({resource: 8}, {}),
        Limits.from_amounts({} if limit is None else {resource: limit}),
        {},
        {resource: 1.0},
        3,
        bounds={} if bound is None else {resource: bound},
        n_jobs=n_jobs,
    )
    assert wants == {resource: ResourceRequest(promised, promised)}


@pytest.mark.parametrize(
    ("requested_by", "limit", "want"),
    [
        ("optimize", None, ResourceRequest(8, 8)),
        ("ask", None, ResourceRequest(1, 4)),
        ("ask in a batch", None, ResourceRequest(1, 4)),
        ("optimize", 3, ResourceRequest(3, 3)),
        ("ask", 3, ResourceRequest(3, 3)),
        ("ask in a batch", 3, ResourceRequest(1, 3)),
        ("ask in a batch", 5, ResourceRequest(1, 4)),
        ("ask in a batch", 0.5, ResourceRequest(0.5, 0.5)),
    ],
)
def test_a_trial_from_ask_leaves_some_for_the_next(
    requested_by: RequestedBy, limit: float | None, want: ResourceRequest
) -> None:
    limits = Limits(memory=None if limit is None else f"{limit}B")
    wants = initial_requests(
        Quota(memory="8B"), limits, {}, {"memory": 8.0}, 0, requested_by=requested_by
    )
    assert wants == {"memory": want}


def test_a_footprint_that_was_stated_is_asked_for_as_it_is() -> None:
    stated = {"memory": 9.0}
    for requested_by in get_args(RequestedBy):
        wants = initial_requests(
            Quota(memory="8B"), Limits(), stated, {}, 0, n_jobs=4, requested_by=requested_by
        )
        assert wants == {"memory": ResourceRequest(9, 9)}


def test_a_trial_that_outgrew_its_promise_asks_for_no_less_than_it_holds() -> None:
    granted, needs = {"memory": 2 * GIB}, {"memory": 2.5 * GIB}
    quota = Quota(memory="8GiB")
    (want,) = extension_requests(
        quota, Limits(), granted, needs, {"memory": 0.1 * GIB}, 3
    ).values()
    assert want == ResourceRequest(2.5 * GIB, 2.5 * GIB)
    (want,) = extension_requests(quota, Limits(), granted, needs, {"memory": 6 * GIB}, 0).values()
    assert want == ResourceRequest(2.5 * GIB, 5 * GIB)
    (want,) = extension_requests(
        quota, Limits(memory="2.25GiB"), granted, needs, {"memory": 6 * GIB}, 0
    ).values()
    assert want == ResourceRequest(2.25 * GIB, 2.25 * GIB)


@pytest.mark.parametrize(
    ("bound", "used", "smaller", "larger"),
    [
        (2.0, 0.0, {"memory": 2.0}, {}),
        (3.9, 0.0, {}, {}),
        (2.0, 3.5, {"memory": 3.5 / 0.9}, {}),
        (5.0, 0.0, {}, {"memory": 5.0}),
        (9.0, 0.0, {}, {"memory": 6.0}),
    ],
)
def test_a_promise_follows_the_point_once_it_is_known(
    bound: float, used: float, smaller: dict[str, float], larger: dict[str, float]
) -> None:
    granted = {"memory": 4.5 if smaller else 4.0}
    found = revise_grant(
        Quota(memory="8B"), Limits(memory="6B"), granted, {"memory": bound}, {"memory": used}
    )
    assert found == (smaller, larger)


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
def test_what_is_left_of_a_quota_for_a_trial(
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


def test_used_amounts_are_not_released() -> None:
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
