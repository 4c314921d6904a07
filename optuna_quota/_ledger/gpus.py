"""Which GPU a trial is given: the one with the most room (pure).

What a trial may hold on one GPU is a resource of its own, held at one moment on one machine, so
that the protocol settles between workers who gets which.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
import os

from optuna_quota._ledger.protocol import Claim
from optuna_quota._ledger.protocol import DEVICE
from optuna_quota._ledger.protocol import Want
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


# What a trial of unknown needs takes of a GPU, at least.
_LEAST_SHARE = 1 / 8


@dataclass(frozen=True)
class Gpu:
    """One GPU of this machine.

    Attributes:
        uuid: The identifier that CUDA_VISIBLE_DEVICES takes.
        memory: Its memory in bytes.
    """

    uuid: str
    memory: float

    @property
    def resource(self) -> str:
        """What the memory of this very GPU is called among resources."""
        return DEVICE + self.uuid


def capacities(gpus: Iterable[Gpu]) -> dict[str, float]:
    """Return what may be held on each GPU, by its resource."""
    return {gpu.resource: gpu.memory for gpu in gpus}


def want_of_gpu(
    gpus: Sequence[Gpu], claims: Iterable[Claim], machine: str, need: float | None
) -> dict[str, Want]:
    """Return the want of the GPU with the most room; nothing where there is none.

    Args:
        gpus: The machine's GPUs.
        claims: The running trials.
        machine: This machine.
        need: Bytes that the trial needs, None when unknown.
    """
    if not gpus:
        return {}
    here = [claim for claim in claims if claim.machine == machine]
    room = {gpu: gpu.memory - _held(gpu, here) for gpu in gpus}
    best = max(gpus, key=lambda gpu: room[gpu])
    if need is not None:
        return {best.resource: Want(need, need)}
    least = _LEAST_SHARE * best.memory
    return {best.resource: Want(least, max(least, room[best] / 2))}


def gpu_in(granted: Mapping[str, float]) -> str | None:
    """Return the UUID of the GPU that a grant names."""
    names = (name.removeprefix(DEVICE) for name in granted if name.startswith(DEVICE))
    return next(names, None)


def _held(gpu: Gpu, claims: Iterable[Claim]) -> float:
    return sum(
        max(claim.granted.get(gpu.resource, 0.0), claim.asked.get(gpu.resource, 0.0))
        for claim in claims
    )
