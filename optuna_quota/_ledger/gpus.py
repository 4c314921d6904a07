"""This machine's GPUs, and which of them a trial is given: those with the most room.

The memory of each GPU is a resource of its own, held at one moment on one machine, so that the
protocol settles between workers which trial gets it. What processes outside of the study hold is
read when a trial starts; nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
import os
from types import MappingProxyType

from optuna_quota._ledger.protocol import Claim, DEVICE, ResourceRequest
from optuna_quota._metering.nvml import answer_in_time, GpuError
from optuna_quota._metering.visible_gpus import memory_by_device, visible_gpus
from optuna_quota._metering.warn import warn_once
from optuna_quota._units import counted


# The smallest share of a GPU's memory with which a trial of unknown needs starts.
_MIN_SHARE = 1 / 8
# Seconds that a study waits for a driver that is slow to start: what it says holds for all trials.
_STUDY_START_TIME = 60.0


@dataclass(frozen=True)
class Gpu:
    """One GPU: its identifier as CUDA_VISIBLE_DEVICES takes it, and its memory in bytes."""

    uuid: str
    memory: float

    @property
    def resource(self) -> str:
        """The name of this GPU's memory as a resource."""
        return DEVICE + self.uuid


def request_gpus(
    gpus: Sequence[Gpu],
    claims: Iterable[Claim],
    machine: str,
    need: float | None,
    *,
    count: int = 1,
    in_use: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, ResourceRequest]:
    """Return the request for the GPUs with the most room; empty without GPUs.

    ``need`` is in bytes, evenly on all of a trial's GPUs, None if unknown; ``in_use`` has what
    all processes hold now, by UUID, where known.
    """
    here = [claim for claim in claims if claim.machine == machine]
    each = None if need is None else need / count
    room, usable = {}, {}
    for gpu in gpus:
        name = gpu.resource
        held = sum(max(c.granted.get(name, 0.0), c.asked.get(name, 0.0)) for c in here)
        # Only what exceeds all grants is surely other processes'.
        outside = max(0.0, in_use.get(gpu.uuid, 0.0) - held)
        usable[gpu] = gpu.memory - outside
        room[gpu] = usable[gpu] - held
    # One that is full of others' memory comes last: no trial of this study will free it.
    order = sorted(
        gpus, key=lambda gpu: (each is None or usable[gpu] >= each, room[gpu]), reverse=True
    )
    requests = {}
    for gpu in order[:count]:
        least = _MIN_SHARE * gpu.memory if each is None else each
        most = max(least, room[gpu] / 2) if each is None else each
        requests[gpu.resource] = ResourceRequest(least, most)
    return requests


@dataclass(frozen=True)
class GpuChoice:
    """Which GPUs one trial requests; the fields are arguments of :func:`request_gpus`."""

    gpus: Sequence[Gpu]
    machine: str
    need: float | None
    count: int
    in_use: Mapping[str, float]

    def request(self, claims: Iterable[Claim]) -> dict[str, ResourceRequest]:
        return request_gpus(
            self.gpus, claims, self.machine, self.need, count=self.count, in_use=self.in_use
        )

    def revise(
        self, requests: Mapping[str, ResourceRequest], number: int, claims: Iterable[Claim]
    ) -> dict[str, ResourceRequest] | None:
        """Return what to request after all, as others ask for the same GPUs; None if settled.

        Of trials that ask at once, the one with the lower number has its choice. It asks again
        until the others have seen that: one may have read the claims before this was among them.
        """
        others = [claim for claim in claims if claim.number != number]
        before = [each if each.number < number else replace(each, asked={}) for each in others]
        mine = self.request(before)
        if mine.keys() | self.request(others).keys() <= requests.keys():
            return None
        return {n: r for n, r in requests.items() if not n.startswith(DEVICE)} | mine


def find_gpus(granted: Mapping[str, float]) -> str | None:
    """Return the UUIDs of the GPUs in a grant as ``CUDA_VISIBLE_DEVICES`` takes them."""
    names = [name.removeprefix(DEVICE) for name in granted if name.startswith(DEVICE)]
    return ",".join(names) or None


def check_gpus_per_trial(gpus: Sequence[Gpu], count: int) -> None:
    """Raise a ValueError if no trial can have so many of these GPUs."""
    if not gpus or count == 1:
        return
    whole = [gpu for gpu in gpus if not gpu.uuid.startswith("MIG-")]
    if len(whole) < count:
        instances = "" if len(whole) == len(gpus) else "; a process can use one MIG instance only"
        raise ValueError(
            f"`gpus_per_trial` must be at most the {counted(len(whole), 'GPU')} that this worker "
            f"may use but got {count}{instances}."
        )


def memory_in_use(gpus: Sequence[Gpu]) -> dict[str, float]:
    """Return the bytes that all processes hold of these GPUs now, by UUID, where known."""
    known = memory_by_device(os.environ) if gpus else {}
    return {gpu.uuid: float(known[gpu.uuid][0]) for gpu in gpus if gpu.uuid in known}


def gpus_here() -> Sequence[Gpu]:
    """Return the GPUs that CUDA shows to this process, by the names that CUDA accepts.

    Returns none, with a warning, if NVML is not available: each trial then sees all GPUs.
    """
    try:
        shown = visible_gpus(os.environ, within=_STUDY_START_TIME)
        totals = answer_in_time(lambda: [float(gpu.memory()[1]) for gpu in shown.devices])
        uuids = answer_in_time(lambda: [gpu.uuid() for gpu in shown.devices])
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
