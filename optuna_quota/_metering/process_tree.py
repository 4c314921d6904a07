"""What is read from a process tree, and how a reader of it is chosen."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Hashable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
import logging
import math
import os
import time
from typing import Any
from typing import Protocol
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import psutil


_logger = logging.getLogger("optuna.quota.metering")


@dataclass(frozen=True)
class TreeReading:
    """One look at a process tree.

    Attributes:
        memory: Bytes that all its processes hold together at this moment, anonymous, shared and
            swapped out; None when unknown.
        cpu_time: CPU-seconds of all that ever belonged to it, the dead included; never falls.
            None when unknown.
        peak: The highest such memory of any one of its processes that no look saw, since the
            start (or the last :meth:`ProcessTree.reset_peak`), in bytes, 0 without any; None where
            the kernel does not keep it.
        pids: Its processes.
    """

    memory: float | None
    cpu_time: float | None
    peak: float | None
    pids: tuple[int, ...]


class ProcessTree(Protocol):
    """Reads one process tree."""

    def read(
        self, *, thorough: bool, without: Collection[int] = (), ceiling: float = math.inf
    ) -> TreeReading:
        """Return what the tree holds and has used.

        Args:
            thorough: False for memory alone as cheaply as it goes (what else is known is given
                as it was last), True for all of it.
            without: Roots of subtrees that belong to others.
            ceiling: The memory over which there is a breach, in bytes: where there may be one,
                what processes share is looked at more closely.
        """
        ...

    def glance(self) -> float | None:
        """Return the memory of the processes known so far, at the least possible cost.

        None when only :meth:`read` can tell: a process was created or has ended, or what they
        share has changed.
        """
        ...

    def age(self) -> float:
        """Return the seconds since the root was created."""
        ...

    def reset_peak(self) -> None:
        """Forget the peaks so far, where the kernel allows it."""
        ...

    def close(self) -> None:
        """Release what is held."""
        ...


@dataclass(frozen=True)
class Times:
    """CPU times of one process at one moment, in seconds.

    Attributes:
        own: What it used itself.
        reaped: What its children had used that ended and were waited for, theirs included.
        parent: The identity of the process that it was found under, None for the root.
        foreign: True when it belongs to another trial; its time is not counted, nor when its
            parent inherits it.
    """

    own: float
    reaped: float = 0.0
    parent: Hashable | None = None
    foreign: bool = False

    @property
    def used(self) -> float:
        """All that is known under it."""
        return self.own + self.reaped


class TreeTime:
    """Sums CPU time over all processes that ever belonged to a tree; the sum never falls.

    The kernel adds the time of a child that was waited for to its parent's ``reaped``. A child
    that was not (its parent ignores it, or died first) just vanishes: what it had used when last
    seen is kept here.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._known: dict[Any, Times] = {}
        self._settled = 0.0  # of the vanished that nobody inherited, less what foreigners left

    def update(self, now: Mapping[Any, Times]) -> float:
        """Take in the times of all living members by identity; return the total in seconds."""
        gone = [(who, times) for who, times in self._known.items() if who not in now]
        owed: dict[Hashable | None, float] = {}
        foreign: dict[Hashable | None, float] = {}
        for _, times in gone:
            heir = self._heir(times, now)
            purse = foreign if times.foreign else owed
            purse[heir] = purse.get(heir, 0.0) + times.used
        for heir in {**owed, **foreign}:
            inherited = self._inherited(heir, now)
            not_ours = min(foreign.get(heir, 0.0), inherited)
            unclaimed = max(0.0, owed.get(heir, 0.0) - (inherited - not_ours))
            self._settled += unclaimed - not_ours
        # What a process had used before it became another trial's was counted: that stays.
        self._settled += sum(self._known[who].used for who in now if self._turns_foreign(who, now))
        self._known = dict(now)
        alive = sum(times.used for times in _ours(now.values()))
        self.total = max(self.total, alive + self._settled)
        return self.total

    def _turns_foreign(self, who: Hashable, now: Mapping[Any, Times]) -> bool:
        known = self._known.get(who)
        return known is not None and now[who].foreign and not known.foreign

    def _heir(self, times: Times, now: Mapping[Any, Times]) -> Hashable | None:
        """Return the nearest ancestor alive: the dead in between passed on what they inherited."""
        parent = times.parent
        while parent is not None and parent not in now:
            parent = self._known[parent].parent if parent in self._known else None
        return parent

    def _inherited(self, heir: Hashable | None, now: Mapping[Any, Times]) -> float:
        if heir is None or heir not in now:
            return 0.0
        before = self._known[heir].reaped if heir in self._known else 0.0
        return max(0.0, now[heir].reaped - before)


def _ours(times: Iterable[Times]) -> Iterable[Times]:
    return (t for t in times if not t.foreign)


class PsutilProcessTree:
    """The tree under a process, by psutil, which knows a process by its time of creation.

    Memory is the plain sum of the resident memory of the processes; peaks between samples are
    not known.

    Args:
        pid: The root; None for this process.

    Raises:
        ProcessLookupError: If there is no such process.
    """

    def __init__(self, pid: int | None = None) -> None:
        import psutil

        self._errors = (psutil.Error, OSError)
        try:
            self._root = psutil.Process(os.getpid() if pid is None else pid)
        except psutil.NoSuchProcess as error:
            raise ProcessLookupError(f"There is no process {pid}.") from error
        self._parents: dict[psutil.Process, psutil.Process | None] = {self._root: None}
        self._foreign: set[psutil.Process] = set()
        self._time = TreeTime()

    def read(
        self, *, thorough: bool, without: Collection[int] = (), ceiling: float = math.inf
    ) -> TreeReading:
        """Return what the tree holds and has used."""
        if thorough:
            self._refresh(without)
            self._read_times()
        ours = [p for p in self._parents if p not in self._foreign]
        sizes = [size for size in map(self._memory, ours) if size is not None]
        memory = sum(sizes) if sizes or not ours else None
        return TreeReading(memory, self._time.total, None, tuple(p.pid for p in ours))

    def glance(self) -> float | None:
        """Return None: psutil has nothing that is much cheaper than a reading."""
        return None

    def age(self) -> float:
        """Return the seconds since the root was created."""
        created: float = self._root.create_time()
        return time.time() - created

    def reset_peak(self) -> None:
        """Do nothing: there is no peak that could be reset."""

    def close(self) -> None:
        """Forget the processes."""
        self._parents.clear()
        self._foreign.clear()

    def _memory(self, process: psutil.Process) -> int | None:
        try:
            return int(process.memory_info().rss)
        except self._errors:
            return None

    def _refresh(self, without: Collection[int]) -> None:
        self._parents = {p: parent for p, parent in self._parents.items() if p.is_running()}
        self._foreign = {p for p in self._parents if p in self._foreign or p.pid in without}
        queue = [p for p in self._parents if p not in self._foreign]
        while queue:
            parent = queue.pop()
            for child in self._children(parent):
                if child in self._parents:
                    continue
                self._parents[child] = parent
                if child.pid in without:
                    self._foreign.add(child)
                else:
                    queue.append(child)

    def _children(self, process: psutil.Process) -> list[psutil.Process]:
        try:
            return process.children()
        except self._errors:
            return []

    def _read_times(self) -> None:
        now = {}
        for process, parent in self._parents.items():
            try:
                times = process.cpu_times()
            except self._errors:
                continue
            reaped = times.children_user + times.children_system
            own = times.user + times.system
            now[process] = Times(own, reaped, parent, process in self._foreign)
        self._time.update(now)
