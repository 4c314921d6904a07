"""What a meter is: the small protocol for a resource of the user's own."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
import math
import threading
from typing import Protocol
from typing import runtime_checkable
from typing import TYPE_CHECKING

from optuna_quota._metering.gpu_attribution import GpuUse
from optuna_quota._metering.timing import LONGEST_INTERVAL
from optuna_quota._metering.timing import next_due
from optuna_quota._metering.warn import warn_once
from optuna_quota._records import is_reserved
from optuna_quota._resources import RESOURCES


if TYPE_CHECKING:
    from optuna_quota._metering.trial_monitor import TrialMonitor


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

    A meter is read when the trial starts, then by the metering loop's thread ten times a second,
    or as seldom as its ``period`` says where it has one (seconds, an optional attribute), and once
    more when the trial ends. It should return at once: while it reads, the next look at memory has
    to wait. It may be asked for several trials, so it must not mind two threads.

    Trials in threads of one process have the same ``pids``: the growth of a total is then split
    evenly among them, and a peak, which can't be told apart, is not recorded.

    Attributes:
        name: An identifier. The trial table gets the column, ``Limits(custom={name: ...})`` sets
            the limit.
        peak: True where a trial's usage is the maximum over time of what is read (a size, a
            count), False where what is read is a running total: the trial's usage is then the
            growth since its start.
    """

    name: str
    peak: bool

    def read(self, pids: Sequence[int]) -> float | None:
        """Return the amount at this moment, None where it can't be told.

        Args:
            pids: The processes of the trial. An exception counts as None; the first is logged.
        """
        ...


def check_names(meters: Iterable[Meter]) -> tuple[Meter, ...]:
    """Return meters of the user's own whose names can be used.

    Raises:
        TypeError: If one is not a meter.
        ValueError: If a name is no identifier, is taken by a resource, or comes twice.
    """
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
                "A meter's `name` must be an identifier that is no resource's and no word of the "
                f"trial table but got {meter.name!r}."
            )
        if meter.name in seen:
            raise ValueError(
                f"Each meter must have a name of its own but {meter.name!r} is twice."
            )
        seen.add(meter.name)
    return meters


@dataclass(frozen=True)
class MeterReading:
    """One reading of a gauge.

    Attributes:
        value: The amount now, or the total since the gauge was opened; None when it can't be told.
        peak: Whether the usage is the maximum of what is read, not its growth.
        lost: True when the trial's usage can't be told any more, what was read before included.
        is_own: True when it is the trial's own share, False when it is that of its processes,
            which other trials may run in.
        gpu: How the trial's use of GPUs is told.
    """

    value: float | None
    peak: bool
    lost: bool = False
    is_own: bool = False
    gpu: GpuUse | None = None


class TrialMeter(Protocol):
    """Reads one or more resources of one trial.

    Attributes:
        period: Seconds between readings; infinite once there is nothing to read.
        eager: Whether to read at the very start, in the thread of the trial.
    """

    period: float
    eager: bool

    def read(self, pids: Sequence[int]) -> Mapping[str, MeterReading]:
        """Return what is read by resource, at once and without raising."""
        ...

    def close(self) -> None:
        """Let go of the trial."""
        ...


class CustomMeter:
    """A user's own meter, whatever it does.

    Args:
        meter: The meter.
    """

    eager = True

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._start: float | None = None
        self.period = float(getattr(meter, "period", LONGEST_INTERVAL))

    def read(self, pids: Sequence[int]) -> Mapping[str, MeterReading]:
        """Return what the meter reads, None with one warning where it fails."""
        value = self._value(pids)
        if self._meter.peak or value is None:
            return {self._meter.name: MeterReading(value, peak=True)}
        if self._start is None:
            self._start = value
            return {}  # one reading of a running total tells nothing of the trial yet
        return {self._meter.name: MeterReading(max(0.0, value - self._start), peak=False)}

    def close(self) -> None:
        """Nothing is held."""

    def _value(self, pids: Sequence[int]) -> float | None:
        try:
            value = self._meter.read(pids)
            amount = None if value is None else float(value)
        except Exception as error:  # noqa: BLE001 - a user's code may raise anything
            self._complain(f"raised {error!r}")
            return None
        if amount is not None and not (math.isfinite(amount) and amount >= 0):
            self._complain(f"read {amount}, which must be nonnegative and finite")
            return None
        return amount

    def _complain(self, what: str) -> None:
        name = self._meter.name
        warn_once(f"meter {name}", f"{name} is not measured while its meter fails: it {what}.")


class ScheduledMeter:
    """One gauge on one trial: reads outside the loop's lock, and takes in what was read.

    Args:
        watch: The trial.
        gauge: What to read.
        now: The time.
    """

    def __init__(self, watch: TrialMonitor, gauge: TrialMeter, now: float) -> None:
        self.watch = watch
        self.due = now
        self.eager = gauge.eager
        self._gauge = gauge
        self._reading = threading.Lock()
        self._last: dict[str, float] = {}

    def read(self, pids: Sequence[int], *, patience: float = 0.0) -> Mapping[str, MeterReading]:
        """Return what the gauge reads; nothing when another thread is at it.

        Args:
            pids: The processes of the trial.
            patience: Seconds to wait for that other thread.
        """
        timeout = patience if patience > 0 else -1
        if not self._reading.acquire(blocking=patience > 0, timeout=timeout):
            return {}
        try:
            return self._gauge.read(pids)
        finally:
            self._reading.release()

    def take(self, amounts: Mapping[str, MeterReading], sharers: int) -> None:
        """Hand what was read to the trial, under the loop's lock.

        Args:
            amounts: What was read.
            sharers: The trials that run in the same processes; a total is split evenly.
        """
        for name, amount in amounts.items():
            self.watch.gpu = amount.gpu or self.watch.gpu
            if amount.lost:
                self.watch.forget(name)
            elif amount.value is None:
                continue
            elif not amount.peak:
                growth = max(0.0, amount.value - self._last.get(name, 0.0))
                self._last[name] = max(amount.value, self._last.get(name, 0.0))
                self.watch.add(name, growth if amount.is_own else growth / sharers)
            elif self.watch.isolation != "shared":
                self.watch.raise_to(name, amount.value)

    def close(self) -> None:
        """Let go of the trial."""
        self._gauge.close()

    def schedule(self, now: float) -> None:
        """Set when to read next."""
        self.due = next_due(self.due, now, self._gauge.period)
