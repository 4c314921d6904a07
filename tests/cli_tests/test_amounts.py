"""What is typed becomes quotas, limits and footprints, or an error that helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import Usage
from optuna_quota.cli.arguments import read_limits
from optuna_quota.cli.arguments import read_quota
from optuna_quota.cli.arguments import read_usage
from optuna_quota.cli.arguments import UsageError


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda: read_quota(["wall_time=2h", "memory=8GiB"]), Quota(wall_time=7200, memory=2**33)),
        (lambda: read_quota(["wall_time=2h, memory = 8GiB"]), Quota(wall_time=7200, memory=2**33)),
        (lambda: read_quota(["n_trials=100", "cpu_cores=4"]), Quota(n_trials=100, cpu_cores=4)),
        (lambda: read_quota(["energy=2kWh"]), Quota(energy=7.2e6)),
        (
            lambda: read_quota(["cost=10"], ["cpu_time=0.05"]),
            Quota(cost=10, prices={"cpu_time": 0.05}),
        ),
        (lambda: read_quota([]), Quota()),
        (
            lambda: read_limits(["memory=2GiB", "cpu_cores=1.5"]),
            Limits(memory=2**31, cpu_cores=1.5),
        ),
        (lambda: read_usage("memory=2GiB,wall_time=90s"), Usage(memory=2**31, wall_time=90)),
    ],
)
def test_what_is_meant(read: Callable[[], Any], expected: Any) -> None:
    assert read() == expected


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda: read_quota(["memory"]), "NAME=VALUE"),
        (lambda: read_quota(["=8GiB"]), "NAME=VALUE"),
        (lambda: read_quota(["memory="]), "NAME=VALUE"),
        (lambda: read_quota([""]), "NAME=VALUE"),
        (lambda: read_quota(["memory=8"]), "has no unit"),
        (lambda: read_quota(["memory=8GiBs"]), "unknown unit"),
        (lambda: read_quota(["memory=-8GiB"]), "positive"),
        (lambda: read_quota(["wall-time=2h"]), "did you mean wall_time?"),
        (lambda: read_quota(["xyzzy=2h"]), "it knows n_trials"),
        (lambda: read_quota(["memory=1GiB", "memory=2GiB"]), "given twice"),
        (lambda: read_quota(["n_trials=ten"]), "must be a number"),
        (lambda: read_quota(["n_trials=1.5"]), "whole number"),
        (lambda: read_quota(["cpu_cores=nan"]), "finite"),
        (lambda: read_quota(["cost=10"]), "`prices`"),
        (lambda: read_quota([], ["cpu_time=1"]), "`cost`"),
        (lambda: read_quota(["cost=10"], ["memory=1"]), "--price knows no 'memory'"),
        (lambda: read_limits(["n_trials=3"]), "--limit knows no 'n_trials'"),
        (lambda: read_usage("cpu_cores=3"), "--footprint knows no 'cpu_cores'"),
    ],
)
def test_what_cannot_be_meant(read: Callable[[], Any], says: str) -> None:
    with pytest.raises(UsageError, match=None) as caught:
        read()
    assert says in str(caught.value)
    assert "?." not in str(caught.value)


@given(st.lists(st.text(max_size=40), max_size=3), st.lists(st.text(max_size=20), max_size=2))
def test_any_text_is_a_quota_or_a_usage_error(typed: list[str], prices: list[str]) -> None:
    try:
        read_quota(typed, prices)
    except UsageError as error:
        assert str(error)
