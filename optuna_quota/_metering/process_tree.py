"""The interface of process tree readers, CPU time over changing members, a psutil reader."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
import contextlib
from dataclasses import dataclass
import math
import os
from typing import Any, Protocol

import psutil


@dataclass(frozen=True)
class TreeReading:
    """One reading of a process tree.

    Attributes:
        memory: Bytes that all its processes hold together at this moment, anonymous, shared and
            swapped out; None if unknown.
        cpu_time: CPU-seconds of all processes that ever belonged to it; never falls. None if
            unknown.
        peak: The highest such memory of any one of its processes between two readings, since the
            start (or the last :meth:`ProcessTree.reset_peak`), in bytes, 0 without any; None if
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
        """Read what the tree holds and has used.

        Args:
            thorough: False for memory alone, as cheaply as possible; the rest is as last read.
            without: Roots of subtrees that belong to others.
            ceiling: The memory over which there is a breach, in bytes: near it, shared pages are
                measured more closely.
        """
        ...

    def reset_peak(self) -> None:
        """Forget the peaks so far, if the kernel allows it."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class CpuTimes:
    """CPU times of one process at one moment, in seconds.

    Attributes:
        own: What it used itself.
        reaped: What its children had used that ended and were waited for, theirs included.
        parent: The identity of the process that it was found under, None for the root.
        foreign: Whether it belongs to another trial; its time is not counted, nor when its parent
            inherits it.
    """

    own: float
    reaped: float = 0.0
    parent: Hashable | None = None
    foreign: bool = False

    @property
    def used(self) -> float:
        """Its own time and its children's."""
        return self.own + self.reaped


class TreeCpuTime:
    """Sums CPU time over all processes that ever belonged to a tree; the sum never falls.

    The kernel adds the time of a child that was waited for to its parent's ``reaped``. A child
    that was not (its parent ignores it, or died first) just vanishes: what it had used when last
    seen is kept here.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._known: dict[Any, CpuTimes] = {}
        # Of vanished processes that no parent inherited, less what foreign ones left.
        self._unaccounted = 0.0

    def update(self, now: Mapping[Any, CpuTimes]) -> None:
        """Update by the times of all living members."""
        vanished: dict[Hashable | None, float] = {}
        foreign: dict[Hashable | None, float] = {}
        for process, times in self._known.items():
            if process not in now:
                ancestor = self._living_ancestor(times, now)
                amounts = foreign if times.foreign else vanished
                amounts[ancestor] = amounts.get(ancestor, 0.0) + times.used
            elif now[process].foreign and not times.foreign:
                # What it used before it became another trial's was counted, and remains so.
                self._unaccounted += times.used
        for ancestor in {**vanished, **foreign}:
            inherited = self._inherited(ancestor, now)
            not_ours = min(foreign.get(ancestor, 0.0), inherited)
            unclaimed = vanished.get(ancestor, 0.0) - (inherited - not_ours)
            self._unaccounted += max(0.0, unclaimed) - not_ours
        self._known = dict(now)
        alive = sum(times.used for times in now.values() if not times.foreign)
        self.total = max(self.total, alive + self._unaccounted)

    def _living_ancestor(self, times: CpuTimes, now: Mapping[Any, CpuTimes]) -> Hashable | None:
        """Return the nearest living ancestor: dead ones passed on what they inherited."""
        parent = times.parent
        while parent is not None and parent not in now:
            parent = self._known[parent].parent if parent in self._known else None
        return parent

    def _inherited(self, process: Hashable | None, now: Mapping[Any, CpuTimes]) -> float:
        if process is None:
            return 0.0
        before = self._known[process].reaped if process in self._known else 0.0
        return max(0.0, now[process].reaped - before)


class PsutilProcessTree:
    """The tree under a process, by psutil: for any system, and if /proc can't be read.

    Memory is the plain sum of the resident memory of the processes; peaks between samples are not
    known. Raises ProcessLookupError if there is no such process.
    """

    _errors = (psutil.Error, OSError)

    def __init__(self, pid: int | None = None) -> None:
        try:
            root = psutil.Process(os.getpid() if pid is None else pid)
        except psutil.NoSuchProcess as error:
            raise ProcessLookupError(f"There is no process {pid}.") from error
        self._parents: dict[psutil.Process, psutil.Process | None] = {root: None}
        self._foreign: set[psutil.Process] = set()
        self._cpu_time = TreeCpuTime()

    def read(
        self, *, thorough: bool, without: Collection[int] = (), ceiling: float = math.inf
    ) -> TreeReading:
        if thorough:
            self._find_processes(without)
            self._read_times()
        ours = [p for p in self._parents if p not in self._foreign]
        sizes = []
        for process in ours:
            with contextlib.suppress(*self._errors):
                sizes.append(process.memory_info().rss)
        memory = sum(sizes) if sizes or not ours else None
        return TreeReading(memory, self._cpu_time.total, None, tuple(p.pid for p in ours))

    def reset_peak(self) -> None:
        """Do nothing: there is no peak to reset."""

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def _find_processes(self, without: Collection[int]) -> None:
        self._parents = {p: parent for p, parent in self._parents.items() if p.is_running()}
        self._foreign = {p for p in self._parents if p in self._foreign or p.pid in without}
        queue = [p for p in self._parents if p not in self._foreign]
        while queue:
            parent = queue.pop()
            children: list[psutil.Process] = []
            with contextlib.suppress(*self._errors):
                children = parent.children()
            for child in children:
                if child in self._parents:
                    continue
                self._parents[child] = parent
                if child.pid in without:
                    self._foreign.add(child)
                else:
                    queue.append(child)

    def _read_times(self) -> None:
        now = {}
        for process, parent in self._parents.items():
            try:
                times = process.cpu_times()
            except self._errors:
                continue
            reaped = times.children_user + times.children_system
            own = times.user + times.system
            now[process] = CpuTimes(own, reaped, parent, process in self._foreign)
        self._cpu_time.update(now)
