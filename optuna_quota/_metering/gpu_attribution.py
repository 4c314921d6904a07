"""Chooses whether a trial's GPU usage is measured by process or by device. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


GpuSource = Literal["process", "device", "framework"]

# Bytes. A CUDA context alone takes more; less is within what the driver's own bookkeeping moves.
NOTICEABLE = 32 * 2**20


@dataclass
class DeviceReading:
    """What the driver reports of one device at one moment; None is unknown.

    Attributes:
        used: Bytes in use by any process.
        total: Bytes in all.
        held: Bytes by pid of the processes that the driver lists.
        joules: Energy since the device was first read, of all processes.
        busy: Busy GPU-seconds since then, of all processes.
        lost: Why nothing is known of the device any more.
        unknown: Why a total is not reported, neither by process nor of the device, by resource.
    """

    used: float | None = None
    total: float | None = None
    held: Mapping[int, float | None] = field(default_factory=dict)
    joules: float | None = None
    busy: float | None = None
    lost: str | None = None
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def in_use(self) -> float | None:
        """Bytes in use by any process, at least what the listed ones hold."""
        listed = [held for held in self.held.values() if held is not None]
        if self.used is None:
            return sum(listed) if listed else None
        return max(self.used, sum(listed))


@dataclass(frozen=True)
class DeviceShare:
    """A trial's part of one device at one moment, in bytes.

    Attributes:
        held: What the trial holds.
        used: What all processes hold.
        total: The device's memory.
    """

    held: float
    used: float
    total: float


@dataclass(frozen=True)
class GpuUse:
    """How a trial's use of GPUs was measured, and of which devices at the last reading.

    Attributes:
        source: By process, by what its devices hold, or by the framework's own counters.
        devices: The devices that it uses.
    """

    source: GpuSource
    devices: tuple[DeviceShare, ...] = ()


@dataclass(frozen=True)
class Source:
    """How a trial's use of GPUs can be measured.

    Attributes:
        name: By process or by device; None if it is on no GPU, or if it can't be measured.
        reason: Why it can't be measured, as the end of a sentence.
        is_shared: Whether that is because of another trial.
    """

    name: GpuSource | None = None
    reason: str | None = None
    is_shared: bool = False


NOT_ON_A_GPU = Source()


def choose_source(
    *,
    is_listed: bool,
    has_bytes: bool,
    lists_own_pids: bool,
    is_exclusive: bool,
    has_grown: bool,
    was_listed: bool,
    why_not_listed: str,
) -> Source:
    """Return how a trial's use of GPUs can be measured.

    Args:
        is_listed: Whether the driver lists a process of the trial.
        has_bytes: Whether it reports what that process holds.
        lists_own_pids: Whether the driver has listed any process of this study by its pid, so
            that one which is not listed is on no GPU.
        is_exclusive: Whether no other trial uses the trial's devices.
        has_grown: Whether they hold noticeably more than before the trial.
        was_listed: Whether a process of the trial was listed before the trial already.
        why_not_listed: Why the driver's list is of no use, if it is.
    """
    if is_listed and has_bytes:
        return Source("process")
    if is_listed and was_listed:
        # What it held before is part of what the device held before.
        return Source(None, why_not_listed)
    if not has_grown or (lists_own_pids and not is_listed):
        return NOT_ON_A_GPU
    if not is_exclusive:
        return Source(None, f"{why_not_listed}, and trials share a GPU", is_shared=True)
    return Source("device")


def is_foreign(pid: int, before: Mapping[int, object], is_alive: Callable[[int], bool]) -> bool:
    """Return whether a listed process that has no pid of the trial surely belongs to others.

    It does if it was listed before the trial began, or if this machine shows a process of that
    pid. Any other may be the trial's, by the pid that it has outside of its container.
    """
    return pid in before or is_alive(pid)


def growth(
    before: DeviceReading, now: DeviceReading, is_foreign: Callable[[int], bool]
) -> float | None:
    """Return what a device holds beyond what it held before, in bytes; None if unknown.

    Known changes of foreign processes are not counted.
    """
    used_before, used_now = before.in_use, now.in_use
    if used_before is None or used_now is None:
        return None
    grown = used_now - used_before
    for pid in {*before.held, *now.held}:
        if is_foreign(pid):
            grown -= (now.held.get(pid) or 0.0) - (before.held.get(pid) or 0.0)
    return grown


def has_hidden_use(reading: DeviceReading) -> bool:
    """Return whether much of a device's memory is held by processes that are not listed."""
    if reading.used is None or reading.total is None:
        return False
    listed = sum(held or 0.0 for held in reading.held.values())
    return reading.used - listed > max(reading.total / 10, 2**29)
