"""How an isolated trial ended, and how it will: decisions that need no process."""

from __future__ import annotations

import signal
import subprocess

import numpy as np
import pytest

from optuna_quota._isolation.exit_cause import describe_exit
from optuna_quota._isolation.exit_cause import find_breach_at_exit
from optuna_quota._isolation.messages import ExitReport
from optuna_quota._isolation.out_of_memory import FailedAllocation
from optuna_quota._isolation.out_of_memory import find_failed_allocation
from optuna_quota._isolation.out_of_memory import find_memory_breach
from tests.isolation_tests.trials import caught
from tests.isolation_tests.trials import raises


MIB = 2**20
GIB = 2**30


def named(name: str, module: str, base: type[Exception] = RuntimeError) -> type[Exception]:
    return type(name, (base,), {"__module__": module})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 8000000000 bytes. Error code 12"
            ),
            FailedAllocation("memory", 8e9),
        ),
        (
            named("OutOfMemoryError", "torch")("CUDA out of memory. Tried to allocate 2.50 GiB."),
            FailedAllocation("gpu_memory", 2.5 * GIB),
        ),
        (
            named("XlaRuntimeError", "jaxlib.xla_extension")(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes."
            ),
            FailedAllocation("gpu_memory", GIB),
        ),
        (
            named("ResourceExhaustedError", "tensorflow.python.framework.errors_impl")(
                "OOM when allocating tensor on device:GPU:0"
            ),
            FailedAllocation("gpu_memory"),
        ),
        (named("XGBoostError", "xgboost.core")("std::bad_alloc"), FailedAllocation("memory")),
        (OSError(12, "Cannot allocate memory"), FailedAllocation("memory")),
        (RuntimeError("shapes don't match"), None),
        (ValueError("nothing of the kind"), None),
        (MemoryError("made up"), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_shortages(error: BaseException, expected: FailedAllocation | None) -> None:
    assert find_failed_allocation(caught(raises(error))) == expected


def test_a_failed_allocation_is_told_from_a_raised_memory_error() -> None:
    array = caught(lambda: np.ones(2**55, dtype=np.uint8))
    assert find_failed_allocation(array) == FailedAllocation("memory", 2.0**55)
    plain = caught(lambda: bytearray(2**60))
    assert find_failed_allocation(plain) == FailedAllocation("memory")

    def wrap() -> None:
        try:
            bytearray(2**60)
        except MemoryError as error:
            raise ValueError("could not load") from error

    assert find_failed_allocation(caught(wrap)) == FailedAllocation("memory")


REFUSED = """
Traceback (most recent call last):
  File "/usr/lib/python3.11/multiprocessing/pool.py", line 125, in worker
    result = (True, func(*args, **kwds))
                    ^^^^^^^^^^^^^^^^^^^
  File "train.py", line 3, in load
    return np.ones(900 * 2**20)
           ^^^^^^^^^^^^^^^^^^^^
numpy._core._exceptions._ArrayMemoryError: Unable to allocate 900. MiB for an array
"""
OF_BYTES = """Traceback (most recent call last):
  File "train.py", line 3, in <module>
    data = bytearray(2**31)
MemoryError
"""
RAISED = """Traceback (most recent call last):
  File "train.py", line 3, in <module>
    raise MemoryError("the table is full")
MemoryError: the table is full
"""
WITHOUT_SOURCE = """Traceback (most recent call last):
  File "<string>", line 1, in <module>
MemoryError: the table is full
"""
LOADER = """Caught MemoryError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "loader.py", line 3, in fetch
    data = bytearray(2**31)
MemoryError
"""
FITS = (
    """
All the 5 fits failed.
Below are more details about the failures:
--------------------------------------------------------------------------------
5 fits failed with the following error:
"""
    + REFUSED
)
GPU = """Traceback (most recent call last):
  File "train.py", line 3, in <module>
    model.cuda()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total \
capacity of 80.00 GiB of which 1.00 GiB is free. Including non-PyTorch memory, this process \
has 30.00 GiB memory in use.
"""


def failed_script(stderr: str | bytes) -> subprocess.CalledProcessError:
    return subprocess.CalledProcessError(1, ["python", "train.py"], stderr=stderr)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(REFUSED), FailedAllocation("memory", 900.0 * MIB)),
        (ValueError(FITS), FailedAllocation("memory", 900.0 * MIB)),
        (MemoryError(LOADER), FailedAllocation("memory")),
        (RuntimeError(LOADER), FailedAllocation("memory")),
        (failed_script(REFUSED), FailedAllocation("memory", 900.0 * MIB)),
        (failed_script(OF_BYTES.encode()), FailedAllocation("memory")),
        (failed_script("terminate called: what():  std::bad_alloc"), FailedAllocation("memory")),
        (failed_script("bash: fork: Cannot allocate memory"), FailedAllocation("memory")),
        (failed_script(GPU), FailedAllocation("gpu_memory", 2.0 * GIB)),
        (ValueError(f"train.py failed:\n{OF_BYTES}"), FailedAllocation("memory")),
        (RuntimeError(RAISED), None),
        (failed_script(RAISED), None),
        (failed_script(WITHOUT_SOURCE), None),
        (failed_script("no such dataset: MemoryError"), None),
        (failed_script(b"\xff\xfe"), None),
        (subprocess.CalledProcessError(1, ["python"]), None),
    ],
)
def test_shortages_in_other_processes(
    error: BaseException, expected: FailedAllocation | None
) -> None:
    assert find_failed_allocation(caught(raises(error))) == expected


LIMITS = {"memory": (1.0 * GIB, False), "cpu_time": (10.0, True)}


@pytest.mark.parametrize(
    ("shortage", "used", "enforced", "breached"),
    [
        (FailedAllocation("memory"), 0.1 * GIB, True, True),
        (FailedAllocation("memory"), 0.1 * GIB, False, False),
        (FailedAllocation("memory"), 0.99 * GIB, False, True),
        (FailedAllocation("memory", 2.0 * GIB), 0.1 * GIB, True, True),
        (FailedAllocation("memory", 0.1 * GIB), 0.1 * GIB, True, True),
        (FailedAllocation("memory", 0.1 * GIB), 0.1 * GIB, False, False),
        (FailedAllocation("gpu_memory", GIB), GIB, True, False),
    ],
)
def test_a_shortage_at_the_limit_is_a_breach(
    shortage: FailedAllocation, used: float, enforced: bool, breached: bool
) -> None:
    breach = find_memory_breach(shortage, used, LIMITS, 3.0, enforced=enforced)
    assert (breach is not None) is breached
    if breach is not None:
        assert breach.observed > breach.limit == GIB


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (ExitReport(-signal.SIGSEGV), "segmentation fault"),
        (ExitReport(-signal.SIGKILL), "from outside"),
        (ExitReport(-signal.SIGKILL, oom_kills=1, memory=GIB), "out-of-memory killer"),
        (ExitReport(-signal.SIGKILL, "stopped"), "SIGSTOP"),
        (ExitReport(-signal.SIGKILL, "request"), "interrupted"),
        (ExitReport(0), "before it gave a result"),
        (ExitReport(7), "exit code 7"),
        (ExitReport(None), "unknown way"),
        (ExitReport(-200), "signal 200"),
    ],
)
def test_every_death_has_a_name(ended: ExitReport, words: str) -> None:
    assert words in describe_exit(ended)
    assert describe_exit(ended).endswith(".")


@pytest.mark.parametrize(
    ("ended", "strict", "resource"),
    [
        (ExitReport(-signal.SIGABRT, memory=0.97 * GIB), True, "memory"),
        # Nothing is refused where memory is measured.
        (ExitReport(-signal.SIGABRT, memory=0.97 * GIB), False, None),
        (ExitReport(-signal.SIGKILL, memory=0.97 * GIB, oom_kills=1), True, None),
        (ExitReport(-signal.SIGABRT, memory=1.01 * GIB), False, "memory"),
        (ExitReport(-signal.SIGKILL, memory=0.5 * GIB, cgroup_oom_kills=1), False, "memory"),
        (ExitReport(-signal.SIGKILL, memory=0.5 * GIB, oom_kills=1), False, None),
        (ExitReport(-signal.SIGXCPU, cpu_time=9.9), False, "cpu_time"),
        (ExitReport(1, cpu_time=9.9), False, None),
        (ExitReport(1), False, None),
    ],
)
def test_a_death_at_a_limit_is_a_breach(
    ended: ExitReport, strict: bool, resource: str | None
) -> None:
    breach = find_breach_at_exit(ended, LIMITS, 5.0, strict_memory=strict)
    assert (None if breach is None else breach.resource) == resource
    if breach is not None:
        assert breach.observed > breach.limit
