"""The state of a trial under metering: its usage so far, its ceilings and its first breach."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
import math

from optuna_quota._limits import Limits
from optuna_quota._metering.breach import (
    Ceiling,
    EXTENSION_THRESHOLD,
    find_breaches,
    QuotaExtension,
    tightest_ceilings,
)
from optuna_quota._metering.meter import GpuUse, Meter, MeterReading
from optuna_quota._resources import CLOCK_RESOURCES, Isolation, Outcome, RESOURCES, USAGE_RESOURCES
from optuna_quota._usage import Breach, Usage, usage_from_amounts


Key = tuple[int, int]

# Seconds over which the rate of CPU cores is averaged.
CORES_WINDOW = 1.0
# Resources whose breach depends on how often CPU time is read.
_NEED_CPU_TIME = {"cpu_time", "cpu_cores", "cost"}


@dataclass(frozen=True)
class Verdict:
    """How a trial ended, as decided by what ended it."""

    outcome: Outcome  # The outcome in the trial table
    reason: str  # One sentence for a person
    breach: Breach | None = None  # The breach, if that was why


class UsageTotals:
    """A trial's usage so far, by resource; without a reading it is unknown."""

    def __init__(self) -> None:
        self._measured: dict[str, float] = {}
        self._external: dict[str, float] = {}
        self._unknown: set[str] = set()

    def record_peak(self, resource: str, value: float) -> None:
        known = self._measured.get(resource)
        if (known is None or value > known) and resource not in self._unknown:
            self._measured[resource] = value

    def add(self, resource: str, amount: float) -> None:
        if resource not in self._unknown:
            self._measured[resource] = self._measured.get(resource, 0.0) + amount

    def mark_unknown(self, resource: str) -> None:
        """Discard a resource permanently: later readings cover only a part of the trial."""
        self._unknown.add(resource)
        self._measured.pop(resource, None)

    def record_external(self, usage: Usage) -> None:
        """Record totals from another source, such as the trial's process; the maximum wins."""
        for resource, value in usage.amounts().items():
            self._external[resource] = max(value, self._external.get(resource, 0.0))

    def by_resource(self) -> dict[str, float]:
        known = dict(self._measured)
        for resource, value in self._external.items():
            known[resource] = max(value, known.get(resource, 0.0))
        return known


# The most points of a timeline, and the seconds of its first buckets.
_MAX_POINTS = 60
_BUCKET = 0.05


class UsageTimeline:
    """A trial's usage over time: a bounded number of points, each the maximum of its bucket.

    Time is divided into buckets of equal width. When there are too many, the width doubles and
    neighbours merge, so that no peak is lost.
    """

    def __init__(self) -> None:
        self._width = _BUCKET
        self._points: dict[int, tuple[float, float]] = {}

    def add(self, seconds: float, value: float) -> None:
        bucket = int(seconds / self._width)
        known = self._points.get(bucket)
        if known is None or value > known[1]:
            self._points[bucket] = (seconds, value)
        while len(self._points) > _MAX_POINTS:
            self._width *= 2
            points, self._points = self._points, {}
            for point in points.values():
                self.add(*point)

    def points(self) -> tuple[tuple[float, float], ...]:
        return tuple(sorted(self._points.values()))


class MonitoredTrial:
    """The state of one trial under metering.

    The metering loop holds its lock while it calls the methods.
    """

    def __init__(
        self,
        key: Key,
        limits: Limits,
        left: Mapping[str, float],
        meters: Sequence[Meter],
        started: float,
    ) -> None:
        self.key = key  # The trial, see :func:`optuna_quota._metering.key_of`
        self.meters = tuple(meters)
        self.started = started  # When the trial started, in seconds on the loop's clock
        # ``"thread"`` alone in this process, ``"shared"`` once another trial ran in this process
        # at the same time, ``"process"`` in a process tree of its own, None where this process
        # can't see it.
        self.isolation: Isolation | None = "thread"
        # Memory that this process held before the trial began in it, in bytes.
        self.held: float | None = None
        # GPU memory that tensors of this process held before, in bytes.
        self.held_on_gpu = 0.0
        self.breach: Breach | None = None  # The first breach; it stays
        self.verdict: Verdict | None = None
        # Which component writes the trial's record, ``"sampler"`` for the sampler.
        self.owner: str | None = None
        self.recorded = False
        # The memory that was last recorded while it runs, and when the next record is due.
        self.last_record = (0.0, 0.0)
        self.is_finished = False  # Whether it has its result: later usage is no breach
        self.closed = False  # Whether metering has ended
        # Environment variables of the trial's own process, such as the GPU assigned to it.
        self.environment: Mapping[str, str] = {}
        # How its use of GPUs was measured; None when it used none or that is unknown.
        self.gpu: GpuUse | None = None
        # The largest grant of each quota that it may ever get, by resource.
        self.most: Mapping[str, float] = {}
        # The memory limit that the trial's supervisor process enforces, in bytes.
        self.supervised: float | None = None
        # Price per hour by resource, where there is a quota on ``cost``.
        self.prices: Mapping[str, float] = {}
        self.used = UsageTotals()
        # Its requests for more of the quotas, where it makes any.
        self.extension: QuotaExtension | None = None
        self.limits = limits
        # What it may use of the study's total quotas, by resource.
        self.left: Mapping[str, float] = dict(left)
        self._is_confined = False
        self._unseen_peak: float | None = None
        self._callbacks: list[Callable[[Breach], None]] = []
        self._timelines: dict[str, UsageTimeline] = defaultdict(UsageTimeline)
        self._cpu_samples: deque[tuple[float, float]] = deque()
        self._update_ceilings()

    @property
    def hard_ceilings(self) -> Mapping[str, Ceiling]:
        """The ceilings under the largest possible grants, for limits that can be set only once."""
        most = {name: self.most.get(name, amount) for name, amount in self.left.items()}
        return tightest_ceilings(self.limits.amounts(), most)

    @property
    def needs(self) -> Mapping[str, float]:
        """The usage of the quotas of which more was requested, at the time of the request."""
        return {} if self.extension is None else self.extension.needs

    def timeline(self, resource: str = "memory") -> tuple[tuple[float, float], ...]:
        """Return pairs of seconds since the start and usage, at most 60.

        Of memory, or of a resource with a ceiling, where a peak is that so far.
        """
        found = self._timelines.get(resource)
        return () if found is None else found.points()

    def usage_after(self, elapsed: float) -> Usage:
        amounts = self.used.by_resource()
        if self._unseen_peak is not None and "memory" in amounts:
            amounts["memory"] = max(amounts["memory"], self._unseen_peak)
        amounts["wall_time"] = max(elapsed, amounts.get("wall_time", 0.0))
        return usage_from_amounts(amounts)

    def ceiling(self, resource: str) -> float | None:
        found = self._ceilings.get(resource)
        return None if found is None else found.limit

    def set_ceilings(self, limits: Limits, left: Mapping[str, float], now: float) -> None:
        before, self.limits, self.left = self._ceilings, limits, dict(left)
        self._update_ceilings()
        if self.extension is not None:
            self.extension.resolve(before, self._ceilings, now)

    def cpu_seconds_left(self) -> float:
        """Return the CPU-seconds until a ceiling needs attention; infinite without one."""
        by_cpu_time = self._ceilings.keys() & _NEED_CPU_TIME
        if self.breach is not None or not by_cpu_time:
            return math.inf
        if by_cpu_time != {"cpu_time"}:
            return 0.0  # a rate or a price: read as often as possible
        used = self.used.by_resource().get("cpu_time", 0.0)
        # More of a quota is requested before it is used up.
        threshold = EXTENSION_THRESHOLD if self.extension is not None else 1.0
        return max(0.0, threshold * self._ceilings["cpu_time"].limit - used)

    def deadline(self, now: float) -> float:
        """Return when time alone may cause a breach, on the loop's clock; infinite for never."""
        if self.breach is not None or self.is_finished:
            return math.inf
        if self.extension is not None:
            return self.extension.deadline(self.started, self._ceilings, now)
        limits = [c.limit for name, c in self._ceilings.items() if name in CLOCK_RESOURCES]
        return self.started + min(limits, default=math.inf)

    def record_memory(self, now: float, memory: float | None, unseen_peak: float | None) -> None:
        """Record the memory now, and a peak between two samples."""
        if memory is not None:
            self.used.record_peak("memory", memory)
            self._timelines["memory"].add(max(0.0, now - self.started), memory)
        self.record_unseen_peak(unseen_peak)

    def record_unseen_peak(self, peak: float | None) -> None:
        """Record a peak of memory that the kernel reports and no sample saw.

        It is no breach: a limit is enforced by what is measured at that moment, and this memory
        was already free again.
        """
        if peak is not None:
            self._unseen_peak = max(peak, self._unseen_peak or 0.0)

    def record_readings(
        self,
        readings: Mapping[str, MeterReading],
        growth: Callable[[str, float], float],
        sharers: int,
    ) -> None:
        """Record what a meter read; ``growth`` of a total is split evenly by the sharers."""
        for name, reading in readings.items():
            self.gpu = reading.gpu or self.gpu
            if reading.lost:
                self.mark_unknown(name)
            elif reading.value is None:
                continue
            elif not reading.peak:
                grown = growth(name, reading.value)
                self.used.add(name, grown if reading.is_own else grown / sharers)
            elif self.isolation != "shared":
                self.used.record_peak(name, reading.value)

    def mark_unknown(self, resource: str) -> None:
        self.used.mark_unknown(resource)
        if resource == "gpu_memory":
            self.gpu = None

    def check_breach(self, now: float) -> None:
        """Check the usage so far for a breach; the first one is kept."""
        if self.breach is not None or self.is_finished or not self._ceilings:
            return
        amounts = self.used.by_resource()
        if "cpu_cores" in self._ceilings:
            amounts.update(self._cpu_cores(now, amounts.get("cpu_time")))
        elapsed = max(0.0, now - self.started)
        for name in amounts.keys() & self._ceilings.keys() - {"memory"}:
            self._timelines[name].add(elapsed, amounts[name])
        for name in CLOCK_RESOURCES:
            amounts.setdefault(name, elapsed)
        if self.prices:
            amounts["cost"] = sum(p * amounts.get(n, 0.0) / 3600 for n, p in self.prices.items())
        found = find_breaches(amounts, self._ceilings, elapsed)
        if self.extension is not None:
            found = self.extension.review(found, amounts, self._ceilings, now)
        self.breach = found[0] if found else None

    def _cpu_cores(self, now: float, cpu_time: float | None) -> dict[str, float]:
        """Return the rate of CPU time over the last second, None within the first second."""
        samples = self._cpu_samples
        if cpu_time is not None and (not samples or cpu_time > samples[-1][1]):
            samples.append((now, cpu_time))
        while len(samples) > 1 and samples[-1][0] - samples[1][0] >= CORES_WINDOW:
            samples.popleft()
        if not samples or samples[-1][0] - samples[0][0] < CORES_WINDOW:
            return {}
        (then, before), (last, total) = samples[0], samples[-1]
        return {"cpu_cores": (total - before) / (last - then)}

    def mark_shared(self) -> None:
        """Mark that another trial runs in the same process: peaks can't be attributed any more."""
        if self.isolation != "thread":
            return
        self.isolation = "shared"
        self._timelines.clear()
        self._unseen_peak = None
        peaks = [name for name in USAGE_RESOURCES if RESOURCES[name].peak]
        for name in (*peaks, *(meter.name for meter in self.meters if meter.peak)):
            self.mark_unknown(name)

    def confine(self) -> None:
        """Drop the ceiling on cores: the trial's process is confined to them."""
        self._is_confined = "cpu_cores" in self.limits.amounts()
        self._update_ceilings()

    def _update_ceilings(self) -> None:
        self._ceilings = tightest_ceilings(self.limits.amounts(), self.left)
        if self._is_confined:
            self._ceilings.pop("cpu_cores", None)

    def isolate(self) -> None:
        """Discard earlier measurements: the trial gets a process of its own."""
        self.isolation = "process"
        self.gpu = self.held = None
        self.held_on_gpu = 0.0
        self.used = UsageTotals()
        self._unseen_peak = None
        self._timelines.clear()
        self._cpu_samples.clear()
        if self.breach is not None and self.breach.resource not in CLOCK_RESOURCES:
            self.breach = None

    def postpone(self, seconds: float) -> None:
        """Move the start to a later time."""
        self.started += seconds
        if seconds:
            self.breach = None

    def take_callbacks(self) -> list[Callable[[], None]]:
        """Return the callbacks that are due, each once: of a breach, or to request more."""
        if self.breach is not None:
            due, self._callbacks = self._callbacks, []
            return [partial(callback, self.breach) for callback in due]
        request = None if self.extension is None else self.extension.take_request()
        return [] if request is None else [request]

    def end(self) -> None:
        self._callbacks, self.extension = [], None
        self.closed = True
