"""Meters beside the process tree: their interface, users' own meters, processor energy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
import functools
import logging
import math
from pathlib import Path
import threading
from typing import Literal, Protocol, runtime_checkable

import psutil

from optuna_quota._metering.timing import LONGEST_INTERVAL, next_due
from optuna_quota._records import is_reserved
from optuna_quota._resources import RESOURCES
from optuna_quota._units import check_number


_logger = logging.getLogger("optuna.quota.metering")
_logged: set[str] = set()


def log_once(subject: str, message: str, *, level: int = logging.WARNING) -> None:
    """Log a message unless one on the same subject was logged at this level or above.

    The level is INFO where no limit or quota needs the missing figure.
    """
    keys = {f"{at}:{subject}" for at in (logging.INFO, logging.WARNING) if at >= level}
    if not keys & _logged:
        _logged.add(f"{level}:{subject}")
        _logger.log(level, message)


def forget_warnings() -> None:
    """Let each message of :func:`log_once` be logged again."""
    _logged.clear()


@runtime_checkable
class Meter(Protocol):
    """Measures one resource of a trial that the library does not measure itself.

    Example:

        .. code-block:: python

            class ScratchSpace:
                name = "scratch"
                peak = True

                def read(self, pids):
                    return sum(f.stat().st_size for f in Path("/scratch").rglob("*"))


            pruner = QuotaPruner(limits=Limits(custom={"scratch": 2e9}), meters=[ScratchSpace()])

    A meter is read when the trial starts, then ten times a second by a thread for all meters (or
    every ``period`` seconds, an optional attribute), and once more when the trial ends. It should
    return at once: no other meter is read meanwhile. It must be safe to call from two threads,
    for several trials.

    Trials in threads of one process have the same ``pids``: the growth of a total is then split
    evenly among them, and a peak, which can't be attributed, is not recorded.

    Attributes:
        name: An identifier: the column of the trial table, and ``Limits(custom={name: ...})``
            sets the limit.
        peak: True if a trial's usage is the maximum of the readings (a size, a count), False if
            readings are a running total, whose growth since its start is the trial's usage.
    """

    name: str
    peak: bool

    def read(self, pids: Sequence[int]) -> float | None:
        """Return the amount at this moment, None if unknown.

        Args:
            pids: The processes of the trial.

        An exception counts as None; the first is logged.
        """
        ...


def check_names(meters: Iterable[Meter]) -> tuple[Meter, ...]:
    """Check the user's own meters and return them as a tuple.

    Raises:
        TypeError: If one is not a meter, or its period not a number.
        ValueError: If a name is no identifier, is reserved, or is used twice, or a period is not
            positive.
    """
    if isinstance(meters, str) or not isinstance(meters, Iterable):
        raise TypeError(f"`meters` must be a sequence of meters but got {meters!r}.")
    meters = tuple(meters)
    seen: set[str] = set()
    for meter in meters:
        if not isinstance(meter, Meter) or not isinstance(meter.peak, bool):
            raise TypeError(
                "A meter must have a `name`, a bool `peak` and a method `read(pids)` "
                f"but got {meter!r}."
            )
        name = str(meter.name)
        if not name.isidentifier() or name in RESOURCES or is_reserved(name):
            raise ValueError(
                "A meter's `name` must be an identifier other than a resource or a column of the "
                f"trial table but got {meter.name!r}."
            )
        period = getattr(meter, "period", LONGEST_INTERVAL)
        check_number(period, "period", "a positive number of seconds", lambda p: p > 0)
        if meter.name in seen:
            raise ValueError(f"Meters must have different names but got {meter.name!r} twice.")
        seen.add(meter.name)
    return meters


@dataclass(frozen=True)
class DeviceShare:
    """A trial's part of one GPU at one moment: what it holds, all processes hold, the GPU has.

    All are in bytes.
    """

    held: float
    used: float
    total: float


@dataclass(frozen=True)
class GpuUse:
    """How a trial's use of GPUs was measured, and which it used at the last reading."""

    # By process, by what its devices hold, or by the framework's own counters
    source: Literal["process", "device", "framework"]
    devices: tuple[DeviceShare, ...] = ()  # The devices


@dataclass(frozen=True)
class MeterReading:
    """One reading of one resource."""

    value: float | None  # The amount now, or the total since the meter was opened; None if unknown
    peak: bool  # Whether the usage is the maximum of the readings, not their growth
    lost: bool = False  # Whether the resource is unknown from now on, earlier readings included
    # Whether the amount is the trial's own share; otherwise that of its processes, which other
    # trials may run in
    is_own: bool = False
    gpu: GpuUse | None = None  # How the trial's use of GPUs was measured


class TrialMeter(Protocol):
    """Measures one or more resources of one trial.

    Attributes:
        period: Seconds between readings; infinite once there is nothing to read.
        eager: Whether to read at the very start, in the thread of the trial.
    """

    period: float
    eager: bool

    def read(self, pids: Sequence[int], *, fully: bool = False) -> Mapping[str, MeterReading]:
        """Return the readings by resource, at once and without raising.

        With ``fully``, as at the end of a trial, slow readings are renewed as well.
        """
        ...

    def close(self) -> None:
        """Release what is open; most meters have nothing open."""
        return


class CustomMeter(TrialMeter):
    """A user's own meter; its errors are caught."""

    eager = True

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._start: float | None = None
        self.period = float(getattr(meter, "period", LONGEST_INTERVAL))

    def read(self, pids: Sequence[int], *, fully: bool = False) -> Mapping[str, MeterReading]:
        """Return the reading, None with one warning where the meter fails."""
        value = self._value(pids)
        if self._meter.peak or value is None:
            return {self._meter.name: MeterReading(value, peak=True)}
        if self._start is None:
            self._start = value
            return {}  # the usage is the growth from here
        return {self._meter.name: MeterReading(max(0.0, value - self._start), peak=False)}

    def _value(self, pids: Sequence[int]) -> float | None:
        try:
            value = self._meter.read(pids)
            amount = None if value is None else float(value)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's code may raise anything
            self._warn(f"raised {error!r}")
            return None
        if amount is not None and not (math.isfinite(amount) and amount >= 0):
            self._warn(f"returned {amount}, which must be nonnegative and finite")
            return None
        return amount

    def _warn(self, what: str) -> None:
        name = self._meter.name
        log_once(f"meter {name}", f"{name} is not measured while its meter fails: it {what}.")


def warn_of_missing(names: Iterable[str], meters: Iterable[Meter]) -> None:
    """Warn once of each custom limit that no meter serves."""
    for name in sorted({*names} - {meter.name for meter in meters}):
        log_once(
            f"meter {name}",
            f"The limit on {name} can't be enforced: no meter has this name. Pass one to the "
            "pruner, as `QuotaPruner(limits=…, meters=[…])`.",
        )


# Seconds that a full reading waits for another thread's.
_TIMEOUT = 1.0


class ScheduledMeter:
    """A meter of one trial and when to read it."""

    def __init__(self, meter: TrialMeter, now: float) -> None:
        self.due = now
        self.eager = meter.eager
        self.close = meter.close
        self._meter = meter
        self._reading = threading.Lock()
        self._last: dict[str, float] = {}

    def read(self, pids: Sequence[int], *, fully: bool = False) -> Mapping[str, MeterReading]:
        """Return the readings; none while another thread is reading.

        With ``fully``, wait for that thread for a second.
        """
        if not self._reading.acquire(timeout=_TIMEOUT if fully else 0.0):
            return {}
        try:
            return self._meter.read(pids, fully=fully)
        finally:
            self._reading.release()

    def growth(self, resource: str, total: float) -> float:
        """Return how much more a total is than at the last call."""
        last = self._last.get(resource, 0.0)
        self._last[resource] = max(total, last)
        return max(0.0, total - last)

    def schedule(self, now: float) -> None:
        self.due = next_due(self.due, now, self._meter.period)


# The energy of the processors, by their own counters (RAPL).

_POWERCAP = Path("/sys/class/powercap")
# Seconds. The counters wrap after minutes at the earliest.
_PERIOD = 1.0


class Rapl:
    """The energy counters of a host's processors and memory.

    Raises OSError if there are none or they may not be read; since 2020 only root may.
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
    return Rapl()


def host_busy() -> float:
    """Return the CPU-seconds of all processors since the boot."""
    times = psutil.cpu_times()
    # Guest time, which comes last, is part of user time.
    return sum(times[:8]) - times.idle - times.iowait


class ProcessorEnergyMeter(TrialMeter):
    """A trial's share of the energy of the host's processors, idle power included.

    The share is that of the host's busy CPU time between two readings: a trial that does all the
    work is charged all the energy. If the counters can't be read, energy is unknown, with a
    warning if the trial has a ceiling on it.
    """

    eager = False

    def __init__(
        self,
        cpu_time: Callable[[], float | None],
        *,
        is_limited: bool = False,
        open_counters: Callable[[], Rapl] = rapl,
        host_busy: Callable[[], float] = host_busy,
    ) -> None:
        self.period = _PERIOD
        self._cpu_time = cpu_time
        self._is_limited = is_limited
        self._open_counters = open_counters
        self._host_busy = host_busy
        self._last: tuple[float, float, float] | None = None
        self._joules = 0.0

    def read(self, pids: Sequence[int], *, fully: bool = False) -> Mapping[str, MeterReading]:
        try:
            now = (self._open_counters().joules(), self._host_busy(), self._cpu_time() or 0.0)
        except (OSError, ValueError) as error:
            self.period = math.inf
            level = logging.WARNING if self._is_limited else logging.DEBUG
            message = f"The processors' energy is not measured: {error}."
            if self._is_limited:
                message += " A quota on energy counts none of it: `optuna-quota doctor` says more."
            log_once("processor energy", message, level=level)
            return {}
        before, self._last = self._last, now
        if before is None:
            return {}
        joules, busy, used = (b - a for a, b in zip(before, now, strict=True))
        self._joules += joules * min(1.0, used / busy) if busy > 0 else 0.0
        return {"energy": MeterReading(self._joules, peak=False, is_own=True)}
