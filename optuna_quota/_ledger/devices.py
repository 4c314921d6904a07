"""The GPUs of this machine, for the ledger to tell apart."""

from __future__ import annotations

from collections.abc import Sequence
import os

from optuna_quota._ledger.gpus import Gpu
from optuna_quota._metering import nvml
from optuna_quota._metering.gpu_gauge import visible_instances
from optuna_quota._metering.nvml import GpuError


def gpus_here() -> Sequence[Gpu]:
    """Return the GPUs that CUDA shows to this process; none where NVML can't be asked."""
    devices, _ = nvml.open_devices()
    if not devices:
        return ()
    try:
        shown = visible_instances(devices, os.environ)
        return [Gpu(device.uuid(), device.memory()[1]) for device in shown]
    except GpuError:
        return ()
