"""A shell script as an objective, with several trials at once and one quota."""

from __future__ import annotations

from pathlib import Path

import optuna

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, script, trial_table


if __name__ == "__main__":
    study = optuna.create_study(
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(n_trials=6)),
        pruner=QuotaPruner(optuna.pruners.MedianPruner(), limits=Limits(wall_time="1min")),
    )
    objective = script(
        ["sh", Path(__file__).with_name("train.sh"), "{width}"],
        lambda trial: {"width": trial.suggest_int("width", 1, 100)},
    )
    study.optimize(objective, n_trials=20, n_jobs=2)
    print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
