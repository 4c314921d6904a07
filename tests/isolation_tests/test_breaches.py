"""A trial over a limit is stopped, whatever it does."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import _optuna, isolated, Limits, QuotaPruner
from optuna_quota._records import read_record
from tests.isolation_tests.trials import needs_supervisor, run_one


pytestmark = needs_supervisor


def allocate_bytes(trial: optuna.Trial) -> float:
    held = []
    while True:
        held.append(bytearray(8 * 2**20))


def ask_for_too_much(trial: optuna.Trial) -> float:
    import numpy as np

    return float(np.ones(2**31).sum())


def ask_for_too_much_untyped(trial: optuna.Trial) -> float:
    return float(len(bytearray(2**31)))


def allocate_shared(trial: optuna.Trial) -> float:
    import mmap

    held = []
    while True:
        shared = mmap.mmap(-1, 4 * 2**20)
        for page in range(0, len(shared), 4096):
            shared[page] = 1
        held.append(shared)


def allocate_in_a_child(trial: optuna.Trial) -> float:
    code = "x = []\nwhile True: x.append(bytearray(2**22))"
    subprocess.run([sys.executable, "-c", code], check=False)
    time.sleep(60)
    return 0.0


@pytest.mark.parametrize(
    "objective",
    [
        allocate_bytes,
        ask_for_too_much,
        ask_for_too_much_untyped,
        allocate_shared,
        allocate_in_a_child,
    ],
    ids=lambda value: value.__name__,
)
def test_memory_breaches(objective: Callable[..., Any]) -> None:
    trial = run_one(objective, Limits(memory="256MiB"), grace_period=1.0)
    record = read_record(trial)
    assert trial.state == TrialState.PRUNED
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "memory"
    assert record.breach.observed > record.breach.limit == 256 * 2**20
    assert record.usage.memory is not None and record.usage.memory < 600 * 2**20
    assert any(value > 0 for value in _optuna.constraints_of(trial).values()) or trial.system_attrs


def test_the_start_counts_against_the_time_limit() -> None:
    class SlowToArrive:
        def __reduce__(self) -> Any:
            return (time.sleep, (60,))

    slow = SlowToArrive()
    trial = run_one(lambda trial: float(slow is None), Limits(wall_time=1.0), grace_period=0.5)
    record = read_record(trial)
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "wall_time"


def test_a_memory_error_of_its_own_is_the_objectives_error() -> None:
    def objective(trial: optuna.Trial) -> float:
        raise MemoryError("I made this up")

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(memory="1GiB")))
    with pytest.raises(MemoryError, match="made this up"):
        study.optimize(isolated(objective), n_trials=1)
    assert study.trials[0].state == TrialState.FAIL


def test_a_hung_native_call_is_killed_after_the_grace_period() -> None:
    def objective(trial: optuna.Trial) -> float:
        # Holds the interpreter lock and never handles signals.
        ctypes.PyDLL(None).sleep(60)
        return 0.0

    start = time.monotonic()
    trial = run_one(objective, Limits(wall_time=0.3), grace_period=0.2)
    assert time.monotonic() - start < 30
    assert trial.state == TrialState.PRUNED
    assert read_record(trial).outcome == "terminated"


def test_a_stopped_process_meets_its_time_limit() -> None:
    def objective(trial: optuna.Trial) -> float:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
        return 0.0

    trial = run_one(objective, Limits(wall_time=0.5), grace_period=10)
    record = read_record(trial)
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "wall_time"


def test_a_stopped_process_does_not_hang_the_study() -> None:
    def objective(trial: optuna.Trial) -> float:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
        return 0.0

    trial = run_one(objective, grace_period=0.3)
    assert trial.state == TrialState.FAIL
    assert "SIGSTOP" in (read_record(trial).reason or "")


@pytest.mark.slow
def test_cpu_time() -> None:
    def objective(trial: optuna.Trial) -> float:
        while True:
            pass

    trial = run_one(objective, Limits(cpu_time=0.5), grace_period=1)
    record = read_record(trial)
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "cpu_time"


def test_a_stop_by_the_kernel_is_a_breach() -> None:
    def objective(trial: optuna.Trial) -> float:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGXCPU)
        return 1.0

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(cpu_time=50)))
    study.optimize(isolated(objective), n_trials=1)
    record = read_record(study.trials[0])
    assert record.outcome == "terminated" and record.breach is not None
    assert (record.breach.resource, record.breach.limit) == ("cpu_time", 50)
    assert str(record.reason).startswith("CPU time limit exceeded")


def test_an_objective_that_ignores_the_stop_is_killed() -> None:
    def objective(trial: optuna.Trial) -> float:
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(60)

    record = read_record(run_one(objective, Limits(wall_time=0.3), grace_period=1.2))
    assert record.outcome == "terminated"
    assert re.fullmatch(
        r"Time limit of 300 ms exceeded\. The trial was killed after [\d.]+ s\.",
        str(record.reason),
    )


def test_returning_after_the_stop_is_a_breach() -> None:
    def objective(trial: optuna.Trial) -> float:
        try:
            time.sleep(60)
        except optuna.TrialPruned:
            trial.set_user_attr("saved", True)
        return 1.0

    trial = run_one(objective, Limits(wall_time=0.3))
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["saved"] is True
    assert read_record(trial).outcome == "terminated"


def daemonize(act: Callable[[], Any]) -> None:
    """Start a process that has lost its parent and left the session."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork() == 0:
            act()
            time.sleep(120)
        os._exit(0)
    os.waitpid(pid, 0)


def burn() -> None:
    while True:
        pass


def grow() -> None:
    held = []
    while True:
        held.append(b"x" * 2**20)
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "limits"),
    [(burn, Limits(cpu_time="1s")), (grow, Limits(memory="250MiB"))],
    ids=["cpu_time", "memory"],
)
def test_what_a_daemon_of_the_trial_uses_counts_while_it_runs(
    act: Callable[[], Any], limits: Limits
) -> None:
    def objective(trial: optuna.Trial) -> float:
        daemonize(act)
        time.sleep(100)
        return 1.0

    trial = run_one(objective, limits, grace_period=0.2)
    record = read_record(trial)
    (resource,) = limits.amounts()
    assert record.breach is not None and record.breach.resource == resource
    assert record.usage.wall_time is not None and record.usage.wall_time < 80


def test_what_a_daemon_shares_with_the_trial_counts_once() -> None:
    def objective(trial: optuna.Trial) -> float:
        block = bytearray(b"x") * (200 * 2**20)
        daemonize(lambda: time.sleep(120))
        time.sleep(0.5)
        return float(len(block))

    trial = run_one(objective, Limits(memory="400MiB"))
    record = read_record(trial)
    assert record.outcome == "completed"
    assert record.usage.memory is not None and record.usage.memory < 350 * 2**20
