"""One quota for many workers, through nothing but the study's storage.

Four worker processes take part in one study. Together they may use 20 CPU-seconds and run 60
trials; the reservations that hold the total stand in the trials' own rows. The workers need no
server but the database: give PostgreSQL's URL to share the study between machines.

Run it with ``python examples/03_many_workers.py --storage postgresql://user@host/database``, or
without a storage to use a SQLite file in a temporary folder. It prints the ledger at the end.
"""

from __future__ import annotations

import argparse
from multiprocessing import get_context
from pathlib import Path
import tempfile

import numpy as np
import optuna

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, status, trial_table


QUOTA = Quota(cpu_time="20s", n_trials=60)
NAME = "many-workers"


def objective(trial: optuna.Trial) -> float:
    """Return how badly a polynomial fits a noisy sine, over many resamples."""
    degree = trial.suggest_int("degree", 1, 12)
    resamples = trial.suggest_int("resamples", 50, 2000, log=True)
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 200)
    errors = []
    for _ in range(resamples):
        y = np.sin(4 * x) + 0.3 * rng.normal(size=len(x))
        fitted = np.polynomial.Polynomial.fit(x[::2], y[::2], degree)
        errors.append(np.mean((fitted(x[1::2]) - y[1::2]) ** 2))
    return float(np.mean(errors))


def work(storage: str) -> None:
    """Take part in the study until its quota is used up."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(
        study_name=NAME,
        storage=storage,
        sampler=QuotaSampler(quota=QUOTA),
        pruner=QuotaPruner(limits=Limits(cpu_time="5s")),
    )
    study.optimize(objective, n_trials=1000)


def main(storage: str, workers: int) -> None:
    """Start the workers, wait for them, and print the ledger."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if NAME in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=NAME, storage=storage)
    optuna.create_study(study_name=NAME, storage=storage)
    context = get_context("spawn")
    processes = [context.Process(target=work, args=(storage,)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    study = optuna.load_study(study_name=NAME, storage=storage)
    print(status(study))
    table = trial_table(study)
    print(f"\n{(table['outcome'] == 'completed').sum()} trials completed by {workers} workers")
    print(f"CPU time used: {table['cpu_time'].sum():.1f} s of 20 s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", help="URL of a storage, such as PostgreSQL's")
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.storage:
        main(arguments.storage, arguments.workers)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(f"sqlite:///{Path(folder) / 'tuning.db'}", arguments.workers)
