"""Reads what processes use of the visible GPUs, and which GPUs other workers' trials use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
import logging
import os
from pathlib import Path
import secrets
import socket
import sys
import threading
import time
from typing import TypeVar

import psutil

from optuna_quota._metering.nvml import answer_in_time, GpuError, GpuSample, NvmlDevice
from optuna_quota._resources import GPU_RESOURCES, RESOURCES


_logger = logging.getLogger("optuna.quota.metering")

# Stands for every pid where the driver does not even list processes.
ANY_PID = -1

# The GPU resources that add up.
GPU_TOTALS = tuple(name for name in GPU_RESOURCES if not RESOURCES[name].peak)

_NAMES = Path("/proc/net/unix")
_PREFIX = "optuna-quota/gpu/"

_INSTANCE = "it is not reported by process on a MIG instance"
_NO_BYTES = "the driver does not report it by process"
_CROWDED = "several processes share a GPU that does not report how busy each keeps it"

Answer = TypeVar("Answer")


class GpuRegistry:
    """Tells other processes which GPUs the trials of this one use; not thread-safe.

    A device's memory can be attributed to a trial only while no other trial, of any worker, has
    the device. The names of abstract sockets are visible to all processes of a machine or
    container, and vanish with their process.
    """

    def __init__(self) -> None:
        self._token = secrets.token_hex(8)
        self._sockets: dict[str, socket.socket] = {}

    def publish(self, devices: Iterable[str]) -> None:
        """Publish which devices trials of this process use; replaces what was published."""
        wanted = set(devices) if sys.platform.startswith("linux") else set()
        for device in self._sockets.keys() - wanted:
            self._sockets.pop(device).close()
        for device in wanted - self._sockets.keys():
            name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._sockets[device] = name
            name.bind(f"\0{_PREFIX}{device}/{self._token}")

    def used_by_others(self) -> set[str]:
        """Return the devices that trials of other processes use."""
        if not sys.platform.startswith("linux"):
            return set()
        found = set()
        for line in _NAMES.read_text(errors="replace").splitlines():
            _, is_ours, name = line.partition(f" @{_PREFIX}")
            device, _, token = name.rpartition("/")
            if is_ours and token != self._token:
                found.add(device)
        return found


@dataclass
class DeviceReading:
    """What the driver reports of one device at one moment; None is unknown."""

    used: float | None = None  # Bytes in use by any process
    total: float | None = None  # Bytes in all
    # Bytes by pid of the processes that the driver lists
    held: Mapping[int, float | None] = field(default_factory=dict)
    # Busy GPU-seconds and energy of all processes since the first reading, by resource
    totals: dict[str, float] = field(default_factory=dict)
    lost: str | None = None  # Why nothing is known of the device any more
    # Why a total is not reported, neither by process nor of the device, by resource
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def listed(self) -> float:
        """Bytes that the listed processes hold, where known."""
        return sum(held or 0.0 for held in self.held.values())

    @property
    def in_use(self) -> float | None:
        """Bytes in use by any process, at least those of the listed ones."""
        if self.used is None:
            return self.listed if set(self.held.values()) - {None} else None
        return max(self.used, self.listed)

    @property
    def has_hidden_use(self) -> bool:
        """Whether much of its memory is held by processes that are not listed."""
        if self.used is None or self.total is None:
            return False
        return self.used - self.listed > max(self.total / 10, 2**29)


def growth(
    before: DeviceReading, now: DeviceReading, is_foreign: Callable[[int], bool]
) -> float | None:
    """Return the growth of a device's memory since a reading, in bytes; None if unknown.

    Known changes of foreign processes are not counted.
    """
    used_before, used_now = before.in_use, now.in_use
    if used_before is None or used_now is None:
        return None
    foreign = [pid for pid in {*before.held, *now.held} if is_foreign(pid)]
    theirs = sum((now.held.get(pid) or 0.0) - (before.held.get(pid) or 0.0) for pid in foreign)
    return used_now - used_before - theirs


@dataclass
class GpuReading:
    """What is known of all processes on all visible GPUs."""

    # Bytes held at this moment, by pid; None where the driver does not report it
    memory: dict[int, float | None] = field(default_factory=dict)
    # Busy GPU-seconds and energy so far, by resource and pid
    totals: dict[str, dict[int, float]] = field(
        default_factory=lambda: {name: {} for name in GPU_TOTALS}
    )
    devices: dict[str, DeviceReading] = field(default_factory=dict)  # The devices, by identity
    # Why a resource is unknown, by pid and resource
    unknown: dict[int, dict[str, str]] = field(default_factory=dict)
    lost: str | None = None  # Why nothing is known any more, None while something is
    # When it was read, and when its totals were, in seconds since 1970
    at: float = float("-inf")
    totals_at: float = float("-inf")

    def mark_unknown(self, pids: Iterable[int], resource: str, reason: str) -> None:
        for pid in pids:
            self.unknown.setdefault(pid, {})[resource] = reason


def has_process(pid: int) -> bool:
    """Return whether this machine or container has a process of this pid."""
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
    """Reads what processes use of the visible devices; thread-safe.

    Busy time is the integral of the driver's utilization samples. Energy is the device's counter:
    a process that has the device to itself is charged all of it, idle power included; processes
    that share it are charged by their busy time, evenly if there is none; if the driver does not
    report that, energy is unknown.
    """

    def __init__(
        self, devices: Iterable[NvmlDevice], *, is_alive: Callable[[int], bool] = has_process
    ) -> None:
        self.is_alive = is_alive
        self._lock = threading.Lock()
        # Apart from the reading's: a trial can end while the driver hangs.
        self._claims_lock = threading.Lock()
        now = time.time()  # as the driver dates its samples
        self._devices = [_DeviceReader(device, now) for device in devices]
        self._claims: dict[object, frozenset[str]] = {}
        self._registry = GpuRegistry()
        self.latest = GpuReading()  # The last reading
        # Seconds of CPU time that the last reading of memory took, and that of totals. Not of
        # clock time: while a process starts CUDA, 0.35 s on an H200, the driver lets others wait.
        self.cost = self.totals_cost = 0.0
        self.lists_own_pids = False  # Whether the driver has listed a trial's process by its pid
        # Pids outside of this container of processes that are this process's own.
        self.outside_pids: set[int] = set()

    @property
    def identities(self) -> frozenset[str]:
        return frozenset(reader.device.identity for reader in self._devices)

    def claim(self, trial: object, devices: frozenset[str]) -> None:
        with self._claims_lock:
            if self._claims.get(trial) != devices:
                self._claims[trial] = devices
                self._publish()

    def release(self, trial: object) -> None:
        with self._claims_lock:
            if self._claims.pop(trial, None) is not None:
                self._publish()

    def _publish(self) -> None:
        try:
            self._registry.publish(frozenset().union(*self._claims.values()))
        except OSError as error:
            _logger.debug(f"Other workers can't see which GPUs trials use: {error}.")

    def is_exclusive(self, trial: object) -> bool:
        """Return whether no other trial of this machine may use a trial's devices."""
        with self._claims_lock:
            own = self._claims.get(trial, frozenset())
            if any(own & its for other, its in self._claims.items() if other is not trial):
                return False
        try:
            return not own & self._registry.used_by_others()
        except OSError as error:
            _logger.debug(f"Which GPUs other workers' trials use is not known: {error}.")
            return True

    def reset_after_fork(self) -> None:
        self._registry.publish(())

    def read(
        self, max_age: float = 0.0, after: float = float("-inf"), *, totals_age: float = 0.0
    ) -> GpuReading:
        """Return the last reading, or a new one if it is older than ``max_age`` or ``after``.

        A new reading keeps totals that are no older than ``totals_age``: reading them takes about
        a hundred times as long as memory (4 to 15 ms on an H200). Threads that wait for another's
        reading share the next one. Raises GpuError if the driver does not answer.
        """
        asked = time.time()
        return answer_in_time(lambda: self._read_in_turn(asked, max_age, after, totals_age))

    def _read_in_turn(
        self, asked: float, max_age: float, after: float, totals_age: float
    ) -> GpuReading:
        with self._lock:
            now, latest = time.time(), self.latest
            is_fresh = asked - max_age <= latest.at <= now and latest.at > after
            has_totals = asked - totals_age <= latest.totals_at <= now
            if latest.lost is None and not (is_fresh and has_totals):
                self.latest = self._read(now, with_totals=not has_totals)
            return self.latest

    def _read(self, now: float, *, with_totals: bool) -> GpuReading:
        # Copies: other threads may still hold the earlier reading.
        totals = {name: dict(by_pid) for name, by_pid in self.latest.totals.items()}
        totals_at = now if with_totals else self.latest.totals_at
        reading = GpuReading(totals=totals, at=now, totals_at=totals_at)
        try:
            costs = [d.read(reading, now, with_totals=with_totals) for d in self._devices]
            self.cost = sum(memory for memory, _ in costs)
            if with_totals:
                self.totals_cost = sum(totals for _, totals in costs)
        except GpuError as error:
            reading.lost = error.reason
        lost = [device.lost for device in reading.devices.values()]
        if all(lost):
            reading.lost = reading.lost or next(iter(lost), None)
        for amounts in totals.values():
            for pid in [p for p in amounts if p not in reading.memory and not self.is_alive(p)]:
                del amounts[pid]
        return reading


class _DeviceReader:
    def __init__(self, device: NvmlDevice, now: float) -> None:
        self.device = device
        self._sampled = now  # When the last sample of any process was taken
        # When that of each process was, at first when it was listed.
        self._since: dict[int, float] = {}
        self._totals_at = now
        self._first_joules: float | None = None
        self._joules: float | None = None
        self._busy = 0.0
        self._lost: str | None = None
        # What was last read: totals of the device as a whole, and why processes have none.
        self._totals: dict[str, float] = {}
        self._unknown: dict[str, str] = {}

    def read(self, reading: GpuReading, now: float, *, with_totals: bool) -> tuple[float, float]:
        """Read the device; return the seconds of CPU time that memory and totals took."""
        found = reading.devices[self.device.identity] = DeviceReading(lost=self._lost)
        begun = between = time.thread_time()
        try:
            if self._lost is None:
                self._read_memory(reading, found)
                between = time.thread_time()
                if with_totals:
                    self._read_totals(reading, found, now)
                # The totals that were read last, and why others are unknown.
                found.totals = self._totals
                for resource, reason in self._unknown.items():
                    reading.mark_unknown(found.held, resource, reason)
                    if resource not in found.totals:
                        found.unknown[resource] = reason
        except GpuError as error:
            if not error.lost:
                raise
            # The other devices go on.
            self._lost = found.lost = error.reason
        return between - begun, time.thread_time() - between

    def _read_memory(self, reading: GpuReading, found: DeviceReading) -> None:
        # Before the list: what is in use then never includes a process that is not listed yet.
        found.used, found.total = _try(self.device.memory) or (None, None)
        try:
            listed = self.device.processes()
        except GpuError as error:
            if error.final:
                raise
            for resource in ("gpu_memory", "energy"):
                reading.mark_unknown([ANY_PID], resource, error.reason)
            listed = {}
        found.held = listed
        for pid in listed:
            self._since.setdefault(pid, reading.at)
        for pid, memory in listed.items():
            known = reading.memory.get(pid, 0.0)
            reading.memory[pid] = None if memory is None or known is None else known + memory
            if memory is None:
                reason = _INSTANCE if self.device.is_instance else _NO_BYTES
                reading.mark_unknown([pid], "gpu_memory", reason)

    def _read_totals(self, reading: GpuReading, found: DeviceReading, now: float) -> None:
        self._totals, self._unknown = {}, {}
        busy: dict[int, float] | None = None
        try:
            busy = self._read_busy(reading, found.held)
        except GpuError as error:
            self._mark_unknown("gpu_time", error)
        try:
            self._read_energy(reading, found.held, busy)
        except GpuError as error:
            self._mark_unknown("energy", error)
        if not found.held or busy is None:
            # How busy the device is as a whole is all there is.
            share = _try(self.device.utilization)
            if share is not None:
                self._busy += share * max(0.0, now - self._totals_at)
                self._totals["gpu_time"] = self._busy
        self._totals_at = now

    def _mark_unknown(self, resource: str, error: GpuError) -> None:
        if error.final:
            raise error
        self._unknown[resource] = error.reason

    def _read_busy(self, reading: GpuReading, listed: Iterable[int]) -> dict[int, float]:
        """Return the busy seconds by process since the last reading."""
        if self.device.is_instance:
            raise GpuError(_INSTANCE)
        samples = self.device.samples(self._sampled)
        grown = busy_seconds(samples, self._since, self._totals_at)
        self._sampled = max((s.seconds for s in samples), default=self._sampled)
        self._since = {pid: at for pid, at in self._since.items() if pid in listed}
        for sample in samples:
            self._since[sample.pid] = max(sample.seconds, self._since.get(sample.pid, 0.0))
        totals = reading.totals["gpu_time"]
        for pid in {*listed, *grown}:
            totals[pid] = totals.get(pid, 0.0) + grown.get(pid, 0.0)
        return grown

    def _read_energy(
        self,
        reading: GpuReading,
        listed: Iterable[int],
        busy: Mapping[int, float] | None,
    ) -> None:
        if self.device.is_instance:
            raise GpuError(_INSTANCE)
        joules = self.device.joules()
        before, self._joules = self._joules, joules
        self._first_joules = joules if self._first_joules is None else self._first_joules
        self._totals["energy"] = max(0.0, joules - self._first_joules)
        grown = 0.0 if before is None else max(0.0, joules - before)
        totals = reading.totals["energy"]
        for pid, share in energy_shares(list(listed), busy).items():
            totals[pid] = totals.get(pid, 0.0) + grown * share


def _try(read: Callable[[], Answer]) -> Answer | None:
    try:
        return read()
    except GpuError as error:
        if error.final:
            raise
        return None


def busy_seconds(
    samples: Iterable[GpuSample], since: Mapping[int, float], otherwise: float
) -> dict[int, float]:
    """Return the integral of utilization over time by process, in seconds.

    A sample holds from the previous one of the same process, or for its first one from ``since``
    (by pid), else from ``otherwise``: the driver has no samples from before a process existed.
    """
    last = dict(since)
    busy: dict[int, float] = {}
    for sample in sorted(samples, key=lambda s: s.seconds):
        span = max(0.0, sample.seconds - last.get(sample.pid, otherwise))
        busy[sample.pid] = busy.get(sample.pid, 0.0) + sample.busy * span
        last[sample.pid] = sample.seconds
    return busy


def energy_shares(listed: list[int], busy: Mapping[int, float] | None) -> dict[int, float]:
    """Return the share of a device's energy that each process is charged; the sum is 1.

    Raises GpuError if there are several and it is unknown how busy each kept the device.
    """
    if len(listed) <= 1:
        return dict.fromkeys(listed, 1.0)
    if busy is None:
        raise GpuError(_CROWDED)
    whole = sum(busy.get(pid, 0.0) for pid in listed)
    if whole <= 0:
        return dict.fromkeys(listed, 1 / len(listed))
    return {pid: busy.get(pid, 0.0) / whole for pid in listed}
