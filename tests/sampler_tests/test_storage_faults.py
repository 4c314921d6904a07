"""A fault of the storage while a trial is settled never loses its result."""

from __future__ import annotations

import logging
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaSampler
from optuna_quota._metering import key_of
from optuna_quota._metering import metering_loop


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


def new_study(storage: Faulty) -> optuna.Study:
    sampler = QuotaSampler(
        RandomSampler(seed=0),
        quota=Quota(n_trials=9, cpu_time="1h"),
        limits=Limits(memory="1TiB"),
    )
    return optuna.create_study(storage=storage, sampler=sampler)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_stored(method: str, caplog: pytest.LogCaptureFixture) -> None:
    optuna.logging.enable_propagation()
    storage = Faulty(method)
    study = new_study(storage)

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
def test_a_trial_that_can_not_be_admitted_is_not_left_running(method: str) -> None:
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
