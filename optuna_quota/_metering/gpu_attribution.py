"""How what a trial uses of GPUs can be told: pure, from what the driver tells of each device."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Literal


GpuSource = Literal["process", "device", "framework"]

# Bytes. A CUDA context alone takes more; less is what a driver's own bookkeeping moves.
NOTICEABLE = 32 * 2**20


@dataclass
class DeviceReading:
    """What the driver tells of one device at one moment.

    Attributes:
        used: Bytes in use by anyone; None when it does not tell.
        total: Bytes in all.
        held: Bytes by process that it lists, by pid; None where it does not tell.
        joules: Energy since the device was first read, by anyone; None when it does not tell.
        busy: Busy GPU-seconds since then, of all processes; None when it does not tell.
        lost: Why nothing can be told of it any more.
    """

    used: float | None = None
    total: float | None = None
    held: Mapping[int, float | None] = field(default_factory=dict)
    joules: float | None = None
    busy: float | None = None
    lost: str | None = None

    @property
    def in_use(self) -> float | None:
        """Bytes in use by anyone, by whatever tells; None when nothing does."""
        listed = [held for held in self.held.values() if held is not None]
        if self.used is None:
            return sum(listed) if listed else None
        return max(self.used, sum(listed))


@dataclass(frozen=True)
class DeviceShare:
    """One device of a trial at one moment, in bytes.

    Attributes:
        held: What the trial holds of it.
        used: What anyone does.
        total: Its memory.
    """

    held: float
    used: float
    total: float


@dataclass(frozen=True)
class GpuUse:
    """How a trial's use of GPUs is told, and of which devices at the last reading.

    Attributes:
        source: By process, by what its devices hold, or by the framework from inside.
        devices: The devices that it holds something of.
    """

    source: GpuSource
    devices: tuple[DeviceShare, ...] = ()


@dataclass(frozen=True)
class Source:
    """How a trial's use of GPUs is told.

    Attributes:
        name: By process or by device; None when it is not on a GPU, or when it can't be told.
        reason: Why it can't be told, as the end of a sentence.
        is_shared: Whether that is because of another trial.
    """

    name: GpuSource | None = None
    reason: str | None = None
    is_shared: bool = False


NOT_ON_A_GPU = Source()
_BY_PROCESS = Source("process")
_BY_DEVICE = Source("device")


def choose_source(
    *,
    is_listed: bool,
    is_told: bool,
    list_is_ours: bool,
    is_alone: bool,
    has_grown: bool,
    was_there: bool,
    why_not_listed: str,
) -> Source:
    """Return how a trial's use of GPUs can be told.

    Args:
        is_listed: Whether the driver lists a process of the trial.
        is_told: Whether it tells what that one holds.
        list_is_ours: Whether the driver has listed any process of this study by its number, so
            that one which is not listed is on no GPU.
        is_alone: Whether no other trial of this study has the trial's devices.
        has_grown: Whether they hold noticeably more than before the trial.
        was_there: Whether a process of the trial was listed before the trial already.
        why_not_listed: Why the driver's list is of no use, where it is.
    """
    if is_listed and is_told:
        return _BY_PROCESS
    if is_listed and was_there:
        # What it held before is in what the device held before.
        return Source(None, why_not_listed)
    if not has_grown or (list_is_ours and not is_listed):
        return NOT_ON_A_GPU
    if not is_alone:
        return Source(None, f"{why_not_listed}, and trials share a GPU", is_shared=True)
    return _BY_DEVICE


def is_stranger(pid: int, before: Mapping[int, object], is_alive: Callable[[int], bool]) -> bool:
    """Return whether a listed process, none of the trial's by its number, is another's for sure.

    It is when it was listed before the trial began, or when it is one that this machine shows. Any
    other may be the trial's own by the number that it has outside of its container.
    """
    return pid in before or is_alive(pid)


def growth(
    before: DeviceReading, now: DeviceReading, is_strangers: Callable[[int], bool]
) -> float | None:
    """Return what a device holds beyond what it held before, in bytes; None when unknown.

    What is known of how strangers' use has changed meanwhile is not counted.

    Args:
        before: Before the trial.
        now: Now.
        is_strangers: Whether a listed process is another's for sure.
    """
    used_before, used_now = before.in_use, now.in_use
    if used_before is None or used_now is None:
        return None
    grown = used_now - used_before
    for pid in {*before.held, *now.held}:
        if is_strangers(pid):
            grown -= (now.held.get(pid) or 0.0) - (before.held.get(pid) or 0.0)
    return grown


def has_hidden_use(reading: DeviceReading) -> bool:
    """Return whether much of a device's memory is held by processes that are not listed."""
    if reading.used is None or reading.total is None:
        return False
    listed = sum(held or 0.0 for held in reading.held.values())
    return reading.used - listed > max(reading.total / 10, 2**29)
