"""What a trial asks for before it runs, and while it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import pytest

from optuna_quota import Limits, Quota
from optuna_quota._ledger.grant import (
    check_gpus_per_trial,
    extension_requests,
    GpuChoice,
    initial_requests,
    left_for_trial,
    refuse_exhausted,
    refuse_late,
    RequestedBy,
    revise_grant,
)
from optuna_quota._ledger.protocol import Claim, ResourceRequest
from optuna_quota._limits import quota_from_amounts
from optuna_quota._metering.host import Gpu


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


@pytest.mark.parametrize(
    ("left", "likely", "starts"),
    [(100, None, True), (100, 90, True), (100, 91, False), (10, None, False), (-1, 1, False)],
)
def test_whether_a_trial_starts(left: float, likely: float | None, starts: bool) -> None:
    refusal = refuse_late(1e9 + left, 1e9, likely, margin=10.0)
    assert (refusal is None) == starts
    if likely == 91 and refusal is not None:
        assert "1 min 40 s are left" in refusal.reason
        assert "1 min 31 s" in refusal.reason


# GPUs.

GPUS = (Gpu("GPU-a", 24.0), Gpu("GPU-b", 16.0))
FOUR = tuple(Gpu(f"GPU-{name}", 24.0) for name in "abcd")


@pytest.mark.parametrize(
    ("claims", "need", "expected"),
    [
        ([], 8.0, {"gpu:GPU-a": ResourceRequest(8, 8)}),
        ([Claim(0, "here", {"gpu:GPU-a": 12})], 8.0, {"gpu:GPU-b": ResourceRequest(8, 8)}),
        ([Claim(0, "here", asked={"gpu:GPU-a": 12})], 8.0, {"gpu:GPU-b": ResourceRequest(8, 8)}),
        ([Claim(0, "there", {"gpu:GPU-a": 12})], 8.0, {"gpu:GPU-a": ResourceRequest(8, 8)}),
        ([], None, {"gpu:GPU-a": ResourceRequest(3, 12)}),
    ],
)
def test_the_gpu_with_the_most_room(
    claims: list[Claim], need: float | None, expected: dict[str, ResourceRequest]
) -> None:
    assert GpuChoice(GPUS, "here", need).request(claims) == expected
    assert GpuChoice((), "here", need).request(claims) == {}


@pytest.mark.parametrize(
    ("held", "in_use", "count", "expected"),
    [
        ({}, {}, 2, {"gpu:GPU-a": 10, "gpu:GPU-b": 10}),
        ({"gpu:GPU-a": 12, "gpu:GPU-b": 20}, {}, 2, {"gpu:GPU-c": 10, "gpu:GPU-d": 10}),
        # Of what is in use, the part that trials were granted is theirs.
        ({"gpu:GPU-a": 12}, {"GPU-a": 9.0}, 4, dict.fromkeys(map("gpu:GPU-{}".format, "abcd"), 5)),
        ({}, {"GPU-a": 20.0, "GPU-b": 3.0}, 2, {"gpu:GPU-c": 10, "gpu:GPU-d": 10}),
        # Room that trials will free is better than what others hold.
        (
            {"gpu:GPU-b": 23, "gpu:GPU-c": 23, "gpu:GPU-d": 23},
            {"GPU-a": 20.0},
            1,
            {"gpu:GPU-b": 20},
        ),
    ],
)
def test_several_gpus_a_trial_and_the_memory_of_others(
    held: dict[str, float], in_use: dict[str, float], count: int, expected: dict[str, float]
) -> None:
    claims = [Claim(0, "here", held)]
    found = GpuChoice(FOUR, "here", 20.0, count, in_use).request(claims)
    assert found == {name: ResourceRequest(each, each) for name, each in expected.items()}


def test_more_gpus_than_there_are_is_an_error() -> None:
    check_gpus_per_trial(FOUR, 4)
    check_gpus_per_trial((), 4)  # without a driver each trial sees what there is
    with pytest.raises(ValueError, match="must be at most the 4 GPUs .* but got 5"):
        check_gpus_per_trial(FOUR, 5)
    instances = [Gpu("MIG-a", 5.0), Gpu("MIG-b", 5.0), FOUR[0]]
    with pytest.raises(ValueError, match="1 GPU .* but got 2; a process can use one MIG"):
        check_gpus_per_trial(instances, 2)


ASKED = {"gpu:GPU-a": ResourceRequest(6, 6), "memory": ResourceRequest(1, 1)}


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ([], None),
        # A lower number has its choice, and so has what was granted.
        ([Claim(1, "here", asked={"gpu:GPU-a": 6})], "gpu:GPU-b"),
        ([Claim(9, "here", {"gpu:GPU-a": 6})], "gpu:GPU-b"),
        # A higher one has not yet seen this claim.
        ([Claim(9, "here", asked={"gpu:GPU-a": 6})], "gpu:GPU-a"),
        ([Claim(9, "here", asked={"gpu:GPU-b": 6})], None),
        ([Claim(1, "there", asked={"gpu:GPU-a": 6})], None),
    ],
)
def test_who_moves_to_another_gpu(claims: list[Claim], expected: str | None) -> None:
    choice = GpuChoice(FOUR, "here", 6.0, 1, {})
    mine = Claim(5, "here", asked={"gpu:GPU-a": 6})
    found = choice.revise(ASKED, 5, [*claims, mine])
    assert found is expected is None or set(found or ()) == {expected, "memory"}
