"""Whole studies through ``optimize`` in several processes and threads at once."""

from __future__ import annotations

from pathlib import Path
import time

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import (
    check,
    isolated,
    Limits,
    Quota,
    QuotaExhausted,
    QuotaPruner,
    QuotaSampler,
    status,
)
from tests.ledger_tests.workers import wait_for, working
from tests.storages import Address, storage_at, study_in


def long_now_and_then(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    until = time.monotonic() + (600 if trial.number == 1 else 0.05)
    while time.monotonic() < until:
        time.sleep(0.01)
        check(trial)
    return x


def tune(address: Address, name: str, quota: Quota, n_jobs: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(
        study_name=name,
        storage=address.open(),
        sampler=QuotaSampler(optuna.samplers.RandomSampler(), quota=quota),
        pruner=QuotaPruner(limits=Limits(wall_time=900)),
    )
    study.optimize(long_now_and_then, n_jobs=n_jobs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "journal-file"])
@pytest.mark.parametrize(
    "quota", [Quota(trial_time=4), Quota(cost=4, prices={"trial_time": 3600})], ids=str
)
def test_a_total_ends_a_trial_that_would_run_on_and_then_the_study(
    kind: str, quota: Quota, tmp_path: Path
) -> None:
    with storage_at(kind, tmp_path) as address, study_in(address) as study:
        with working(2, tune, address, study.study_name, quota, 2) as processes:
            wait_for(processes)
        rows = study.trials
        outcomes = [row.user_attrs["quota:outcome"] for row in rows]
        # Running trials ended with the rest of the quota, and none started after that.
        assert rows[1].user_attrs["quota:outcome"] == "terminated"
        assert rows[1].user_attrs["quota:breach"]["quota"] is True
        assert all(row.state.is_finished() for row in rows)
        assert set(outcomes) <= {"completed", "terminated", "rejected"}
        (resource,) = quota.amounts()
        line = next(line for line in status(study).lines if line.resource == resource)
        assert line.reserved == 0 and line.used > 0.9 * 4
        # It was stopped within the stopping latency, not after a trial of 10 minutes; with a large
        # tolerance for a loaded machine.
        assert line.used < 20


def quick(trial: optuna.Trial) -> float:
    time.sleep(0.01)
    return trial.suggest_float("x", 0, 1)


def tune_quickly(address: Address, name: str, quota: Quota) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=quota)
    study = optuna.load_study(study_name=name, storage=address.open(), sampler=sampler)
    study.optimize(quick, n_jobs=2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "enqueued"), [("sqlite", []), ("journal-file", [0.5, 0.25])])
def test_a_count_over_processes_and_threads_is_exact(
    kind: str, enqueued: list[float], tmp_path: Path
) -> None:
    # Optuna gives an enqueued trial of a SQLite study to several workers at times.
    quota = Quota(n_trials=11)
    with storage_at(kind, tmp_path) as address, study_in(address) as study:
        for x in enqueued:
            study.enqueue_trial({"x": x})
        with working(2, tune_quickly, address, study.study_name, quota) as processes:
            wait_for(processes)
        rows = study.trials
        assert sum(row.state == TrialState.COMPLETE for row in rows) == 11
        assert [row.params["x"] for row in rows[: len(enqueued)]] == enqueued
        assert status(study).table.loc["n_trials"].to_dict() == {
            "used": 11,
            "reserved": 0,
            "left": 0,
            "quota": 11,
        }


def study_within(quota: Quota) -> optuna.Study:
    return optuna.create_study(
        sampler=QuotaSampler(optuna.samplers.RandomSampler(), quota=quota),
        pruner=QuotaPruner(limits=Limits(memory="1GiB")),
    )


@pytest.mark.parametrize("isolate", [False, True])
def test_an_objective_may_ask_for_another_trial(isolate: bool) -> None:
    def objective(trial: optuna.Trial) -> float:
        other = trial.study.ask()
        value = other.suggest_float("x", 0, 1)
        trial.study.tell(other, value)
        return value

    study = study_within(Quota(memory="4GiB", wall_time="1h"))
    study.optimize(isolated(objective) if isolate else objective, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 4


def test_an_objective_that_asks_for_what_it_holds_itself_is_refused() -> None:
    def objective(trial: optuna.Trial) -> float:
        with pytest.raises(QuotaExhausted):
            trial.study.ask()
        return 1.0

    study = study_within(Quota(memory="1GiB"))
    study.optimize(objective, n_trials=1)
    assert study.trials[0].value == 1.0


def test_a_callback_may_ask_for_several_trials() -> None:
    def ask_for_two(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        for asked in [study.ask(), study.ask()]:
            study.tell(asked, asked.suggest_float("x", 0, 1))

    study = study_within(Quota(memory="4GiB", wall_time="1h"))
    study.optimize(lambda trial: 1.0, n_trials=2, callbacks=[ask_for_two])
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 6
