"""Tune a real model inside limits and a quota, in one process.

A neural network is tuned on scikit-learn's digits. Some of the points that TPE proposes ask for
more memory or time than a trial may have: they are terminated, and the study goes on with the
next point.

Run it with ``python examples/01_quickstart.py``; it takes under a minute on two cores, leaves
``quickstart.db`` behind, and prints which trials were terminated and why, what the study used,
and which hyperparameters drove it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import sys
import warnings

import numpy as np
import optuna
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from optuna_quota import analyze
from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler
from optuna_quota import trial_table


EPOCHS = 6
DIGITS = load_digits(return_X_y=True)


def objective(trial: optuna.Trial) -> float:
    """Return the validation accuracy of a network trained epoch by epoch."""
    width = trial.suggest_int("width", 16, 3072, log=True)
    layers = trial.suggest_int("layers", 1, 3)
    model = MLPClassifier(
        hidden_layer_sizes=(width,) * layers,
        batch_size=trial.suggest_int("batch_size", 32, 192, log=True),
        learning_rate_init=trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
        random_state=0,
    )
    x_train, x_valid, y_train, y_valid = train_test_split(*DIGITS, random_state=0)
    accuracy = 0.0
    for epoch in range(EPOCHS):
        for rows in np.array_split(np.arange(len(x_train)), 6):
            model.partial_fit(x_train[rows] / 16, y_train[rows], classes=np.unique(y_train))
            if trial.should_prune():  # True as soon as a limit is breached
                raise optuna.TrialPruned
        accuracy = model.score(x_valid / 16, y_valid)
        trial.report(accuracy, epoch)
        if trial.should_prune():  # True also when the base pruner says so
            raise optuna.TrialPruned
    return accuracy


def main(n_trials: int, storage: str) -> None:
    """Run the study and print what came of it."""
    warnings.simplefilter("ignore", ConvergenceWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "quickstart" in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name="quickstart", storage=storage)
    study = optuna.create_study(
        study_name="quickstart",
        storage=storage,
        direction="maximize",
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(wall_time="40s")),
        pruner=QuotaPruner(
            optuna.pruners.MedianPruner(n_startup_trials=8),
            limits=Limits(memory="450MiB", wall_time="3s"),
        ),
    )
    study.optimize(objective, n_trials=n_trials, show_progress_bar=True)

    table = trial_table(study)
    terminated = table[table["outcome"] == "terminated"]
    print(f"\n{len(table)} trials, {len(terminated)} terminated:")
    for number, reason in zip(terminated["number"], terminated["reason"], strict=True):
        print(f"  trial {number}: {reason}")
    if any(table["outcome"] == "completed"):
        print(f"\nBest accuracy {study.best_value:.3f} with {study.best_params}\n")
    report = analyze(study)
    print(report.summary())
    report.publish()  # notes and plots for optuna-dashboard
    dashboard = os.path.relpath(Path(sys.executable).with_name("optuna-dashboard"))
    print(f"\nSee it in the browser:  {dashboard} {storage}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-trials", type=int, default=40)
    parser.add_argument("--storage", default="sqlite:///quickstart.db")
    arguments = parser.parse_args()
    main(arguments.n_trials, arguments.storage)
