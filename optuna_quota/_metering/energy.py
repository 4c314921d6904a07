"""Energy of the processors by their own counters (RAPL), and a trial's share of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import logging
import math
import os
from pathlib import Path

from optuna_quota._metering.meter import MeterReading
from optuna_quota._metering.warn import warn_once


_POWERCAP = Path("/sys/class/powercap")
# Seconds. The counters wrap after minutes at the earliest.
_PERIOD = 1.0


class Rapl:
    """The energy counters of a host's processors and memory.

    Args:
        folder: Where Linux has them.

    Raises:
        OSError: If there are none or they may not be read; since 2020 only root may.
    """

    def __init__(self, folder: Path = _POWERCAP) -> None:
        self._zones = [zone for zone in sorted(folder.glob("*rapl:*")) if _counts(zone)]
        if not self._zones:
            raise FileNotFoundError("there are no energy counters")
        self._ranges = [_number(zone / "max_energy_range_uj") for zone in self._zones]
        self._last = self._read()
        self._joules = 0.0

    def joules(self) -> float:
        """Return the joules since this object was made; raises OSError if they can't be read."""
        now = self._read()
        for before, after, span in zip(self._last, now, self._ranges, strict=True):
            # The counters are in microjoules and start again at 0 after their range.
            self._joules += (after - before if after >= before else after + span - before) / 1e6
        self._last = now
        return self._joules

    def _read(self) -> list[float]:
        return [_number(zone / "energy_uj") for zone in self._zones]


def _counts(zone: Path) -> bool:
    """Return whether a zone adds to the others: packages include cores, not memory."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


def _number(path: Path) -> float:
    return float(path.read_text())


@functools.lru_cache(maxsize=1)
def rapl() -> Rapl:
    """Return the counters of this host. Raises OSError where there are none."""
    return Rapl()


def busy_seconds_of_host(stat: str, ticks: int) -> float:
    """Return the CPU-seconds of all processors since the boot, from the text of /proc/stat."""
    fields = [int(value) for value in stat.split("\n", 1)[0].split()[1:]]
    # user nice system idle iowait irq softirq steal; guest time is part of user time.
    busy = sum(fields[:8]) - sum(fields[3:5])
    return busy / ticks


def _host_busy() -> float:
    return busy_seconds_of_host(Path("/proc/stat").read_text(), os.sysconf("SC_CLK_TCK"))


class ProcessorEnergyMeter:
    """A trial's share of the energy of the host's processors, idle power included.

    It is its share of the host's busy CPU time between two readings: a trial that does all the
    work is charged all the energy. If the counters can't be read there is no amount, which is a
    warning if the trial has a ceiling on energy.
    """

    eager = False

    def __init__(
        self,
        cpu_time: Callable[[], float | None],
        *,
        is_limited: bool = False,
        open_counters: Callable[[], Rapl] = rapl,
        host_busy: Callable[[], float] = _host_busy,
    ) -> None:
        self.period = _PERIOD
        self._cpu_time = cpu_time
        self._is_limited = is_limited
        self._open_counters = open_counters
        self._host_busy = host_busy
        self._last: tuple[float, float, float] | None = None
        self._joules = 0.0

    def read(self, pids: Sequence[int]) -> Mapping[str, MeterReading]:
        """Return the trial's joules so far."""
        try:
            now = (self._open_counters().joules(), self._host_busy(), self._cpu_time() or 0.0)
        except (OSError, ValueError) as error:
            self.period = math.inf
            level = logging.WARNING if self._is_limited else logging.DEBUG
            message = f"The processors' energy is not measured: {error}."
            warn_once("processor energy", message, level=level)
            return {}
        before, self._last = self._last, now
        if before is None:
            return {}
        joules, busy, used = (b - a for a, b in zip(before, now, strict=True))
        self._joules += joules * min(1.0, used / busy) if busy > 0 else 0.0
        return {"energy": MeterReading(self._joules, peak=False, is_own=True)}

    def close(self) -> None:
        """Do nothing."""
