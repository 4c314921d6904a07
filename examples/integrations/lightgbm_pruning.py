"""LightGBM with its pruning callback, each trial in a child process that can be killed.

The callback of optuna-integration gets the trial and asks ``should_prune`` after each boosting
round: a breach of a limit ends the training there, as an unpromising value would.
"""

from __future__ import annotations

import lightgbm as lgb
import optuna
from optuna_integration import LightGBMPruningCallback
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


def objective(trial: optuna.Trial) -> float:
    """Return the AUC on the validation part."""
    data = train_test_split(*load_breast_cancer(return_X_y=True), random_state=0)
    x_train, x_valid, y_train, y_valid = data
    params = {
        "objective": "binary",
        "metric": "auc",
        "verbosity": -1,
        "num_threads": 1,
        "num_leaves": trial.suggest_int("num_leaves", 4, 256, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-3, 0.3, log=True),
    }
    train = lgb.Dataset(x_train, y_train)
    valid = lgb.Dataset(x_valid, y_valid, reference=train)
    callback = LightGBMPruningCallback(trial, "auc")
    model = lgb.train(params, train, 60, valid_sets=[valid], callbacks=[callback])
    return float(model.best_score["valid_0"]["auc"])


if __name__ == "__main__":
    study = optuna.create_study(
        direction="maximize",
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(cpu_time="5min")),
        pruner=QuotaPruner(
            optuna.pruners.MedianPruner(n_startup_trials=3),
            limits=Limits(memory="1GiB", wall_time="20s"),
        ),
    )
    study.optimize(isolated(objective), n_trials=8)
    print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
