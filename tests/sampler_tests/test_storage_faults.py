"""Storage errors while a trial is settled do not lose its result."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import logging
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
import pytest

from optuna_quota import (
    check,
    isolated,
    LimitBreached,
    Limits,
    Quota,
    QuotaExhausted,
    QuotaPruner,
    QuotaSampler,
    status,
)
from optuna_quota._metering import key_of, metering_loop
from optuna_quota._records import read_record
from optuna_quota.testing import FakeMeter


class Faulty(InMemoryStorage):
    """Fails in one of its methods while ``failing``."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.failing = False

    def _fault(self, method: str) -> None:
        if self.failing and method == self.method:
            raise optuna.exceptions.StorageInternalError("on purpose")

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._fault("set_trial_user_attr")
        super().set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._fault("set_trial_system_attr")
        super().set_trial_system_attr(trial_id, key, value)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        if state.is_finished():
            self._fault("set_trial_state_values")
        return super().set_trial_state_values(trial_id, state, values)

    def get_all_trials(self, *args: Any, **kwargs: Any) -> Any:
        self._fault("get_all_trials")
        return super().get_all_trials(*args, **kwargs)

    def get_study_user_attrs(self, study_id: int) -> Any:
        self._fault("get_study_user_attrs")
        return super().get_study_user_attrs(study_id)


METHODS = [
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_all_trials",
    "get_study_user_attrs",
]


def new_study(storage: Faulty, memory: str = "1TiB") -> optuna.Study:
    sampler = QuotaSampler(
        RandomSampler(seed=0),
        quota=Quota(n_trials=9, cpu_time="1h"),
        limits=Limits(memory=memory),
    )
    return optuna.create_study(storage=storage, sampler=sampler)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_stored(method: str, caplog: pytest.LogCaptureFixture) -> None:
    optuna.logging.enable_propagation()
    storage = Faulty(method)
    # Over its limit, its row gets constraints, which are system attributes.
    study = new_study(storage, "1KiB" if method == "set_trial_system_attr" else "1TiB")

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        storage.failing = True
        return x

    with caplog.at_level(logging.WARNING, logger="optuna.quota"):
        study.optimize(objective, n_trials=1)
    storage.failing = False
    (trial,) = study.trials
    assert trial.state == TrialState.COMPLETE
    assert trial.value == trial.params["x"]
    assert metering_loop().find(key_of(study, trial)) is None
    if method in ("set_trial_user_attr", "set_trial_system_attr"):
        assert "on purpose" in caplog.text


@pytest.mark.parametrize("method", ["set_trial_user_attr", "set_trial_system_attr"])
def test_a_trial_that_cannot_be_admitted_is_not_left_running(method: str) -> None:
    storage = Faulty(method)
    study = new_study(storage)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    storage.failing = True
    if method == "set_trial_system_attr":
        with pytest.raises(optuna.exceptions.StorageInternalError):
            study.optimize(lambda trial: 0.0, n_trials=1)
    else:
        study.optimize(lambda trial: 0.0, n_trials=1)
    assert all(t.state.is_finished() for t in study.trials)


class Refusing(InMemoryStorage):
    """Refuses, while ``armed``, the writes for which ``refuses(n_before, key)`` is true."""

    def __init__(self, refuses: Callable[[int, str], bool]) -> None:
        super().__init__()
        self.refuses = refuses
        self.armed = False
        self.writes = 0

    def _write(self, key: str) -> None:
        if self.armed:
            self.writes += 1
            if self.refuses(self.writes - 1, key):
                raise optuna.exceptions.StorageInternalError(f"{key} is refused on purpose")

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._write(key)
        super().set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._write(key)
        super().set_trial_system_attr(trial_id, key, value)


def end_of_one_trial(storage: Refusing, error: Exception | None) -> optuna.trial.FrozenTrial:
    """Return the row of a trial whose storage refuses from the end of the objective on."""
    study = new_study(storage)

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        storage.armed = True
        if error is not None:
            raise error
        return x

    study.optimize(objective, n_trials=1, catch=ValueError)
    storage.armed = False
    assert (status(study).table["reserved"] == 0).all()
    (row,) = study.trials
    assert row.state.is_finished()
    return row


ENDS = [(None, "completed"), (ValueError("no"), "failed"), (optuna.TrialPruned("no"), "pruned")]


@pytest.mark.parametrize(("error", "outcome"), ENDS)
def test_a_write_that_fails_once_loses_nothing(error: Exception | None, outcome: str) -> None:
    counting = Refusing(lambda count, key: False)
    whole = end_of_one_trial(counting, error)
    assert counting.writes > 5
    for failing in range(counting.writes):
        row = end_of_one_trial(Refusing(lambda count, key, n=failing: count == n), error)  # type: ignore[misc]
        assert row.user_attrs.keys() == whole.user_attrs.keys()
        assert row.system_attrs.keys() == whole.system_attrs.keys()
        record = read_record(row)
        assert record.outcome == outcome
        assert (record.reason is not None) is (error is not None)
        assert row.value == (row.params["x"] if error is None else None)


@pytest.mark.parametrize("key", ["constraints", "quota:memory", "quota:reason", "quota:outcome"])
def test_a_refused_attribute_loses_no_other(key: str, caplog: pytest.LogCaptureFixture) -> None:
    optuna.logging.enable_propagation()
    error = optuna.TrialPruned("no")
    whole = end_of_one_trial(Refusing(lambda count, key: False), error)
    with caplog.at_level(logging.WARNING, logger="optuna.quota"):
        row = end_of_one_trial(Refusing(lambda count, k: k == key), error)
    assert {*whole.user_attrs, *whole.system_attrs} - {*row.user_attrs, *row.system_attrs} == {key}
    (message,) = [each for each in caplog.messages if "could not record" in each]
    assert key in message


@pytest.mark.parametrize("key", ["quota:memory", "quota:outcome"])
def test_a_database_that_refuses_one_attribute_takes_the_others(key: str, tmp_path: Path) -> None:
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'a.db'}")
    with storage.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER refusal BEFORE INSERT ON trial_user_attributes "
            f"WHEN NEW.key = '{key}' BEGIN SELECT RAISE(ABORT, 'on purpose'); END"
        )
    sampler = QuotaSampler(RandomSampler(seed=0), quota=Quota(n_trials=9))
    study = optuna.create_study(storage=storage, sampler=sampler)
    study.tell(study.ask(), state=TrialState.PRUNED)
    (row,) = study.trials
    written = {"quota:memory", "quota:wall_time", "quota:outcome", "quota:reason", "quota:host"}
    assert row.state == TrialState.PRUNED
    assert written - row.user_attrs.keys() == {key}


def test_a_row_is_finished_at_the_second_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = InMemoryStorage()
    study = optuna.create_study(
        storage=storage, sampler=QuotaSampler(RandomSampler(seed=0), quota=Quota(n_trials=1))
    )
    study.tell(study.ask(), 1.0)
    faults = iter([optuna.exceptions.StorageInternalError("on purpose")])
    finish = storage.set_trial_state_values

    def fails_once(*args: Any, **kwargs: Any) -> bool:
        for fault in faults:
            raise fault
        return finish(*args, **kwargs)

    monkeypatch.setattr(storage, "set_trial_state_values", fails_once)
    with pytest.raises(QuotaExhausted):
        study.ask()
    assert study.trials[1].state == TrialState.FAIL
    assert read_record(study.trials[1]).outcome == "rejected"


@pytest.mark.parametrize("failing", range(3))
def test_a_trial_whose_claim_is_refused_has_no_usage(failing: int) -> None:
    storage = Refusing(lambda count, key: count == failing)
    study = new_study(storage)
    study.set_user_attr("known", True)
    storage.armed = True
    with contextlib.suppress(optuna.exceptions.StorageInternalError):
        study.tell(study.ask(), state=TrialState.FAIL)
    storage.armed = False
    began = "quota:wall_time" in study.trials[0].user_attrs
    assert status(study).table.loc["n_trials", "used"] == began
    assert began or status(study).table.loc["cpu_time", "used"] == 0


class Unreadable(InMemoryStorage):
    """No row can be read from the attribute ``end`` on, until the outcome is written."""

    def __init__(self) -> None:
        super().__init__()
        self.refusing = False

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.refusing = (self.refusing or key == "end") and key != "quota:outcome"
        super().set_trial_user_attr(trial_id, key, value)

    def get_trial(self, trial_id: int) -> optuna.trial.FrozenTrial:
        if self.refusing:
            raise optuna.exceptions.StorageInternalError("on purpose")
        return super().get_trial(trial_id)


class Writing(RandomSampler):
    """Writes into the row when a trial ends."""

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        study._storage.set_trial_user_attr(trial._trial_id, "end", True)


def test_an_unreadable_row_is_settled() -> None:
    sampler = QuotaSampler(Writing(seed=0), quota=Quota(n_trials=9))
    study = optuna.create_study(storage=Unreadable(), sampler=sampler)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    (row,) = study.trials
    assert row.state == TrialState.COMPLETE
    assert read_record(row).outcome == "completed"


def test_the_result_of_an_isolated_trial_survives_an_unreadable_row() -> None:
    def objective(trial: Any) -> float:
        trial.set_user_attr("end", True)
        return 1.0

    study = optuna.create_study(storage=Unreadable())
    study.optimize(isolated(objective), n_trials=1)
    (row,) = study.trials
    assert row.value == 1.0
    assert read_record(row).outcome == "completed"


def test_the_storage_of_another_study_fails_no_trial() -> None:
    storage, pruner = Unreadable(), QuotaPruner(limits=Limits(memory="1TiB"))
    old = optuna.create_study(storage=storage, pruner=pruner)
    trial = old.ask()
    assert not trial.should_prune()
    trial.set_user_attr("end", True)
    new = optuna.create_study(pruner=pruner)
    other = new.ask()
    assert not other.should_prune()
    storage.refusing = False
    old.tell(trial, 1.0)
    new.tell(other, 1.0)


@pytest.mark.parametrize(
    ("work", "state", "outcome"),
    [(10.0, TrialState.PRUNED, "terminated"), (1.0, TrialState.PRUNED, "pruned")],
)
def test_the_first_tell_of_the_same_state_decides_the_record(
    work: float, state: TrialState, outcome: str
) -> None:
    storage = Faulty("set_trial_state_values")
    meter = FakeMeter("work", work)
    limits = Limits(custom={"work": 5})
    sampler = QuotaSampler(RandomSampler(), quota=Quota(n_trials=9), limits=limits, meters=[meter])
    study = optuna.create_study(storage=storage, sampler=sampler)
    trial = study.ask()
    watch = metering_loop().find(key_of(study, trial))
    assert watch is not None
    watch.sample()
    with contextlib.suppress(LimitBreached):
        check(trial)
    storage.failing = True
    for _ in range(2):
        with pytest.raises(optuna.exceptions.StorageInternalError):
            study.tell(trial, state=state)
    first = read_record(study.trials[0])
    assert first.outcome == outcome
    storage.failing = False
    study.tell(trial, state=state)
    assert read_record(study.trials[0]) == first
    assert status(study).table.loc["n_trials", "used"] == 1


def test_a_later_tell_of_another_state_decides_the_record() -> None:
    storage = Faulty("set_trial_state_values")
    study = optuna.create_study(storage=storage, sampler=QuotaSampler(quota=Quota(n_trials=9)))
    trial = study.ask()
    storage.failing = True
    with pytest.raises(optuna.exceptions.StorageInternalError):
        study.tell(trial, 1.0)
    storage.failing = False
    study.tell(trial, state=TrialState.FAIL)
    assert read_record(study.trials[0]).outcome == "failed"
