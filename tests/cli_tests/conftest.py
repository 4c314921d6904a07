"""Studies that ran, in storages that a command can open."""

from __future__ import annotations

from pathlib import Path
import time

import optuna
import pytest

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler


def objective(trial: optuna.Trial) -> float:
    layers = trial.suggest_int("layers", 1, 8)
    time.sleep(0.001 * layers)
    return float(layers)


def run_study(storage: str, name: str, n_trials: int = 12) -> None:
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        sampler=QuotaSampler(
            optuna.samplers.RandomSampler(seed=1), quota=Quota(n_trials=100, wall_time="1h")
        ),
        pruner=QuotaPruner(limits=Limits(wall_time="1min")),
    )
    study.optimize(objective, n_trials=n_trials)


@pytest.fixture(scope="package")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a storage with one study, named ``tuned``."""
    url = f"sqlite:///{tmp_path_factory.mktemp('tuned')}/tuning.db"
    run_study(url, "tuned")
    return url


@pytest.fixture(scope="package")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal file with the studies ``first`` and ``second``, no trial in either."""
    path = tmp_path_factory.mktemp("several") / "journal.log"
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    for name in ("first", "second"):
        optuna.create_study(storage=storage, study_name=name)
    return path
