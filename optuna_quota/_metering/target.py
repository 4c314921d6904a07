"""A process tree under metering and the trials that run in it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from dataclasses import replace
import math
import os
from typing import TypeVar

from optuna_quota._metering.pacing import ASSUMED_GROWTH
from optuna_quota._metering.pacing import fastest_growth
from optuna_quota._metering.pacing import LONGEST_WAIT
from optuna_quota._metering.pacing import LONGEST_WAIT_ALONE
from optuna_quota._metering.pacing import next_due
from optuna_quota._metering.pacing import wait_for
from optuna_quota._metering.threads import apportion
from optuna_quota._metering.threads import ThreadTime
from optuna_quota._metering.tree import Tree
from optuna_quota._metering.tree import TreeReading
from optuna_quota._metering.warn import warn_once
from optuna_quota._metering.watch import Watch


Answer = TypeVar("Answer")

# Seconds after which a trial will not be isolated any more: it is by then in its own process.
_SURELY_SHARED = 10.0


# Seconds between looks at CPU time and peaks in a long trial without a ceiling on CPU time.
_MOST_SELDOM = 1.0


class Target:
    """A process tree and the trials that run in it: several for trials in threads.

    Args:
        tree: Reads the tree.
        pid: Its root; None for this process.
        now: The time.
        period: Seconds between looks while there is headroom in plenty; None for a fitting one.
    """

    def __init__(
        self, tree: Tree, pid: int | None, now: float, period: float | None = None
    ) -> None:
        self.tree = tree
        self.pid = pid
        self.due = now
        self.watches: dict[Watch, ThreadTime] = {}
        self._thorough_due = now
        self._reading: TreeReading | None = None
        self._read_at = now
        self._memory: float | None = None
        self._calm = -math.inf
        self._ceiling = math.inf
        self._growth = ASSUMED_GROWTH
        self._fixed_period = period
        self._period = LONGEST_WAIT if period is None else period
        self._cores = max(1, os.cpu_count() or 1)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes, as last seen."""
        return () if self._reading is None else self._reading.pids

    def join(self, watch: Watch, now: float, without: Collection[int]) -> None:
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

    def _begin(self, watch: Watch, now: float, without: Collection[int]) -> None:
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
            self._period = LONGEST_WAIT_ALONE if self._is_alone() else LONGEST_WAIT
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
        wait = wait_for(headroom, self._growth, longest=self._period)
        self.due = next_due(self.due, now, wait) if wait == self._period else now + wait


def warn_of_sharing(watch: Watch) -> None:
    """Say that a memory limit can't be enforced where there is one."""
    limited = any(watch.ceiling(name) is not None for name in ("memory", "gpu_memory"))
    if watch.isolation == "shared" and limited:
        warn_once(
            "shared",
            "Trials run at once in one process: their memory can't be told apart, is not "
            "recorded, and no memory limit is enforced on them. `isolated(objective)` gives "
            "each trial a process of its own.",
        )
