"""Whose fault it is that GPU memory ran out."""

from __future__ import annotations

import pytest

from optuna_quota._isolation.out_of_memory import describe_full_gpu
from optuna_quota._isolation.out_of_memory import find_failed_allocation
from optuna_quota._isolation.out_of_memory import find_gpu_breach
from optuna_quota._isolation.out_of_memory import read_gpu_memory_state
from optuna_quota._metering.gpu_attribution import DeviceShare


GIB = 2**30

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
        # What it held once is no matter at the moment of the error.
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


def test_bad_luck_has_the_figures() -> None:
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


def test_what_is_not_known_to_be_bad_luck_is_the_objectives_own_error() -> None:
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
