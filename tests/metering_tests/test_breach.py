"""Which use is a breach: a table of cases."""

from __future__ import annotations

import pytest

from optuna_quota import Limits
from optuna_quota._metering import find_breach


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
def test_find_breach(amounts, limits, left, elapsed, expected) -> None:  # type: ignore[no-untyped-def]
    breach = find_breach(amounts, Limits(**limits), left, elapsed)
    found = None if breach is None else (breach.resource, breach.limit, breach.quota)
    assert found == expected
    if breach is not None:
        assert breach.seconds == elapsed
        assert breach.reason


def test_of_several_breaches_the_worst_is_told() -> None:
    limits = Limits(memory=100, cpu_time=1)
    breach = find_breach({"memory": 110, "cpu_time": 9}, limits, {}, 2.0)
    assert breach is not None
    assert breach.resource == "cpu_time"
