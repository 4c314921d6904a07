"""A training script as an objective, whatever it is written in.

``09_train.py`` imports no Optuna: it takes arguments and prints its accuracy as lines of JSON.
Each trial runs it in a process of its own, under the study's limits; trials that lag behind the
others are pruned. What the script prints is passed on with the trial's number; at the end come a
table of the trials and the best arguments.
"""

from __future__ import annotations

from pathlib import Path
import sys

import optuna

from optuna_quota import Limits, QuotaPruner, script, trial_table


def arguments(trial: optuna.Trial) -> dict[str, float]:
    """Return what is filled into the command."""
    return {
        "width": trial.suggest_int("width", 4, 128, log=True),
        "rate": trial.suggest_float("rate", 1e-4, 1e-1, log=True),
    }


if __name__ == "__main__":
    train = Path(__file__).with_name("09_train.py")
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=QuotaPruner(
            optuna.pruners.MedianPruner(n_startup_trials=2),
            limits=Limits(memory="1GiB", wall_time="2min"),
        ),
    )
    objective = script(
        [sys.executable, train, "--width", "{width}", "--rate={rate:.5f}"],
        arguments,
        env={"OMP_NUM_THREADS": "1"},
    )
    study.optimize(objective, n_trials=6, n_jobs=2)
    print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
    print(f"Best: {study.best_value:.3f} with {study.best_params}")
