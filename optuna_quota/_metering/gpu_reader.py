"""Which GPUs the trials of other processes on this machine may use.

A device's memory is one trial's only while no other trial has the device, of another worker too.
The names of abstract sockets are seen by all processes of a machine or container, and are gone
with theirs: no file is left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
import logging
import os
from pathlib import Path
import secrets
import socket
import sys
import threading
import time
from typing import Protocol
from typing import TypeVar

import psutil

from optuna_quota._metering.gpu_attribution import DeviceReading
from optuna_quota._metering.nvml import GpuError
from optuna_quota._metering.nvml import GpuSample


_NAMES = Path("/proc/net/unix")
_PREFIX = "optuna-quota/gpu/"


class GpuRegistry:
    """Tells other processes which GPUs the trials of this one may use; not for several threads."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(8)
        self._sockets: dict[str, socket.socket] = {}

    def show(self, devices: Iterable[str]) -> None:
        """Show that trials of this process may use these devices and no others."""
        wanted = set(devices) if sys.platform.startswith("linux") else set()
        for device in self._sockets.keys() - wanted:
            self._sockets.pop(device).close()
        for device in wanted - self._sockets.keys():
            name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._sockets[device] = name
            name.bind(f"\0{_PREFIX}{device}/{self._token}")

    def others(self) -> set[str]:
        """Return the devices that trials of other processes may use."""
        if not sys.platform.startswith("linux"):
            return set()
        found = set()
        for line in _NAMES.read_text(errors="replace").splitlines():
            _, is_ours, name = line.partition(f" @{_PREFIX}")
            device, _, token = name.rpartition("/")
            if is_ours and token != self._token:
                found.add(device)
        return found


_logger = logging.getLogger("optuna.quota.metering")

GPU_RESOURCES = ("gpu_memory", "gpu_time", "energy")

# Stands for every pid where the driver does not even list processes.
ANYONE = -1

Answer = TypeVar("Answer")


class GpuDevice(Protocol):
    """What is asked of a device, see :class:`~optuna_quota._metering.nvml.NvmlDevice`."""

    is_instance: bool

    @property
    def identity(self) -> str: ...
    def processes(self) -> dict[int, int | None]: ...
    def memory(self) -> tuple[int, int]: ...
    def samples(self, since: float) -> list[GpuSample]: ...
    def utilization(self) -> float: ...
    def joules(self) -> float: ...


@dataclass
class GpuReading:
    """What is known of all processes on all visible GPUs.

    Attributes:
        memory: Bytes held at this moment, by pid; None where the driver does not tell.
        busy: Busy GPU-seconds so far, by pid.
        joules: Energy so far, by pid.
        devices: What is known of each device as a whole, by its identity.
        unknown: What can't be told and why, by pid and resource.
        lost: Why nothing can be told any more, None while something can.
        at: When it was read, in seconds since 1970.
    """

    memory: dict[int, float | None] = field(default_factory=dict)
    busy: dict[int, float] = field(default_factory=dict)
    joules: dict[int, float] = field(default_factory=dict)
    devices: dict[str, DeviceReading] = field(default_factory=dict)
    unknown: dict[int, dict[str, str]] = field(default_factory=dict)
    lost: str | None = None
    at: float = float("-inf")


_INSTANCE = "it is not told by process on a MIG instance"
_NO_MEMORY = "the driver does not tell it by process"
_CROWDED = "several processes share a GPU that does not tell how busy each keeps it"


def is_alive(pid: int) -> bool:
    """Return whether this machine, or container, has a process of this number, hidden or not."""
    if os.name != "posix":
        return psutil.pid_exists(pid)
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # another user's, though /proc may hide it
    except (ProcessLookupError, OverflowError):
        return False
    return True


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

    Attributes:
        latest: What was read last.
        cost: Seconds that it took.
        listed: Whether the driver has listed a trial's process by its number.
        outside: Numbers outside of this container of processes that are this one's own.
    """

    def __init__(
        self,
        devices: Iterable[GpuDevice],
        *,
        clock: Callable[[], float] = time.time,
        is_alive: Callable[[int], bool] = is_alive,
    ) -> None:
        self._clock = clock
        self.is_alive = is_alive
        self._lock = threading.Lock()
        now = clock()
        self._meters = [_DeviceMeter(device, now) for device in devices]
        self._tenants: dict[object, frozenset[str]] = {}
        self._presence = GpuRegistry()
        self.latest = GpuReading()
        self.cost = 0.0
        self.listed = False
        self.outside: set[int] = set()

    @property
    def identities(self) -> frozenset[str]:
        """The devices."""
        return frozenset(meter.device.identity for meter in self._meters)

    def enter(self, tenant: object, devices: frozenset[str]) -> None:
        """Note that a trial may use these devices from now on."""
        with self._lock:
            if self._tenants.get(tenant) != devices:
                self._tenants[tenant] = devices
                self._show()

    def leave(self, tenant: object) -> None:
        """Note that a trial has ended."""
        with self._lock:
            if self._tenants.pop(tenant, None) is not None:
                self._show()

    def _show(self) -> None:
        try:
            self._presence.show(frozenset().union(*self._tenants.values()))
        except OSError as error:
            _logger.debug(f"Other workers are not told which GPUs trials use: {error}.")

    def is_alone(self, tenant: object) -> bool:
        """Return whether no other trial of this machine's workers may use a trial's devices."""
        with self._lock:
            own = self._tenants.get(tenant, frozenset())
            if any(own & its for other, its in self._tenants.items() if other is not tenant):
                return False
        try:
            return not own & self._presence.others()
        except OSError as error:
            _logger.debug(f"Which GPUs other workers' trials use is not known: {error}.")
            return True

    def abandon(self) -> None:
        """Leave the devices to the parent, in the child after a fork."""
        self._presence.show(())

    def read(self, max_age: float = 0.0, after: float = float("-inf")) -> GpuReading:
        """Return what is known, asked anew if that is too old.

        Args:
            max_age: Seconds after which it is.
            after: The moment that it must have been read after.
        """
        with self._lock:
            now, latest = self._clock(), self.latest
            is_fresh = 0 <= now - latest.at <= max_age and latest.at > after
            if latest.lost is None and not is_fresh:
                begun = time.perf_counter()
                self.latest = self._read(now)
                self.cost = time.perf_counter() - begun
            return self.latest

    def _read(self, now: float) -> GpuReading:
        # The dictionaries of a reading are its own: whoever holds an earlier one is not disturbed.
        busy, joules = dict(self.latest.busy), dict(self.latest.joules)
        reading = GpuReading(busy=busy, joules=joules, at=now)
        try:
            for meter in self._meters:
                meter.read(reading, now)
        except GpuError as error:
            reading.lost = error.reason
        lost = [device.lost for device in reading.devices.values()]
        if all(lost):
            reading.lost = reading.lost or next(iter(lost), None)
        self._drop_the_dead(reading)
        return reading

    def _drop_the_dead(self, reading: GpuReading) -> None:
        for amounts in (reading.busy, reading.joules):
            for pid in [p for p in amounts if p not in reading.memory and not self.is_alive(p)]:
                del amounts[pid]


class _DeviceMeter:
    """Adds up what processes use of one device."""

    def __init__(self, device: GpuDevice, now: float) -> None:
        self.device = device
        self._sampled = now
        self._read_at = now
        self._first_joules: float | None = None
        self._joules: float | None = None
        self._busy = 0.0
        self._lost: str | None = None

    def read(self, reading: GpuReading, now: float) -> None:
        """Add this device's part to a reading."""
        found = reading.devices[self.device.identity] = DeviceReading(lost=self._lost)
        if self._lost is not None:
            return
        try:
            self._read(reading, found, now)
        except GpuError as error:
            if not error.lost:
                raise
            # The other devices go on.
            self._lost = found.lost = error.reason

    def _read(self, reading: GpuReading, found: DeviceReading, now: float) -> None:
        # First: what it holds is then never ahead of whom it lists.
        found.used, found.total = _ask(self.device.memory) or (None, None)
        try:
            listed = self.device.processes()
        except GpuError as error:
            if error.final:
                raise
            for resource in ("gpu_memory", "energy"):
                _mark(reading, ANYONE, resource, error.reason)
            listed = {}
        found.held = listed
        for pid, memory in listed.items():
            known = reading.memory.get(pid, 0.0)
            whole = None if memory is None or known is None else known + memory
            reading.memory[pid] = whole
            if memory is None:
                reason = _INSTANCE if self.device.is_instance else _NO_MEMORY
                _mark(reading, pid, "gpu_memory", reason)
        busy = self._read_busy(reading, listed, now)
        self._read_energy(reading, found, listed, busy)
        if not listed:
            self._read_utilization(found, now)
        self._read_at = now

    def _read_utilization(self, found: DeviceReading, now: float) -> None:
        """Add up how busy the device is as a whole, where that is all that can be told."""
        share = _ask(self.device.utilization)
        if share is not None:
            self._busy += share * max(0.0, now - self._read_at)
            found.busy = self._busy

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
        self,
        reading: GpuReading,
        found: DeviceReading,
        listed: Iterable[int],
        busy: Mapping[int, float] | None,
    ) -> None:
        try:
            if self.device.is_instance:
                raise GpuError(_INSTANCE)
            joules = self.device.joules()
            before, self._joules = self._joules, joules
            self._first_joules = joules if self._first_joules is None else self._first_joules
            found.joules = max(0.0, joules - self._first_joules)
            grown = 0.0 if before is None else max(0.0, joules - before)
            for pid, share in shares(list(listed), busy).items():
                reading.joules[pid] = reading.joules.get(pid, 0.0) + grown * share
        except GpuError as error:
            if error.final:
                raise
            for pid in listed:
                _mark(reading, pid, "energy", error.reason)


def _ask(question: Callable[[], Answer]) -> Answer | None:
    try:
        return question()
    except GpuError as error:
        if error.final:
            raise
        return None


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
