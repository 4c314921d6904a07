"""joblib's workers (loky processes) share a study: isolated trials, and one quota for all."""

from __future__ import annotations

import tempfile

import joblib
import optuna

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


def objective(trial: optuna.Trial) -> float:
    """Return the square of x."""
    return trial.suggest_float("x", -10, 10) ** 2


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        study = optuna.create_study(
            storage=f"sqlite:///{folder}/joblib.db",
            sampler=QuotaSampler(optuna.samplers.TPESampler(), quota=Quota(n_trials=6)),
            pruner=QuotaPruner(limits=Limits(memory="512MiB", wall_time="1min")),
        )
        joblib.Parallel(n_jobs=2)([joblib.delayed(study.optimize)(isolated(objective))] * 2)
        table = trial_table(study)
    print(table[["number", "value", "memory", "cpu_time", "outcome"]])
    print(f"{(table['outcome'] == 'completed').sum()} completed")
    print(f"isolated: {set(table['isolation'].dropna())}")
