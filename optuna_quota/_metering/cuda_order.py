"""The order in which CUDA numbers GPUs of different models: its own, the fastest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
import os
import subprocess
import sys


# Seconds. To start CUDA takes a few on a machine with many GPUs.
_TIMEOUT = 30.0

# CUDA is started in a process of its own: one that has started it can't be forked for trials.
_SCRIPT = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
count, device, uuid = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(16)
if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
    raise SystemExit(1)
for i in range(count.value):
    if cuda.cuDeviceGet(ctypes.byref(device), i) or cuda.cuDeviceGetUuid(uuid, device):
        raise SystemExit(1)
    print(uuid.raw.hex())
"""


def cuda_order(environment: Mapping[str, str]) -> Sequence[str]:
    """Return the UUIDs of all GPUs by the numbers that CUDA gives them; empty if unknown.

    Args:
        environment: ``CUDA_DEVICE_ORDER`` counts, which GPUs are shown does not.
    """
    return _cuda_order(environment.get("CUDA_DEVICE_ORDER"))


@functools.lru_cache(maxsize=4)
def _cuda_order(order: str | None) -> Sequence[str]:
    hidden = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    if order is not None:
        environment["CUDA_DEVICE_ORDER"] = order
    if not sys.executable:
        return ()
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SCRIPT],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return () if done.returncode else tuple(map(_uuid, done.stdout.split()))


def _uuid(digits: str) -> str:
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return "GPU-" + "-".join(parts)


def forget_cuda_order() -> None:
    """Discard the cached order; for tests."""
    _cuda_order.cache_clear()
