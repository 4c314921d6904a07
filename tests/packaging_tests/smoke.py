"""Runs in a clean environment, where only the wheel is installed: the library's round trip."""

from __future__ import annotations

import sys

import optuna

from optuna_quota import (
    analyze,
    isolated,
    Limits,
    Quota,
    QuotaPruner,
    QuotaSampler,
    Strategy,
    trial_table,
)


def objective(trial: optuna.Trial) -> float:
    megabytes = trial.suggest_int("megabytes", 1, 20)
    block = bytearray(megabytes * 10**6)
    return float(len(block))


study = optuna.create_study(
    storage=sys.argv[1],
    study_name="smoke",
    sampler=QuotaSampler(
        optuna.samplers.TPESampler(seed=1), quota=Quota(wall_time="1h"), strategy=Strategy(3)
    ),
    pruner=QuotaPruner(limits=Limits(memory="2GiB", wall_time="10min")),
)
study.optimize(isolated(objective), n_trials=3)
table = trial_table(study)
assert list(table["outcome"]) == ["completed"] * 3, table.to_string()
assert set(table["isolation"]) == {"process"}
assert (table["memory"] > 10**6).all()
assert "3 trials finished" in analyze(study).summary()
