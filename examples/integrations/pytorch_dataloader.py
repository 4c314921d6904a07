"""PyTorch on the CPU with DataLoader workers inside an isolated trial.

The workers are processes of the trial: what they hold counts, and they end with it.
"""

from __future__ import annotations

import optuna
import torch
from torch.utils.data import DataLoader, TensorDataset

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


def objective(trial: optuna.Trial) -> float:
    """Return the loss of a small regression after two epochs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(2000, 16)
    data = TensorDataset(x, x.square().sum(dim=1, keepdim=True))
    width = trial.suggest_int("width", 8, 512, log=True)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, 1)
    )
    rate = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    loss = torch.tensor(0.0)
    for epoch in range(2):
        for inputs, targets in DataLoader(data, batch_size=200, num_workers=2):
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trial.report(loss.item(), epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return loss.item()


if __name__ == "__main__":
    study = optuna.create_study(
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(cpu_time="5min")),
        pruner=QuotaPruner(limits=Limits(memory="3GiB", wall_time="1min")),
    )
    study.optimize(isolated(objective), n_trials=3)
    print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
