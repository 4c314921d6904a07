"""Assigns GPUs of this machine to trials: those with the most free memory.

The memory of each GPU is a resource of its own, which the protocol shares among workers. What
processes outside of the study hold is read when a trial starts; no trial waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
import os

from optuna_quota._ledger.protocol import Claim, DEVICE, ResourceRequest
from optuna_quota._metering.host import memory_by_device, visible_gpus
from optuna_quota._metering.meter import log_once
from optuna_quota._metering.nvml import answer_in_time, GpuError
from optuna_quota._units import counted


# A trial of unknown footprint needs at least this share of a GPU's memory to start.
_MIN_SHARE = 1 / 8
# Seconds that a study waits for a driver to start: the answer is used for all its trials.
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


@dataclass(frozen=True)
class GpuChoice:
    """Which GPUs one trial requests: those with the most room."""

    gpus: Sequence[Gpu]
    machine: str
    need: float | None  # bytes, evenly on all of the trial's GPUs; None if unknown
    count: int = 1
    # What all processes hold now, in bytes by UUID, where known.
    in_use: Mapping[str, float] = field(default_factory=dict)

    def request(self, claims: Iterable[Claim]) -> dict[str, ResourceRequest]:
        """Return the request for GPUs beside these claims; empty without GPUs."""
        here = [claim for claim in claims if claim.machine == self.machine]
        each = None if self.need is None else self.need / self.count
        room, usable = {}, {}
        for gpu in self.gpus:
            name = gpu.resource
            held = sum(max(c.granted.get(name, 0.0), c.asked.get(name, 0.0)) for c in here)
            # Only memory beyond all grants certainly belongs to other processes.
            outside = max(0.0, self.in_use.get(gpu.uuid, 0.0) - held)
            usable[gpu] = gpu.memory - outside
            room[gpu] = usable[gpu] - held

        def preference(gpu: Gpu) -> tuple[bool, float]:
            # A GPU full of other processes' memory comes last: no trial of the study will free it.
            return each is None or usable[gpu] >= each, room[gpu]

        requests = {}
        for gpu in sorted(self.gpus, key=preference, reverse=True)[: self.count]:
            least = _MIN_SHARE * gpu.memory if each is None else each
            most = max(least, room[gpu] / 2) if each is None else each
            requests[gpu.resource] = ResourceRequest(least, most)
        return requests

    def revise(
        self, requests: Mapping[str, ResourceRequest], number: int, claims: Iterable[Claim]
    ) -> dict[str, ResourceRequest] | None:
        """Return a new request if others ask for the same GPUs, None if there is no conflict.

        Of trials that ask at once, the lowest number chooses first. It asks again until the others
        have seen its claim, which they may have read the rows too early for.
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
    """Raise ValueError if there are fewer than ``gpus_per_trial`` GPUs."""
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

    Without NVML, returns none and warns: each trial then sees all GPUs.
    """
    try:
        shown = visible_gpus(os.environ, within=_STUDY_START_TIME)
        totals = answer_in_time(lambda: [float(gpu.memory()[1]) for gpu in shown.devices])
        uuids = answer_in_time(lambda: [gpu.uuid() for gpu in shown.devices])
    except GpuError as error:
        message = f"Trials are not assigned GPUs of their own, and see all: {error.reason}."
        log_once("gpu: one a trial", message)
        return ()
    if not shown.unresolved:
        return [Gpu(uuid, total) for uuid, total in zip(uuids, totals, strict=True)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    log_once(
        "gpu: unresolved",
        f"CUDA_VISIBLE_DEVICES={visible} is ambiguous: the GPUs differ, and CUDA numbers the "
        "fastest first. Trials get these numbers unchanged, and the memory of the smallest GPU "
        "is assumed. Set CUDA_DEVICE_ORDER=PCI_BUS_ID, or use UUIDs.",
    )
    return [Gpu(entry, min(totals)) for entry in shown.unresolved]
