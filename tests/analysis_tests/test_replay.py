"""A replay computes what limits and quotas would have done to a study."""

from __future__ import annotations

import datetime
import math
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial, TrialState
import pytest

from optuna_quota import Limits, Quota, replay, Usage
from tests.analysis_tests.studies import finished, study_of, terminated


SPACE = {"x": FloatDistribution(0.0, 100.0)}
MINUTE = 60.0


def trial(value: float = 1.0, **usage: float) -> optuna.trial.FrozenTrial:
    return finished({"x": 1.0}, Usage(**usage), SPACE, value=value)


def dated(start: float, seconds: float, value: float = 1.0, **attrs: Any) -> Any:
    epoch = datetime.datetime(2026, 1, 1)
    row = create_trial(value=value, user_attrs=attrs)
    row.datetime_start = epoch + datetime.timedelta(seconds=start)
    row.datetime_complete = epoch + datetime.timedelta(seconds=start + seconds)
    return row


def test_a_saving_of_trials_without_a_timeline_is_a_lower_bound() -> None:
    known, unknown = Limits(cpu_time=5), Limits(memory=2e9)
    study = study_of(trial(memory=5e9, wall_time=20.0, cpu_time=10.0))

    assert "when 1 trial reached the limit is unknown" in replay(study, limits=unknown).summary()
    assert "reached the limit" not in replay(study, limits=known).summary()


def test_a_memory_limit_terminates_trials_over_it() -> None:
    study = study_of(
        trial(3.0, memory=1e9, wall_time=10.0),
        trial(1.0, memory=5e9, wall_time=20.0),
        trial(2.0, memory=2e9, wall_time=30.0),
    )

    report = replay(study, limits=Limits(memory="4GB"))

    assert report.terminated == [1] and report.lost == [1] and report.not_run == []
    assert report.best_lives is False
    assert report.best == [1] and report.best_left == [2]
    text = str(report)
    assert "best trial (1, 1) would have been lost" in text
    assert "trial 2 (2)" in text and "1 by memory (limit)" in text


def test_a_peak_may_equal_its_limit_and_a_total_that_reaches_it_is_used_up() -> None:
    study = study_of(trial(memory=4e9, wall_time=20.0), trial(memory=1e9, wall_time=19.0))

    assert replay(study, limits=Limits(memory=4e9)).terminated == []
    assert replay(study, quota=Quota(memory=4e9)).terminated == []
    assert replay(study, limits=Limits(wall_time=20)).terminated == [0]


def test_a_memory_limit_saves_nothing_without_a_timeline() -> None:
    report = replay(study_of(trial(memory=5e9, wall_time=20.0)), limits=Limits(memory="4GB"))

    assert report.saved["trial_time"] == 0.0
    assert "Nothing would have been saved" in report.summary()


def test_a_timeline_gives_the_time_of_the_breach() -> None:
    row = trial(memory=5e9, wall_time=20.0, cpu_time=40.0)
    row.system_attrs = {"quota:timeline": [[0.0, 1e9], [5.0, 4.5e9], [20.0, 5e9]]}

    report = replay(study_of(row), limits=Limits(memory="4GB"))

    assert report.table["seconds"].tolist() == [5.0]
    assert report.saved == {"trial_time": 15.0, "cpu_time": 30.0}


def test_time_limits_terminate_at_the_limit() -> None:
    study = study_of(trial(wall_time=100.0, cpu_time=200.0), trial(wall_time=10.0, cpu_time=10.0))

    by_wall = replay(study, limits=Limits(wall_time=25.0))
    by_cpu = replay(study, limits=Limits(cpu_time=100.0))
    by_both = replay(study, limits=Limits(wall_time=25.0, cpu_time=100.0))

    assert by_wall.table["seconds"].tolist() == [25.0, 10.0]
    assert by_wall.saved == {"trial_time": 75.0, "cpu_time": 150.0}
    assert by_cpu.table["seconds"].tolist() == [50.0, 10.0]
    assert by_both.table["by"].tolist() == ["wall_time", None]


@pytest.mark.parametrize(
    ("quota", "by", "fates", "end"),
    [
        (Quota(n_trials=2), "n_trials", ["kept", "kept", "not run", "not run"], 2.0),
        (
            Quota(wall_time=2.5 * MINUTE),
            "wall_time",
            ["kept", "kept", "terminated", "not run"],
            2.5,
        ),
        (Quota(trial_time="3min"), "trial_time", ["kept", "kept", "kept", "not run"], 3.0),
        (Quota(cpu_time="5min"), "cpu_time", ["kept", "kept", "terminated", "not run"], 2.5),
        (
            Quota(cost=5.0, prices={"cpu_time": 60.0}),
            "cost",
            ["kept", "kept", "terminated", "not run"],
            2.5,
        ),
        (Quota(energy="1kWh"), None, ["kept"] * 4, None),
    ],
)
def test_a_total_quota_ends_the_study(
    quota: Quota, by: str | None, fates: list[str], end: float | None
) -> None:
    study = study_of(*(trial(wall_time=MINUTE, cpu_time=2 * MINUTE, energy=1.0) for _ in range(4)))

    report = replay(study, quota=quota)

    assert report.table["fate"].tolist() == fates
    assert report.ended_by == by
    assert report.ended_at == (None if end is None else pytest.approx(end * MINUTE))


def test_limits_leave_more_of_the_quota_to_other_trials() -> None:
    study = study_of(trial(wall_time=100.0), trial(wall_time=10.0), trial(wall_time=10.0))
    quota = Quota(trial_time=60.0)

    alone, with_limit = (
        replay(study, quota=quota),
        replay(study, quota=quota, limits=Limits(wall_time=30.0)),
    )

    assert alone.table["fate"].tolist() == ["terminated", "not run", "not run"]
    assert with_limit.table["fate"].tolist() == ["terminated", "kept", "kept"]
    assert with_limit.ended_by is None


def test_a_held_quota_terminates_trials_that_exceed_it_alone() -> None:
    study = study_of(trial(memory=5e9, wall_time=1.0), trial(memory=1e9, wall_time=1.0))

    report = replay(study, quota=Quota(memory="4GB"))

    assert report.table["fate"].tolist() == ["terminated", "kept"]
    assert report.table["scope"].tolist() == ["quota", None]


def test_a_trial_over_two_held_quotas_ends_at_the_first_that_it_reaches() -> None:
    row = trial(memory=5e9, gpu_memory=9e9, wall_time=10.0)
    row.system_attrs = {"quota:timeline": [[0.0, 1e9], [4.0, 5e9]]}

    report = replay(study_of(row), quota=Quota(gpu_memory="8GB", memory="4GB"))

    assert report.table["by"].tolist() == ["memory"]
    assert report.table["seconds"].tolist() == [4.0]


def test_clock_time_excludes_pauses_and_counts_parallel_trials_once() -> None:
    study = study_of(dated(0, 60), dated(0, 60), dated(1000, 60), dated(2000, 60))

    report = replay(study, quota=Quota(wall_time=150.0))

    assert report.table["fate"].tolist() == ["kept", "kept", "kept", "terminated"]
    assert report.ended_at == pytest.approx(2030.0)
    assert report.table["seconds"].tolist()[-1] == pytest.approx(30.0)


def test_a_study_run_without_this_library_has_times() -> None:
    study = optuna.create_study()
    study.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=5)

    report = replay(study, limits=Limits(wall_time="1h", memory="1GiB"), quota=Quota(n_trials=3))

    assert report.not_run == [3, 4]
    assert any("No trial has a known memory" in note for note in report.notes)


def test_terminated_and_rejected_trials_of_the_study() -> None:
    refused = {"quota:outcome": "rejected", "quota:reason": "too much"}
    study = study_of(
        terminated({"x": 1.0}, Usage(memory=2e9, wall_time=5.0), "memory", 2e9, SPACE),
        create_trial(state=TrialState.FAIL, user_attrs=refused),
        trial(memory=1e9, wall_time=5.0),
    )

    report = replay(study, limits=Limits(memory="4GB"))

    assert report.table["number"].tolist() == [0, 2], "a rejected trial never ran"
    assert any("terminated already" in note for note in report.notes)
    assert report.lost == []


def test_a_refused_allocation_exceeds_lower_limits_too() -> None:
    study = study_of(
        terminated({"x": 1.0}, Usage(memory=4e7, wall_time=5.0), "memory", 2e9, SPACE),
        trial(memory=1e9, wall_time=5.0),
    )

    assert replay(study, limits=Limits(memory="1.5GB")).terminated == [0]
    assert replay(study, limits=Limits(memory="4GB")).terminated == []


def test_several_objectives_have_a_pareto_front() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    for values, memory in (([1.0, 1.0], 1e9), ([2.0, 3.0], 5e9), ([3.0, 0.0], 1e9)):
        attrs = {"quota:memory": memory, "quota:wall_time": 1.0}
        study.add_trial(create_trial(values=values, user_attrs=attrs))

    report = replay(study, limits=Limits(memory="4GB"))

    assert report.best == [0, 1] and report.best_lives is False
    assert "1 of 2 trials of the Pareto front would have completed." in report.summary()


@pytest.mark.parametrize("n", [0, 1])
def test_small_studies(n: int) -> None:
    study = study_of(*(trial(wall_time=1.0) for _ in range(n)))

    report = replay(study, quota=Quota(trial_time=10.0))

    assert len(report.table) == n
    assert ("nothing to replay" in report.summary()) is (n == 0)
    assert report.best_lives is (True if n else None)


def test_a_study_in_which_all_failed() -> None:
    study = optuna.create_study()
    study.add_trials([create_trial(state=TrialState.FAIL) for _ in range(3)])

    report = replay(study, limits=Limits(wall_time=1.0))

    assert report.best_lives is None and "no best trial" in report.summary()


def test_a_trial_without_duration_uses_its_share_at_once() -> None:
    study = study_of(*(trial(wall_time=0.0, cpu_time=1.0) for _ in range(3)))

    report = replay(study, quota=Quota(cpu_time=1.5))

    assert report.ended_by == "cpu_time"
    assert not math.isnan(report.saved["cpu_time"])


@pytest.mark.parametrize("arguments", [{}, {"limits": Limits()}, {"quota": Quota()}])
def test_a_quota_or_limits_must_be_given(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be given"):
        replay(optuna.create_study(), **arguments)


def test_arguments_must_have_the_right_type() -> None:
    with pytest.raises(TypeError, match="`quota` must be a Quota"):
        replay(optuna.create_study(), quota=Limits(memory="1GB"))  # type: ignore[arg-type]  # point


def test_a_quota_of_trials_counts_trials_of_equal_start() -> None:
    # MySQL keeps whole seconds, so that trials may have the same start.
    rows = [dated(10 * (i // 4), 10, value=float(i)) for i in range(8)]
    report = replay(study_of(*rows), quota=Quota(n_trials=2))
    assert report.not_run == [2, 3, 4, 5, 6, 7]
    assert report.best_lives and report.ended_by == "n_trials"


def test_a_quota_used_up_exactly_is_not_exceeded() -> None:
    study = study_of(*(trial(wall_time=0.1) for _ in range(3)))
    report = replay(study, quota=Quota(wall_time=0.3))
    assert report.ended_by is None
