"""Each trial in a child process of its own: a limit becomes a promise.

The objective is kernel ridge regression, whose memory grows with the square of the rows. It never
reports, never asks whether it should stop, and would gladly take all the memory there is. Wrapped
in ``isolated`` it is stopped all the same, at its limit, and the study goes on.

Run it with ``python examples/02_isolated_trials.py``; it takes about half a minute and prints each
trial's peak memory and how it ended. No trial ends more than a few MiB above the limit of 400 MiB.
"""

from __future__ import annotations

import numpy as np
import optuna
from sklearn.kernel_ridge import KernelRidge

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


def objective(trial: optuna.Trial) -> float:
    """Return the error on held-out rows."""
    rows = trial.suggest_int("rows", 200, 12_000, log=True)
    alpha = trial.suggest_float("alpha", 1e-4, 1.0, log=True)
    gamma = trial.suggest_float("gamma", 1e-2, 10.0, log=True)
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, (rows + 300, 3))
    y = np.sin(x).sum(axis=1) + 0.1 * rng.normal(size=len(x))
    model = KernelRidge(kernel="rbf", alpha=alpha, gamma=gamma).fit(x[300:], y[300:])
    return float(np.mean((model.predict(x[:300]) - y[:300]) ** 2))


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(trial_time="2min")),
        pruner=QuotaPruner(limits=Limits(memory="400MiB", wall_time="10s")),
    )
    # It has nothing to save, so a trial over its limit is killed at once.
    study.optimize(isolated(objective, grace_period=0), n_trials=25)
    table = trial_table(study)
    for row in table.itertuples():
        print(
            f"trial {row.number:2}: {row.params_rows:>6} rows, "
            f"{row.memory / 2**20:5.0f} MiB, {row.outcome}"
        )
    print(f"\nBest error {study.best_value:.4f} with {study.best_params}")
    print(f"Highest peak of any trial: {table['memory'].max() / 2**20:.0f} MiB of 400 MiB")
