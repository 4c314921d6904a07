"""MLflow's callback: usage and outcome are user attributes, so MLflow gets them as tags."""

from __future__ import annotations

from pathlib import Path
import tempfile

import mlflow
import optuna
from optuna_integration import MLflowCallback

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler


def objective(trial: optuna.Trial) -> float:
    """Return the square of x."""
    return trial.suggest_float("x", -10, 10) ** 2


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{Path(folder) / 'mlflow.db'}"
        callback = MLflowCallback(tracking_uri=uri, metric_name="loss")
        study = optuna.create_study(
            study_name="tuning",
            sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(n_trials=4)),
            pruner=QuotaPruner(limits=Limits(memory="2GiB")),
        )
        study.optimize(objective, n_trials=10, callbacks=[callback])
        mlflow.set_tracking_uri(uri)
        runs = mlflow.search_runs(experiment_names=["tuning"])
        print(runs[["params.x", "metrics.loss", "tags.quota:outcome", "tags.quota:wall_time"]])
