"""What an objective held is free once its trial is over, however it ended."""

from __future__ import annotations

from collections.abc import Iterator
import gc
from pathlib import Path
import weakref

import optuna
import pytest

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler


class Model:
    """Holds itself, as many a framework's models do."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    # A log record of a failed trial keeps the exception, and pytest keeps the record.
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    yield
    optuna.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("ending", ["completes", "prunes", "raises", "breaches"])
def test_nothing_keeps_what_an_objective_held(ending: str, tmp_path: Path) -> None:
    held: list[weakref.ref[Model]] = []

    def objective(trial: optuna.Trial) -> float:
        model = Model()
        held.append(weakref.ref(model))
        trial.suggest_float("x", 0, 1)
        if ending == "prunes":
            raise optuna.TrialPruned
        if ending == "raises":
            raise ValueError
        while ending == "breaches":
            if trial.should_prune():
                raise optuna.TrialPruned
        return 1.0

    study = optuna.create_study(
        storage=f"sqlite:///{tmp_path / 'a.db'}",
        sampler=QuotaSampler(quota=Quota(n_trials=9)),
        pruner=QuotaPruner(limits=Limits(memory="100GiB", wall_time=0.05, gpu_memory="1GiB")),
    )
    study.optimize(objective, n_trials=3, catch=(ValueError,))
    gc.collect()
    assert len(held) == 3
    assert [model() for model in held] == [None] * 3
