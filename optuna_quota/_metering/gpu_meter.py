"""Measures what one trial uses of GPUs: memory, busy time, energy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import functools
import logging
import math
import os
from typing import Literal, NamedTuple

from optuna_quota._metering import nvml
from optuna_quota._metering.gpu_reader import ANY_PID, GPU_TOTALS, GpuReader, GpuReading, growth
from optuna_quota._metering.host import forget_gpus, has_gpu_open, visible_gpus
from optuna_quota._metering.meter import DeviceShare, GpuUse, log_once, MeterReading
from optuna_quota._metering.nvml import GpuError
from optuna_quota._resources import get_resource, GPU_RESOURCES


# Seconds. Reading memory takes microseconds to milliseconds, depending on the driver.
_PERIOD = 0.1
_PERIOD_WITH_LIMIT = 0.02
_LONGEST_PERIOD = 0.25
# For totals, which take milliseconds. The driver's own samples are 1/6 to 1 s apart.
_TOTALS_PERIOD = 0.25
# Up to the longest period, queries take at most this share of the time.
_MAX_LOAD = 0.02
# Bytes. A CUDA context alone takes more; smaller changes may be the driver's own.
_NOTICEABLE = 32 * 2**20

_NOT_LISTED = (
    "the driver lists no process of this container (start it with the host's PID namespace)"
)
_SHARED = "the driver lists others on a GPU, and not this container's processes"
_NOT_REPORTED = "the driver does not report it"
_LOST = MeterReading(None, peak=True, lost=True)


class Source(NamedTuple):
    """How a trial's use of GPUs can be measured.

    Without a name, the trial uses no GPU, or ``reason`` says why it can't be measured.
    """

    name: Literal["process", "device"] | None = None
    reason: str | None = None
    is_shared: bool = False


NOT_ON_A_GPU = Source()


class GpuMeter:
    """Measures what one trial uses of GPUs.

    By process if the driver lists the trial's processes. Otherwise by device, as long as no other
    trial may use it: the growth of memory since the first reading, which therefore takes place
    before the trial's process begins. A trial that uses no GPU has no amounts: None, not 0.

    Warns of a ``limited`` resource that can't be measured. ``environment`` has variables that only
    the trial's own process has.
    """

    eager = True

    def __init__(
        self,
        limited: Collection[str],
        environment: Mapping[str, str] | None = None,
        open_reader: Callable[[], GpuReader] | None = None,
        has_gpu_open: Callable[[Iterable[int]], bool | None] = has_gpu_open,
    ) -> None:
        self._limited = set(limited) & set(GPU_RESOURCES)
        self._environment = environment or {}
        self._open_reader = open_reader or gpu_reader
        self._has_gpu_open = has_gpu_open
        self._reader: GpuReader | None = None
        self._start = GpuReading()
        self._at = -math.inf
        # The devices that the trial may use, and those that list its processes.
        self._devices: frozenset[str] = frozenset()
        self._listed_on: set[str] = set()
        self._pids: set[int] = set()
        # Its processes by their pids outside of this container.
        self._outside_pids: set[int] = set()
        # What its processes added to each total, by pid.
        self._used: dict[str, dict[int, float]] = {name: {} for name in GPU_TOTALS}
        self._least: dict[str, float] = {}
        self._runs_here = False
        self._is_closed = False
        self._was_shared = False
        self._source = NOT_ON_A_GPU
        self._shortest_period = _PERIOD_WITH_LIMIT if "gpu_memory" in self._limited else _PERIOD
        self.period = self._shortest_period

    def read(self, pids: Sequence[int], *, fully: bool = False) -> Mapping[str, MeterReading]:
        """Read what the trial's processes hold and have used.

        Totals may be up to 0.25 s old, unless they are read ``fully``.
        """
        if self.period == math.inf:
            return {}  # no GPU, or given up: a part of the trial says nothing about the whole
        try:
            return self._read(pids, fully)
        except GpuError as error:
            if self._start.at == -math.inf:
                return self._give_up(Source(None, error.reason), GPU_RESOURCES)
            return {}  # the next reading may be answered
        finally:
            if self._is_closed and self._reader is not None:
                self._reader.release(self)  # closed by another thread meanwhile

    def _read(self, pids: Sequence[int], fully: bool) -> Mapping[str, MeterReading]:
        reader = self._reader
        if reader is None:
            reader = self._open()
            if reader is None:
                self.period = math.inf
                return {}
            self._start = reading = reader.read()
            self._warn_of_unenforced(reading)
            self._runs_here = bool(pids)
            if not self._runs_here:
                reader.claim(self, self._devices)
        else:
            # Not at the first reading: a trial in this process may soon get one of its own, on
            # other devices.
            reader.claim(self, self._devices)
            totals_age = max(_TOTALS_PERIOD, reader.totals_cost / _MAX_LOAD)
            reading = reader.read(
                max_age=self.period / 2, after=self._at, totals_age=0.0 if fully else totals_age
            )
        self._at = reading.at
        self.period = max(self._shortest_period, min(_LONGEST_PERIOD, reader.cost / _MAX_LOAD))
        return self._measure(reader, reading, pids)

    def close(self) -> None:
        self._is_closed = True
        if self._reader is not None:
            self._reader.release(self)

    def _open(self) -> GpuReader | None:
        try:
            reader = self._reader = self._open_reader()
            self._devices = reader.identities
            if self._environment:
                shown = visible_gpus({**os.environ, **self._environment}).devices
                self._devices &= {device.identity for device in shown}
        except GpuError as error:
            # A machine without a GPU is nothing to report unless a GPU was asked for.
            if self._limited or nvml.driver_is_present():
                self._warn(GPU_RESOURCES[:2], error.reason)
            if self._reader is None:
                # A part of the trial, if the driver answers later, says nothing about the whole.
                self._source = Source(None, error.reason)
        return self._reader

    def _warn_of_unenforced(self, reading: GpuReading) -> None:
        """Warn before the trial begins of limits on what none of its devices reports."""
        devices = [reading.devices[name] for name in self._devices if name in reading.devices]
        for name in sorted(self._limited):
            reasons = [device.unknown.get(name) for device in devices]
            if reasons and reasons[0] is not None and None not in reasons:
                self._warn([name], reasons[0])

    def _measure(
        self, reader: GpuReader, reading: GpuReading, pids: Sequence[int]
    ) -> Mapping[str, MeterReading]:
        self._pids.update(pids)
        lost = self._lost(reading)
        if lost is not None:
            is_on_gpu = self._source.name is not None
            names = [name for name in GPU_RESOURCES if is_on_gpu or name != "energy"]
            return self._give_up(Source(None, lost), names)
        source, reading = self._choose(reader, reading)
        if source.reason is not None:
            if source.is_shared and not self._was_shared:
                self._was_shared = True
                return {}  # perhaps only while the other trial is on its way to another device
            return self._give_up(source, GPU_RESOURCES)
        self._source, self._was_shared = source, False
        if source.name == "device":
            return self._by_device(reader, reading)
        if source.name == "process":
            return self._by_process(reader, reading)
        for reason, names in _reasons(reading, [ANY_PID]).items():
            self._warn(names, reason, how=" by process")
        return {}

    def _give_up(self, source: Source, names: Sequence[str]) -> Mapping[str, MeterReading]:
        self._source, self.period = source, math.inf
        self._warn(GPU_RESOURCES, str(source.reason))
        return dict.fromkeys(names, _LOST)

    def _lost(self, reading: GpuReading) -> str | None:
        """Return why nothing is known of the trial any more, else None."""
        if reading.lost is not None:
            return reading.lost
        used = self._devices if self._source.name == "device" else self._listed_on
        lost = (reading.devices[identity].lost for identity in sorted(used))
        return next((reason for reason in lost if reason is not None), None)

    def _choose(self, reader: GpuReader, reading: GpuReading) -> tuple[Source, GpuReading]:
        listed = self._pids & reading.memory.keys()
        if listed:
            reader.lists_own_pids = True
            self._listed_on |= {k for k, d in reading.devices.items() if listed & d.held.keys()}
        if not listed and self._source.name == "process":
            return self._source, reading  # it holds nothing now, or its process has ended
        source = self._source_of(reader, reading, listed)
        if source.name == "device" != self._source.name:
            # Read again: processes that have just ended are not listed any more.
            reading = reader.read(totals_age=math.inf)
            self._at = reading.at
            source = self._source_of(reader, reading, self._pids & reading.memory.keys())
        return source, reading

    def _source_of(
        self, reader: GpuReader, reading: GpuReading, listed: Collection[int]
    ) -> Source:
        # First: each reading of devices updates the least that others hold there.
        growth_of_devices = sum(self._growths(reader, reading).values())
        without_bytes = [pid for pid in listed if reading.memory[pid] is None]
        if listed and not without_bytes:
            return Source("process")
        reasons = reading.unknown.get(without_bytes[0] if without_bytes else ANY_PID, {})
        reason = reasons.get("gpu_memory", _NOT_LISTED)
        if any(pid in self._start.memory for pid in listed):
            # What it held before is part of what the device held before.
            return Source(None, reason)
        # Where the driver lists processes by the pids that they have here, one that is not listed
        # is on no GPU.
        is_off = reader.lists_own_pids and not listed
        if is_off or growth_of_devices < _NOTICEABLE:
            return NOT_ON_A_GPU
        # The open files of a process show whether it is on a GPU, in a container too.
        may_be_new = not listed and self._source.name is None
        if may_be_new and self._has_gpu_open(self._pids) is False:
            return NOT_ON_A_GPU
        if not reader.is_exclusive(self):
            return Source(None, f"{reason}, and trials share a GPU", is_shared=True)
        return Source("device")

    def _growths(self, reader: GpuReader, reading: GpuReading) -> dict[str, float]:
        """Return what each of the trial's devices holds beyond what it held before, in bytes."""
        found = {}
        for identity in self._devices:
            before, now = self._start.devices.get(identity), reading.devices.get(identity)
            if before is None or now is None:
                continue
            amount = growth(before, now, lambda pid: self._is_foreign(reader, pid)) or 0.0
            # Less than before: others have released memory, and the trial held none of that.
            least = self._least[identity] = min(amount, self._least.get(identity, 0.0))
            found[identity] = amount - least
        return found

    def _is_foreign(self, reader: GpuReader, pid: int) -> bool:
        """Return whether a listed process certainly does not belong to the trial.

        That is so if it was listed before the trial began, or if this machine has a process of
        that pid. Any other pid may be a trial's process as seen from outside its container.
        """
        if pid in self._pids or (self._runs_here and pid in reader.outside_pids):
            return False
        return pid in self._start.memory or reader.is_alive(pid)

    def _by_process(self, reader: GpuReader, reading: GpuReading) -> dict[str, MeterReading]:
        held = {
            identity: sum(reading.devices[identity].held.get(pid) or 0.0 for pid in self._pids)
            for identity in self._listed_on
        }
        memory = sum(reading.memory.get(pid) or 0.0 for pid in self._pids)
        found = {
            "gpu_memory": self._memory("process", memory, reading, held),
            **self._totals(reading, self._pids),
        }
        unknown = _reasons(reading, self._pids)
        if unknown and self._is_alone(reader, reading):
            # What its devices spent as a whole is the trial's.
            known = self._device_totals(reading, self._listed_on)
            for reason, names in unknown.items():
                found.update({name: known[name] for name in names if name in known})
                unknown[reason] = [name for name in names if name not in known]
        return self._without_unknown(found, unknown)

    def _without_unknown(
        self,
        found: dict[str, MeterReading],
        unknown: Mapping[str, Sequence[str]],
        level: int = logging.WARNING,
    ) -> dict[str, MeterReading]:
        """Discard resources that are unknown; warn of limited ones at least."""
        for reason, names in unknown.items():
            if names:
                is_limited = self._limited.intersection(names)
                self._warn(names, reason, level=logging.WARNING if is_limited else level)
                found.update(dict.fromkeys(names, _LOST))
        return found

    def _is_alone(self, reader: GpuReader, reading: GpuReading) -> bool:
        """Return whether no other process uses the devices that list the trial's."""
        found = [r.devices[d] for r in (self._start, reading) for d in self._listed_on]
        is_listed_alone = all(device.held.keys() <= self._pids for device in found)
        is_hidden = any(self._start.devices[d].has_hidden_use for d in self._listed_on)
        return is_listed_alone and not is_hidden and reader.is_exclusive(self)

    def _by_device(self, reader: GpuReader, reading: GpuReading) -> dict[str, MeterReading]:
        message = "GPU memory of trials is measured as the growth of what their devices hold"
        log_once("gpu: by device", f"{message}: {_NOT_LISTED}.", level=logging.INFO)
        held = self._growths(reader, reading)
        listed = {pid for name in self._devices for pid in reading.devices[name].held}
        self._outside_pids |= {pid for pid in listed if not self._is_foreign(reader, pid)}
        reader.outside_pids |= self._outside_pids
        found = {"gpu_memory": self._memory("device", sum(held.values()), reading, held)}
        if self._outside_pids:
            found.update(self._totals(reading, self._outside_pids))
            unknown = _reasons(reading, self._outside_pids, GPU_TOTALS)
        elif listed or any(self._start.devices[name].has_hidden_use for name in self._devices):
            unknown = {_SHARED: list(GPU_TOTALS)}
        else:
            found.update(self._device_totals(reading, self._devices))
            unknown = {_NOT_REPORTED: [name for name in GPU_TOTALS if name not in found]}
        return self._without_unknown(found, unknown, logging.INFO)

    def _memory(
        self,
        source: Literal["process", "device"],
        memory: float,
        reading: GpuReading,
        held: Mapping[str, float],
    ) -> MeterReading:
        shares = []
        for identity, amount in sorted(held.items()):
            used, total = reading.devices[identity].used, reading.devices[identity].total
            if used is not None and total is not None:
                shares.append(DeviceShare(amount, used, total))
        return MeterReading(memory, peak=True, gpu=GpuUse(source, tuple(shares)))

    def _totals(self, reading: GpuReading, pids: Iterable[int]) -> dict[str, MeterReading]:
        """Return what its processes added; one that has ended keeps what it had."""
        for name, used in self._used.items():
            start, now = self._start.totals[name], reading.totals[name]
            for pid in now.keys() & pids:
                used[pid] = max(used.get(pid, 0.0), now[pid] - start.get(pid, 0.0))
        return {n: MeterReading(sum(used.values()), peak=False) for n, used in self._used.items()}

    def _device_totals(
        self, reading: GpuReading, devices: Collection[str]
    ) -> dict[str, MeterReading]:
        """Return the totals of whole devices since the trial's start, where known."""
        found = {}
        for name in GPU_TOTALS:
            before = [self._start.devices[d].totals.get(name) for d in devices]
            now = [reading.devices[d].totals.get(name) for d in devices]
            if None not in before and None not in now:
                grown = sum(n or 0.0 for n in now) - sum(b or 0.0 for b in before)
                found[name] = MeterReading(max(0.0, grown), peak=False)
        return found

    def _warn(
        self, resources: Sequence[str], reason: str, *, level: int = logging.WARNING, how: str = ""
    ) -> None:
        """Warn once of resources that are not measured, and of limits that can't be enforced."""
        what = _titles(resources)
        verb = "is" if len(resources) == 1 else "are"
        message = f"{what[0].upper()}{what[1:]} {verb} not measured{how}: {reason}."
        limited = [] if how else [name for name in resources if name in self._limited]
        if limited:
            message += (
                f" A limit or quota on {_titles(limited)} can't be enforced here: "
                "`optuna-quota doctor` says more."
            )
        log_once(f"gpu: {reason}", message, level=level)


def _reasons(
    reading: GpuReading, pids: Iterable[int], names: Sequence[str] = GPU_RESOURCES
) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name in names:
        for reason in {reading.unknown.get(pid, {}).get(name) for pid in pids} - {None}:
            reasons.setdefault(str(reason), []).append(name)
    return reasons


def _titles(resources: Sequence[str]) -> str:
    *others, last = [get_resource(name).title for name in resources]
    return f"{', '.join(others)} and {last}" if others else last


@functools.lru_cache(maxsize=1)
def gpu_reader() -> GpuReader:
    """Return the reader of the devices that CUDA shows here; raises GpuError without NVML."""
    return GpuReader(visible_gpus(os.environ).devices)


def reset_after_fork() -> None:
    """Leave the driver to the parent, in the child after a fork."""
    if gpu_reader.cache_info().currsize:
        gpu_reader().reset_after_fork()
    gpu_reader.cache_clear()
    forget_gpus()
