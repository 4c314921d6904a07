"""Sets the frameworks' own GPU memory caps in a trial's process, and reads their peak counters.

NVML shows what a process holds, not what it is about to allocate. A framework with a cap fails its
own allocation, and the error is recognized as a breach.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from typing import Any

from optuna_quota._isolation.modules import after_import


def set_gpu_caps(gpu_memory: float | None, device_memory: float | None) -> None:
    """Cap the frameworks at a trial's limit on GPU memory; without one, do nothing.

    Args:
        gpu_memory: The trial's limit, in bytes.
        device_memory: The memory of the smallest GPU or MIG instance that the trial sees, in
            bytes; None when unknown, and then only what needs no fraction is set.
    """
    if gpu_memory is None:
        return
    # By default TensorFlow takes a whole device, whatever the model needs.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    # By default JAX takes three quarters of each device at once: the need of a trial would stay
    # unknown, and its whole limit, with the driver's own part on top, would be a breach.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if device_memory:
        fraction = math.floor(1e4 * min(1.0, gpu_memory / device_memory)) / 1e4
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{fraction:.4f}")
    os.environ.setdefault("CUPY_GPU_MEMORY_LIMIT", str(int(gpu_memory)))
    after_import("torch.cuda", lambda module: cap_torch(module, gpu_memory))


def cap_torch(cuda: Any, gpu_memory: float) -> None:
    """Cap torch's allocator on each device, as soon as CUDA is used.

    Args:
        cuda: The module ``torch.cuda``.
        gpu_memory: The trial's limit, in bytes.
    """

    def cap() -> None:
        for device in range(cuda.device_count()):
            total = cuda.get_device_properties(device).total_memory
            cuda.set_per_process_memory_fraction(min(1.0, gpu_memory / total), device)

    # Torch's queue of calls at initialization: to initialize CUDA here would take GPU memory for
    # trials that never use it.
    lazily = getattr(cuda, "_lazy_call", None)
    if lazily is not None:
        lazily(cap)
    elif cuda.is_available():
        cap()


def framework_gpu_memory() -> float | None:
    """Return the peak of GPU memory by the counters of frameworks in use, in bytes."""
    found = []
    for name, count in (("torch", _torch_peak), ("jax", _jax_peak), ("cupy", _cupy_total)):
        module = sys.modules.get(name)
        if module is not None:
            # Whatever it raises, the trial's own result counts.
            with contextlib.suppress(Exception):
                found.append(float(count(module)))
    return sum(found) or None


def _torch_peak(torch: Any) -> float:
    if not torch.cuda.is_initialized():
        return 0.0
    devices = range(torch.cuda.device_count())
    return float(sum(torch.cuda.max_memory_reserved(device) for device in devices))


def _jax_peak(jax: Any) -> float:
    # To ask for the devices would start the backend.
    if not sys.modules["jax._src.xla_bridge"]._backends:
        return 0.0
    counters = [d.memory_stats() for d in jax.local_devices() if d.platform in ("gpu", "cuda")]
    return float(sum((stats or {}).get("peak_bytes_in_use", 0) for stats in counters))


def _cupy_total(cupy: Any) -> float:
    # Its pool frees nothing by itself: its size is its peak.
    return float(cupy.get_default_memory_pool().total_bytes())
