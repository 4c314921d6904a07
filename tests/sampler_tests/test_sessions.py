"""A sampler holds on to no study that its user has let go of."""

from __future__ import annotations

from collections.abc import Iterator
import gc
import os
from pathlib import Path
import sys
import threading
import time
import weakref

import optuna
import pytest

from optuna_quota import isolated
from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler
from optuna_quota._optuna import storage_of
from tests.storages import Address
from tests.storages import KINDS
from tests.storages import missing
from tests.storages import storage_at


def objective(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(params=KINDS)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Address]:
    reason = missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    with storage_at(request.param, tmp_path) as address:
        yield address


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_loading_a_study_again_and_again_leaves_nothing_open(address: Address) -> None:
    sampler = QuotaSampler(
        optuna.samplers.RandomSampler(), quota=Quota(n_trials=500, cpu_time="1h")
    )
    name = f"loaded-{os.getpid()}"
    counts = []
    for _ in range(8):
        study = optuna.create_study(
            study_name=name, storage=address.open(), load_if_exists=True, sampler=sampler
        )
        study.optimize(objective, n_trials=1)
        study.ask()
        gone = weakref.ref(storage_of(study))
        del study
        counts.append(descriptors())
        assert gone() is None
    assert counts[-1] <= counts[1] + 2


def test_the_thread_of_a_study_that_is_gone_ends() -> None:
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(cpu_time="1h"))
    study = optuna.create_study(sampler=sampler)
    study.ask()  # asked for, and never told
    del study
    gc.collect()
    deadline = time.monotonic() + 10
    while any(thread.name == "optuna-quota-ledger" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_isolated_trials_of_many_studies_leave_no_storage() -> None:
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(cpu_time="1h"))
    gone = []
    for _ in range(3):
        study = optuna.create_study(
            sampler=sampler, pruner=QuotaPruner(limits=Limits(wall_time=60))
        )
        study.optimize(isolated(objective), n_trials=2, n_jobs=2)
        gone.append(weakref.ref(storage_of(study)))
        del study
    gc.collect()
    assert [each() for each in gone] == [None] * 3


def test_study_objects_on_one_storage_share_a_session() -> None:
    storage = optuna.storages.InMemoryStorage()
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=3))
    first = optuna.create_study(study_name="s", storage=storage, sampler=sampler)
    trial = first.ask()
    number = trial.number
    second = optuna.load_study(study_name="s", storage=storage, sampler=sampler)
    del first, trial
    gc.collect()
    second.tell(number, 1.0)
    second.optimize(objective)
    assert [t.state.name for t in second.trials] == ["COMPLETE"] * 3
    assert second.trials[0].user_attrs["quota:outcome"] == "completed"
