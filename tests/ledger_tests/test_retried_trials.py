"""Trials of dead workers are tried again where the user asked Optuna for it."""

from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path
import subprocess
import threading
from typing import Any
import warnings

import optuna
from optuna.storages import RDBStorage, RetryFailedTrialCallback
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits, Quota, QuotaSampler
from optuna_quota._ledger.ledger import Ledger
from optuna_quota._ledger.protocol import Reservation, reservation_object, this_worker, Worker
from optuna_quota._optuna import storage_of, trial_id_of
from optuna_quota._records import RESERVATION
from tests.storages import missing, storage_at


DATABASES = ("sqlite", "postgresql", "mysql")


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    reason = missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    with storage_at(request.param, tmp_path) as address:
        yield address.place


def open_storage(url: str, callback: Any, **arguments: Any) -> RDBStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RDBStorage(url, failed_trial_callback=callback, **arguments)


def retry(**arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RetryFailedTrialCallback(**arguments)


def dead_worker() -> Worker:
    here = this_worker()
    gone = subprocess.Popen(["true"])
    gone.wait()
    return Worker(here.host, here.machine, here.space, gone.pid, 1.0)


def leave_behind(study: optuna.Study, x: float = 0.5) -> int:
    """Leave the row of a worker that died in the middle of a trial."""
    study.sampler = optuna.samplers.RandomSampler()
    study.enqueue_trial({"x": x})
    with warnings.catch_warnings():
        # Heartbeats are meant for `optimize`.
        warnings.simplefilter("ignore")
        trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial_id = trial_id_of(trial)
    held = Reservation(trial_id, {"n_trials": 1.0}, worker=dead_worker(), began=1.0, beat=1.0)
    storage_of(study).set_trial_system_attr(trial_id, RESERVATION, reservation_object(held))
    return trial.number


def objective(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1)


def study_on(url: str, storage: RDBStorage) -> optuna.Study:
    name = f"retry-{os.getpid()}-{threading.get_ident()}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.delete_study(study_name=name, storage=url) if name in names_in(url) else None
    return optuna.create_study(study_name=name, storage=storage)


def names_in(url: str) -> list[str]:
    return optuna.get_all_study_names(url)


@pytest.mark.slow
def test_the_trial_of_a_dead_worker_runs_again_with_the_same_parameters(url: str) -> None:
    storage = open_storage(url, retry(max_retry=1), heartbeat_interval=60)
    study = study_on(url, storage)
    dead = leave_behind(study, 0.25)
    study.sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=4))
    study.optimize(objective)
    rows = study.trials
    assert rows[dead].state == TrialState.FAIL
    again = [row for row in rows if row.system_attrs.get("failed_trial") == dead]
    assert len(again) == 1
    assert again[0].state == TrialState.COMPLETE and again[0].params == {"x": 0.25}
    assert again[0].user_attrs["quota:outcome"] == "completed"
    assert len([row for row in rows if row.state == TrialState.COMPLETE]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("heartbeat", [None, 60])
def test_it_is_called_as_optuna_would_call_it(tmp_path: Path, heartbeat: int | None) -> None:
    called = []

    def callback(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        called.append((study.study_name, trial.number, trial.state, trial.params))

    url = f"sqlite:///{tmp_path}/study.db"
    storage = open_storage(url, callback, heartbeat_interval=heartbeat)
    study = optuna.create_study(study_name="s", storage=storage)
    leave_behind(study)
    study.sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=4))
    study.optimize(objective, n_trials=2)
    expected = [] if heartbeat is None else [("s", 0, TrialState.FAIL, {"x": 0.5})]
    assert called == expected


@pytest.mark.slow
def test_a_callback_that_fails_ends_no_study(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def callback(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        raise OSError("no mail today")

    url = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=open_storage(url, callback, heartbeat_interval=60))
    leave_behind(study)
    study.sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=4))
    study.optimize(objective, n_trials=2)
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert "no mail today" in caplog.text


@pytest.mark.slow
def test_of_several_workers_one_calls(url: str) -> None:
    called: list[int] = []
    failures: list[BaseException] = []

    def callback(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        called.append(trial.number)

    first = study_on(url, open_storage(url, callback, heartbeat_interval=60))
    dead = [leave_behind(first) for _ in range(8)]
    together = threading.Barrier(4)

    def work() -> None:
        try:
            storage = open_storage(url, callback, heartbeat_interval=60)
            study = optuna.load_study(study_name=first.study_name, storage=storage)
            ledger = Ledger(study, Quota(n_trials=50))
            row = storage.get_trial(
                storage.create_new_trial(storage.get_study_id_from_name(first.study_name))
            )
            together.wait(30)
            ledger.reserve(row, limits=Limits(), footprint={})
        except BaseException as failure:  # noqa: BLE001 - told in the main thread
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(called) == dead
    assert all(first.trials[number].state == TrialState.FAIL for number in dead)
