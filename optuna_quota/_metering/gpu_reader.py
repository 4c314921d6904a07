"""What all processes use of the visible GPUs, and which GPUs the trials of others use."""

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

from optuna_quota._metering.nvml import answer_in_time, GpuError, GpuSample, HANGS, NvmlDevice
from optuna_quota._resources import GPU_RESOURCES, RESOURCES


_logger = logging.getLogger("optuna.quota.metering")

# Stands for every pid where the driver does not even list processes.
ANY_PID = -1

# The GPU resources that add up.
GPU_TOTALS = tuple(name for name in GPU_RESOURCES if not RESOURCES[name].peak)

# Seconds that a reading waits for that of another thread.
_TIMEOUT = 2.0

_NAMES = Path("/proc/net/unix")
_PREFIX = "optuna-quota/gpu/"

_INSTANCE = "it is not reported by process on a MIG instance"
_NO_BYTES = "the driver does not report it by process"
_CROWDED = "several processes share a GPU that does not report how busy each keeps it"

Answer = TypeVar("Answer")


class GpuRegistry:
    """Shares with other processes which GPUs the trials of this one use; not thread-safe.

    A device's memory is one trial's only while no other trial has the device, those of other
    workers included. All processes of a machine or container see the names of abstract sockets,
    and these are gone with their process: no file is left behind.
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
        """Bytes that the listed processes hold, as far as known."""
        return sum(held or 0.0 for held in self.held.values())

    @property
    def in_use(self) -> float | None:
        """Bytes in use by any process, at least what the listed ones hold."""
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
    """Return what a device holds beyond what it held before, in bytes; None if unknown.

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
    at: float = float("-inf")  # When it was read, in seconds since 1970

    def mark_unknown(self, pids: Iterable[int], resource: str, reason: str) -> None:
        for pid in pids:
            self.unknown.setdefault(pid, {})[resource] = reason


def is_alive(pid: int) -> bool:
    """Return whether this machine, or container, has a process of this pid, hidden or not."""
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

    Busy time is the integral of the driver's utilization samples. Energy is a device's own
    counter: a process that has the device to itself is charged all of it, idle power included;
    processes that share it are charged by how busy they kept it, evenly if none did; if the
    driver does not report that, it is unknown.
    """

    def __init__(
        self, devices: Iterable[NvmlDevice], *, is_alive: Callable[[int], bool] = is_alive
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
        self.cost = 0.0  # Seconds that it took
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
        """Return whether no other trial, of any worker on this machine, may use its devices."""
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

    def read(self, max_age: float = 0.0, after: float = float("-inf")) -> GpuReading:
        """Return the last reading, or a new one if that is older than ``max_age`` or ``after``.

        Threads that wait for another's reading share the next one. Raises GpuError if the driver
        does not answer.
        """
        asked = time.time()
        return answer_in_time(lambda: self._read_in_turn(asked, max_age, after))

    def _read_in_turn(self, asked: float, max_age: float, after: float) -> GpuReading:
        if not self._lock.acquire(timeout=_TIMEOUT):
            raise GpuError(HANGS)
        try:
            now, latest = time.time(), self.latest
            is_fresh = asked - max_age <= latest.at <= now and latest.at > after
            if latest.lost is None and not is_fresh:
                begun = time.perf_counter()
                self.latest = self._read(now)
                self.cost = time.perf_counter() - begun
            return self.latest
        finally:
            self._lock.release()

    def _read(self, now: float) -> GpuReading:
        # Copies: other threads may still hold the earlier reading.
        totals = {name: dict(by_pid) for name, by_pid in self.latest.totals.items()}
        reading = GpuReading(totals=totals, at=now)
        try:
            for device in self._devices:
                device.read(reading, now)
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
        self._sampled = now
        self._read_at = now
        self._first_joules: float | None = None
        self._joules: float | None = None
        self._busy = 0.0
        self._lost: str | None = None

    def read(self, reading: GpuReading, now: float) -> None:
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
        for pid, memory in listed.items():
            known = reading.memory.get(pid, 0.0)
            reading.memory[pid] = None if memory is None or known is None else known + memory
            if memory is None:
                reason = _INSTANCE if self.device.is_instance else _NO_BYTES
                reading.mark_unknown([pid], "gpu_memory", reason)
        busy: dict[int, float] | None = None
        try:
            busy = self._read_busy(reading, listed)
        except GpuError as error:
            self._mark_unknown(reading, found, "gpu_time", error)
        try:
            self._read_energy(reading, found, listed, busy)
        except GpuError as error:
            self._mark_unknown(reading, found, "energy", error)
        if not listed or busy is None:
            # How busy the device is as a whole is all there is.
            share = _try(self.device.utilization)
            if share is not None:
                self._busy += share * max(0.0, now - self._read_at)
                found.totals["gpu_time"] = self._busy
                found.unknown.pop("gpu_time", None)
        self._read_at = now

    def _mark_unknown(
        self, reading: GpuReading, found: DeviceReading, resource: str, error: GpuError
    ) -> None:
        if error.final:
            raise error
        reading.mark_unknown(found.held, resource, error.reason)
        if resource not in found.totals:
            found.unknown[resource] = error.reason

    def _read_busy(self, reading: GpuReading, listed: Iterable[int]) -> dict[int, float]:
        """Return the busy seconds by process since the last reading."""
        if self.device.is_instance:
            raise GpuError(_INSTANCE)
        samples = self.device.samples(self._sampled)
        grown = busy_seconds(samples, self._sampled)
        self._sampled = max((s.seconds for s in samples), default=self._sampled)
        totals = reading.totals["gpu_time"]
        for pid in {*listed, *grown}:
            totals[pid] = totals.get(pid, 0.0) + grown.get(pid, 0.0)
        return grown

    def _read_energy(
        self,
        reading: GpuReading,
        found: DeviceReading,
        listed: Iterable[int],
        busy: Mapping[int, float] | None,
    ) -> None:
        if self.device.is_instance:
            raise GpuError(_INSTANCE)
        joules = self.device.joules()
        before, self._joules = self._joules, joules
        self._first_joules = joules if self._first_joules is None else self._first_joules
        found.totals["energy"] = max(0.0, joules - self._first_joules)
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


def energy_shares(listed: list[int], busy: Mapping[int, float] | None) -> dict[int, float]:
    """Return the share of a device's energy that each process is charged; they add up to 1.

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
