"""What one trial uses of GPUs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import logging
import math
import os

from optuna_quota._metering import nvml
from optuna_quota._metering.gpu_attribution import choose_source
from optuna_quota._metering.gpu_attribution import DeviceShare
from optuna_quota._metering.gpu_attribution import GpuUse
from optuna_quota._metering.gpu_attribution import growth
from optuna_quota._metering.gpu_attribution import has_hidden_use
from optuna_quota._metering.gpu_attribution import is_stranger
from optuna_quota._metering.gpu_attribution import NOT_ON_A_GPU
from optuna_quota._metering.gpu_attribution import NOTICEABLE
from optuna_quota._metering.gpu_attribution import Source
from optuna_quota._metering.gpu_reader import ANYONE
from optuna_quota._metering.gpu_reader import GPU_RESOURCES
from optuna_quota._metering.gpu_reader import GpuReader
from optuna_quota._metering.gpu_reader import GpuReading
from optuna_quota._metering.meter import MeterReading
from optuna_quota._metering.nvml import GpuError
from optuna_quota._metering.visible_gpus import forget_visible
from optuna_quota._metering.visible_gpus import has_gpu_open
from optuna_quota._metering.visible_gpus import visible_gpus
from optuna_quota._metering.warn import warn_once
from optuna_quota._resources import get_resource


# Seconds. Asking a driver takes 0.1 to several ms a device; its own samples are 1/6 to 1 s apart.
_PERIOD = 0.25
_PERIOD_WITH_LIMIT = 0.05
# Asking takes at most this share of the time.
_SHARE = 0.02

_NOT_LISTED = (
    "the driver lists no process of this container (start it with the host's PID namespace)"
)
_TOGETHER = "the driver lists others on a GPU, and not this container's processes"


class GpuMeter:
    """What one trial uses of GPUs: memory, busy time, energy.

    By process where the driver lists the trial's; else what the trial's devices hold beyond what
    they held at the gauge's first reading, where no other trial of this study may use them: so
    that one is to be taken before the trial's process begins. A trial that is on no GPU has no
    amounts: None, not 0.

    Args:
        asked: The resources that the trial has a ceiling on: what can't be measured of them is
            a warning, of others only where it is odd.
        environment: Environment variables of the trial's own process that this one does not have.
        open_reader: Opens the reader of the visible devices.
        has_gpu_open: Whether any of these processes has a GPU open; None when that can't be known.
    """

    eager = True

    def __init__(
        self,
        asked: Collection[str],
        environment: Mapping[str, str] | None = None,
        open_reader: Callable[[], GpuReader] | None = None,
        has_gpu_open: Callable[[Iterable[int]], bool | None] = has_gpu_open,
    ) -> None:
        self._asked = set(asked) & set(GPU_RESOURCES)
        self._environment = environment or {}
        self._open_reader = open_reader or gpu_reader
        self._has_gpu_open = has_gpu_open
        self._reader: GpuReader | None = None
        self._start = GpuReading()
        self._at = -math.inf
        self._devices: frozenset[str] = frozenset()
        self._pids: set[int] = set()
        self._busy: dict[int, float] = {}
        self._joules: dict[int, float] = {}
        self._least: dict[str, float] = {}
        self._homes: set[str] = set()
        self._members: set[int] = set()
        self._runs_here = False
        self._is_closed = False
        self._was_shared = False
        self._source = NOT_ON_A_GPU
        self._has_limit = "gpu_memory" in self._asked
        self.period = _PERIOD_WITH_LIMIT if self._has_limit else _PERIOD

    def read(self, pids: Sequence[int]) -> Mapping[str, MeterReading]:
        """Return what the trial's processes hold and have used.

        Each reading is newer than the one before it: none is another trial's.
        """
        reader = self._reader
        if reader is None:
            reader = self._open()
            if reader is None:
                self.period = math.inf
                return {}
            self._start = reading = reader.read()
            self._runs_here = bool(pids)
            if not self._runs_here:
                reader.enter(self, self._devices)
        else:
            # A trial in this process may be about to get one of its own, on other devices.
            reader.enter(self, self._devices)
            reading = reader.read(max_age=self.period / 2, after=self._at)
        self._at = reading.at
        shortest = _PERIOD_WITH_LIMIT if self._has_limit else _PERIOD
        self.period = max(shortest, reader.cost / _SHARE)
        amounts = self._amounts(reader, reading, pids)
        if self._is_closed:
            reader.leave(self)  # closed by another thread meanwhile
        return amounts

    def close(self) -> None:
        """Leave the devices to the next trial."""
        self._is_closed = True
        if self._reader is not None:
            self._reader.leave(self)

    def _open(self) -> GpuReader | None:
        try:
            reader = self._reader = self._open_reader()
            self._devices = self._own_devices(reader)
        except GpuError as error:
            odd = self._asked or nvml.driver_is_present()
            level = logging.WARNING if odd else logging.INFO
            _say(GPU_RESOURCES[:2], error.reason, level=level, unenforced=self._asked)
        return self._reader

    def _own_devices(self, reader: GpuReader) -> frozenset[str]:
        """Return the devices of the trial among those that this process may use."""
        if not self._environment:
            return reader.identities
        shown = visible_gpus({**os.environ, **self._environment})
        return frozenset(d.identity for d in shown.devices) & reader.identities

    def _amounts(
        self, reader: GpuReader, reading: GpuReading, pids: Sequence[int]
    ) -> Mapping[str, MeterReading]:
        if self._source.reason is not None:
            return {}  # what can't be told of a part can't be told of the whole
        self._pids.update(pids)
        lost = self._lost(reading)
        if lost is not None:
            on_gpu = self._source.name is not None
            names = [name for name in GPU_RESOURCES if on_gpu or name != "energy"]
            return self._give_up(Source(None, lost), names)
        source, reading = self._choose(reader, reading)
        if source.reason is not None:
            if source.is_shared and not self._was_shared:
                self._was_shared = True
                return {}  # it may be for an instant only, while a trial is on its way
            return self._give_up(source, GPU_RESOURCES)
        self._source, self._was_shared = source, False
        if source.name == "device":
            return self._by_device(reader, reading)
        if source.name == "process":
            return self._by_process(reading)
        self._say_what_is_refused(reading)
        return {}

    def _give_up(self, source: Source, names: Sequence[str]) -> Mapping[str, MeterReading]:
        self._source, self.period = source, math.inf
        _say(GPU_RESOURCES, str(source.reason), unenforced=self._asked)
        return dict.fromkeys(names, _LOST)

    def _say_what_is_refused(self, reading: GpuReading) -> None:
        for reason, names in _reasons(reading, [ANYONE]).items():
            _say(names, reason, how=" by process")

    def _lost(self, reading: GpuReading) -> str | None:
        """Return why nothing can be told of the trial any more, None while something can."""
        if reading.lost is not None:
            return reading.lost
        homes = self._devices if self._source.name == "device" else self._homes
        lost = (reading.devices[home].lost for home in sorted(homes))
        return next((reason for reason in lost if reason is not None), None)

    def _choose(self, reader: GpuReader, reading: GpuReading) -> tuple[Source, GpuReading]:
        """Return how the trial's use is told, and by which reading."""
        here = self._pids & reading.memory.keys()
        if here:
            reader.listed = True
            self._homes |= {k for k, d in reading.devices.items() if here & d.held.keys()}
        if not here and self._source.name == "process":
            return self._source, reading  # it holds nothing now, or its process has ended
        source = self._judge(reader, reading, here)
        if source.name == "device" != self._source.name:
            # Those that have just ended are gone when the driver is asked again.
            reading = reader.read()
            self._at = reading.at
            source = self._judge(reader, reading, self._pids & reading.memory.keys())
        return source, reading

    def _judge(self, reader: GpuReader, reading: GpuReading, here: Collection[int]) -> Source:
        has_grown = sum(self._growths(reader, reading).values()) >= NOTICEABLE
        # A driver's files tell who is on no GPU at all, in a container too.
        may_be_new = has_grown and not here and self._source.name is None
        if may_be_new and self._has_gpu_open(self._pids) is False:
            return NOT_ON_A_GPU
        untold = [pid for pid in here if reading.memory[pid] is None]
        marks = reading.unknown.get(untold[0] if untold else ANYONE, {})
        return choose_source(
            is_listed=bool(here),
            is_told=not untold,
            list_is_ours=reader.listed,
            is_alone=not has_grown or reader.is_alone(self),
            has_grown=has_grown,
            was_there=any(pid in self._start.memory for pid in here),
            why_not_listed=marks.get("gpu_memory", _NOT_LISTED),
        )

    def _growths(self, reader: GpuReader, reading: GpuReading) -> dict[str, float]:
        """Return what each of the trial's devices holds beyond what it held before, in bytes."""
        found = {}
        for identity in self._devices:
            before, now = self._start.devices.get(identity), reading.devices.get(identity)
            if before is None or now is None:
                continue
            amount = growth(before, now, lambda pid: self._is_strangers(reader, pid)) or 0.0
            # Less than before: others have let go of it, and the trial held none of that.
            least = self._least[identity] = min(amount, self._least.get(identity, 0.0))
            found[identity] = amount - least
        return found

    def _is_strangers(self, reader: GpuReader, pid: int) -> bool:
        if pid in self._pids or (self._runs_here and pid in reader.outside):
            return False
        return is_stranger(pid, self._start.memory, reader.is_alive)

    def _by_process(self, reading: GpuReading) -> dict[str, MeterReading]:
        memory = sum(reading.memory.get(pid) or 0.0 for pid in self._pids)
        held = {
            home: sum(reading.devices[home].held.get(pid) or 0.0 for pid in self._pids)
            for home in self._homes
        }
        use = GpuUse("process", _shares(reading, held))
        found = {
            "gpu_memory": MeterReading(memory, peak=True, gpu=use),
            **self._totals(reading, self._pids),
        }
        for reason, names in _reasons(reading, self._pids).items():
            _say(names, reason, unenforced=self._asked)
            found.update(dict.fromkeys(names, _LOST))
        return found

    def _by_device(self, reader: GpuReader, reading: GpuReading) -> dict[str, MeterReading]:
        message = (
            "GPU memory of trials is measured by what their devices hold beyond what they held"
        )
        warn_once("gpu: by device", f"{message} before: {_NOT_LISTED}.", level=logging.INFO)
        held = self._growths(reader, reading)
        listed = {pid for name in self._devices for pid in reading.devices[name].held}
        # By the numbers that they have outside of the container.
        self._members |= {pid for pid in listed if not self._is_strangers(reader, pid)}
        reader.outside |= self._members
        use = GpuUse("device", _shares(reading, held))
        found = {"gpu_memory": MeterReading(sum(held.values()), peak=True, gpu=use)}
        if self._members:
            found.update(self._totals(reading, self._members))
            for reason, names in _reasons(reading, self._members, GPU_RESOURCES[1:]).items():
                self._say_beside(names, reason)
                found.update(dict.fromkeys(names, _LOST))
            return found
        hidden = any(has_hidden_use(self._start.devices[name]) for name in self._devices)
        if listed or hidden:
            self._say_beside(GPU_RESOURCES[1:], _TOGETHER)
            return {**found, "gpu_time": _LOST, "energy": _LOST}
        return {**found, **self._device_totals(reading)}

    def _device_totals(self, reading: GpuReading) -> dict[str, MeterReading]:
        """Return what the trial's devices as a whole spent since its start."""
        found = {}
        for name, attribute in (("gpu_time", "busy"), ("energy", "joules")):
            before = [getattr(self._start.devices[d], attribute) for d in self._devices]
            now = [getattr(reading.devices[d], attribute) for d in self._devices]
            if None in before or None in now:
                self._say_beside([name], "the driver does not tell it")
                found[name] = _LOST
            else:
                found[name] = MeterReading(max(0.0, sum(now) - sum(before)), peak=False)
        return found

    def _say_beside(self, names: Sequence[str], reason: str) -> None:
        """Say what is not measured beside the memory; a warning where there is a limit on it."""
        level = logging.WARNING if self._asked.intersection(names) else logging.INFO
        _say(names, reason, level=level, unenforced=self._asked)

    def _totals(self, reading: GpuReading, pids: Iterable[int]) -> dict[str, MeterReading]:
        busy = _total(self._busy, pids, reading.busy, self._start.busy)
        joules = _total(self._joules, pids, reading.joules, self._start.joules)
        return {
            "gpu_time": MeterReading(busy, peak=False),
            "energy": MeterReading(joules, peak=False),
        }


def _reasons(
    reading: GpuReading, pids: Iterable[int], names: Sequence[str] = GPU_RESOURCES
) -> dict[str, list[str]]:
    """Return the resources that can't be told of these processes, by the reason."""
    reasons: dict[str, list[str]] = {}
    for name in names:
        for reason in {reading.unknown.get(pid, {}).get(name) for pid in pids} - {None}:
            reasons.setdefault(str(reason), []).append(name)
    return reasons


def _shares(reading: GpuReading, held: Mapping[str, float]) -> tuple[DeviceShare, ...]:
    devices = [(amount, reading.devices[name]) for name, amount in sorted(held.items())]
    return tuple(
        DeviceShare(amount, device.used, device.total)
        for amount, device in devices
        if device.used is not None and device.total is not None
    )


_LOST = MeterReading(None, peak=True, lost=True)


def _total(
    of_pid: dict[int, float],
    pids: Iterable[int],
    now: Mapping[int, float],
    start: Mapping[int, float],
) -> float:
    """Return the sum of what each process added; one that has ended keeps what it had."""
    for pid in pids:
        if pid in now:
            grown = now[pid] - start.get(pid, 0.0)
            of_pid[pid] = max(of_pid.get(pid, 0.0), grown)
    return sum(of_pid.values())


def _say(
    resources: Sequence[str],
    reason: str,
    *,
    level: int = logging.WARNING,
    unenforced: Collection[str] = (),
    how: str = "",
) -> None:
    """Say once that resources are not measured, and which limits are not enforced therefore."""
    what = _titles(resources)
    verb = "is" if len(resources) == 1 else "are"
    message = f"{what[0].upper()}{what[1:]} {verb} not measured{how}: {reason}."
    lacking = [name for name in resources if name in unenforced]
    if lacking:
        message += f" The limit on {_titles(lacking)} can't be enforced here."
    warn_once(f"gpu: {reason}", message, level=level)


def _titles(resources: Sequence[str]) -> str:
    titles = [get_resource(name).title for name in resources]
    return titles[0] if len(titles) == 1 else f"{', '.join(titles[:-1])} and {titles[-1]}"


@functools.lru_cache(maxsize=1)
def gpu_reader() -> GpuReader:
    """Return the reader of the devices that CUDA shows to this process.

    Raises:
        GpuError: If NVML can't be used.
    """
    return GpuReader(visible_gpus(os.environ).devices)


def forget_gpus() -> None:
    """Let the driver be asked anew; after a fork, and for tests."""
    if gpu_reader.cache_info().currsize:
        gpu_reader().abandon()
    gpu_reader.cache_clear()
    forget_visible()
    nvml.forget_devices()
