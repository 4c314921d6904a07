"""The meters of a trial besides its process tree: protocol, schedule, users' meters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import math
import threading
from typing import Protocol

from optuna_quota._metering.gpu_attribution import GpuUse
from optuna_quota._metering.meter import Meter
from optuna_quota._metering.timing import LONGEST_INTERVAL, next_due
from optuna_quota._metering.trial_state import TrialState
from optuna_quota._metering.warn import warn_once


@dataclass(frozen=True)
class MeterReading:
    """One reading of one resource.

    Attributes:
        value: The amount now, or the total since the meter was opened; None if unknown.
        peak: Whether the usage is the maximum of the readings, not their growth.
        lost: Whether the resource is unknown from now on, earlier readings included.
        is_own: Whether the amount is the trial's own share; otherwise that of its processes,
            which other trials may run in.
        gpu: How the trial's use of GPUs was measured.
    """

    value: float | None
    peak: bool
    lost: bool = False
    is_own: bool = False
    gpu: GpuUse | None = None


class TrialMeter(Protocol):
    """Measures one or more resources of one trial.

    Attributes:
        period: Seconds between readings; infinite once there is nothing to read.
        eager: Whether to read at the very start, in the thread of the trial.
    """

    period: float
    eager: bool

    def read(self, pids: Sequence[int]) -> Mapping[str, MeterReading]:
        """Return the readings by resource, at once and without raising."""
        ...

    def close(self) -> None: ...


class CustomMeter:
    """A user's own meter, guarded against its faults."""

    eager = True

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._start: float | None = None
        self.period = float(getattr(meter, "period", LONGEST_INTERVAL))

    def read(self, pids: Sequence[int]) -> Mapping[str, MeterReading]:
        """Return the reading, None with one warning where the meter fails."""
        value = self._value(pids)
        if self._meter.peak or value is None:
            return {self._meter.name: MeterReading(value, peak=True)}
        if self._start is None:
            self._start = value
            return {}  # the usage is the growth from here
        return {self._meter.name: MeterReading(max(0.0, value - self._start), peak=False)}

    def close(self) -> None:
        """Do nothing."""

    def _value(self, pids: Sequence[int]) -> float | None:
        try:
            value = self._meter.read(pids)
            amount = None if value is None else float(value)
        except Exception as error:  # noqa: BLE001 - a user's code may raise anything
            self._warn(f"raised {error!r}")
            return None
        if amount is not None and not (math.isfinite(amount) and amount >= 0):
            self._warn(f"returned {amount}, which must be nonnegative and finite")
            return None
        return amount

    def _warn(self, what: str) -> None:
        name = self._meter.name
        warn_once(f"meter {name}", f"{name} is not measured while its meter fails: it {what}.")


class ScheduledMeter:
    """A meter of one trial and when to read it: read outside the loop's lock, recorded under it.

    Args:
        monitor: The trial.
        meter: The meter.
        now: The time.
    """

    def __init__(self, monitor: TrialState, meter: TrialMeter, now: float) -> None:
        self.monitor = monitor
        self.due = now
        self.eager = meter.eager
        self.close = meter.close
        self._meter = meter
        self._reading = threading.Lock()
        self._last: dict[str, float] = {}

    def read(self, pids: Sequence[int], *, timeout: float = 0.0) -> Mapping[str, MeterReading]:
        """Return the readings; nothing while another thread is reading.

        Args:
            pids: The processes of the trial.
            timeout: Seconds to wait for that other thread.
        """
        if not self._reading.acquire(timeout=timeout):
            return {}
        try:
            return self._meter.read(pids)
        finally:
            self._reading.release()

    def record(self, readings: Mapping[str, MeterReading], sharers: int) -> None:
        """Record readings in the trial's state, under the loop's lock.

        Args:
            readings: The readings by resource.
            sharers: The trials that run in the same processes; a total is split evenly.
        """
        for name, reading in readings.items():
            self.monitor.gpu = reading.gpu or self.monitor.gpu
            if reading.lost:
                self.monitor.mark_unknown(name)
            elif reading.value is None:
                continue
            elif not reading.peak:
                growth = max(0.0, reading.value - self._last.get(name, 0.0))
                self._last[name] = max(reading.value, self._last.get(name, 0.0))
                self.monitor.used.add(name, growth if reading.is_own else growth / sharers)
            elif self.monitor.isolation != "shared":
                self.monitor.used.record_peak(name, reading.value)

    def schedule(self, now: float) -> None:
        self.due = next_due(self.due, now, self._meter.period)
