"""Ranks that share an isolated trial, with ``TorchDistributedTrial``, on the CPU (gloo).

The objective starts the ranks and hands its trial to rank 0; its limits hold for all of them.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any
import warnings

import optuna
from optuna_integration import TorchDistributedTrial
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from optuna_quota import check, isolated, Limits, QuotaPruner, trial_table


RANKS = 2


def train(rank: int, own_trial: optuna.Trial, folder: str, losses: Any) -> None:
    """Train on one rank."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    # A file, unlike a port, can't be taken by another trial.
    dist.init_process_group("gloo", f"file://{folder}/ranks", world_size=RANKS, rank=rank)
    trial = TorchDistributedTrial(own_trial if rank == 0 else None)
    x = torch.randn(64, 8)
    model = DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=trial.suggest_float("rate", 1e-3, 0.3))
    for step in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), x.sum(dim=1, keepdim=True))
        loss.backward()
        optimizer.step()
        trial.report(loss.item(), step)
        check(trial)
        if trial.should_prune():
            break
    losses[rank] = loss.item()
    dist.barrier()
    # Now and then torch aborts as its threads are taken down, and the trial fails with a rank.
    os._exit(0)


def objective(trial: optuna.Trial) -> float:
    """Return the mean loss of the ranks."""
    losses = torch.zeros(RANKS).share_memory_()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (trial, folder, losses), RANKS)
    if trial.should_prune():
        raise optuna.TrialPruned
    return losses.mean().item()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=QuotaPruner(optuna.pruners.MedianPruner(), limits=Limits(memory="4GiB")),
    )
    study.optimize(isolated(objective), n_trials=2)
    print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
