"""The GPUs of this machine, for the ledger to tell apart."""

from __future__ import annotations

from collections.abc import Sequence
import os

from optuna_quota._ledger.gpus import Gpu
from optuna_quota._metering.nvml import GpuError
from optuna_quota._metering.visible_gpus import visible_gpus
from optuna_quota._metering.warn import warn_once


def gpus_here() -> Sequence[Gpu]:
    """Return the GPUs that CUDA shows to this process, by the names that CUDA understands.

    None where NVML can't be asked, with a warning: each trial then sees all of them.
    """
    try:
        shown = visible_gpus(os.environ)
        totals = [float(device.memory()[1]) for device in shown.devices]
        uuids = [device.uuid() for device in shown.devices]
    except GpuError as error:
        warn_once("gpu: one a trial", f"No trial is given a GPU of its own: {error.reason}.")
        return ()
    if not shown.unresolved:
        return [Gpu(uuid, total) for uuid, total in zip(uuids, totals, strict=True)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    warn_once(
        "gpu: unresolved",
        f"It can't be known which GPUs CUDA_VISIBLE_DEVICES={visible} names, since the models "
        "differ and CUDA counts the fastest first. Trials are given these numbers as they are, "
        "and the memory of the smallest GPU is assumed. Set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name "
        "GPUs by UUID.",
    )
    return [Gpu(entry, min(totals)) for entry in shown.unresolved]
