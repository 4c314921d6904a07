"""Growth over a memory limit is stopped soon, also while the study is busy."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
from pathlib import Path
import threading
import time
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits
from optuna_quota._records import read_record
from tests.isolation_tests.trials import needs_supervisor, run_one


pytestmark = needs_supervisor
MIB = 2**20


def grow(kind: str) -> Any:
    """Return an objective that allocates more and more memory, and catches all errors."""

    def objective(trial: optuna.Trial) -> float:
        held: list[Any] = []
        for _ in range(400):
            if kind == "shared":
                block = mmap.mmap(-1, 4 * MIB)
                np.frombuffer(block, dtype=np.uint8)[:] = 1
                held.append(block)
            elif kind == "list":
                held.append([float(i) for i in range(100_000)])
            else:
                held.append(np.ones(4 * MIB // 8))
            with contextlib.suppress(Exception):
                time.sleep(0.0005)
        time.sleep(60)
        return 0.0

    return objective


@pytest.mark.parametrize("kind", ["array", "shared", "list"])
def test_growth_is_stopped_soon_after_the_limit(kind: str) -> None:
    record = read_record(run_one(grow(kind), Limits(memory="256MiB"), grace_period=2.0))
    assert record.outcome == "terminated" and record.breach is not None
    assert record.breach.resource == "memory" and not record.breach.refused
    assert 256 * MIB < record.breach.observed < 300 * MIB
    assert record.reason is not None and "used, 256 MiB allowed" in record.reason
    assert record.usage.memory is not None and record.usage.memory < 330 * MIB


# Unlike CDLL, it does not release the interpreter lock.
hold_interpreter = ctypes.PyDLL(None).usleep


class LoadsSlowly:
    """Signals that it is being loaded, then takes a while."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return _load_slowly, (self._file,)


def _load_slowly(file: Path) -> LoadsSlowly:
    file.touch()
    time.sleep(0.3)
    return LoadsSlowly(file)


def _fill_600_mib(_: LoadsSlowly, trial: optuna.Trial) -> float:
    held = []
    for _ in range(150):
        held.append(np.ones(4 * MIB // 8))
        time.sleep(0.001)
    return float(held[0][0])


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_a_limit_is_enforced_while_the_study_is_busy(start_method: Any, tmp_path: Path) -> None:
    file = tmp_path / "loading"

    def hold_once_loading() -> None:
        while not file.exists():
            time.sleep(0.01)
        hold_interpreter(1_500_000)

    if start_method == "fork":
        study, holds = os.getpid(), [1_500_000]

        def hold_once() -> None:
            # The hook stays registered, and is run in the supervisor as well.
            if os.getpid() == study and holds:
                hold_interpreter(holds.pop())

        os.register_at_fork(after_in_parent=hold_once)
    else:
        threading.Thread(target=hold_once_loading).start()
    objective = functools.partial(_fill_600_mib, LoadsSlowly(file))
    trial = run_one(objective, Limits(memory="300MiB"), start_method=start_method)
    record = read_record(trial)
    assert record.outcome == "terminated" and record.breach is not None
    assert record.breach.observed < 330 * MIB
    assert 0 < record.breach.seconds < 60
    assert record.usage.memory is not None and record.usage.memory < 340 * MIB


@pytest.mark.slow
def test_memory_freed_before_the_objective_begins_does_not_count() -> None:
    trial = run_one(functools.partial(_run_loaded, LoadsMuch()), Limits(memory="300MiB"))
    record = read_record(trial)
    assert (trial.state, record.reason) == (TrialState.COMPLETE, None)
    assert record.usage.memory is not None and record.usage.memory < 250 * MIB


class LoadsMuch:
    """Needs 400 MiB for a moment when it is unpickled."""

    def __reduce__(self) -> Any:
        return _load_much, ()


def _load_much() -> LoadsMuch:
    held = np.ones(400 * MIB // 8)
    time.sleep(0.3)
    del held
    return LoadsMuch()


def _run_loaded(loaded: LoadsMuch, trial: optuna.Trial) -> float:
    time.sleep(0.1)
    return 0.0
