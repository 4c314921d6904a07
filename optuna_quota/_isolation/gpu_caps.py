"""Sets the frameworks' own GPU memory caps in a trial's process, and reads their peak counters.

NVML shows what a process holds, not what it is about to allocate. A framework with a cap fails its
own allocation, and the error is recognized as a breach.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from typing import Any

from optuna_quota._isolation.modules import after_import


_logger = logging.getLogger("optuna.quota.isolated")


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
        _set_at_most("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction, f"{fraction:.4f}")
    # A share of the device, which CuPy takes too ("50%"), is no smaller for sure.
    _set_at_most("CUPY_GPU_MEMORY_LIMIT", gpu_memory, str(int(gpu_memory)))
    after_import("torch.cuda", lambda module: cap_torch(module, gpu_memory))
    after_import("tensorflow", lambda module: cap_tensorflow(module, gpu_memory))


def _set_at_most(name: str, most: float, text: str) -> None:
    """Set an environment variable, unless it has a smaller number already."""
    try:
        if float(os.environ[name]) <= most:
            return
    except (KeyError, ValueError):
        pass
    os.environ[name] = text


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


def cap_tensorflow(tensorflow: Any, gpu_memory: float) -> None:
    """Cap TensorFlow's allocator on each device; to list the devices takes no GPU memory.

    Args:
        tensorflow: The module.
        gpu_memory: The trial's limit, in bytes.
    """
    config = tensorflow.config
    try:
        for device in config.list_physical_devices("GPU"):
            cap = config.LogicalDeviceConfiguration(memory_limit=gpu_memory / 2**20)
            config.set_logical_device_configuration(device, [cap])
    except (AttributeError, RuntimeError, ValueError) as error:
        # A version without it, or one that has started already: the meter judges alone.
        _logger.info(f"TensorFlow got no cap on its GPU memory: {error}")
        return
    set_growth = config.experimental.set_memory_growth

    def set_memory_growth(device: Any, enable: bool) -> None:
        # On a device with a cap it raises an error; TF_FORCE_GPU_ALLOW_GROWTH does the same.
        if not config.get_logical_device_configuration(device):
            set_growth(device, enable)

    config.experimental.set_memory_growth = set_memory_growth


def framework_gpu_memory() -> float | None:
    """Return the peak of GPU memory by the counters of frameworks in use, in bytes."""
    found = []
    counters = {
        "torch": _torch_peak,
        "jax": _jax_peak,
        "tensorflow": _tensorflow_peak,
        "cupy": _cupy_total,
    }
    for name, count in counters.items():
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


def _tensorflow_peak(tensorflow: Any) -> float:
    # To ask for the devices would start the runtime.
    context = sys.modules["tensorflow.python.eager.context"]._context
    if context is None or not context._initialized:
        return 0.0
    config = tensorflow.config
    names = [f"GPU:{i}" for i in range(len(config.list_logical_devices("GPU")))]
    return float(sum(config.experimental.get_memory_info(name)["peak"] for name in names))


def _cupy_total(cupy: Any) -> float:
    # Its pool frees nothing by itself: its size is its peak.
    return float(cupy.get_default_memory_pool().total_bytes())
