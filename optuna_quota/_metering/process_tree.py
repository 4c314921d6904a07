"""Process trees: the interface of readers, CPU time, shared memory, and a reader by psutil."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
import contextlib
from dataclasses import dataclass
import math
import os
from typing import Any, Protocol

import psutil


@dataclass(frozen=True)
class TreeReading:
    """One reading of a process tree."""

    # Bytes that all its processes hold together at this moment, anonymous, shared and swapped out;
    # None if unknown
    memory: float | None
    # CPU-seconds of all processes that ever belonged to it; never falls. None if unknown.
    cpu_time: float | None
    # The highest such memory of any one of its processes between two readings, since the start (or
    # the last :meth:`ProcessTree.reset_peak`), in bytes, 0 without any; None if the kernel does
    # not keep it
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
    """CPU times of one process at one moment, in seconds."""

    own: float  # What it used itself
    # What its children had used that ended and were waited for, theirs included
    reaped: float = 0.0
    # The identity of the process that it was found under, None for the root
    parent: Hashable | None = None
    # Whether it belongs to another trial; its time is not counted, nor when its parent inherits it
    foreign: bool = False

    @property
    def used(self) -> float:
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
        # Of vanished processes that no parent inherited, minus what other trials' processes left.
        self._unaccounted = 0.0

    def update(self, now: Mapping[Any, CpuTimes]) -> None:
        vanished: dict[Hashable | None, float] = {}
        foreign: dict[Hashable | None, float] = {}
        for process, times in self._known.items():
            if process not in now:
                ancestor = self._living_ancestor(times, now)
                amounts = foreign if times.foreign else vanished
                amounts[ancestor] = amounts.get(ancestor, 0.0) + times.used
            elif now[process].foreign and not times.foreign:
                # What it used before it became another trial's stays counted.
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
        """Return the nearest living ancestor: dead ones passed on inherited time."""
        parent = times.parent
        while parent is not None and parent not in now:
            parent = self._known[parent].parent if parent in self._known else None
        return parent

    def _inherited(self, process: Hashable | None, now: Mapping[Any, CpuTimes]) -> float:
        if process is None:
            return 0.0
        before = self._known[process].reaped if process in self._known else 0.0
        return max(0.0, now[process].reaped - before)


# Memory that the processes of a tree share.

# It is measured again when the memory that may have become shared, or ceased to be, has changed by
# this share of the whole.
_CHANGED = 0.1
# Otherwise it is measured again after this many seconds, unless the shared memory is a smaller
# part of the whole than this.
_LATEST = 1.0
_NEGLIGIBLE = 0.02
# The shortest time between two measurements, as a multiple of the CPU time that one takes: far
# from a limit; when there are other processes or there may be a breach; and before a verdict.
_FAR, _NEAR, _VERDICT = 50.0, 10.0, 1.0
# CPU-seconds that a measurement may take before a verdict that would be the same without it.
_AFFORDABLE = 0.001


@dataclass(frozen=True)
class ProcessMemory:
    """The anonymous and shared memory of one process, swapped out or not, in bytes."""

    held: int  # All of it
    proportional: int  # The same, each page divided by the number of its holders
    shareable: int = 0  # The part that is shared memory
    common: int = 0  # Its anonymous pages that others hold too, after a fork
    common_part: int = 0  # The same, each page divided by the number of its holders
    shareable_part: int = 0  # The shared memory, each page divided by the number of its holders


@dataclass(frozen=True)
class InheritedPages:
    """Pages that a tree's processes share with the process that they were forked from."""

    size: int  # bytes
    members: int  # How many processes of the tree hold them
    holders: float  # How many processes hold them in all, on average

    def part(self, outsiders: float | None = None) -> float:
        """Return the tree's part in bytes, with the given or the present number of others."""
        holders = self.holders if outsiders is None else self.members + outsiders
        return self.size * self.members / max(1.0, holders)


def find_inherited(
    memories: Collection[ProcessMemory], root: ProcessMemory, supervisor: ProcessMemory
) -> InheritedPages:
    """Return the pages that processes hold from before their tree was forked (pure).

    The kernel reports how many processes hold a page, but not which. The supervisor was forked
    from the same process as the tree and hardly writes to its memory, so its shared pages are
    those that the tree began with, and show how many processes hold them on average. It is not
    used while the root is alone.
    """
    if len(memories) == 1:
        return InheritedPages(root.common, 1, root.common / max(1, root.common_part))
    size = min(root.common, supervisor.common)
    members = sum(memory.common >= size / 2 for memory in memories) if size else 0
    return InheritedPages(size, members, supervisor.common / max(1, supervisor.common_part))


def find_doubt(memories: Mapping[int, ProcessMemory], moved: int, ended: Collection[int]) -> int:
    """Return the bytes that may count twice, because processes are read one by one (pure).

    If shared memory is mapped meanwhile (``moved`` bytes), those that were read before count it in
    larger parts than those that are read after: by at most half of it too much. A process that has
    ended since it was read left its parts to the others.
    """
    shared = sum(memory.shareable_part for memory in memories.values())
    # Together they hold as much as any one of them.
    surely = max((memory.shareable for memory in memories.values()), default=0)
    left = sum(memories[pid].proportional for pid in ended if pid in memories)
    return min(moved // 2, max(0, shared - surely)) + left


@dataclass(frozen=True)
class TreeMemory:
    """Memory of each process of a tree: anonymous, shared and swapped, in bytes.

    ``shareable`` is the part of the sum that is shared memory.
    """

    sizes: Mapping[int, int]
    shareable: int = 0

    @property
    def total(self) -> int:
        """The plain sum, in which shared pages count for each holder."""
        return sum(self.sizes.values())


class SharedPages:
    """Estimates the memory that a tree's processes share between two measurements.

    Between measurements, memory follows from the plain sum, which takes a microsecond per process;
    a measurement takes 0.1 ms and up to 10 ms per gigabyte. The error is bounded: of a new process
    only its growth counts, and each page that ceases to be shared shows as a page fault, where a
    process wrote to it, or in the size of the process that gave it up.
    """

    def __init__(self) -> None:
        self._excess = 0
        self._doubt = 0
        self._measured = TreeMemory({})
        # By process: its size before the measurement, the least since, and its unshared memory.
        self._before: Mapping[int, int] = {}
        self._least: dict[int, int] = {}
        self._own: dict[int, int] = {}
        self._faulted = 0
        self._new: dict[int, int] = {}
        self._at = -math.inf
        self._cost = 0.0

    @property
    def is_measured(self) -> bool:
        return self._at > -math.inf

    @property
    def excess(self) -> int:
        """Bytes that the plain sum counts too much, as last measured."""
        return self._excess + self._doubt

    def memory(self, held: TreeMemory) -> int:
        """Return a lower bound of the tree's memory in bytes.

        Only a fork makes anonymous pages shared, and it makes a new process, so growth of them
        counts at once. What was added of shared memory, others may hold already.
        """
        added = max(0, held.shareable - self._measured.shareable)
        return max(0, self._without_new(held) - self._excess - self._doubt - added)

    def at_most(self, held: TreeMemory) -> int:
        """Return an upper bound of the tree's memory.

        All added shared memory counts, and of what a process gave up, also by ending or by
        running another program, what was not its own alone is others' now.
        """
        given_up = sum(
            max(0, amount - self._own.get(pid, 0)) for pid, amount in self._given_up(held).items()
        )
        return self._without_new(held) - max(0, self._excess - given_up)

    def _given_up(self, held: TreeMemory) -> dict[int, int]:
        """Return the bytes that each process has released since, or during, the last measurement.

        What it has taken since then is its own.
        """
        for pid, size in self._least.items():
            self._least[pid] = min(size, held.sizes.get(pid, 0))
        return {pid: self._before[pid] - size for pid, size in self._least.items()}

    def _without_new(self, held: TreeMemory) -> int:
        """Return the plain sum without what new processes began with."""
        # A fork begins with pages that were counted before: of a new process its growth counts.
        if held.sizes.keys() == self._measured.sizes.keys():
            self._new = {}
        else:
            new = held.sizes.keys() - self._measured.sizes.keys()
            sizes = held.sizes
            self._new = {pid: min(self._new.get(pid, sizes[pid]), sizes[pid]) for pid in new}
        return held.total - sum(self._new.values())

    def has_new_processes(self, held: TreeMemory) -> bool:
        """Return whether there are processes that the last measurement did not include."""
        return bool(self._measured.sizes) and not held.sizes.keys() <= self._measured.sizes.keys()

    def is_due(
        self, held: TreeMemory, ceiling: float, now: float, faulted: Callable[[], int]
    ) -> bool:
        """Return whether it is time to measure again.

        Over the ceiling there is a breach. ``faulted`` returns the bytes of the pages that the
        processes have ever faulted in.
        """
        if not held.total:
            return False
        age = (now - self._at) / self._cost if self._cost else math.inf
        if age < _VERDICT:
            return False
        if self.at_most(held) > ceiling:
            likely_cost = self._cost * max(1.0, held.total / max(1, self._measured.total))
            return self.memory(held) <= ceiling or likely_cost <= _AFFORDABLE
        if age < _NEAR:
            return False
        if held.sizes.keys() != self._measured.sizes.keys():
            return True
        total, then = held.total, self._measured.total
        if total <= ceiling and age < _FAR:
            return False
        moved = faulted() - self._faulted if self._excess else 0
        given_up = sum(self._given_up(held).values())
        unshared = min(self._excess, max(0, moved - max(0, total - then)) + given_up)
        if total - self._excess + unshared > ceiling:
            return True
        shared = abs(held.shareable - self._measured.shareable)
        has_changed = max(shared, then - total, unshared) > _CHANGED * then
        is_late = moved > 0 and now - self._at >= _LATEST and self._excess > _NEGLIGIBLE * total
        is_doubtful = self._doubt > _NEGLIGIBLE * total
        return age >= _FAR and (has_changed or is_late or is_doubtful)

    def update(
        self,
        memories: Mapping[int, ProcessMemory],
        *,
        faulted: int,
        cost: float,
        now: float,
        not_counted: int = 0,
        doubt: int = 0,
        before: Mapping[int, int] | None = None,
    ) -> float:
        """Record a measurement; return a lower bound of the tree's memory in bytes.

        Args:
            memories: The memory of each living process.
            faulted: The bytes of the pages that they had ever faulted in, just before.
            cost: The CPU-seconds that it took.
            now: The time in seconds.
            not_counted: The bytes of their sum that don't count.
            doubt: The bytes of their sum that may count twice.
            before: The size of each process just before. They are read one by one: pages that one
                gives up meanwhile, of which another has counted its part, are missing.
        """
        self._new = {}
        sizes = {pid: memory.held for pid, memory in memories.items()}
        self._measured = TreeMemory(sizes, sum(m.shareable for m in memories.values()))
        self._before = {pid: max(size, (before or {}).get(pid, 0)) for pid, size in sizes.items()}
        self._least = dict(sizes)
        self._own = {pid: m.held - m.common - m.shareable for pid, m in memories.items()}
        proportional = sum(memory.proportional for memory in memories.values()) - not_counted
        # What was added while they were read one by one is not shared.
        self._excess = max(0, self._measured.total - proportional)
        self._doubt = doubt
        self._faulted = faulted
        self._cost = cost
        self._at = now
        return max(0, proportional - doubt)


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
