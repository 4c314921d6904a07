"""Failed allocations of memory and of GPU memory, and the limits behind them."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from optuna_quota._isolation.out_of_memory import (
    describe_full_gpu,
    FailedAllocation,
    find_failed_allocation,
    find_gpu_breach,
    find_memory_breach,
    read_gpu_memory_state,
)
from optuna_quota._metering.meter import DeviceShare
from tests.isolation_tests.trials import caught, GIB, MIB, raises


OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})
CupyError = type("OutOfMemoryError", (MemoryError,), {"__module__": "cupy.cuda.memory"})
JaxError = type("XlaRuntimeError", (RuntimeError,), {"__module__": "jaxlib.xla_extension"})

TORCH = "CUDA out of memory. Tried to allocate {asked}. GPU 0 has a total capacity of {size} of "
TORCH += "which {free} is free. Including non-PyTorch memory, this process has {held} memory in "
TORCH += "use."
FULL = TORCH.format(asked="20.00 MiB", size="80.00 GiB", free="4.00 MiB", held="1.40 GiB")
CAPPED = TORCH.format(asked="512.00 MiB", size="80.00 GiB", free="70.00 GiB", held="3.70 GiB")
OWN = TORCH.format(asked="2.00 GiB", size="8.00 GiB", free="0.50 GiB", held="7.40 GiB")
JAX = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 20971520 bytes."
CUPY = "Out of memory allocating {asked:,} bytes (allocated so far: {held:,} bytes, limit set to: "
CUPY += "{limit:,} bytes)."

HERE = DeviceShare(held=1.5 * GIB, used=79.9 * GIB, total=80.0 * GIB)
EMPTY = DeviceShare(held=0.0, used=0.0, total=80.0 * GIB)


@pytest.mark.parametrize(
    ("error", "peak", "devices", "limit", "breached"),
    [
        (OutOfMemoryError(FULL), 1.5, [HERE], 4, None),
        (OutOfMemoryError(FULL), None, [], 4, None),
        (OutOfMemoryError(FULL), None, [], None, None),
        # Its earlier peak does not matter at the moment of the error.
        (OutOfMemoryError(FULL), 3.9, [HERE], 4, None),
        (OutOfMemoryError(CAPPED), None, [], 4, 4),
        (OutOfMemoryError(CAPPED), 3.7, [], None, None),
        (OutOfMemoryError(OWN), None, [], None, 8),
        (OutOfMemoryError(OWN), None, [], 40, 8),
        (JaxError(JAX), 3.9, [], 4, 4),
        (JaxError(JAX), 1.4, [HERE], 4, None),
        # The trial holds half of each of two GPUs, others the rest of one.
        (
            JaxError(JAX),
            12.0,
            [DeviceShare(12.0 * GIB, 24.0 * GIB, 24.0 * GIB)] * 2,
            None,
            None,
        ),
        (CupyError(CUPY.format(asked=GIB, held=3 * GIB + 1, limit=4 * GIB)), None, [EMPTY], 4, 4),
        (CupyError(CUPY.format(asked=GIB, held=GIB, limit=4 * GIB)), 1.2, [HERE], 4, None),
    ],
)
def test_the_limit_the_own_gpu_or_others(
    error: Exception,
    peak: float | None,
    devices: list[DeviceShare],
    limit: float | None,
    breached: float | None,
) -> None:
    shortage = find_failed_allocation(error)
    assert shortage is not None
    held = None if peak is None else peak * GIB
    known = read_gpu_memory_state(shortage, held, devices, 80.0 * GIB)
    ceilings = {} if limit is None else {"gpu_memory": (float(limit * GIB), False)}
    breach = find_gpu_breach(known, ceilings, 3.0)
    assert (breach and breach.limit) == (breached and breached * GIB)
    assert breach is None or breach.observed > breach.limit


def test_a_full_gpu_is_described() -> None:
    error = OutOfMemoryError(FULL)
    shortage = find_failed_allocation(error)
    assert shortage is not None
    known = read_gpu_memory_state(shortage, None, [], None)
    assert str(describe_full_gpu(known, error)).startswith(
        "The GPU was full, 78.6 GiB of it taken by other processes: the trial held 1.4 GiB and "
        "asked for 20 MiB more. OutOfMemoryError: CUDA out of memory."
    )


def test_the_error_is_found_behind_others() -> None:
    outer = ValueError("Training failed.")
    outer.__cause__ = OutOfMemoryError(CAPPED)
    shortage = find_failed_allocation(outer)
    assert shortage is not None
    known = read_gpu_memory_state(shortage, None, [], None)
    breach = find_gpu_breach(known, {"gpu_memory": (4.0 * GIB, True)}, 1.0)
    assert breach is not None and breach.quota


def test_an_unknown_cause_is_an_error_of_the_objective() -> None:
    error = RuntimeError("CUDA out of memory.")
    shortage = find_failed_allocation(error)
    assert shortage is not None
    assert describe_full_gpu(read_gpu_memory_state(shortage, None, [], None), error) is None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"),
        MemoryError(
            "std::bad_alloc: out_of_memory: CUDA error (failed to allocate 8000 bytes) at: "
            "cuda_memory_resource.hpp: cudaErrorMemoryAllocation out of memory"
        ),
        CupyError("Out of memory allocating 8,000 bytes (allocated so far: 0 bytes)."),
    ],
)
def test_errors_that_are_a_gpus(error: Exception) -> None:
    shortage = find_failed_allocation(error)
    assert shortage is not None and shortage.resource == "gpu_memory"


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
def test_failed_allocations(error: BaseException, expected: FailedAllocation | None) -> None:
    assert find_failed_allocation(caught(raises(error))) == expected


def test_dots_are_no_size() -> None:
    found = find_failed_allocation(RuntimeError("Unable to allocate ... bytes"))
    assert found == FailedAllocation("memory", None)


def test_a_failed_allocation_differs_from_a_raised_memory_error() -> None:
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
def test_failed_allocations_in_other_processes(
    error: BaseException, expected: FailedAllocation | None
) -> None:
    assert find_failed_allocation(caught(raises(error))) == expected


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
def test_a_failed_allocation_at_the_limit_is_a_breach(
    shortage: FailedAllocation, used: float, enforced: bool, breached: bool
) -> None:
    breach = find_memory_breach(
        shortage, used, {"memory": (1.0 * GIB, False)}, 3.0, enforced=enforced
    )
    assert (breach is not None) is breached
    if breach is not None:
        assert breach.observed > breach.limit == GIB
