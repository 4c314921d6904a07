"""One quota under Dask, which copies the sampler to its workers."""

from __future__ import annotations

import time

import optuna
import pytest

from optuna_quota import Quota, QuotaSampler, status


def objective(trial: optuna.Trial) -> float:
    time.sleep(0.02)
    return trial.suggest_float("x", 0, 1)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_dask_workers_share_a_quota() -> None:
    distributed = pytest.importorskip("distributed")
    dask_storage = pytest.importorskip("optuna_integration.dask").DaskStorage
    with distributed.Client(
        processes=False, n_workers=2, threads_per_worker=2, dashboard_address=None
    ) as client:
        sampler = QuotaSampler(
            optuna.samplers.RandomSampler(), quota=Quota(n_trials=7, trial_time="1h")
        )
        study = optuna.create_study(storage=dask_storage(), sampler=sampler)
        futures = [client.submit(study.optimize, objective, pure=False) for _ in range(4)]
        distributed.wait(futures, timeout=100)
        client.gather(futures)
        states = [trial.state.name for trial in study.trials]
        assert states.count("COMPLETE") == 7
        assert "RUNNING" not in states
        assert status(study).table.loc["n_trials", "used"] == 7
