"""An enqueued trial of a SQLite study that Optuna gives to two workers."""

from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
import threading

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import Quota, QuotaSampler, status
from optuna_quota._ledger.protocol import (
    process_start,
    Reservation,
    reservation_object,
    this_worker,
    Worker,
)
from optuna_quota._optuna import storage_of, trial_id_of
from optuna_quota._records import RESERVATION


def objective(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1)


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=4))
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", sampler=sampler)
    study.enqueue_trial({"x": 0.5})
    return study


def give_twice(study: optuna.Study, trial_id: int, patch: pytest.MonkeyPatch) -> None:
    """Make the next pop return a trial that was popped before, as SQLite sometimes does."""
    pop: Callable[[], int | None] = study._pop_waiting_trial_id
    given = [trial_id]
    patch.setattr(study, "_pop_waiting_trial_id", lambda: given.pop() if given else pop())


def another_worker() -> Worker:
    here, pid = this_worker(), os.getppid()
    return Worker(here.host, here.machine, here.space, pid, process_start(pid) or 0.0)


def test_a_row_that_another_worker_has_is_left_to_it(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storage_of(study)
    trial_id = trial_id_of(study.trials[0])
    storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    held = Reservation(trial_id, granted={"n_trials": 1.0}, worker=another_worker(), began=1.0)
    storage.set_trial_system_attr(trial_id, RESERVATION, reservation_object(held))
    before = storage.get_trial(trial_id)
    give_twice(study, trial_id, monkeypatch)
    study.optimize(objective)
    rows = study.trials
    # The other worker's row is unchanged; this one continued with its own, up to the quota.
    assert rows[0] == before
    assert [row.state for row in rows[1:4]] == [TrialState.COMPLETE] * 3
    assert all(row.params["x"] != 0.5 for row in rows[1:4])
    assert status(study).table.loc["n_trials", "used"] == 3
    assert status(study).table.loc["n_trials", "reserved"] == 1


def test_two_threads_that_are_given_one_row_run_two(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = study.ask()
    give_twice(study, trial_id_of(first), monkeypatch)
    asked: list[optuna.Trial] = []
    thread = threading.Thread(target=lambda: asked.append(study.ask()))
    thread.start()
    thread.join()
    (second,) = asked
    assert (first.number, second.number) == (0, 1)
    assert first.suggest_float("x", 0, 1) == 0.5
    assert second.suggest_float("x", 0, 1) != 0.5
    study.tell(first, 0.0)
    study.tell(second, 1.0)
    assert [row.value for row in study.trials] == [0.0, 1.0]
    assert [row.params["x"] == 0.5 for row in study.trials] == [True, False]


def test_the_worker_that_loses_the_race_takes_the_next_waiting_trial(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.enqueue_trial({"x": 0.25})
    study.enqueue_trial({"x": 0.75})
    first = study.ask()
    give_twice(study, trial_id_of(first), monkeypatch)
    others = [study.ask() for _ in range(3)]
    assert [trial.number for trial in others] == [1, 2, 3]
    drawn = [trial.suggest_float("x", 0, 1) for trial in (first, *others)]
    assert drawn[:3] == [0.5, 0.25, 0.75] and drawn[3] not in drawn[:3]


def test_a_retried_trial_is_given_to_one_worker(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = study.ask()
    lost.suggest_float("x", 0, 1)
    study.tell(lost, state=TrialState.FAIL)
    row = study.trials[0]
    assert RESERVATION in row.system_attrs
    # As Optuna's callback does, without what was enqueued: the parameters are in the row.
    copied = {key: value for key, value in row.system_attrs.items() if key != "fixed_params"}
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.WAITING,
            params=row.params,
            distributions=row.distributions,
            user_attrs=row.user_attrs,
            system_attrs=copied,
        )
    )
    first = study.ask()
    give_twice(study, trial_id_of(first), monkeypatch)
    second = study.ask()
    assert (first.number, second.number) == (1, 2)
    assert first.suggest_float("x", 0, 1) == 0.5 != second.suggest_float("x", 0, 1)


def test_an_unclaimed_enqueued_trial_runs(study: optuna.Study) -> None:
    study.enqueue_trial({"x": 0.25})
    study.optimize(objective)
    assert [row.params["x"] for row in study.trials[:2]] == [0.5, 0.25]
    assert len([row for row in study.trials if row.state == TrialState.COMPLETE]) == 4


def test_a_retried_trial_that_copied_a_reservation_runs(study: optuna.Study) -> None:
    first = study.ask()
    copied = storage_of(study).get_trial(trial_id_of(first)).system_attrs
    assert RESERVATION in copied
    study.tell(first, state=TrialState.FAIL)
    study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING, system_attrs=copied))
    again = study.ask()
    assert again.number == 1
    assert again.suggest_float("x", 0, 1) == 0.5
    study.tell(again, 0.0)
