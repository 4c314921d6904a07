"""Storage calls of a trial, beyond those of the bare sampler."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median_low
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import create_trial
import pytest

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota._optuna import storage_of
from optuna_quota._optuna.storages import _engine_of
from tests.storages import storage_at, study_in


QUOTA = Quota(n_trials=1000, cpu_time="10h", wall_time="10h")
LIMITS = Limits(memory="1TiB", wall_time="1h")
READS = ("get_all_trials", "get_trial", "get_study_user_attrs", "get_study_system_attrs")
WRITES = (
    "create_new_trial",
    "set_trial_param",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_state_values",
)
_TRIALS = 12


def objective(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1) + trial.suggest_float("y", 0, 1)


def counting(storage: BaseStorage, counts: Counter[str]) -> None:
    """Count calls of a storage, and of its database or file."""

    def counted(owner: Any, name: str, key: str) -> None:
        before = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[key] += 1
            return before(*arguments, **options)

        setattr(owner, name, call)

    for name in (*READS, *WRITES):
        counted(storage, name, name)
    engine = _engine_of(storage)
    if engine is not None:
        from sqlalchemy import event

        def on_statement(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
            counts[statement.split()[0]] += 1

        event.listen(engine, "commit", lambda connection: counts.update(commits=1))
        event.listen(engine, "after_cursor_execute", on_statement)
    backend = getattr(storage, "_backend", None)
    if hasattr(backend, "append_logs"):
        counted(backend, "append_logs", "appends")


def a_trial(kind: str, folder: Path, sampler: BaseSampler, *, loop: bool) -> dict[str, int]:
    """Return the calls for one trial: medians, as a lease may be renewed meanwhile."""
    counts: Counter[str] = Counter()
    sums: list[Counter[str]] = []
    with storage_at(kind, folder) as address, study_in(address) as study:
        study.sampler, study.pruner = sampler, QuotaPruner(limits=LIMITS)
        study.optimize(objective, n_trials=3)
        counting(storage_of(study), counts)
        if loop:
            keep = [lambda study, trial: sums.append(counts.copy())]
            study.optimize(objective, n_trials=_TRIALS, callbacks=keep)
        else:
            for _ in range(_TRIALS):
                trial = study.ask()
                study.tell(trial, objective(trial))
                sums.append(counts.copy())
    each = [after - before for before, after in pairwise(sums)]
    return {key: median_low(one[key] for one in each) for key in counts}


def added(kind: str, folder: Path, *, loop: bool) -> dict[str, int]:
    bare = a_trial(kind, folder, RandomSampler(), loop=loop)
    ours = a_trial(kind, folder, QuotaSampler(RandomSampler(), quota=QUOTA), loop=loop)
    return {k: n - bare.get(k, 0) for k, n in ours.items() if n != bare.get(k, 0)}


# One read of all rows, one write of the claim, one of the grant and one of the usage. Near the end
# of a quota, `optimize` reads once more, to see whether it is used up by any worker.
@pytest.mark.parametrize("loop", [False, True], ids=["ask and tell", "optimize"])
def test_in_memory(loop: bool, tmp_path: Path) -> None:
    found = added("memory", tmp_path, loop=loop)
    # The usage, one attribute at a time.
    assert found.pop("set_trial_user_attr") <= 8
    assert found == {"get_all_trials": 1, "set_trial_system_attr": 2}


@pytest.mark.parametrize("loop", [False, True], ids=["ask and tell", "optimize"])
def test_in_a_journal(loop: bool, tmp_path: Path) -> None:
    found = added("journal-file", tmp_path, loop=loop)
    assert found == {"appends": 3, "get_all_trials": 1}


@pytest.mark.slow
@pytest.mark.parametrize("loop", [False, True], ids=["ask and tell", "optimize"])
def test_in_sqlite(loop: bool, tmp_path: Path) -> None:
    found = added("sqlite", tmp_path, loop=loop)
    assert found.pop("SELECT") <= 10
    assert found.pop("commits") <= 4
    assert found == {"INSERT": 3, "get_all_trials": 1}


def calls_and_rows(n_finished: int, folder: Path) -> tuple[Counter[str], list[int]]:
    """Return the calls for one trial of a study, and how many rows each reading returned."""
    counts: Counter[str] = Counter()
    rows: list[int] = []
    with storage_at("sqlite", folder) as address, study_in(address) as study:
        finished = create_trial(value=0.0, user_attrs={"quota:cpu_time": 1})
        study.add_trials([finished] * n_finished)
        study.sampler = QuotaSampler(RandomSampler(), quota=QUOTA)
        database = storage_of(study)._backend  # type: ignore[attr-defined]
        read = database._get_trials

        def counted(*arguments: Any, **options: Any) -> Any:
            found = read(*arguments, **options)
            rows.append(len(found))
            return found

        database._get_trials = counted
        counting(storage_of(study), counts)
        for _ in range(3):
            counts.clear()
            rows.clear()
            study.tell(study.ask(), 0.0)
    return counts, rows


@pytest.mark.slow
def test_an_admission_reads_no_more_however_many_trials_have_finished(tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    few.mkdir()
    many.mkdir()
    found = calls_and_rows(5, few)
    assert found[1] and max(found[1]) <= 2  # the newest two, of which one has finished since
    assert calls_and_rows(60, many) == found
