"""Trials that no ledger admitted: they ran before there was a quota, or were added."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path
import time

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, status
from optuna_quota._ledger.totals import describe_unadmitted


SPACE = {"x": FloatDistribution(0, 1)}


def added(state: TrialState, **arguments: object) -> optuna.trial.FrozenTrial:
    value = 0.5 if state == TrialState.COMPLETE else None
    return optuna.create_trial(
        state=state,
        value=value,
        params={"x": 0.5},
        distributions=SPACE,
        **arguments,  # type: ignore[arg-type]
    )


def study_of(quota: Quota, limits: Limits) -> optuna.Study:
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=quota)
    return optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=limits))


def x_of(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1)


def test_a_preempted_row_runs_again_and_counts_no_trial() -> None:
    study = study_of(Quota(n_trials=10), Limits())
    start = datetime.datetime.now() - datetime.timedelta(seconds=5)
    preempted = added(TrialState.FAIL, user_attrs={"quota:outcome": "preempted"})
    preempted.datetime_start = start
    study.add_trials([preempted])
    used = status(study, quota=Quota(n_trials=10)).table["used"]
    assert used["n_trials"] == 0
    assert used["trial_time"] == pytest.approx(5, abs=1)


@pytest.mark.parametrize(
    "quota",
    [
        Quota(n_trials=10),
        Quota(cpu_time=60),
        Quota(trial_time=60),
        Quota(cost=1, prices={"cpu_time": 3600 / 60}),
        Quota(energy=60),
    ],
    ids=lambda quota: next(iter(quota.amounts())),
)
@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
def test_rows_that_were_added_are_charged_nothing_that_they_do_not_show(
    quota: Quota, state: TrialState
) -> None:
    study = study_of(quota, Limits(cpu_time=5, wall_time=5))
    study.add_trials([added(state)] * 50)
    study.optimize(x_of, n_trials=5)
    assert [t.state.name for t in study.trials[50:]] == ["COMPLETE"] * 5
    assert status(study).table.loc["n_trials", "used"] == 5


def test_rows_that_still_run_or_wait_are_charged_nothing_either() -> None:
    study = study_of(Quota(n_trials=4), Limits(cpu_time=5))
    study.add_trials([added(TrialState.RUNNING)] * 9)
    study.add_trial(added(TrialState.WAITING))
    study.optimize(x_of, n_trials=4)
    assert [t.number for t in study.trials if t.state == TrialState.COMPLETE] == [9, 10, 11, 12]


@pytest.mark.parametrize("same_ids", [True, False])
def test_rows_of_another_study_with_a_quota_are_charged_what_they_used(same_ids: bool) -> None:
    source = study_of(Quota(n_trials=50), Limits(cpu_time=5))
    source.optimize(x_of, n_trials=3)
    study = study_of(Quota(n_trials=4, trial_time=100), Limits(cpu_time=5))
    if not same_ids:
        study.add_trial(added(TrialState.COMPLETE))
    study.add_trials(source.trials)
    study.optimize(x_of, n_trials=4)
    assert [t.state.name for t in study.trials[-4:]] == ["COMPLETE"] * 4
    shown = sum(t.user_attrs.get("quota:wall_time", 0.0) for t in study.trials)
    found = status(study).table.loc["trial_time", "used"]
    assert found == pytest.approx(shown)


@pytest.mark.slow
def test_a_study_that_was_copied_as_a_whole_goes_on_where_it_was(tmp_path: Path) -> None:
    source = study_of(Quota(n_trials=5), Limits(cpu_time=5))
    source.optimize(x_of, n_trials=3)
    url = f"sqlite:///{tmp_path}/copy.db"
    other = optuna.create_study(storage=url)
    other.add_trial(added(TrialState.COMPLETE))
    optuna.copy_study(
        from_study_name=source.study_name, from_storage=source._storage, to_storage=url
    )
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=5))
    study = optuna.load_study(study_name=source.study_name, storage=url, sampler=sampler)
    study.optimize(x_of)
    assert len([t for t in study.trials if t.state == TrialState.COMPLETE]) == 5


def test_usage_that_was_reported_with_a_row_is_charged() -> None:
    study = study_of(Quota(cpu_time=10), Limits())
    study.add_trials([added(TrialState.COMPLETE, user_attrs={"quota:cpu_time": 4.0})] * 2)
    study.optimize(x_of, n_trials=1)
    assert status(study).table.loc["cpu_time", "used"] == pytest.approx(8, abs=0.5)


def test_trials_from_before_the_quota_count_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def objective(trial: optuna.Trial) -> float:
        time.sleep(0.05)
        return trial.suggest_float("x", 0, 1)

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler())
    study.optimize(objective, n_trials=3)
    study.add_trial(added(TrialState.COMPLETE))
    study.sampler = QuotaSampler(
        optuna.samplers.RandomSampler(), quota=Quota(n_trials=5, cpu_time=60)
    )
    study.pruner = QuotaPruner(limits=Limits(cpu_time=30))
    caplog.set_level(logging.INFO, logger="optuna.quota")
    study.optimize(objective, n_trials=10)
    assert len(study.trials) == 6
    logged = [r.message for r in caplog.records if "from before it was set" in r.message]
    assert len(logged) == 1 and "(3 ran, 1 was added)" in logged[0]
    assert "ms of trial time." in logged[0]
    assert "s of wall time" in logged[0]
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("optuna.quota")]
    first, second, *_ = dict.fromkeys(ours)
    assert first == logged[0]
    assert second.startswith("Resumed: 3 earlier trials have used 3 of 5 (trials), ")
    used = status(study).table["used"]
    assert used["n_trials"] == 5
    assert used["trial_time"] >= 0.25 and used["cpu_time"] < 5


@pytest.mark.parametrize(
    ("earlier", "text"),
    [
        ({}, None),
        (
            {"n_trials": 3, "trial_time": 1e308, "cpu_time": float("inf")},
            "The quota includes trials from before it was set (3 ran, 0 were added): 1e+308 s of "
            "trial time, inf s of CPU time.",
        ),
        (
            {"added": 50},
            "The quota includes trials from before it was set (0 ran, 50 were added): no recorded "
            "usage.",
        ),
    ],
)
def test_the_log_line_on_earlier_trials(earlier: dict[str, float], text: str | None) -> None:
    assert describe_unadmitted(earlier) == text
