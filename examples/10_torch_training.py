"""The memory of a training with torch, known before the first trial.

A network is trained in isolated trials whose memory is limited. One training step with fake
tensors says what each point would hold, so that a point that does not fit is replaced before it
runs, from the first trial on.

Run it with ``python examples/10_torch_training.py``; it prints what is expected of one point, by
parts, and what each trial held beside what was expected of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import IntDistribution

from optuna_quota import (
    footprints,
    isolated,
    Limits,
    Quota,
    QuotaPruner,
    QuotaSampler,
    Strategy,
    trial_table,
)


SPACE = {
    "width": IntDistribution(128, 6000, log=True),
    "batch": IntDistribution(32, 2048, log=True),
}


def build(params: Mapping[str, Any]) -> Any:
    """Return the network of a point."""
    from torch import nn

    width = params["width"]
    return nn.Sequential(
        nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )


def batch(params: Mapping[str, Any]) -> Any:
    """Return inputs and targets."""
    import torch

    x = torch.randn(params["batch"], 256)
    return x, x.sum(dim=1, keepdim=True)


def objective(trial: optuna.Trial) -> float:
    """Return the loss after some steps."""
    import torch

    params = {
        name: trial.suggest_int(name, each.low, each.high, log=each.log)
        for name, each in SPACE.items()
    }
    model = build(params)
    optimizer = torch.optim.Adam(model.parameters())
    loss = torch.tensor(0.0)
    for _ in range(5):
        optimizer.zero_grad()
        inputs, targets = batch(params)
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    """Run the study."""
    try:
        import torch
    except ModuleNotFoundError:
        print("This example needs PyTorch.")
        return
    footprint = footprints.torch_training(build, batch, torch.optim.Adam)
    print("A point:", footprint.memory({"width": 4000, "batch": 512}))
    # With the search space, points are judged from the first trial on.
    strategy = Strategy(8, search_space=SPACE)
    study = optuna.create_study(
        sampler=QuotaSampler(
            quota=Quota(cpu_time="10min"), strategy=strategy, footprint=footprint
        ),
        pruner=QuotaPruner(limits=Limits(memory="600MiB", wall_time="1min")),
    )
    study.optimize(isolated(objective), n_trials=8)
    names = ["params_width", "params_batch", "memory", "footprint_memory", "outcome"]
    print(trial_table(study)[names])


if __name__ == "__main__":
    main()
