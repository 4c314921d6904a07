"""A process tree under metering and the trials that run in it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Sequence
from dataclasses import replace
import logging
import math
import os
import threading
import time
from typing import TypeVar

from optuna_quota._metering.linux_process_tree import is_available
from optuna_quota._metering.linux_process_tree import LinuxProcessTree
from optuna_quota._metering.process_tree import ProcessTree
from optuna_quota._metering.process_tree import PsutilProcessTree
from optuna_quota._metering.process_tree import TreeReading
from optuna_quota._metering.timing import ASSUMED_GROWTH
from optuna_quota._metering.timing import fastest_growth
from optuna_quota._metering.timing import LONGEST_INTERVAL
from optuna_quota._metering.timing import LONGEST_INTERVAL_ALONE
from optuna_quota._metering.timing import next_due
from optuna_quota._metering.timing import sampling_interval
from optuna_quota._metering.trial_monitor import TrialMonitor
from optuna_quota._metering.warn import warn_once


_logger = logging.getLogger("optuna.quota.metering")

Answer = TypeVar("Answer")

# Seconds after which a trial will not be isolated any more: it is by then in its own process.
_SURELY_SHARED = 10.0


# Seconds between looks at CPU time and peaks in a long trial without a ceiling on CPU time.
_MOST_SELDOM = 1.0


class MonitoredTree:
    """A process tree and the trials that run in it: several for trials in threads.

    Args:
        tree: Reads the tree.
        pid: Its root; None for this process.
        now: The time.
        period: Seconds between looks while there is headroom in plenty; None for a fitting one.
    """

    def __init__(
        self, tree: ProcessTree, pid: int | None, now: float, period: float | None = None
    ) -> None:
        self.tree = tree
        self.pid = pid
        self.due = now
        self.watches: dict[TrialMonitor, ThreadTime] = {}
        self._thorough_due = now
        self._reading: TreeReading | None = None
        self._read_at = now
        self._memory: float | None = None
        self._calm = -math.inf
        self._ceiling = math.inf
        self._growth = ASSUMED_GROWTH
        self._fixed_period = period
        self._period = LONGEST_INTERVAL if period is None else period
        self._cores = max(1, os.cpu_count() or 1)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes, as last seen."""
        return () if self._reading is None else self._reading.pids

    def join(self, watch: TrialMonitor, now: float, without: Collection[int]) -> None:
        """Let a trial join; trials that run at once in one tree are shared from then on."""
        if self.watches:
            self.read(now, without, thorough=True)  # what was used so far is not the newcomer's
        self.watches[watch] = ThreadTime()
        self._calm = -math.inf
        if len(self.watches) == 1:
            self._begin(watch, now, without)
        else:
            for each in self.watches:
                each.share()
            for thread in self.watches.values():
                thread.growth()  # counts from now

    def _begin(self, watch: TrialMonitor, now: float, without: Collection[int]) -> None:
        """Take the first reading of a trial that is alone in the tree."""
        self._ask(self.tree.reset_peak)
        self._growth = ASSUMED_GROWTH
        self.take_stock()
        reading = self._reading = self._measure(without, thorough=True)
        self._memory = reading.memory
        self._read_at = self.due = self._thorough_due = now
        watch.take_memory(now, reading.memory, None)
        if reading.cpu_time is not None:
            # A process that was made for the trial counts from its birth, to a clock tick.
            age = None if self.pid is None else self._ask(self.tree.age)
            own = age is not None and age <= watch.elapsed + 0.02
            watch.add("cpu_time", reading.cpu_time if own else 0.0)
        self.take_stock()

    def look(self, now: float, without: Collection[int]) -> bool:
        """Measure as cheaply as will do; return whether there is anything new to judge.

        Mostly a glance at the memory tells that it is no higher than it was before and that there
        is headroom, so that nothing else needs to be done.
        """
        if now < self._thorough_due:
            memory = self._ask(self.tree.glance)
            if memory is not None and memory <= self._calm:
                self._learn_growth(memory, now)
                self._schedule(now, memory)
                return False
        self.read(now, without)
        self.schedule(now)
        return True

    def read(self, now: float, without: Collection[int], *, thorough: bool = False) -> None:
        """Measure, and hand to each trial what is its own."""
        thorough = thorough or now >= self._thorough_due
        reading = self._measure(without, thorough=thorough)
        before, self._reading = self._reading, self._known(reading)
        self._learn_growth(reading.memory, now)
        if before is not None:
            self._hand_out(before, reading, now)
        if thorough:
            self._thorough_due = now + self._thorough_wait()
        self.take_stock()

    def _measure(self, without: Collection[int], *, thorough: bool) -> TreeReading:
        ceiling = self._ceiling
        found = self._ask(
            lambda: self.tree.read(thorough=thorough, without=without, ceiling=ceiling)
        )
        return TreeReading(None, None, None, self.pids) if found is None else found

    def _known(self, reading: TreeReading) -> TreeReading:
        """Return a reading with the CPU time as last known, so that none is lost by a fault."""
        if reading.cpu_time is not None or self._reading is None:
            return reading
        return replace(reading, cpu_time=self._reading.cpu_time)

    def _ask(self, read: Callable[[], Answer]) -> Answer | None:
        """Return what the tree answers, None with one warning where it can't be read."""
        try:
            return read()
        except OSError as fault:
            warn_once(
                "trees",
                "Memory and CPU time of trials are not known while their processes can't be "
                f"looked at: {fault!r}.",
            )
            return None

    def take_stock(self) -> None:
        """Settle, until the next reading, what a glance is held against."""
        ceilings = [
            ceiling
            for watch in self.watches
            if watch.breach is None and watch.isolation != "shared"
            if (ceiling := watch.ceiling("memory")) is not None
            # Who looks at it twice is in the way of who has to be on time.
            and ceiling != watch.supervised
        ]
        self._ceiling = min(ceilings, default=math.inf)
        if self._fixed_period is None:
            self._period = LONGEST_INTERVAL_ALONE if self._is_alone() else LONGEST_INTERVAL
        self._calm = self._calm_up_to(self._memory)

    def _is_alone(self) -> bool:
        reading = self._reading
        return reading is not None and len(reading.pids) == 1 and reading.peak is not None

    def _calm_up_to(self, memory: float | None) -> float:
        """Return the memory up to which there is nothing new to know, and no breach."""
        if memory is None:
            return -math.inf
        if all(watch.isolation == "shared" for watch in self.watches):
            return math.inf
        return min(max(memory, self._calm), self._ceiling)

    def _thorough_wait(self) -> float:
        """Return the seconds until CPU time and peaks must be read again.

        Seldom in a long trial, as often as memory in a short one, and before a ceiling on CPU
        time can be reached even if all cores are busy.
        """
        waits = [_MOST_SELDOM]
        for watch in self.watches:
            waits += [watch.elapsed / 5, watch.seconds_of_cpu_left() / self._cores]
        return max(self._period, min(waits))

    def _learn_growth(self, memory: float | None, now: float) -> None:
        before, seconds = self._memory, now - self._read_at
        if memory is not None and before is not None and seconds > 0 and memory > before:
            self._growth = fastest_growth(self._growth, (memory - before) / seconds, self._cores)
        self._memory, self._read_at = memory, now

    def _hand_out(self, before: TreeReading, reading: TreeReading, now: float) -> None:
        if reading.cpu_time is not None and before.cpu_time is not None:
            spent = max(0.0, reading.cpu_time - before.cpu_time)
            if spent > 0:
                self._apportion(spent)
        for watch in self.watches:
            if watch.isolation != "shared":
                watch.take_memory(now, reading.memory, reading.peak)
            elif now - watch.started > _SURELY_SHARED:
                warn_of_sharing(watch)

    def _apportion(self, spent: float) -> None:
        if len(self.watches) == 1:
            next(iter(self.watches)).add("cpu_time", spent)
            return
        weights = [thread.growth() for thread in self.watches.values()]
        for watch, share in zip(self.watches, apportion(spent, weights), strict=True):
            watch.add("cpu_time", share)

    def schedule(self, now: float) -> None:
        """Set when to measure next: the sooner, the less headroom there is."""
        self._schedule(now, self._memory)

    def _schedule(self, now: float, memory: float | None) -> None:
        headroom = None if memory is None else self._ceiling - memory
        wait = sampling_interval(headroom, self._growth, longest=self._period)
        self.due = next_due(self.due, now, wait) if wait == self._period else now + wait


def warn_of_sharing(watch: TrialMonitor) -> None:
    """Say that a memory limit can't be enforced where there is one."""
    limited = any(watch.ceiling(name) is not None for name in ("memory", "gpu_memory"))
    if watch.isolation == "shared" and limited:
        warn_once(
            "shared",
            "Trials run at once in one process: their memory can't be told apart, is not "
            "recorded, and no memory limit is enforced on them. `isolated(objective)` gives "
            "each trial a process of its own.",
        )


class ThreadTime:
    """CPU-seconds of the thread that made this object, 0 where the system has no such clock."""

    def __init__(self) -> None:
        self._clock: int | None = None
        if hasattr(time, "pthread_getcpuclockid"):
            # Asked for once, from the thread itself: asking for a thread that has ended would
            # crash, while reading the clock of one merely fails.
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._last = self._now()

    def growth(self) -> float:
        """Return what was used since the last call, 0 once the thread has ended."""
        now = self._now()
        spent, self._last = max(0.0, now - self._last), now
        return spent

    def _now(self) -> float:
        if self._clock is None:
            return 0.0
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return 0.0


def apportion(spent: float, weights: Sequence[float]) -> list[float]:
    """Return the parts of a total by weight; even parts when all weights are 0.

    Args:
        spent: CPU-seconds of the whole process tree.
        weights: CPU-seconds of each trial's own thread. What BLAS workers and other helpers used
            goes to the trials in proportion to what their own threads did: the sum over trials
            is exact, the parts are an estimate.
    """
    whole = sum(weights)
    if whole <= 0:
        return [spent / len(weights) for _ in weights]
    return [spent * weight / whole for weight in weights]


# From a pid, and the reaper's where there is one.
OpenTree = Callable[..., ProcessTree]


def open_tree(pid: int | None, reaper: int | None = None, outsiders: int = 0) -> ProcessTree:
    """Return the cheapest true reader of the tree under a process.

    Args:
        pid: The root; None for this process.
        reaper: A process that inherits the tree's orphans, and has no other children than these
            and the root; None without one.
        outsiders: How many processes outside of the tree hold, at least, what it was forked with.

    Raises:
        ProcessLookupError: If there is no such process.
    """
    if is_available():
        try:
            return LinuxProcessTree(pid, reaper, outsiders=outsiders)
        except ProcessLookupError:
            raise
        except OSError as error:
            _logger.info(f"Processes are measured through psutil: /proc can't be read ({error}).")

    return PsutilProcessTree(pid)
