"""Parsing of quotas, limits and footprints."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import given, strategies as st
import pytest

from optuna_quota import Limits, Quota, Usage
from optuna_quota.cli.arguments import parse_footprint, parse_limits, parse_quota, UsageError


def quota(texts: Sequence[str], prices: Sequence[str] = ()) -> Quota:
    return parse_quota(Namespace(quota=texts, price=prices))


def limits(*texts: str) -> Limits:
    return parse_limits(Namespace(limit=texts))


@pytest.mark.parametrize(
    ("parse", "expected"),
    [
        (lambda: quota(["wall_time=2h", "memory=8GiB"]), Quota(wall_time=7200, memory=2**33)),
        (lambda: quota(["wall_time=2h, memory = 8GiB"]), Quota(wall_time=7200, memory=2**33)),
        (lambda: quota(["n_trials=100", "cpu_cores=4"]), Quota(n_trials=100, cpu_cores=4)),
        (lambda: quota(["energy=2kWh"]), Quota(energy=7.2e6)),
        (
            lambda: quota(["cost=10"], ["cpu_time=0.05"]),
            Quota(cost=10, prices={"cpu_time": 0.05}),
        ),
        (lambda: quota(["memory=4G", "wall_time=01:30:00"]), Quota(memory=4e9, wall_time=5400)),
        (
            lambda: limits("wall_time=2 hours", "cpu_time=1h30m"),
            Limits(wall_time=7200, cpu_time=5400),
        ),
        (lambda: quota([]), Quota()),
        (
            lambda: limits("memory=2GiB", "cpu_cores=1.5"),
            Limits(memory=2**31, cpu_cores=1.5),
        ),
        (lambda: parse_footprint("memory=2GiB,wall_time=90s"), Usage(memory=2**31, wall_time=90)),
    ],
)
def test_valid_arguments(parse: Callable[[], Any], expected: Any) -> None:
    assert parse() == expected


@pytest.mark.parametrize(
    ("parse", "message"),
    [
        (lambda: quota(["memory"]), "NAME=VALUE"),
        (lambda: quota(["=8GiB"]), "NAME=VALUE"),
        (lambda: quota(["memory="]), "NAME=VALUE"),
        (lambda: quota([""]), "NAME=VALUE"),
        (lambda: quota(["memory=8"]), "has no unit"),
        (lambda: quota(["memory=8GiBs"]), "unknown unit"),
        (lambda: quota(["memory=-8GiB"]), "positive"),
        (lambda: quota(["wall-time=2h"]), "did you mean wall_time?"),
        (lambda: quota(["xyzzy=2h"]), "valid names are n_trials"),
        (lambda: quota(["memory=1GiB", "memory=2GiB"]), "given twice"),
        (lambda: quota(["n_trials=ten"]), "must be a number"),
        (lambda: quota(["n_trials=1.5"]), "whole number"),
        (lambda: quota(["cpu_cores=nan"]), "finite"),
        (lambda: quota(["cost=10"]), "`prices`"),
        (lambda: quota([], ["cpu_time=1"]), "`cost`"),
        (lambda: quota(["cost=10"], ["memory=1"]), "--price: unknown name 'memory'"),
        (lambda: limits("n_trials=3"), "--limit: unknown name 'n_trials'"),
        (lambda: parse_footprint("cpu_cores=3"), "--footprint: unknown name 'cpu_cores'"),
    ],
)
def test_invalid_arguments(parse: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse()
    assert message in str(caught.value)
    assert "?." not in str(caught.value)


@given(st.lists(st.text(max_size=40), max_size=3), st.lists(st.text(max_size=20), max_size=2))
def test_any_text_is_a_quota_or_a_usage_error(texts: list[str], prices: list[str]) -> None:
    try:
        quota(texts, prices)
    except UsageError as error:
        assert str(error)
