"""Memory of an objective is freed when its trial ends, and a long study does not grow."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import gc
from pathlib import Path
import subprocess
import sys
import weakref

import optuna
import pytest

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler


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


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["completes", "prunes", "raises", "breaches"])
def test_objects_of_an_objective_are_freed(ending: str, tmp_path: Path) -> None:
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


# Prints by how many bytes a process grows from trial 1,000 to trial 5,000. The bare study writes
# the same attributes into its rows: these belong to the storage.
GROWTH = """
import gc
import json
import sys

import optuna
import psutil

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler
from optuna_quota._optuna import storage_of

optuna.logging.set_verbosity(optuna.logging.CRITICAL)


def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    trial.report(x, 0)
    assert not trial.should_prune()
    return x


def beside_our_attributes(trial):
    storage = storage_of(bare)
    for key, value in json.loads(user_attrs).items():
        storage.set_trial_user_attr(trial._trial_id, key, value)
    for key, value in json.loads(system_attrs).items():
        storage.set_trial_system_attr(trial._trial_id, key, value)
    return objective(trial)


ours = optuna.create_study(
    sampler=QuotaSampler(
        optuna.samplers.RandomSampler(seed=0), quota=Quota(n_trials=10**6, trial_time="1000h")
    ),
    pruner=QuotaPruner(
        optuna.pruners.NopPruner(), limits=Limits(memory="1TiB", wall_time="1h")
    ),
)
ours.optimize(objective, n_trials=20)
row = ours.trials[-1]
user_attrs, system_attrs = json.dumps(row.user_attrs), json.dumps(row.system_attrs)
bare = optuna.create_study(
    sampler=optuna.samplers.RandomSampler(seed=0), pruner=optuna.pruners.NopPruner()
)


def resident(trials):
    if sys.argv[1] == "ours":
        ours.optimize(objective, n_trials=trials)
    else:
        bare.optimize(beside_our_attributes, n_trials=trials)
    gc.collect()
    return psutil.Process().memory_info().rss


early = resident(1_000)
print(resident(4_000) - early)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_grows_by_its_rows_only() -> None:
    def growth(whose: str) -> int:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", GROWTH, whose],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    names = ("bare", "ours")
    with ThreadPoolExecutor() as executor:
        grown = dict(zip(names, executor.map(growth, names), strict=True))
    # Half a KiB a trial; the rows themselves are six.
    assert grown["ours"] - grown["bare"] < 4_000 * 512, grown
