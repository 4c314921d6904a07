"""Lightning's ``ddp`` strategy, which runs a script again for each rank, as an objective.

The training script is not the study's, so only training runs again. Limits and pruning hold for
all ranks together.
"""

from __future__ import annotations

from pathlib import Path
import sys

import optuna

from optuna_quota import Limits, QuotaPruner, script, trial_table


if __name__ == "__main__":
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=QuotaPruner(
            optuna.pruners.MedianPruner(n_startup_trials=1),
            limits=Limits(memory="4GiB", wall_time="5min"),
        ),
    )
    train = Path(__file__).with_name("lightning_train.py")
    objective = script(
        [sys.executable, train, "--width={width}", "--rate={rate}"],
        lambda trial: {
            "width": trial.suggest_int("width", 8, 512, log=True),
            "rate": trial.suggest_float("rate", 1e-4, 1e-1, log=True),
        },
        env={"OMP_NUM_THREADS": "1"},
    )
    study.optimize(objective, n_trials=2)
    for trial in study.trials:
        print(f"trial {trial.number}: {sorted(trial.intermediate_values)}")
    print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
