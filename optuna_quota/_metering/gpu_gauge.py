"""What one trial uses of GPUs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import logging
import math
import os

from optuna_quota._metering import nvml
from optuna_quota._metering.gauge import Amount
from optuna_quota._metering.gpu import ANYONE
from optuna_quota._metering.gpu import GPU_RESOURCES
from optuna_quota._metering.gpu import GpuReader
from optuna_quota._metering.gpu import GpuReading
from optuna_quota._metering.nvml import GpuError
from optuna_quota._metering.nvml import NvmlDevice
from optuna_quota._metering.visible import visible_devices
from optuna_quota._metering.warn import warn_once
from optuna_quota._resources import get_resource


# Seconds. Asking a driver takes 0.1 to several ms a device; its own samples are 1/6 to 1 s apart.
_PERIOD = 0.25
_PERIOD_WITH_LIMIT = 0.05
# Asking takes at most this share of the time.
_SHARE = 0.02


class GpuGauge:
    """What one trial uses of GPUs: memory, busy time, energy.

    A trial that was never seen on a GPU has no amounts: None, not 0.

    Args:
        asked: The resources that the trial has a ceiling on: what can't be measured of them is
            a warning, of others only where it is odd.
        open_reader: Opens the reader of the visible devices.
    """

    eager = False

    def __init__(
        self, asked: Collection[str], open_reader: Callable[[], GpuReader] | None = None
    ) -> None:
        self._asked = set(asked) & set(GPU_RESOURCES)
        self._open_reader = open_reader or gpu_reader
        self._reader: GpuReader | None = None
        self._start: GpuReading | None = None
        self._pids: set[int] = set()
        self._busy: dict[int, float] = {}
        self._joules: dict[int, float] = {}
        self._is_seen = False
        self._has_limit = "gpu_memory" in self._asked
        self.period = _PERIOD_WITH_LIMIT if self._has_limit else _PERIOD

    def read(self, pids: Sequence[int]) -> Mapping[str, Amount]:
        """Return what the trial's processes hold and have used."""
        reader = self._open()
        if reader is None:
            self.period = math.inf
            return {}
        if self._start is None:
            self._start = reader.latest
        reading = reader.read(max_age=self.period / 2)
        shortest = _PERIOD_WITH_LIMIT if self._has_limit else _PERIOD
        self.period = max(shortest, reader.cost / _SHARE)
        return self._amounts(reading, pids)

    def _open(self) -> GpuReader | None:
        if self._reader is None:
            try:
                self._reader = self._open_reader()
            except GpuError as error:
                odd = self._asked or nvml.driver_is_present()
                level = logging.WARNING if odd else logging.INFO
                _say(GPU_RESOURCES[:2], error.reason, level=level)
        return self._reader

    def _amounts(self, reading: GpuReading, pids: Sequence[int]) -> Mapping[str, Amount]:
        if reading.lost is not None:
            self.period = math.inf
        useless = reading.lost or reading.hidden
        if useless is not None:
            _say(GPU_RESOURCES, useless)
            return {name: _LOST for name in GPU_RESOURCES if self._is_seen or name != "energy"}
        self._pids.update(pids)
        here = self._pids & reading.memory.keys()
        self._is_seen = self._is_seen or bool(here)
        unknown = self._unknown(reading)
        return {**self._known(reading), **dict.fromkeys(unknown, _LOST)}

    def _known(self, reading: GpuReading) -> dict[str, Amount]:
        if not self._is_seen or self._start is None:
            return {}
        memory = sum(reading.memory.get(pid) or 0.0 for pid in self._pids)
        busy = self._total(self._busy, reading.busy, self._start.busy)
        joules = self._total(self._joules, reading.joules, self._start.joules)
        return {
            "gpu_memory": Amount(memory, peak=True),
            "gpu_time": Amount(busy, peak=False),
            "energy": Amount(joules, peak=False),
        }

    def _total(
        self, of_pid: dict[int, float], now: Mapping[int, float], start: Mapping[int, float]
    ) -> float:
        """Return the sum of what each process added; one that has ended keeps what it had."""
        for pid in self._pids:
            if pid in now:
                grown = now[pid] - start.get(pid, 0.0)
                of_pid[pid] = max(of_pid.get(pid, 0.0), grown)
        return sum(of_pid.values())

    def _unknown(self, reading: GpuReading) -> set[str]:
        reasons: dict[str, set[str]] = {}
        for pid, resources in reading.unknown.items():
            if pid == ANYONE or pid in self._pids:
                for name, reason in resources.items():
                    reasons.setdefault(reason, set()).add(name)
        for reason, names in reasons.items():
            _say([name for name in GPU_RESOURCES if name in names], reason)
        return set().union(*reasons.values())


_LOST = Amount(None, peak=True, lost=True)


def _say(resources: Sequence[str], reason: str, *, level: int = logging.WARNING) -> None:
    titles = [get_resource(name).title for name in resources]
    what = titles[0] if len(titles) == 1 else f"{', '.join(titles[:-1])} and {titles[-1]}"
    what = what[0].upper() + what[1:]
    verb = "is" if len(titles) == 1 else "are"
    warn_once(f"gpu: {reason}", f"{what} {verb} not measured: {reason}.", level=level)


@functools.lru_cache(maxsize=1)
def gpu_reader() -> GpuReader:
    """Return the reader of the devices that CUDA shows to this process.

    Raises:
        GpuError: If NVML can't be used.
    """
    devices, failure = nvml.open_devices()
    if failure is not None:
        raise GpuError(failure, final=True)
    return GpuReader(visible_instances(devices, os.environ))


def visible_instances(
    devices: Sequence[NvmlDevice], environment: Mapping[str, str]
) -> list[NvmlDevice]:
    """Return the devices that CUDA shows, MIG instances in place of what they are cut from.

    Raises:
        GpuError: If the environment hides all of them, or NVML fails.
    """
    uuids = [_or_empty(device.uuid) for device in devices]
    names = [_or_empty(device.name) for device in devices]
    shown = [devices[i] for i in visible_devices(uuids, names, environment)]
    if not shown:
        raise GpuError("CUDA_VISIBLE_DEVICES hides every GPU", final=True)
    return [part for device in shown for part in _parts(device)]


def _or_empty(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except GpuError as error:
        if error.final:
            raise
        return ""


def _parts(device: NvmlDevice) -> list[NvmlDevice]:
    if not device.is_partitioned():
        return [device]
    try:
        return device.instances()
    except GpuError as error:
        if error.final:
            raise
        # The instances can't be reached: what the device itself tells is all there is.
        device.is_instance = True
        return [device]


def forget_gpus() -> None:
    """Let the driver be asked anew; after a fork, and for tests."""
    gpu_reader.cache_clear()
    nvml.forget_devices()
