"""Tune a real model inside a memory limit and a time quota.

A classifier is tuned on scikit-learn's digits, each trial in a process of its own. Some of the
points that TPE proposes ask for more memory than a trial may have. Those that come early are
stopped at the limit; later ones are recognized and replaced before they run.

Run it with ``python examples/01_quickstart.py``; it takes under a minute on two cores, leaves
``quickstart.db`` and ``quickstart.html`` behind, and prints what the study used, which
hyperparameters drove it, and what was saved.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import sys

import numpy as np
import optuna
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import RBFSampler
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import train_test_split

from optuna_quota import analyze, isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


EPOCHS = 2
MEMORY = 200  # MiB, for each trial
DIGITS = load_digits(return_X_y=True)


def objective(trial: optuna.Trial) -> float:
    """Return the validation accuracy of a linear model on random Fourier features."""
    features = RBFSampler(
        n_components=trial.suggest_int("features", 100, 40_000, log=True),
        gamma=trial.suggest_float("gamma", 1e-3, 1.0, log=True),
        random_state=0,
    )
    model = SGDClassifier(alpha=trial.suggest_float("alpha", 1e-7, 1e-2, log=True), random_state=0)
    x_train, x_valid, y_train, y_valid = train_test_split(*DIGITS, random_state=0)
    x_train = features.fit_transform(x_train / 16)  # 8 bytes a row and feature
    x_valid = features.transform(x_valid / 16)
    accuracy = 0.0
    for epoch in range(EPOCHS):
        model.partial_fit(x_train, y_train, classes=np.unique(y_train))
        accuracy = model.score(x_valid, y_valid)
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


def main(n_trials: int, storage: str) -> None:
    """Run the study and print what came of it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "quickstart" in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name="quickstart", storage=storage)
    study = optuna.create_study(
        study_name="quickstart",
        storage=storage,
        direction="maximize",
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(wall_time="50s")),
        pruner=QuotaPruner(
            optuna.pruners.MedianPruner(n_startup_trials=8), limits=Limits(memory=f"{MEMORY}MiB")
        ),
    )
    study.optimize(isolated(objective), n_trials=n_trials, n_jobs=2, show_progress_bar=True)

    table = trial_table(study)
    outcomes = table["outcome"].value_counts()
    print(
        f"\n{len(table)} trials:", ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items())
    )
    terminated = table[table["outcome"] == "terminated"]
    for number, reason in zip(terminated["number"], terminated["reason"], strict=True):
        print(f"  trial {number}: {reason}")
    if any(table["outcome"] == "completed"):
        print(f"\nBest accuracy {study.best_value:.3f} with {study.best_params}\n")
    report = analyze(study)
    print(report.summary())
    print(f"\n{what_was_saved(study)}")

    report.to_html("quickstart.html")
    report.publish()  # notes and plots for optuna-dashboard
    dashboard = os.path.relpath(Path(sys.executable).with_name("optuna-dashboard"))
    print(f"\nThe report:      {Path('quickstart.html').resolve()}")
    print(f"In the browser:  {dashboard} {storage}")


def what_was_saved(study: optuna.Study) -> str:
    """Return in a sentence what plain Optuna would have run beyond the limit."""
    rows = [trial.user_attrs for trial in study.trials]
    stopped = sum(row.get("quota:breach", {}).get("resource") == "memory" for row in rows)
    refused = [row["quota:proposed"] for row in rows if "quota:proposed" in row]
    replaced = [point["median"] for point in refused if point["action"] != "audited"]
    count = len(replaced) + stopped
    trials = "1 trial" if count == 1 else f"{count} trials"
    most = f", up to {max(replaced) / 2**20:.0f} MiB" if replaced else ""
    peak = trial_table(study)["memory"].max()
    return (
        f"Plain Optuna would have run {trials} to more than {MEMORY} MiB{most}: {len(replaced)} "
        f"replaced here before they ran, {stopped} stopped; no trial held more than "
        f"{peak / 2**20:.0f} MiB."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-trials", type=int, default=40)
    parser.add_argument("--storage", default="sqlite:///quickstart.db")
    arguments = parser.parse_args()
    main(arguments.n_trials, arguments.storage)
