"""DataLoader workers are processes of the trial: they count, and they end with it."""

from __future__ import annotations

import time

import optuna
import psutil
import pytest

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

MIB = 2**20
HELD: list[object] = []


def hold(_: int) -> None:
    """Hold memory in a worker."""
    import numpy as np

    HELD.append(np.ones(200 * MIB // 8))


def objective(trial: optuna.Trial) -> float:
    """Load data with as many workers as asked for."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    workers = trial.suggest_int("workers", 0, 2)
    data = TensorDataset(torch.ones(64, 1))
    loader = DataLoader(
        data, batch_size=8, num_workers=workers, worker_init_fn=hold if workers else None
    )
    batches = iter(loader)
    # Workers take turns: with a batch of each, all of them hold their memory. They go on doing so
    # for longer than the longest time between two looks of the meter.
    first = [next(batches)[0] for _ in range(max(1, workers))]
    time.sleep(1.0)
    return float(sum(batch.sum() for batch in first) + sum(batch.sum() for (batch,) in batches))


def test_workers_count_and_end_with_the_trial() -> None:
    pytest.importorskip("torch")
    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=3)),
        pruner=QuotaPruner(limits=Limits(memory="1GiB", wall_time="2min")),
    )
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    for workers in (0, 1, 2):
        study.enqueue_trial({"workers": workers})
    study.optimize(isolated(objective), n_trials=3)
    table = trial_table(study)
    assert list(table["outcome"]) == ["completed"] * 3
    alone, one, two = table["memory"]
    assert one - alone > 150 * MIB
    assert two - alone > 330 * MIB
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert not [p for p in left if "pt_data" in p.name()]


def test_a_trial_whose_workers_grow_together_is_terminated() -> None:
    pytest.importorskip("torch")
    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=1)),
        pruner=QuotaPruner(limits=Limits(memory="480MiB", wall_time="2min")),
    )
    study.enqueue_trial({"workers": 2})
    study.optimize(isolated(objective, grace_period=1.0), n_trials=1)
    (trial,) = study.trials
    assert trial.user_attrs["quota:outcome"] == "terminated"
    assert trial.user_attrs["quota:breach"]["resource"] == "memory"
