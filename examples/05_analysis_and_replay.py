"""What drove the cost, and what other limits would have done.

After a study, ``analyze`` tells which hyperparameters drove memory and time, fits a model for each
resource and gives advice; ``replay`` tells what a quota and limits would have saved and lost.

Run it with ``python examples/05_analysis_and_replay.py``; it takes about half a minute and leaves
``report.html`` behind.
"""

from __future__ import annotations

import argparse

import numpy as np
import optuna
from sklearn.kernel_ridge import KernelRidge

from optuna_quota import analyze, isolated, Limits, Quota, QuotaPruner, QuotaSampler, replay


def objective(trial: optuna.Trial) -> float:
    """Return the error of kernel ridge regression on held-out rows."""
    rows = trial.suggest_int("rows", 200, 4000, log=True)
    features = trial.suggest_int("features", 2, 64, log=True)
    kernel = trial.suggest_categorical("kernel", ["rbf", "laplacian"])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows + 300, features))
    y = np.sin(x[:, 0]) + 0.1 * rng.normal(size=len(x))
    model = KernelRidge(kernel=kernel, alpha=0.1).fit(x[300:], y[300:])
    return float(np.mean((model.predict(x[:300]) - y[:300]) ** 2))


def main(html: str) -> None:
    """Run a study, print what drove its cost, and replay it under tighter ceilings."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(trial_time="2min")),
        pruner=QuotaPruner(limits=Limits(memory="1GiB", wall_time="20s")),
    )
    study.optimize(isolated(objective), n_trials=30)
    report = analyze(study)
    print(report.summary())
    print("\nWith a limit of 250 MiB instead:")
    print(replay(study, limits=Limits(memory="250MiB")))
    report.to_html(html)
    print(f"\nThe whole report, with pictures: {html}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--html", default="report.html")
    main(parser.parse_args().html)
