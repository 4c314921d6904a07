"""This machine's GPUs, and which of them a trial is given: the one with the most room.

The memory of each GPU is a resource of its own, held at one moment on one machine, so that the
protocol settles between workers which trial gets it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
import os

from optuna_quota._ledger.protocol import Claim, DEVICE, ResourceRequest
from optuna_quota._metering.nvml import GpuError
from optuna_quota._metering.visible_gpus import visible_gpus
from optuna_quota._metering.warn import warn_once


# The smallest share of a GPU's memory with which a trial of unknown needs starts.
_MIN_SHARE = 1 / 8


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
        """The name of this GPU's memory as a resource."""
        return DEVICE + self.uuid


def request_gpu(
    gpus: Sequence[Gpu], claims: Iterable[Claim], machine: str, need: float | None
) -> dict[str, ResourceRequest]:
    """Return the request for the GPU with the most room; empty without GPUs.

    Args:
        gpus: The machine's GPUs.
        claims: The running trials.
        machine: This machine.
        need: Bytes that the trial needs; None if unknown.
    """
    if not gpus:
        return {}
    here = [claim for claim in claims if claim.machine == machine]
    room = {gpu: gpu.memory - _held(gpu, here) for gpu in gpus}
    best = max(gpus, key=lambda gpu: room[gpu])
    if need is not None:
        return {best.resource: ResourceRequest(need, need)}
    least = _MIN_SHARE * best.memory
    return {best.resource: ResourceRequest(least, max(least, room[best] / 2))}


def find_gpu(granted: Mapping[str, float]) -> str | None:
    """Return the UUID of the GPU in a grant."""
    names = (name.removeprefix(DEVICE) for name in granted if name.startswith(DEVICE))
    return next(names, None)


def _held(gpu: Gpu, claims: Iterable[Claim]) -> float:
    return sum(
        max(claim.granted.get(gpu.resource, 0.0), claim.asked.get(gpu.resource, 0.0))
        for claim in claims
    )


def gpus_here() -> Sequence[Gpu]:
    """Return the GPUs that CUDA shows to this process, by the names that CUDA accepts.

    Returns none, with a warning, if NVML is not available: each trial then sees all GPUs.
    """
    try:
        shown = visible_gpus(os.environ)
        totals = [float(device.memory()[1]) for device in shown.devices]
        uuids = [device.uuid() for device in shown.devices]
    except GpuError as error:
        warn_once("gpu: one a trial", f"Trials are not assigned to single GPUs: {error.reason}.")
        return ()
    if not shown.unresolved:
        return [Gpu(uuid, total) for uuid, total in zip(uuids, totals, strict=True)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    warn_once(
        "gpu: unresolved",
        f"CUDA_VISIBLE_DEVICES={visible} is ambiguous: the GPUs differ, and CUDA numbers the "
        "fastest first. Trials get these numbers unchanged, and the memory of the smallest GPU "
        "is assumed. Set CUDA_DEVICE_ORDER=PCI_BUS_ID, or use UUIDs.",
    )
    return [Gpu(entry, min(totals)) for entry in shown.unresolved]
