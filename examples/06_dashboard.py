"""The study in optuna-dashboard, while it runs and after.

Memory, time and outcome of each trial are columns by themselves. A callback keeps the study's note
(ledger, fitted models, terminated trials) and four small plots current while it runs; ``publish``
does the same once more at the end. Terminated trials bear a note with the reason and, since an
artifact store is given, a plot of their memory over time.

Run it with ``python examples/06_dashboard.py``; it takes about a minute on two cores, leaves
``dashboard.db``, the folder ``dashboard-artifacts`` and ``dashboard.html`` behind, and prints the
command that shows the study. Start that command while it still runs, if you like.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import optuna
from optuna.artifacts import FileSystemArtifactStore
from sklearn.datasets import make_friedman1
from sklearn.kernel_ridge import KernelRidge

from optuna_quota import analyze, isolated, Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota.dashboard import Publisher


SHARES = (0.25, 0.5, 1.0)


def objective(trial: optuna.Trial) -> float:
    """Return the error of kernel ridge regression, whose memory grows with rows squared."""
    rows = trial.suggest_int("rows", 200, 6000, log=True)
    kernel = trial.suggest_categorical("kernel", ["rbf", "laplacian", "polynomial"])
    gamma = trial.suggest_float("gamma", 1e-3, 10.0, log=True)
    alpha = trial.suggest_float("alpha", 1e-4, 1.0, log=True)
    x, y = make_friedman1(rows + 500, n_features=12, noise=0.5, random_state=0)
    error = float("inf")
    for step, share in enumerate(SHARES):
        model = KernelRidge(kernel=kernel, gamma=gamma, alpha=alpha)
        model.fit(x[500 : 500 + int(share * rows)], y[500 : 500 + int(share * rows)])
        error = float(np.mean((model.predict(x[:500]) - y[:500]) ** 2))
        trial.report(error, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return error


def main(n_trials: int, folder: Path) -> None:
    """Run the study, publish it, and say how to look at it."""
    storage = f"sqlite:///{folder / 'dashboard.db'}"
    artifacts = folder / "dashboard-artifacts"
    artifacts.mkdir(exist_ok=True)
    store = FileSystemArtifactStore(str(artifacts))
    print(f"optuna-dashboard {storage} --artifact-dir {artifacts}")

    if "kernel-ridge" in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name="kernel-ridge", storage=storage)
    study = optuna.create_study(
        study_name="kernel-ridge",
        storage=storage,
        sampler=QuotaSampler(
            optuna.samplers.TPESampler(seed=1),
            quota=Quota(wall_time="10min", cpu_time="3min", n_trials=100),
        ),
        pruner=QuotaPruner(
            optuna.pruners.MedianPruner(n_startup_trials=10, n_warmup_steps=1),
            limits=Limits(memory="500MiB", cpu_time="10s"),
        ),
    )
    publisher = Publisher(artifact_store=store, interval=10)
    study.optimize(isolated(objective), n_trials=n_trials, callbacks=[publisher])

    report = analyze(study)
    report.publish(artifact_store=store)
    report.to_html(folder / "dashboard.html")
    print(report.summary())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-trials", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args()
    main(arguments.n_trials, arguments.folder)
