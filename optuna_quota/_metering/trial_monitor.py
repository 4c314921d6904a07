"""Usage under construction."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
import math
from typing import TYPE_CHECKING

from optuna_quota._metering.breach import Ceiling
from optuna_quota._metering.breach import EXTENSION_THRESHOLD
from optuna_quota._metering.breach import find_breaches
from optuna_quota._metering.breach import QuotaExtension
from optuna_quota._metering.breach import tightest_ceilings
from optuna_quota._metering.gpu_attribution import GpuUse
from optuna_quota._resources import Breach
from optuna_quota._resources import Isolation
from optuna_quota._resources import Limits
from optuna_quota._resources import Outcome
from optuna_quota._resources import Usage
from optuna_quota._resources import USAGE_RESOURCES


if TYPE_CHECKING:
    from optuna_quota._metering.loop import MeteringLoop
    from optuna_quota._metering.meter import Meter


class UsageTotals:
    """What one trial used so far, by resource; what was never told is unknown."""

    __slots__ = ("_told", "_unknown", "_values")

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._unknown: set[str] = set()

    def raise_to(self, resource: str, value: float) -> None:
        """Take in a peak."""
        known = self._values.get(resource)
        if (known is None or value > known) and resource not in self._unknown:
            self._values[resource] = value

    def add(self, resource: str, amount: float) -> None:
        """Add to a total."""
        if resource not in self._unknown:
            self._values[resource] = self._values.get(resource, 0.0) + amount

    def forget(self, resource: str) -> None:
        """Let an amount be unknown for good: what is read later tells only a part."""
        self._unknown.add(resource)
        self._values.pop(resource, None)

    def know(self, resource: str, value: float) -> None:
        """Take in a figure for the whole trial, from whoever knows; the largest counts."""
        self._told[resource] = max(value, self._told.get(resource, 0.0))

    def by_resource(self) -> dict[str, float]:
        """Return what is known."""
        known = dict(self._values)
        for resource, value in self._told.items():
            known[resource] = max(value, known.get(resource, 0.0))
        return known

    def usage(self, elapsed: float) -> Usage:
        """Return it as a value, with the clock time."""
        amounts = self.by_resource()
        known = {n: v for n, v in amounts.items() if n in USAGE_RESOURCES}
        known["wall_time"] = max(elapsed, known.get("wall_time", 0.0))
        custom = {n: v for n, v in amounts.items() if n not in USAGE_RESOURCES}
        return Usage(**known, custom=custom)


MOST_POINTS = 60


class Timeline:
    """Keeps at most 60 points whatever the number of samples, and every bucket's maximum.

    Time is cut into buckets of equal width, each represented by its highest sample. When there
    are too many, neighbours are merged and the width doubles: a peak is never thinned away.

    Args:
        most: The most points to keep; even.
        width: Seconds of the first buckets.
    """

    __slots__ = ("_most", "_points", "_width")

    def __init__(self, most: int = MOST_POINTS, width: float = 0.05) -> None:
        self._most = most
        self._width = width
        self._points: dict[int, tuple[float, float]] = {}

    def add(self, seconds: float, value: float) -> None:
        """Add a sample, in seconds since the start."""
        bucket = int(seconds / self._width)
        known = self._points.get(bucket)
        if known is None or value > known[1]:
            self._points[bucket] = (seconds, value)
        while len(self._points) > self._most:
            self._widen()

    def _widen(self) -> None:
        self._width *= 2
        points, self._points = self._points, {}
        for seconds, value in points.values():
            self.add(seconds, value)

    def points(self) -> tuple[tuple[float, float], ...]:
        """Return pairs of seconds and value, in order."""
        return tuple(sorted(self._points.values()))


Key = tuple[int, int]

# Seconds over which the rate of CPU cores is averaged.
CORES_WINDOW = 1.0
_BY_CPU_TIME = {"cpu_time", "cpu_cores", "cost"}


@dataclass(frozen=True)
class Verdict:
    """How a trial ended, from whoever ended it.

    Attributes:
        outcome: The word for it.
        reason: One sentence for a person.
        breach: The limit it was over, where that was why.
    """

    outcome: Outcome
    reason: str
    breach: Breach | None = None


class TrialMonitor:
    """One trial under metering, made by :meth:`MeteringLoop.monitor`.

    Attributes:
        key: Which trial.
        meters: The user's own meters.
        started: When it started, on the loop's clock.
        isolation: Where it runs: ``"thread"`` alone in this process, ``"shared"`` once it ran
            there beside another, ``"process"`` in a process tree of its own, None where this
            process can't see it.
        breach: The first breach found; stays.
        verdict: How it ended, from whoever ended it.
        owner: Who settles the trial's record, ``"sampler"`` for the sampler.
        settled: Whether the trial's record was written.
        closed: Whether metering has ended.
        environment: Environment variables for the trial's own process, such as the GPU it was
            given.
        gpu: How its use of GPUs is told; None where it used none, or that is unknown.
        most: What it could be granted of quotas at the very most, by resource.
        supervised: The limit on memory that a process of its own judges, in bytes; None without.
        prices: Price per hour by resource, where there is a quota on ``cost``.
    """

    def __init__(
        self,
        loop: MeteringLoop,
        key: Key,
        limits: Limits,
        left: Mapping[str, float],
        meters: Sequence[Meter],
        now: float,
    ) -> None:
        self.key = key
        self.meters = tuple(meters)
        self.started = now
        self.isolation: Isolation | None = "thread"
        self.breach: Breach | None = None
        self.verdict: Verdict | None = None
        self.owner: str | None = None
        self.settled = False
        self.closed = False
        self.environment: Mapping[str, str] = {}
        self.gpu: GpuUse | None = None
        self.most: Mapping[str, float] = {}
        self.supervised: float | None = None
        self.prices: Mapping[str, float] = {}
        self._loop = loop
        self._limits = limits
        self._left = dict(left)
        self._ceilings = tightest_ceilings(limits.amounts(), self._left)
        self._paused_before = loop.paused
        self._finished = False
        self._ended: float | None = None
        self._used = UsageTotals()
        self._unseen_peak: float | None = None
        self._callbacks: list[Callable[[Breach], None]] = []
        self._timeline = Timeline()
        self._cpu_marks: deque[tuple[float, float]] = deque()
        self._renewal: QuotaExtension | None = None

    @property
    def limits(self) -> Limits:
        """The trial's limits."""
        return self._limits

    @property
    def left(self) -> Mapping[str, float]:
        """What the trial may use of the study's total quotas, by resource."""
        return dict(self._left)

    @property
    def elapsed(self) -> float:
        """Seconds since the start; stands still once closed."""
        now = self._loop.now() if self._ended is None else self._ended
        return max(0.0, now - self.started)

    @property
    def paused(self) -> float:
        """Seconds since the start in which this process was stopped."""
        return self._loop.paused - self._paused_before

    def sample(self, *, fully: bool = False) -> Usage:
        """Measure now; return the usage so far and update the breach.

        Args:
            fully: Whether GPUs and meters are read as well, though they are not due.
        """
        if not self.closed:
            self._loop.sample(self, fully=fully)
        return self.usage()

    def usage(self) -> Usage:
        """Return the usage so far as it was last measured."""
        usage = self._used.usage(self.elapsed)
        if self._unseen_peak is None or usage.memory is None:
            return usage
        return replace(usage, memory=max(usage.memory, self._unseen_peak))

    def timeline(self) -> tuple[tuple[float, float], ...]:
        """Return pairs of seconds since the start and bytes of memory, at most 60."""
        return self._timeline.points()

    @property
    def ceilings(self) -> Mapping[str, Ceiling]:
        """The ceilings in force by resource, and whether each comes from a quota."""
        return dict(self._ceilings)

    @property
    def needs(self) -> Mapping[str, float]:
        """What the trial used of the quotas of which it asked for more, as it asked."""
        return {} if self._renewal is None else self._renewal.needs

    @property
    def hard_ceilings(self) -> Mapping[str, Ceiling]:
        """The ceilings that no grant of more can raise: for what can be set but once."""
        most = {**self._left, **{n: m for n, m in self.most.items() if n in self._left}}
        return tightest_ceilings(self._limits.amounts(), most)

    def limit(self, limits: Limits) -> None:
        """Set the trial's limits, where they become known after its start."""
        self._limits = limits
        self._loop.allow(self, self._left)

    def allow(self, left: Mapping[str, float]) -> None:
        """Set what this trial may use of the study's total quotas.

        Args:
            left: Ceilings on the trial's whole usage by resource, in SI base units; they replace
                what was set before. A breach of one bears ``quota=True``.
        """
        self._loop.allow(self, left)

    def detach(self, waited: float = 0.0) -> None:
        """From now on meter nothing but the clock, until :meth:`attach`: the trial is isolated.

        What was measured before belongs to this process and is forgotten.

        Args:
            waited: Seconds since the start that are no time of the trial.
        """
        self._loop.detach(self, waited)

    def attach(self, pid: int, reaper: int | None = None, outsiders: int = 0) -> None:
        """From now on meter only the process tree under ``pid``: the trial is isolated.

        What was measured before belongs to this process and is forgotten, but for the clock.

        Args:
            pid: The root; a child that its parent has not waited for yet, so that the number
                can't be another's.
            reaper: The process that inherits the tree's orphans, if it has no other children.
            outsiders: How many processes outside of the tree hold, at least, what it was forked
                with.

        Raises:
            ProcessLookupError: If there is no such process.
        """
        self._loop.attach(self, pid, reaper, outsiders)

    def on_breach(self, callback: Callable[[Breach], None]) -> None:
        """Call back once at the first breach, from the loop's thread; at once if there was one.

        Args:
            callback: Should return quickly: while it runs, nothing is measured.
        """
        self._loop.on_breach(self, callback)

    def on_low_quota(self, ask: Callable[[], None]) -> None:
        """Call when what is left of a quota runs low; the answer is :meth:`allow`.

        A breach of what is left then waits until the answer has refused more of it, for no more
        than a second.

        Args:
            ask: Called from the loop's thread; should return at once.
        """
        self._renewal = QuotaExtension(ask)

    def finish(self) -> None:
        """Tell that the trial has its result: what it uses from now on breaches nothing."""
        self._loop.finish(self)

    def add_usage(self, usage: Usage) -> None:
        """Merge in better figures from whoever knows them; the larger of each counts."""
        self._loop.add_usage(self, usage)

    def close(self) -> Usage:
        """Measure a last time and stop metering; idempotent."""
        self._loop.close_watch(self)
        return self.usage()

    # What follows is for the loop, which holds its lock meanwhile.

    def ceiling(self, resource: str) -> float | None:
        """Return the ceiling in force on a resource, None without one."""
        found = self._ceilings.get(resource)
        return None if found is None else found[0]

    def seconds_of_cpu_left(self) -> float:
        """Return the CPU-seconds until a ceiling needs attention; infinite without one."""
        if self.breach is not None or not self._ceilings.keys() & _BY_CPU_TIME:
            return math.inf
        ceiling = self.ceiling("cpu_time")
        if ceiling is None or len(self._ceilings.keys() & _BY_CPU_TIME) > 1:
            return 0.0  # a rate or a price: as often as may be
        used = self._used.by_resource().get("cpu_time", 0.0)
        # More of a quota is asked for before it is used up.
        return max(
            0.0, ceiling * (EXTENSION_THRESHOLD if self._renewal is not None else 1.0) - used
        )

    def deadline(self) -> float | None:
        """Return when the clock alone may breach, on the loop's clock; None for never."""
        if self.breach is not None or self._finished:
            return None
        if self._renewal is not None:
            return self._renewal.deadline(self.started, self._ceilings, self._loop.now())
        clocks = (self.ceiling("wall_time"), self.ceiling("trial_time"))
        return min((self.started + c for c in clocks if c is not None), default=None)

    def take_memory(self, now: float, memory: float | None, peak: float | None) -> None:
        """Take in the memory at this moment, and a peak between two looks."""
        if memory is not None:
            self._used.raise_to("memory", memory)
            self._timeline.add(max(0.0, now - self.started), memory)
        self.take_unseen_peak(peak)

    def take_unseen_peak(self, peak: float | None) -> None:
        """Take in a peak that the kernel tells of: it is recorded, and no breach.

        A limit is judged by what is measured at that moment; this memory was free again by then.
        """
        if peak is not None:
            self._unseen_peak = max(peak, self._unseen_peak or 0.0)

    def raise_to(self, resource: str, value: float) -> None:
        """Take in a peak."""
        self._used.raise_to(resource, value)

    def add(self, resource: str, amount: float) -> None:
        """Add to a total."""
        self._used.add(resource, amount)

    def forget(self, resource: str) -> None:
        """Let an amount be unknown for good."""
        self._used.forget(resource)
        if resource == "gpu_memory":
            self.gpu = None

    def judge(self, now: float) -> None:
        """Look for a breach in what is known; the first one stays."""
        if self.breach is not None or self._finished or not self._ceilings:
            return
        amounts = self._used.by_resource()
        if "cpu_cores" in self._ceilings:
            amounts.update(self._cores(now, amounts.get("cpu_time")))
        elapsed = max(0.0, now - self.started)
        amounts.setdefault("trial_time", elapsed)
        amounts.setdefault("wall_time", elapsed)
        if self.prices:
            amounts["cost"] = sum(p * amounts.get(n, 0.0) / 3600 for n, p in self.prices.items())
        found = find_breaches(amounts, self._ceilings, elapsed)
        if self._renewal is not None:
            found = self._renewal.review(found, amounts, self._ceilings, now)
        self.breach = found[0] if found else None

    def _cores(self, now: float, cpu_time: float | None) -> dict[str, float]:
        """Return the rate of CPU time over the last second; nothing before it has passed."""
        marks = self._cpu_marks
        if cpu_time is not None and (not marks or cpu_time > marks[-1][1]):
            marks.append((now, cpu_time))
        while len(marks) > 1 and marks[-1][0] - marks[1][0] >= CORES_WINDOW:
            marks.popleft()
        if not marks or marks[-1][0] - marks[0][0] < CORES_WINDOW:
            return {}
        (then, before), (last, total) = marks[0], marks[-1]
        return {"cpu_cores": (total - before) / (last - then)}

    def replace_left(self, left: Mapping[str, float], now: float) -> None:
        """Set what is left of the quotas."""
        before = self._ceilings
        self._left = dict(left)
        self._ceilings = tightest_ceilings(self._limits.amounts(), self._left)
        if self._renewal is not None:
            self._renewal.answer(before, self._ceilings, now)

    def take_ask(self) -> Callable[[], None] | None:
        """Return what asks for more of the quotas, once each time that it is due."""
        return None if self._renewal is None else self._renewal.take_ask()

    def merge(self, usage: Usage) -> None:
        """Merge in figures; the larger of each counts."""
        for name, value in usage.amounts().items():
            self._used.know(name, value)

    def share(self) -> None:
        """Note that peaks can't be told apart from another trial's in the same process."""
        if self.isolation != "thread":
            return
        self.isolation = "shared"
        self._timeline = Timeline()
        self._unseen_peak = None
        for name in ("memory", "gpu_memory", *(m.name for m in self.meters if m.peak)):
            self.forget(name)

    def postpone(self, seconds: float) -> None:
        """Start the clock later; nothing else is measured yet that could be over a ceiling."""
        self.started += seconds
        if seconds:
            self.breach = None

    def isolate(self) -> None:
        """Forget what was measured of this process."""
        self.isolation = "process"
        self.gpu = None
        self._used = UsageTotals()
        self._unseen_peak = None
        self._timeline = Timeline()
        self._cpu_marks.clear()
        if self.breach is not None and self.breach.resource not in ("wall_time", "trial_time"):
            self.breach = None

    def add_callback(self, callback: Callable[[Breach], None]) -> None:
        """Keep a callback for the first breach."""
        self._callbacks.append(callback)

    def take_callbacks(self) -> Sequence[Callable[[Breach], None]]:
        """Return the callbacks that are due, each once."""
        if self.breach is None or not self._callbacks:
            return ()
        due, self._callbacks = self._callbacks, []
        return due

    def stop_judging(self) -> None:
        """Let the trial breach nothing any more."""
        self._finished = True

    def end(self, now: float) -> None:
        """Stop the clock, and let go of all that was to be called."""
        self._ended = now
        self._callbacks, self._renewal = [], None
        self.closed = True
