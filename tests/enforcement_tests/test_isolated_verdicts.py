"""How an isolated trial ended, and how it will: decisions that need no process."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from optuna_quota._enforcement.isolation.ending import Ended
from optuna_quota._enforcement.isolation.ending import find_breach_in_death
from optuna_quota._enforcement.isolation.ending import find_breach_in_shortage
from optuna_quota._enforcement.isolation.ending import name_death
from optuna_quota._enforcement.isolation.shortage import find_shortage
from optuna_quota._enforcement.isolation.shortage import Shortage
from tests.enforcement_tests.trials import caught
from tests.enforcement_tests.trials import raises


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
            Shortage("memory", 8e9),
        ),
        (
            named("OutOfMemoryError", "torch")("CUDA out of memory. Tried to allocate 2.50 GiB."),
            Shortage("gpu_memory", 2.5 * GIB),
        ),
        (
            named("XlaRuntimeError", "jaxlib.xla_extension")(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes."
            ),
            Shortage("gpu_memory", GIB),
        ),
        (
            named("ResourceExhaustedError", "tensorflow.python.framework.errors_impl")(
                "OOM when allocating tensor on device:GPU:0"
            ),
            Shortage("gpu_memory"),
        ),
        (named("XGBoostError", "xgboost.core")("std::bad_alloc"), Shortage("memory")),
        (OSError(12, "Cannot allocate memory"), Shortage("memory")),
        (RuntimeError("shapes don't match"), None),
        (ValueError("nothing of the kind"), None),
        (MemoryError("made up"), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_shortages(error: BaseException, expected: Shortage | None) -> None:
    assert find_shortage(caught(raises(error))) == expected


def test_a_failed_allocation_is_told_from_a_raised_memory_error() -> None:
    array = caught(lambda: np.ones(2**55, dtype=np.uint8))
    assert find_shortage(array) == Shortage("memory", 2.0**55)
    plain = caught(lambda: bytearray(2**60))
    assert find_shortage(plain) == Shortage("memory")

    def wrap() -> None:
        try:
            bytearray(2**60)
        except MemoryError as error:
            raise ValueError("could not load") from error

    assert find_shortage(caught(wrap)) == Shortage("memory")


LIMITS = {"memory": (1.0 * GIB, False), "cpu_time": (10.0, True)}


@pytest.mark.parametrize(
    ("shortage", "used", "enforced", "breached"),
    [
        (Shortage("memory"), 0.1 * GIB, True, True),
        (Shortage("memory"), 0.1 * GIB, False, False),
        (Shortage("memory"), 0.99 * GIB, False, True),
        (Shortage("memory", 2.0 * GIB), 0.1 * GIB, True, True),
        (Shortage("memory", 0.1 * GIB), 0.1 * GIB, True, True),
        (Shortage("memory", 0.1 * GIB), 0.1 * GIB, False, False),
        (Shortage("gpu_memory", GIB), GIB, True, False),
    ],
)
def test_a_shortage_at_the_limit_is_a_breach(
    shortage: Shortage, used: float, enforced: bool, breached: bool
) -> None:
    breach = find_breach_in_shortage(shortage, used, LIMITS, 3.0, enforced=enforced)
    assert (breach is not None) is breached
    if breach is not None:
        assert breach.observed > breach.limit == GIB


@pytest.mark.parametrize(
    ("limit", "used", "expected"), [(None, 1.0, 80.0), (4.0, 1.0, 80.0), (4.0, 3.5, 4.0)]
)
def test_a_full_device_is_a_limit(limit: float | None, used: float, expected: float) -> None:
    breach = find_breach_in_shortage(
        Shortage("gpu_memory", GIB),
        used * GIB,
        {} if limit is None else {"gpu_memory": (limit * GIB, False)},
        3.0,
        enforced=True,
        device_memory=80.0 * GIB,
    )
    assert breach is not None and breach.limit == expected * GIB < breach.observed


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (Ended(-signal.SIGSEGV), "segmentation fault"),
        (Ended(-signal.SIGKILL), "from outside"),
        (Ended(-signal.SIGKILL, oom_kills=1, memory=GIB), "out-of-memory killer"),
        (Ended(-signal.SIGKILL, "stopped"), "SIGSTOP"),
        (Ended(-signal.SIGKILL, "request"), "interrupted"),
        (Ended(0), "before it gave a result"),
        (Ended(7), "exit code 7"),
        (Ended(None), "unknown way"),
        (Ended(-200), "signal 200"),
    ],
)
def test_every_death_has_a_name(ended: Ended, words: str) -> None:
    assert words in name_death(ended)
    assert name_death(ended).endswith(".")


@pytest.mark.parametrize(
    ("ended", "resource"),
    [
        (Ended(-signal.SIGABRT, memory=0.97 * GIB), "memory"),
        (Ended(-signal.SIGKILL, memory=0.5 * GIB, leaf_oom_kills=1), "memory"),
        (Ended(-signal.SIGKILL, memory=0.5 * GIB, oom_kills=1), None),
        (Ended(-signal.SIGXCPU, cpu_time=9.9), "cpu_time"),
        (Ended(1, cpu_time=9.9), None),
        (Ended(1), None),
    ],
)
def test_a_death_at_a_limit_is_a_breach(ended: Ended, resource: str | None) -> None:
    breach = find_breach_in_death(ended, LIMITS, 5.0)
    assert (None if breach is None else breach.resource) == resource
    if breach is not None:
        assert breach.observed > breach.limit
