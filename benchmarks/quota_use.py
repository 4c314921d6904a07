"""How much of a quota goes to trials that complete, where the footprint is known.

    python benchmarks/quota_use.py [--quick]

Trials take from a quarter to seven quarters of their mean, and the quota is ten or thirty times
the mean. What is terminated at the end of the quota, or left of it, is lost.
"""

from __future__ import annotations

import argparse
from statistics import median
import sys
import time
from typing import Any

import optuna
from optuna.samplers import RandomSampler, TPESampler

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, trial_table, Usage


def footprint_of(mean: float) -> Any:
    return lambda params: Usage(wall_time=mean * params["size"])


def objective_of(mean: float) -> Any:
    def objective(trial: optuna.Trial) -> float:
        size = trial.suggest_float("size", 0.25, 1.75)
        end, step = time.monotonic() + mean * size, 0
        while (rest := end - time.monotonic()) > 0:
            time.sleep(min(0.02, rest))
            trial.report(size, step)
            step += 1
            if trial.should_prune():
                raise optuna.TrialPruned
        return size

    return objective


def run(sampler: Any, n_trials: int, n_jobs: int, mean: float) -> tuple[float, float]:
    """Return the shares of the quota that completed and terminated trials used."""
    quota = n_trials * mean
    sampler = QuotaSampler(sampler, quota=Quota(trial_time=quota), footprint=footprint_of(mean))
    pruner = QuotaPruner(limits=Limits(wall_time=10 * mean))
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.optimize(objective_of(mean), n_jobs=n_jobs)
    used = trial_table(study).groupby("outcome")["wall_time"].sum()
    return used.get("completed", 0.0) / quota, used.get("terminated", 0.0) / quota


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mean", type=float, default=0.5, help="seconds of a trial")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seeds = range(1 if arguments.quick else 3)
    print("% of the quota, median and worst")
    print("sampler  trials  workers  completed  terminated")
    for kind in (RandomSampler, TPESampler):
        for n_trials in (10,) if arguments.quick else (10, 30):
            for n_jobs in (1, 4):
                found = [run(kind(seed=seed), n_trials, n_jobs, arguments.mean) for seed in seeds]
                completed, terminated = zip(*found, strict=True)
                print(
                    f"{kind.__name__:8.6} {n_trials:5} {n_jobs:8} "
                    f"{100 * median(completed):6.0f} {100 * min(completed):4.0f} "
                    f"{100 * median(terminated):6.0f} {100 * max(terminated):4.0f}"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
