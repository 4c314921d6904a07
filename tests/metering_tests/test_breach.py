"""What is a breach, and when one waits for more of a quota."""

from __future__ import annotations

import threading

import pytest

from optuna_quota import Limits
from optuna_quota._metering import MeteringLoop
from optuna_quota._metering.breach import (
    AT_LIMIT,
    Ceiling,
    EXTENSION_TIMEOUT,
    find_breaches,
    find_refused_breach,
    QuotaExtension,
    tightest_ceilings,
)
from optuna_quota._usage import Breach


GIB = 2**30


@pytest.mark.parametrize(
    ("amounts", "limits", "left", "elapsed", "expected"),
    [
        ({"memory": 3 * GIB}, {"memory": "2GiB"}, {}, 1.0, ("memory", 2 * GIB, False)),
        ({"memory": 2 * GIB}, {"memory": "2GiB"}, {}, 1.0, None),  # a peak may equal its limit
        ({}, {"memory": "2GiB"}, {}, 1.0, None),  # unknown breaches nothing
        ({}, {"wall_time": "10s"}, {}, 9.99, None),
        ({}, {"wall_time": "10s"}, {}, 10.0, ("wall_time", 10.0, False)),  # used up
        ({"cpu_time": 5.0}, {"cpu_time": 5}, {}, 1.0, ("cpu_time", 5.0, False)),
        ({"cpu_cores": 2.03}, {"cpu_cores": 2}, {}, 1.0, None),  # the rate of two busy threads
        ({"cpu_cores": 2.2}, {"cpu_cores": 2}, {}, 1.0, ("cpu_cores", 2.0, False)),
        ({"cpu_time": 5.0}, {"cpu_time": 9}, {"cpu_time": 4.0}, 1.0, ("cpu_time", 4.0, True)),
        ({"cpu_time": 9.0}, {"cpu_time": 9}, {"cpu_time": 20.0}, 1.0, ("cpu_time", 9.0, False)),
        ({}, {}, {"trial_time": 3.0}, 4.0, ("trial_time", 3.0, True)),
        ({}, {}, {"wall_time": 0.0}, 0.0, ("wall_time", 0.0, True)),
        ({}, {}, {"n_trials": 0}, 1.0, None),  # not a thing that a running trial uses up
        ({"scratch": 11.0}, {"custom": {"scratch": 10}}, {}, 1.0, ("scratch", 10.0, False)),
    ],
)
def test_find_breaches(amounts, limits, left, elapsed, expected) -> None:  # type: ignore[no-untyped-def]
    ceilings = tightest_ceilings(Limits(**limits).amounts(), left)
    amounts = {"wall_time": elapsed, "trial_time": elapsed, **amounts}
    found = find_breaches(amounts, ceilings, elapsed)
    assert [(b.resource, b.limit, b.quota) for b in found] == ([expected] if expected else [])
    for breach in found:
        assert breach.seconds == elapsed
        assert breach.reason


def test_of_several_breaches_the_furthest_over_its_limit_is_first() -> None:
    ceilings = {"memory": Ceiling(100), "cpu_time": Ceiling(1)}
    found = find_breaches({"memory": 110, "cpu_time": 9}, ceilings, 2.0)
    assert [breach.resource for breach in found] == ["cpu_time", "memory"]


@pytest.mark.parametrize(
    ("wanted", "share", "is_found"),
    [(96.0, AT_LIMIT, True), (94.0, AT_LIMIT, False), (0.0, 0.0, True), (120.0, AT_LIMIT, True)],
)
def test_a_refused_allocation_near_a_limit_is_a_breach(
    wanted: float, share: float, is_found: bool
) -> None:
    breach = find_refused_breach("memory", wanted, {"memory": Ceiling(100)}, 2.0, share=share)
    assert (breach is not None) is is_found
    if breach is not None:
        assert breach.observed == pytest.approx(max(101, wanted))
        assert breach.refused
    assert find_refused_breach("memory", wanted, {}, 2.0, share=share) is None


def test_an_amount_over_its_limit_is_the_one_observed() -> None:
    breach = find_refused_breach("cpu_time", 3.2, {"cpu_time": Ceiling(3)}, 4.0, refused=False)
    assert breach is not None and breach.observed == 3.2


OVER = Breach("cpu_time", 10, 10.5, 11, quota=True)
TEN = {"cpu_time": (10.0, True)}
TWENTY = {"cpu_time": (20.0, True)}


def asks(extension: QuotaExtension) -> bool:
    return extension.take_request() is not None


def test_it_requests_once_at_the_threshold() -> None:
    extension = QuotaExtension(lambda: None)
    seen = []
    for used, now in ((7.9, 1.0), (8.0, 2.0), (9.0, 3.0)):
        extension.review([], {"cpu_time": used}, TEN, now)
        seen.append(asks(extension))
    extension.resolve(TEN, TWENTY, 3.0)
    for used, now in ((9.0, 3.0), (16.0, 3.0)):
        extension.review([], {"cpu_time": used}, TWENTY, now)
        seen.append(asks(extension))
    assert seen == [False, True, False, False, True]


def test_a_breach_waits_for_the_answer_but_not_forever() -> None:
    extension = QuotaExtension(lambda: None)
    assert extension.review([OVER], {"cpu_time": 10.5}, TEN, 1.0) == []
    assert extension.review([OVER], {"cpu_time": 10.5}, TEN, 1.1) == []
    assert extension.review([OVER], {"cpu_time": 10.5}, TEN, 1.0 + EXTENSION_TIMEOUT) == [OVER]


def test_only_a_refusal_that_came_after_the_breach_ends_a_trial() -> None:
    extension = QuotaExtension(lambda: None)
    extension.review([], {"cpu_time": 8.5}, TEN, 1.0)
    assert asks(extension)
    extension.resolve(TEN, TEN, 1.0)
    extension.review([], {"cpu_time": 9.0}, TEN, 1.1)
    assert not asks(extension)
    # Others may have released theirs since.
    assert extension.review([OVER], {"cpu_time": 10.5}, TEN, 1.15) == []
    assert asks(extension)
    assert extension.needs == {"cpu_time": 10.5}
    extension.resolve(TEN, TEN, 1.2)
    assert extension.review([OVER], {"cpu_time": 10.5}, TEN, 1.2) == [OVER]


def test_only_requested_resources_are_refused() -> None:
    extension = QuotaExtension(lambda: None)
    before = {**TEN, "memory": (10.0, True)}
    after = {**TWENTY, "memory": (10.0, True)}
    extension.review([], {"cpu_time": 9.0, "memory": 1.0}, before, 1.0)
    assert asks(extension)
    extension.resolve(before, after, 1.0)
    memory = Breach("memory", 10, 11, 1, quota=True)
    assert extension.review([memory], {"cpu_time": 9.0, "memory": 11.0}, after, 1.0) == []
    assert asks(extension)


def test_a_returned_grant_can_be_requested_again() -> None:
    extension = QuotaExtension(lambda: None)
    extension.resolve({"memory": (20.0, True)}, {"memory": (10.0, True)}, 1.0)
    memory = Breach("memory", 10, 11, 1, quota=True)
    amounts = {"memory": 11.0}
    assert extension.review([memory], amounts, {"memory": (10.0, True)}, 1.1) == []
    assert asks(extension)


def test_a_trial_with_a_grant_of_zero_ends_at_once() -> None:
    extension = QuotaExtension(lambda: None)
    extension.resolve({}, {"trial_time": (0.0, True)}, 1.0)
    over = Breach("trial_time", 0, 1, 1, quota=True)
    assert extension.review([over], {}, {"trial_time": (0.0, True)}, 1.0) == [over]


@pytest.mark.parametrize(
    ("breach", "quota"),
    [
        (Breach("cpu_time", 10, 10.5, 11), False),
        (Breach("wall_time", 10, 10.5, 11, quota=True), True),
    ],
)
def test_limits_and_the_studys_wall_time_are_not_extensible(breach: Breach, quota: bool) -> None:
    extension = QuotaExtension(lambda: None)
    ceilings = {breach.resource: (10.0, quota)}
    assert extension.review([breach], {breach.resource: 10.5}, ceilings, 1.0) == [breach]
    assert not asks(extension)


def test_a_breach_that_waits_hides_no_other() -> None:
    extension = QuotaExtension(lambda: None)
    memory = Breach("memory", 10, 11, 1)
    amounts = {"cpu_time": 10.5, "memory": 11}
    ceilings = {**TEN, "memory": (10.0, False)}
    assert extension.review([OVER, memory], amounts, ceilings, 1.0) == [memory]


def test_the_loop_requests_in_time_and_ends_a_refused_trial() -> None:
    loop = MeteringLoop()
    monitor = loop.monitor((1, 1), limits=Limits(wall_time=100), left={"trial_time": 0.1})
    slices = iter([0.2, 0.3, 0.3])
    given = []
    ended = threading.Event()

    def ask() -> None:
        slice_ = next(slices, 0.3)
        given.append((monitor.elapsed, slice_))
        monitor.allow({"trial_time": slice_})

    monitor.on_low_quota(ask)
    monitor.on_breach(lambda breach: ended.set())
    try:
        assert ended.wait(20)
        assert monitor.breach is not None and monitor.breach.quota
        assert monitor.breach.resource == "trial_time" and monitor.breach.limit == 0.3
        assert monitor.breach.observed >= 0.3
        assert [slice_ for _, slice_ in given][:3] == [0.2, 0.3, 0.3]
        assert all(at >= 0.08 for at, _ in given)
    finally:
        monitor.close()
        loop.stop()


def test_cost_is_computed_from_prices_while_a_trial_runs() -> None:
    loop = MeteringLoop()
    monitor = loop.monitor((1, 1), left={"cost": 0.05})
    monitor.prices = {"trial_time": 3600.0}
    ended = threading.Event()
    monitor.on_breach(lambda breach: ended.set())
    try:
        assert ended.wait(20)
        assert monitor.breach is not None and monitor.breach.resource == "cost"
    finally:
        monitor.close()
        loop.stop()
