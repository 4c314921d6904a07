"""A Hydra application as an objective: its parameters are overrides on its command line."""

from __future__ import annotations

from pathlib import Path
import sys
from typing import Any

import optuna

from optuna_quota import Limits, QuotaPruner, script, trial_table


def overrides(trial: optuna.Trial) -> dict[str, Any]:
    """Return the parameters, and a folder for each trial's output."""
    return {
        "model.width": trial.suggest_int("model.width", 8, 64),
        "rate": trial.suggest_float("rate", 1e-4, 1e-1, log=True),
        "folder": f"outputs/trial-{trial.number}",
    }


if __name__ == "__main__":
    train = Path(__file__).with_name("hydra_train.py")
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=QuotaPruner(limits=Limits(memory="1GiB", wall_time="5min")),
    )
    objective = script(
        [sys.executable, train]
        + ["model.width={model.width}", "rate={rate}", "hydra.run.dir={folder}"],
        overrides,
    )
    study.optimize(objective, n_trials=3, n_jobs=2)
    print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
