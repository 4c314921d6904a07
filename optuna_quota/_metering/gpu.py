"""What processes use of GPUs, from what the driver tells of each device."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
import os
import threading
import time
from typing import Protocol

from optuna_quota._metering.nvml import GpuError
from optuna_quota._metering.nvml import GpuSample


GPU_RESOURCES = ("gpu_memory", "gpu_time", "energy")

# Stands for every pid where the driver does not even list processes.
ANYONE = -1


class GpuDevice(Protocol):
    """What is asked of a device, see :class:`~optuna_quota._metering.nvml.NvmlDevice`."""

    is_instance: bool

    def processes(self) -> dict[int, int | None]: ...
    def n_graphics_processes(self) -> int: ...
    def memory(self) -> tuple[int, int]: ...
    def samples(self, since: float) -> list[GpuSample]: ...
    def joules(self) -> float: ...


@dataclass
class GpuReading:
    """What is known of all processes on all visible GPUs.

    Attributes:
        memory: Bytes held at this moment, by pid; None where the driver does not tell.
        busy: Busy GPU-seconds so far, by pid.
        joules: Energy so far, by pid.
        unknown: What can't be told and why, by pid and resource.
        hidden: Why the list is of no use, None while it is.
        lost: Why nothing can be told any more, None while something can.
    """

    memory: dict[int, float | None] = field(default_factory=dict)
    busy: dict[int, float] = field(default_factory=dict)
    joules: dict[int, float] = field(default_factory=dict)
    unknown: dict[int, dict[str, str]] = field(default_factory=dict)
    hidden: str | None = None
    lost: str | None = None


HIDDEN = (
    "the driver lists processes by numbers that are not this container's "
    "(start it with the host's PID namespace)"
)
_INSTANCE = "it is not told by process on a MIG instance"
_NO_MEMORY = "the driver does not tell it by process"
_CROWDED = "several processes share a GPU that does not tell how busy each keeps it"


class GpuReader:
    """Adds up what processes use of the visible devices; safe to call from several threads.

    Busy time is the integral of the driver's utilization samples. Energy is a device's own
    counter: a process that has the device to itself is charged all of it, idle power included;
    processes that share it are charged by how busy they kept it, evenly when none did; where the
    driver does not tell how busy, it is unknown.

    Args:
        devices: The visible devices.
        clock: Seconds since 1970, as the driver dates its samples.
        is_alive: Whether there is a process of a number.
    """

    def __init__(
        self,
        devices: Iterable[GpuDevice],
        *,
        clock: Callable[[], float] = time.time,
        is_alive: Callable[[int], bool] = lambda pid: os.path.exists(f"/proc/{pid}"),
    ) -> None:
        self._clock = clock
        self._is_alive = is_alive
        self._lock = threading.Lock()
        now = clock()
        self._meters = [_DeviceMeter(device, now) for device in devices]
        self._read_at = float("-inf")
        self.latest = GpuReading()
        self.cost = 0.0

    def read(self, max_age: float = 0.0) -> GpuReading:
        """Return what is known, asked anew if what is known is older than ``max_age`` seconds."""
        with self._lock:
            now = self._clock()
            if self.latest.lost is None and not 0 <= now - self._read_at <= max_age:
                begun = time.perf_counter()
                self.latest = self._read(now)
                self._read_at = now
                self.cost = time.perf_counter() - begun
            return self.latest

    def _read(self, now: float) -> GpuReading:
        # The dictionaries of a reading are its own: whoever holds an earlier one is not disturbed.
        reading = GpuReading(busy=dict(self.latest.busy), joules=dict(self.latest.joules))
        try:
            for meter in self._meters:
                meter.read(reading, now)
            if self.latest.hidden or self._is_hidden(reading.memory):
                reading.hidden = HIDDEN
        except GpuError as error:
            reading.lost = error.reason
        self._drop_the_dead(reading)
        return reading

    def _is_hidden(self, listed: Mapping[int, float | None]) -> bool:
        strangers = [pid for pid in listed if not self._is_alive(pid)]
        if strangers:
            # Those that have just ended are gone from the list when it is asked for again.
            still: set[int] = set()
            for meter in self._meters:
                still.update(meter.device.processes())
            return any(pid in still and not self._is_alive(pid) for pid in strangers)
        return not listed and any(meter.is_full_of_nobody() for meter in self._meters)

    def _drop_the_dead(self, reading: GpuReading) -> None:
        for amounts in (reading.busy, reading.joules):
            for pid in [p for p in amounts if p not in reading.memory and not self._is_alive(p)]:
                del amounts[pid]


class _DeviceMeter:
    """Adds up what processes use of one device."""

    def __init__(self, device: GpuDevice, now: float) -> None:
        self.device = device
        self._sampled = now
        self._joules: float | None = None

    def read(self, reading: GpuReading, now: float) -> None:
        """Add this device's part to a reading."""
        try:
            listed = self.device.processes()
        except GpuError as error:
            if error.final:
                raise
            for resource in ("gpu_memory", "energy"):
                _mark(reading, ANYONE, resource, error.reason)
            listed = {}
        for pid, memory in listed.items():
            known = reading.memory.get(pid, 0.0)
            whole = None if memory is None or known is None else known + memory
            reading.memory[pid] = whole
            if memory is None:
                reason = _INSTANCE if self.device.is_instance else _NO_MEMORY
                _mark(reading, pid, "gpu_memory", reason)
        busy = self._read_busy(reading, listed, now)
        self._read_energy(reading, listed, busy)

    def _read_busy(
        self, reading: GpuReading, listed: Iterable[int], now: float
    ) -> dict[int, float] | None:
        """Return the busy seconds by process since the last time, None when unknown."""
        try:
            samples = self._samples()
        except GpuError as error:
            if error.final:
                raise
            for pid in listed:
                _mark(reading, pid, "gpu_time", error.reason)
            return None
        grown = busy_seconds(samples, self._sampled)
        self._sampled = max((s.seconds for s in samples), default=self._sampled)
        for pid in {*listed, *grown}:
            reading.busy[pid] = reading.busy.get(pid, 0.0) + grown.get(pid, 0.0)
        return grown

    def _samples(self) -> list[GpuSample]:
        if self.device.is_instance:
            raise GpuError(_INSTANCE)
        return self.device.samples(self._sampled)

    def _read_energy(
        self, reading: GpuReading, listed: Iterable[int], busy: Mapping[int, float] | None
    ) -> None:
        try:
            if self.device.is_instance:
                raise GpuError(_INSTANCE)
            joules = self.device.joules()
            before, self._joules = self._joules, joules
            grown = 0.0 if before is None else max(0.0, joules - before)
            for pid, share in shares(list(listed), busy).items():
                reading.joules[pid] = reading.joules.get(pid, 0.0) + grown * share
        except GpuError as error:
            if error.final:
                raise
            for pid in listed:
                _mark(reading, pid, "energy", error.reason)

    def is_full_of_nobody(self) -> bool:
        """Return whether much of the memory is in use though no process is listed."""
        try:
            used, total = self.device.memory()
            return used > max(total / 10, 2**29) and self._drawing() == 0
        except GpuError as error:
            if error.final:
                raise
            return False

    def _drawing(self) -> int:
        try:
            return self.device.n_graphics_processes()
        except GpuError as error:
            if error.final:
                raise
            return 0


def _mark(reading: GpuReading, pid: int, resource: str, reason: str) -> None:
    reading.unknown.setdefault(pid, {})[resource] = reason


def busy_seconds(samples: Iterable[GpuSample], since: float) -> dict[int, float]:
    """Return the integral of utilization over time by process, in seconds.

    A sample holds for the time from the one before it of the same process, or from ``since``.
    """
    last: dict[int, float] = {}
    busy: dict[int, float] = {}
    for sample in sorted(samples, key=lambda s: s.seconds):
        span = max(0.0, sample.seconds - last.get(sample.pid, since))
        busy[sample.pid] = busy.get(sample.pid, 0.0) + sample.busy * span
        last[sample.pid] = sample.seconds
    return busy


def shares(listed: list[int], busy: Mapping[int, float] | None) -> dict[int, float]:
    """Return the part of a device's energy that each process is charged; they add up to 1.

    Raises:
        GpuError: If there are several and it isn't known how busy each kept the device.
    """
    if len(listed) <= 1:
        return dict.fromkeys(listed, 1.0)
    if busy is None:
        raise GpuError(_CROWDED)
    whole = sum(busy.get(pid, 0.0) for pid in listed)
    if whole <= 0:
        return dict.fromkeys(listed, 1 / len(listed))
    return {pid: busy.get(pid, 0.0) / whole for pid in listed}
