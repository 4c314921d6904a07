"""Trials a minute of LightGBM and torch with two at once, all threads each, confined and not.

Each trial leaves its number of threads to the library, which takes all cores of the machine. With
``Limits(cpu_cores="auto")`` each gets its share of them, in affinity and in threads. The ways take
turns, so that what else runs on the machine slows each of them alike. Takes three minutes, with
``--quick`` one.

    python benchmarks/cores.py [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np
import optuna

from optuna_quota import isolated, Limits, QuotaPruner


N_JOBS = 2
WAYS = {"all threads each": None, 'cpu_cores="auto"': Limits(cpu_cores="auto")}


def train_lightgbm(trial: optuna.Trial) -> float:
    """Boost trees on 20,000 rows of 20 columns."""
    import lightgbm

    rng = np.random.default_rng(trial.number)
    x = rng.normal(size=(20_000, 20))
    y = x[:, 0] + np.sin(3 * x[:, 1]) + rng.normal(size=len(x))
    model = lightgbm.train(
        {"objective": "regression", "num_leaves": 63, "verbose": -1},
        lightgbm.Dataset(x, y),
        num_boost_round=60,
    )
    return float(np.mean((model.predict(x) - y) ** 2))


def train_torch(trial: optuna.Trial) -> float:
    """Train a small network on 100 batches."""
    import torch

    layers = [torch.nn.Linear(128, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters())
    loss = torch.tensor(0.0)
    for _ in range(100):
        x = torch.randn(512, 128)
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


WORKLOADS = {"LightGBM": (train_lightgbm, "lightgbm"), "torch": (train_torch, "torch")}


def trials_a_minute(name: str, limits: Limits | None, n_trials: int) -> float:
    """Run a study of this many trials; return the trials per minute."""
    objective, module = WORKLOADS[name]
    pruner = None if limits is None else QuotaPruner(limits=limits)
    study = optuna.create_study(pruner=pruner)
    run = isolated(objective, preload=["numpy", module])
    study.optimize(run, n_trials=N_JOBS, n_jobs=N_JOBS)  # loads the modules
    begun = time.monotonic()
    study.optimize(run, n_trials=n_trials, n_jobs=N_JOBS)
    assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials)
    return 60 * n_trials / (time.monotonic() - begun)


def main() -> None:
    """Run all, one way after the other, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    n_trials, rounds = (6, 3) if quick else (12, 7)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(f"{os.cpu_count()} cores, {N_JOBS} trials at once, medians of {rounds} rounds")
    for name in WORKLOADS:
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, limits in WAYS.items():
                found[way].append(trials_a_minute(name, limits, n_trials))
        for way, rates in found.items():
            spread = f"{min(rates):.1f} to {max(rates):.1f}"
            print(
                f"{name:10} {way:20} {statistics.median(rates):6.1f} trials a minute ({spread})",
                flush=True,
            )


if __name__ == "__main__":
    main()
