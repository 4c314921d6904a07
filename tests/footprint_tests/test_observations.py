"""Reading trials as observations, and selecting some of many."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import create_trial, FrozenTrial, TrialState
import pytest

from optuna_quota._footprint.observations import (
    MAX_OBSERVATIONS,
    Observation,
    read_observation,
    select_observations,
)
from optuna_quota._usage import Usage
from tests.footprint_tests.test_footprint import draw_rows


def plain_trial(seconds: float, state: TrialState = TrialState.COMPLETE) -> FrozenTrial:
    trial = optuna.create_trial(
        params={"x": 0.5},
        distributions={"x": FloatDistribution(0, 1)},
        value=None if state == TrialState.FAIL else 1.0,
        state=state,
    )
    assert trial.datetime_start is not None
    trial.datetime_complete = trial.datetime_start + timedelta(seconds=seconds)
    return trial


def test_a_trial_of_plain_optuna_has_its_wall_time() -> None:
    row = read_observation(plain_trial(12.5))
    assert row is not None
    assert row.usage.amounts() == {"wall_time": 12.5}
    assert not row.censored


def test_the_time_of_a_pruned_trial_of_plain_optuna_is_partial() -> None:
    row = read_observation(plain_trial(3.0, TrialState.PRUNED))
    assert row is not None
    assert row.partial == {"wall_time"} and not row.censored


@pytest.mark.parametrize(
    "trial", [plain_trial(0.0), plain_trial(5.0, TrialState.FAIL)], ids=["by hand", "failed"]
)
def test_a_row_made_by_hand_and_a_failed_one_are_no_observations(trial: FrozenTrial) -> None:
    assert read_observation(trial) is None


def row_of(state: TrialState, attrs: dict[str, Any]) -> Observation | None:
    usage = {"quota:memory": 1e9, "quota:wall_time": 5.0, "quota:cpu_time": 4.0}
    trial = create_trial(
        state=state,
        params={"x": 1},
        distributions={"x": IntDistribution(0, 3)},
        value=1.0 if state == TrialState.COMPLETE else None,
        user_attrs={**usage, **attrs},
    )
    return read_observation(trial)


def breach(resource: str, limit: float, **more: Any) -> dict[str, Any]:
    found = {"resource": resource, "limit": limit, "observed": limit, "seconds": 5.0, **more}
    return {"quota:outcome": "terminated", "quota:breach": found}


TIMES = frozenset({"wall_time", "cpu_time"})


@pytest.mark.parametrize(
    ("state", "attrs", "censored", "partial"),
    [
        (TrialState.COMPLETE, {}, frozenset(), frozenset()),
        (TrialState.PRUNED, {"quota:outcome": "pruned"}, frozenset(), TIMES),
        (TrialState.PRUNED, breach("memory", 9e8), {"memory"}, TIMES),
        (TrialState.PRUNED, breach("wall_time", 5.0), TIMES, frozenset()),
        (TrialState.FAIL, {"quota:outcome": "failed"}, frozenset(), TIMES | {"memory"}),
    ],
)
def test_usage_of_a_stopped_trial_is_a_lower_bound_or_partial(
    state: TrialState, attrs: dict[str, Any], censored: frozenset[str], partial: frozenset[str]
) -> None:
    row = row_of(state, attrs)
    assert row is not None
    assert (row.censored, row.partial) == (censored, partial)


def test_a_predicted_breach_counts_as_the_limit() -> None:
    row = row_of(TrialState.PRUNED, breach("memory", 3e9, forecast=True))
    assert row is not None
    assert row.usage.memory == 3e9
    assert row.usage.wall_time == 5.0


@pytest.mark.parametrize(
    ("state", "attrs"),
    [
        (TrialState.RUNNING, {}),
        (TrialState.PRUNED, {"quota:outcome": "rejected"}),
        (
            TrialState.COMPLETE,
            {"quota:memory": None, "quota:wall_time": "x", "quota:cpu_time": -1},
        ),
    ],
)
def test_rows_without_usage_are_no_observations(state: TrialState, attrs: dict[str, Any]) -> None:
    assert row_of(state, attrs) is None


def test_a_lower_bound_below_the_projection_is_no_surprise() -> None:
    attrs = breach("memory", 9e8)
    footprint = {"quota:footprint": {"memory": {"lower": 2e9, "median": 3e9, "upper": 4e9}}}
    stopped = row_of(TrialState.PRUNED, {**attrs, **footprint})
    done = row_of(TrialState.COMPLETE, {"quota:outcome": "completed", **footprint})
    assert stopped is not None
    assert done is not None
    assert not stopped.is_surprise
    assert done.is_surprise


@pytest.mark.parametrize("cap", [10, 40, 100])
def test_the_newest_and_the_extremes_of_many_are_selected(cap: int) -> None:
    rows = draw_rows(500)
    numbers = {id(row): number for number, row in enumerate(rows)}
    kept = [numbers[id(row)] for row in select_observations(rows, cap)]
    assert len(kept) <= cap
    assert kept == sorted(set(kept))
    assert set(range(500 - cap // 2 if cap < 80 else 460, 500)) <= set(kept)
    older = rows[: 500 - min(cap // 2, 40)]
    largest = max(range(len(older)), key=lambda i: older[i].usage.memory or 0)
    least = min(range(len(older)), key=lambda i: older[i].usage.memory or 0)
    assert {largest, least} <= set(kept)
    assert select_observations(rows[:7], cap) == rows[:7]


@pytest.mark.parametrize("count", [101, 120, 500])
def test_as_many_are_selected_as_may_be_though_resources_rank_them_alike(count: int) -> None:
    rows = [
        replace(row, usage=Usage(memory=i, cpu_time=2 * i, wall_time=3 * i))
        for i, row in enumerate(draw_rows(count), start=1)
    ]
    assert len(select_observations(rows)) == MAX_OBSERVATIONS
