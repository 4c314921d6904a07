"""Which use is a breach: a table of cases."""

from __future__ import annotations

import pytest

from optuna_quota import Limits
from optuna_quota._metering.breach import AT_LIMIT
from optuna_quota._metering.breach import Ceiling
from optuna_quota._metering.breach import find_breaches
from optuna_quota._metering.breach import find_refused_breach
from optuna_quota._metering.breach import tightest_ceilings


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
def test_what_is_refused_near_a_limit_is_a_breach(
    wanted: float, share: float, is_found: bool
) -> None:
    breach = find_refused_breach("memory", wanted, {"memory": Ceiling(100)}, 2.0, share=share)
    assert (breach is not None) is is_found
    if breach is not None:
        assert breach.observed == pytest.approx(max(101, wanted))
        assert breach.refused
    assert find_refused_breach("memory", wanted, {}, 2.0, share=share) is None
