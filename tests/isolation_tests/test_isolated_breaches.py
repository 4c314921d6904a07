"""An isolated trial over a limit is ended, whatever it does at that moment."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import isolated
from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler
from optuna_quota._isolation.launch import can_supervise
from optuna_quota._isolation.memory_limits import DataLimit
from optuna_quota._records import read_record
from tests.isolation_tests.trials import run_one


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not can_supervise(), reason="needs Linux with pidfds"
)


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
    assert any(value > 0 for value in trial.constraints.values()) or trial.system_attrs


def test_a_limit_below_what_a_process_takes_is_a_breach_at_once() -> None:
    def objective(trial: optuna.Trial) -> float:
        import numpy as np

        total = 0.0
        for _ in range(600):
            total += float((np.ones((400, 400)) @ np.ones((400, 400))).sum())
            time.sleep(0.05)
        return total

    trial = run_one(objective, Limits(memory="4MiB"), grace_period=0.5)
    record = read_record(trial)
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "memory"


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


def test_untouched_memory_is_given_back() -> None:
    def objective(trial: optuna.Trial) -> float:
        import numpy as np

        sparse = np.empty(300 * 2**20, dtype=np.uint8)
        time.sleep(1.5)
        filled = np.ones(240 * 2**20, dtype=np.uint8)
        return float(len(sparse) + len(filled))

    trial = run_one(objective, Limits(memory="512MiB"))
    assert trial.state == TrialState.COMPLETE


MAPPING = """
import mmap, sys
sys.stdin.readline()
sparse = mmap.mmap(-1, 300 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print("mapped", flush=True)
sys.stdin.readline()
"""


def test_what_stays_untouched_is_looked_at_in_haste_until_it_is_given_back() -> None:
    import resource

    arguments = [sys.executable, "-c", MAPPING]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        pid = process.pid
        try:
            memory = 400 * 2**20
            before = memory + 2**20
            _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
            resource.prlimit(pid, resource.RLIMIT_DATA, (before, hard))
            limit = DataLimit(pid, memory, before)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "mapped\n"
            waits = [limit.update(10 * 2**20) for _ in range(DataLimit.WINDOW)]
            assert waits == [DataLimit.FAST_PERIOD] * (DataLimit.WINDOW - 1) + [DataLimit.PERIOD]
            after, _ = resource.prlimit(pid, resource.RLIMIT_DATA)
            assert 270 * 2**20 < after - before < 310 * 2**20
        finally:
            process.kill()


def test_a_hung_native_call_is_killed_after_the_grace_period() -> None:
    def objective(trial: optuna.Trial) -> float:
        # Holds the interpreter lock and never looks for signals.
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


def test_cpu_time() -> None:
    def objective(trial: optuna.Trial) -> float:
        while True:
            pass

    trial = run_one(objective, Limits(cpu_time=0.5), grace_period=1)
    record = read_record(trial)
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "cpu_time"


@pytest.mark.parametrize(
    ("limits", "most"), [(Limits(wall_time=100), 1000), (Limits(cpu_time=50), 50)]
)
def test_the_kernel_leaves_room_for_all_that_may_be_granted(limits: Limits, most: float) -> None:
    def objective(trial: optuna.Trial) -> float:
        import resource

        return float(resource.getrlimit(resource.RLIMIT_CPU)[0])

    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(cpu_time=1000))
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=limits))
    study.optimize(isolated(objective), n_trials=1)
    assert most <= study.trials[0].values[0] <= most + 10


def test_a_stop_of_the_kernels_is_not_booked_as_the_objectives_own() -> None:
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


def test_swallowing_the_stop_does_not_help() -> None:
    def objective(trial: optuna.Trial) -> float:
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(60)

    trial = run_one(objective, Limits(wall_time=0.3), grace_period=0.3)
    assert read_record(trial).outcome == "terminated"


def test_swallowing_the_stop_and_returning_is_a_breach_all_the_same() -> None:
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


@pytest.mark.parametrize("limits", [Limits(memory=1e30), Limits(cpu_time=1e30)])
def test_limits_beyond_what_the_kernel_counts_are_none(limits: Limits) -> None:
    assert run_one(lambda trial: 1.0, limits, grace_period=1e30).value == 1.0
