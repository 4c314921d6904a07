"""Trials under samplers, pruners and other libraries."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import _optuna, isolated, Limits, Quota, QuotaPruner, QuotaSampler, TrialCrashed
from optuna_quota._isolation import run
from optuna_quota._records import read_record


@pytest.mark.slow
def test_a_predictive_stop_comes_before_the_limit() -> None:
    def objective(trial: optuna.Trial) -> float:
        pace = trial.suggest_categorical("pace", [0.001, 0.1])
        for step in range(100):
            time.sleep(pace)
            trial.report(0.0, step)
        return 0.0

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time="5s")))
    for pace in (0.001, 0.001, 0.001, 0.1):
        study.enqueue_trial({"pace": pace})
    study.optimize(isolated(objective, predictive_stop=True), n_trials=4)
    slow = study.trials[-1]
    record = read_record(slow)
    assert [t.state for t in study.trials[:3]] == [TrialState.COMPLETE] * 3
    assert slow.state == TrialState.PRUNED
    assert record.breach is not None and record.breach.forecast
    assert record.breach.observed > 5 > (record.usage.wall_time or 0)


@pytest.mark.slow
def test_records_of_trials_under_a_quota_sampler() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        if trial.number == 1:
            os._exit(9)
        if trial.number == 2:
            held = []
            while True:
                held.append(np.ones(2**22))
        return 0.0

    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=20)),
        pruner=QuotaPruner(limits=Limits(memory="300MiB")),
    )
    study.optimize(isolated(objective), n_trials=3, catch=(TrialCrashed,))
    records = [read_record(t) for t in study.trials]
    assert [r.outcome for r in records] == ["completed", "failed", "terminated"]
    assert {r.isolation for r in records} == {"process"}
    assert "exit code 9" in (records[1].reason or "")
    assert max(_optuna.constraints_of(study.trials[2]).values()) > 0


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
def test_pruning_callbacks(library: str) -> None:
    pytest.importorskip(library)
    pytest.importorskip("optuna_integration")
    rng = np.random.default_rng(0)
    x, y = rng.random((200, 4)), rng.random(200)

    def by_lightgbm(trial: optuna.Trial) -> float:
        import lightgbm
        from optuna_integration import LightGBMPruningCallback

        data = lightgbm.Dataset(x, y)
        lightgbm.train(
            {"objective": "l2", "metric": "l2", "verbosity": -1, "num_threads": 1},
            data,
            num_boost_round=5,
            valid_sets=[data],
            callbacks=[LightGBMPruningCallback(trial, "l2", valid_name="training")],
        )
        return 0.0

    def by_xgboost(trial: optuna.Trial) -> float:
        from optuna_integration import XGBoostPruningCallback
        import xgboost

        data = xgboost.DMatrix(x, y)
        xgboost.train(
            {"nthread": 1},
            data,
            num_boost_round=5,
            evals=[(data, "train")],
            verbose_eval=False,
            callbacks=[XGBoostPruningCallback(trial, "train-rmse")],
        )
        return 0.0

    pruner = optuna.pruners.ThresholdPruner(upper=1e-9, n_warmup_steps=2)
    study = optuna.create_study(pruner=pruner)
    study.optimize(isolated({"lightgbm": by_lightgbm, "xgboost": by_xgboost}[library]), n_trials=1)
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert len(trial.intermediate_values) == 3


@pytest.mark.slow
@pytest.mark.integration
def test_torch_runs_out_of_memory_at_the_limit() -> None:
    torch = pytest.importorskip("torch")

    def objective(trial: optuna.Trial) -> float:
        return float(torch.ones(2**31, dtype=torch.float32).sum())

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(memory="2GiB")))
    study.optimize(isolated(objective), n_trials=1)
    record = read_record(study.trials[0])
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "memory"


@pytest.mark.parametrize("name", ["RemoteObjects", "Server"])
def test_too_many_open_files_are_no_error_of_the_objective(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    study = optuna.create_study()
    monkeypatch.setattr(run, name, fail)
    study.optimize(isolated(always_one), n_trials=1)
    monkeypatch.undo()
    study.optimize(isolated(always_one), n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    reason = read_record(study.trials[0]).reason
    assert reason is not None and reason.startswith("The trial's process could not be started: ")
    assert "Too many open files. Allow more open files (`ulimit -n`)" in reason


def always_one(trial: optuna.Trial) -> float:
    return 1.0
