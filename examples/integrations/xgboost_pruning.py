"""XGBoost with its pruning callback, each trial in a child process that can be killed."""

from __future__ import annotations

import optuna
from optuna_integration import XGBoostPruningCallback
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
import xgboost as xgb

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


def objective(trial: optuna.Trial) -> float:
    """Return the AUC on the validation part."""
    data = train_test_split(*load_breast_cancer(return_X_y=True), random_state=0)
    x_train, x_valid, y_train, y_valid = data
    params = {
        "objective": "binary:logistic",
        "eval_metric": "auc",
        "nthread": 1,
        "max_depth": trial.suggest_int("max_depth", 1, 9),
        "eta": trial.suggest_float("eta", 1e-3, 0.3, log=True),
    }
    evals = [(xgb.DMatrix(x_valid, y_valid), "validation")]
    result: dict[str, dict[str, list[float]]] = {}
    xgb.train(
        params,
        xgb.DMatrix(x_train, y_train),
        40,
        evals=evals,
        evals_result=result,
        verbose_eval=False,
        callbacks=[XGBoostPruningCallback(trial, "validation-auc")],
    )
    return result["validation"]["auc"][-1]


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
