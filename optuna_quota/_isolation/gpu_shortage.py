"""Whose fault it is that GPU memory ran out: pure, from what the error and the driver tell.

A trial at its limit, or one that filled its GPU by itself, is over a limit. One that found the GPU
full of others had bad luck: it failed, and nothing is to be learned from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import re

from optuna_quota._isolation.shortage import Shortage
from optuna_quota._metering.breach import AT_LIMIT
from optuna_quota._metering.breach import Ceiling
from optuna_quota._metering.breach import Ceilings
from optuna_quota._metering.breach import find_refused_breach
from optuna_quota._metering.gpu_attribution import DeviceShare
from optuna_quota._resources import Breach
from optuna_quota._resources import format_amount


# Characters of an error's message that a reason repeats.
_LONGEST_TEXT = 300

_SIZE = r"([\d.]+) ([KMGT]i)B"
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# PyTorch: "Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 80.00 GiB of which 4.00 MiB
# is free. [...] Including non-PyTorch memory, this process has 1.40 GiB memory in use."
_CAPACITY = re.compile(rf"total capacity of {_SIZE}")
_FREE = re.compile(rf"of which {_SIZE} is free")
_HELD = re.compile(rf"this process has {_SIZE} memory in use")
# CuPy: "Out of memory allocating 8,000 bytes (allocated so far: 512 bytes, limit set to: 4,096
# bytes)."
_OWN_LIMIT = re.compile(
    r"allocating ([\d,]+) bytes \(allocated so far: ([\d,]+) bytes, limit set to: ([\d,]+) bytes"
)


@dataclass(frozen=True)
class GpuShortage:
    """What is known of GPU memory at the moment when an allocation was refused, in bytes.

    Attributes:
        requested: What was asked for.
        held: What the trial held on all of its GPUs.
        held_there: What it held on the GPU in question.
        capacity: The memory of that GPU.
        free: What was free of it.
        is_capped: Whether the framework refused it by its own cap, though the GPU had room.
    """

    requested: float | None = None
    held: float | None = None
    held_there: float | None = None
    capacity: float | None = None
    free: float | None = None
    is_capped: bool = False

    @property
    def others(self) -> float | None:
        """What others held of the GPU in question, None when unknown."""
        if self.capacity is None or self.free is None or self.held_there is None:
            return None
        return max(0.0, self.capacity - self.free - self.held_there)


def read_gpu_shortage(
    shortage: Shortage,
    peak: float | None,
    devices: Sequence[DeviceShare],
    device_memory: float | None,
) -> GpuShortage:
    """Return what is known, by the error's own words where it tells, else by the driver.

    Args:
        shortage: The allocation.
        peak: What the trial held at its peak, in bytes, when its GPUs don't tell.
        devices: The trial's GPUs at the moment of the error, none when unknown.
        device_memory: The memory of each of its GPUs, when nothing else tells.
    """
    text = shortage.text
    capacity, free, told = (_size(pattern, text) for pattern in (_CAPACITY, _FREE, _HELD))
    requested, is_capped = shortage.requested, False
    if requested is not None and free is not None:
        is_capped = requested <= free
    cap = _OWN_LIMIT.search(text)
    if cap is not None:
        requested, allocated, most = (float(figure.replace(",", "")) for figure in cap.groups())
        is_capped = allocated + requested > most
    held = held_there = peak
    if devices:
        fullest = min(devices, key=lambda device: device.total - device.used)
        held, held_there = sum(device.held for device in devices), fullest.held
        capacity = capacity or fullest.total
        free = fullest.total - fullest.used if free is None else free
    return GpuShortage(
        requested,
        _larger(held, told),
        _larger(held_there, told),
        capacity or device_memory,
        free,
        is_capped,
    )


def find_gpu_breach(known: GpuShortage, ceilings: Ceilings, elapsed: float) -> Breach | None:
    """Return the limit that an allocation failed at, the GPU's size among them; None for none.

    Args:
        known: What is known of it.
        ceilings: The ceilings in force by resource, and whether each comes from a quota.
        elapsed: Seconds since the start of the trial.
    """
    requested, share = known.requested or 0.0, 0.0 if known.is_capped else AT_LIMIT
    wanted = (known.held or 0.0) + requested
    breach = find_refused_breach("gpu_memory", wanted, ceilings, elapsed, share=share)
    if breach is not None or known.capacity is None or known.is_capped:
        return breach
    wanted = (known.held_there or 0.0) + requested
    size = {"gpu_memory": Ceiling(known.capacity)}
    return find_refused_breach("gpu_memory", wanted, size, elapsed)


def name_bad_luck(known: GpuShortage, error: BaseException) -> str | None:
    """Return why a trial failed that found its GPU full; None when it can't be known to be so.

    Args:
        known: What is known; no limit of the trial's, see :func:`find_gpu_breach`.
        error: What the objective raised.
    """
    if known.capacity is None or known.is_capped:
        return None
    asked = "" if known.requested is None else f" and asked for {_bytes(known.requested)} more"
    held = "an unknown part" if known.held_there is None else _bytes(known.held_there)
    others = "" if not known.others else f", {_bytes(known.others)} of it taken by other processes"
    text = " ".join(str(error).split())[:_LONGEST_TEXT].removesuffix(".")
    found = f"The GPU was full{others}: the trial held {held}{asked}."
    return f"{found} {type(error).__name__}: {text}." if text else found


def _bytes(amount: float) -> str:
    return format_amount("gpu_memory", amount)


def _size(pattern: re.Pattern[str], text: str) -> float | None:
    found = pattern.search(text)
    return None if found is None else float(found[1]) * _UNITS[found[2]]


def _larger(one: float | None, other: float | None) -> float | None:
    return max((figure for figure in (one, other) if figure is not None), default=None)
