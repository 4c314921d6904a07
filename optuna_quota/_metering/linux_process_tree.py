"""A process tree read from Linux's /proc, with descriptors that stay open.

Reading ``statm`` takes 0.6 µs per process, a tenth of psutil's time. A process that was once seen
in the tree stays in it until it ends, even if it leaves its session or loses its parent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
import contextlib
import math
import os
import time

from optuna_quota._metering.linux_process import (
    LinuxProcess,
    MemorySnapshot,
    PAGE,
    read_huge_pages,
)
from optuna_quota._metering.meter import log_once
from optuna_quota._metering.process_tree import (
    CpuTimes,
    find_doubt,
    find_inherited,
    InheritedPages,
    ProcessMemory,
    SharedPages,
    TreeCpuTime,
    TreeMemory,
    TreeReading,
)
from optuna_quota._metering.timing import fastest_growth, LONGEST_INTERVAL


_LOADAVG = "/proc/loadavg"


class ProcessCreationProbe:
    """Cheap check (0.5 µs) for newly created processes.

    The last field of /proc/loadavg is the pid of the newest visible process or thread. While it
    does not change, no tree can have grown; walking a tree takes 7 µs and more. In some containers
    lxcfs provides the file without that pid: then, as the file's device shows, the tree is walked
    each time.
    """

    def __init__(self) -> None:
        self._handle = -1
        self._newest = b""
        self._not_before = 0.0
        self.is_reliable = False
        with contextlib.suppress(OSError):
            self._handle = os.open(_LOADAVG, os.O_RDONLY)
            self.is_reliable = os.fstat(self._handle).st_dev == os.stat("/proc/self").st_dev

    def reset(self) -> bool:
        """Return whether a process may have been created since this last returned True.

        The tree is then about to be walked.
        """
        if not self.is_reliable:
            return True
        newest = os.pread(self._handle, 128, 0).rsplit(None, 1)[-1]
        if newest == self._newest or time.perf_counter() < self._not_before:
            return False
        self._newest = newest
        return True

    def record_walk(self, seconds: float) -> None:
        """Record the time of a walk: walks take at most a twentieth of the time."""
        self._not_before = time.perf_counter() + 20 * seconds

    def close(self) -> None:
        handle, self._handle, self.is_reliable = self._handle, -1, False
        if handle >= 0:
            os.close(handle)


def is_available() -> bool:
    return os.path.exists("/proc/self/statm") and os.path.exists(
        f"/proc/self/task/{os.getpid()}/children"
    )


def since_boot() -> float:
    """Return the seconds since the boot, on the clock that /proc dates processes with."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LinuxProcessTree:
    """The tree under a process, by /proc.

    Memory is the sum of the anonymous, shared and swapped memory of the processes, each page
    divided by the number of its holders: the sum of ``Pss_Anon``, ``Pss_Shmem`` and ``SwapPss``.
    Clean pages of files don't count, nor memory that was reserved and never touched. Pages shared
    with the fork server are divided by the largest number of holders so far; pages shared with
    the study itself, under ``start_method="fork"``, don't count until the tree writes to them.

    Args:
        pid: The root; None for this process.
        reaper: A process that inherits the tree's orphans and has no other children than these
            and the root; None without one.
        forked_from_study: Whether the reaper, and the root in turn, were forked from the study's
            process, whose memory they share until they write to it; detected for a child of
            this process.
        outsiders: At least how many processes outside of the tree share the memory that it was
            forked with.

    Raises:
        ProcessLookupError: If there is no such process.
        OSError: If /proc can't be read.
    """

    def __init__(
        self,
        pid: int | None = None,
        reaper: int | None = None,
        *,
        forked_from_study: bool = False,
        outsiders: int = 0,
    ) -> None:
        self._opened = since_boot()
        self._root = LinuxProcess(os.getpid() if pid is None else pid)
        self._reaper: LinuxProcess | None = None
        self._forked_from_study = forked_from_study
        if reaper is not None:
            try:
                self._reaper = LinuxProcess(reaper)
            except OSError:
                self._root.close()
                raise
            self._forked_from_study |= self._reaper.parent_pid() == os.getpid()
        self._members: dict[int, LinuxProcess] = {self._root.pid: self._root}
        self._foreign: dict[int, LinuxProcess] = {}
        self._creation = ProcessCreationProbe()
        self._time = TreeCpuTime()
        self._outsiders = float(outsiders)
        self._peak: int | None = None
        self._most_excess = 0  # since peaks were last looked for
        self._shared = SharedPages()
        self._ceiling = math.inf
        self._latest = TreeMemory({})

    def read(
        self, *, thorough: bool, without: Collection[int] = (), ceiling: float = math.inf
    ) -> TreeReading:
        self._ceiling = ceiling
        for pid in self._members.keys() & set(without):
            self._foreign[pid] = self._members.pop(pid)
        if thorough:
            self._read_times()
        if (thorough or self._creation.is_reliable) and self._creation.reset():
            grown = self._find_new(without)
            if thorough and grown:
                self._read_times()
        # Peaks first: in the milliseconds of a measurement, memory may rise to one and fall again.
        peaks = self._find_peaks() if thorough else ()
        memory = self._read_memory() or None  # as all of them have ended
        for found in peaks:
            self._add_peak(found)
        if peaks:
            self._most_excess = self._shared.excess
        return TreeReading(memory, self._time.total, self._peak, tuple(self._members))

    @property
    def finds_new_quickly(self) -> bool:
        """Whether a reading that is not thorough finds new processes as well."""
        return self._creation.is_reliable

    def _read_memory(self) -> float:
        held = self._latest = self._held()
        if not self._shared.is_due(held, self._ceiling, time.perf_counter(), self._faulted):
            return self._shared.memory(held)
        before, has_new = self._shared.memory(held), self._shared.has_new_processes(held)
        measured = self._measure(held)
        # A new process may be about to run another program: no breach before it has stayed.
        return max(before, min(measured, self._ceiling)) if has_new else measured

    def at_most(self) -> float:
        """Return a cheap upper bound of the known processes' memory."""
        return self._shared.at_most(self._latest)

    def reset_peak(self) -> None:
        self._peak = None
        if self._is_read_by_supervisor():
            return  # it would lose the peak that the trial has had by now
        for process in self._members.values():
            process.reset_peak()

    def close(self) -> None:
        for process in (*self._members.values(), *self._foreign.values(), *self._reapers()):
            process.close()
        self._members.clear()
        self._foreign.clear()
        self._creation.close()

    def _find_new(self, without: Collection[int]) -> bool:
        """Add new descendants, except subtrees of others; return whether there are any."""
        known = len(self._members)
        begun, moment = time.perf_counter(), since_boot()
        queue = [*self._members.values(), *self._reapers()]
        while queue:
            parent = queue.pop()
            for pid in parent.children():
                if pid in self._members or pid in self._foreign:
                    continue
                child = _open_child(pid, parent, moment)
                if child is None:
                    continue
                if pid in without:
                    self._foreign[pid] = child
                else:
                    child.knows_peak = child.started >= self._opened
                    self._members[pid] = child
                    queue.append(child)
        self._creation.record_walk(time.perf_counter() - begun)
        return len(self._members) > known

    def _reapers(self) -> tuple[LinuxProcess, ...]:
        return () if self._reaper is None else (self._reaper,)

    def _read_times(self) -> None:
        """Update the CPU times and drop the dead."""
        now: dict[object, CpuTimes] = {}
        for processes, foreign in ((self._members, False), (self._foreign, True)):
            for pid, process in list(processes.items()):
                try:
                    own, reaped = process.times()
                except OSError:
                    processes.pop(pid).close()
                else:
                    now[process] = CpuTimes(own, reaped, process.parent or self._reaper, foreign)
        for reaper in self._reapers():
            # Only the time of its children belongs to the tree.
            with contextlib.suppress(OSError):
                now[reaper] = CpuTimes(0.0, reaper.times()[1])
        self._time.update(now)

    def _held(self) -> TreeMemory:
        sizes, shareable = {}, 0
        for pid, process in self._members.items():
            with contextlib.suppress(OSError):
                size, parent = process.memory(), process.parent
                if size and parent is not None and process.statm == parent.statm:
                    # Made by vfork, as by `subprocess`: it runs in its parent's memory, which
                    # counts once, until it calls exec.
                    continue
                sizes[pid] = size
                shareable += process.shareable
        return TreeMemory(sizes, shareable)

    def _faulted(self) -> int:
        total = 0
        for process in self._members.values():
            with contextlib.suppress(OSError):
                total += process.faults() * PAGE
        return total

    def _measure(self, held: TreeMemory) -> float:
        # In CPU time: on a busy host, clock time includes waiting.
        begun, faulted = time.thread_time(), self._faulted()
        shareable = {pid: self._members[pid].shareable for pid in held.sizes}
        memories = {}
        for pid in held.sizes:
            with contextlib.suppress(OSError):
                memories[pid] = self._members[pid].proportional_memory()
        if not any(memory.held for memory in memories.values()):
            return 0.0  # All have ended: what they shared is needed for their last peak.
        inherited = self._measure_inherited(memories)
        moved, ended = 0, []
        for pid in memories if len(memories) > 1 else ():
            size = 0
            with contextlib.suppress(OSError):
                size = self._members[pid].memory()
            if size:
                moved += abs(self._members[pid].shareable - shareable[pid])
            elif memories[pid].held:
                ended.append(pid)
        memory = self._shared.update(
            memories,
            faulted=faulted,
            cost=time.thread_time() - begun,
            now=time.perf_counter(),
            not_counted=inherited,
            doubt=find_doubt(memories, moved, ended),
            before=held.sizes,
        )
        self._most_excess = max(self._most_excess, self._shared.excess)
        return memory

    def _measure_inherited(self, memories: Mapping[int, ProcessMemory]) -> int:
        """Return the bytes of inherited memory that don't count."""
        root = memories.get(self._root.pid)
        if self._reaper is None or root is None:
            return 0
        try:
            supervisor = root if len(memories) == 1 else self._reaper.proportional_memory()
        except OSError:
            return 0
        pages = find_inherited(memories.values(), root, supervisor)
        if self._forked_from_study:
            return round(pages.part())
        # A trial must not reach its limit because other trials have ended.
        self._outsiders = max(self._outsiders, pages.holders - pages.members)
        return round(max(0.0, pages.part() - pages.part(self._outsiders)))

    def _find_peaks(self) -> list[int | None]:
        if self._is_read_by_supervisor():
            # The supervisor reads more often, and the trial itself at its end: in a long interval,
            # huge pages of other processes account for a file that the trial has mapped meanwhile.
            return [None]
        huge, found = read_huge_pages(), []
        for process in self._members.values():
            if process.knows_peak:
                with contextlib.suppress(OSError):
                    found.append(process.unseen_peak(huge))
        return found

    def _is_read_by_supervisor(self) -> bool:
        return self._reaper is not None and self._reaper.pid != os.getpid()

    def _add_peak(self, found: int | None) -> None:
        # It may have begun to share pages since then, or ceased to: only a lower bound counts.
        own = 0 if found is None else found - max(self._excess(), self._most_excess)
        self._peak = max(self._peak or 0, own)

    def _excess(self) -> int:
        """Return the bytes of the plain sum that don't count."""
        if self._reaper is None or self._shared.is_measured:
            return self._shared.excess
        # It has ended before it was measured; its supervisor still holds what both began with.
        pages = InheritedPages(self._reaper.proportional_memory().common, members=1, holders=1.0)
        return round(
            pages.size - (0.0 if self._forked_from_study else pages.part(self._outsiders))
        )

    def begin(self, snapshot: MemorySnapshot) -> None:
        """Find peaks of the root since its own snapshot."""
        self._root.knows_peak, self._root.last = True, snapshot

    def end(self, snapshot: MemorySnapshot) -> TreeReading:
        """Return the last memory and peak of the root, by its own snapshot before it ended."""
        self._add_peak(self._root.unseen_peak_at(snapshot))
        memory = max(0, snapshot.anonymous - self._excess())
        return TreeReading(memory or None, self._time.total, self._peak, ())


def _open_child(pid: int, parent: LinuxProcess, listed: float) -> LinuxProcess | None:
    """Return a process that was listed, None if it is gone or its pid was reused."""
    try:
        child = LinuxProcess(pid, parent)
    except (ProcessLookupError, PermissionError):
        return None
    except OSError as error:
        log_once(
            "proc",
            f"A process of a trial can't be opened in /proc ({error}): its memory and CPU time "
            "are not counted.",
        )
        return None
    # Ticks are rounded down: a process created after the listing is not the one listed.
    if child.started > listed:
        child.close()
        return None
    return child


# Bytes per second, before any growth was seen: one thread filling fresh huge pages. A sudden burst
# must be noticed before it is far beyond the limit.
_BURST = 1e10


class TreeSampler:
    """Measures the memory of a trial's process tree and of orphans that this process inherits.

    A thorough reading takes ten times as long as another one, so it is made as rarely as that
    requires.
    """

    def __init__(self, child: int, *, forked_from_study: bool) -> None:
        self.outsiders = 0
        self.peak = self.unseen_peak = 0.0
        self.growth = _BURST  # the fastest to expect, in bytes per second
        # The least seconds between thorough readings.
        self.thorough_interval = 0.0
        self._child = child
        self._forked_from_study = forked_from_study
        self._tree: LinuxProcessTree | None = None
        self._last: tuple[float, float] | None = None
        self._thorough_due = 0.0

    def begin(self, snapshot: MemorySnapshot | None) -> None:
        """Begin with what the trial's process has read of itself before the objective."""
        self._tree = LinuxProcessTree(
            self._child,
            reaper=os.getpid(),
            forked_from_study=self._forked_from_study,
            outsiders=self.outsiders,
        )
        if snapshot is not None:
            self._tree.begin(snapshot)

    def read(self, now: float, limit: float = math.inf) -> float:
        """Return the memory in bytes; exact near the limit."""
        assert self._tree is not None
        # The time grows with the number of processes.
        thorough = now >= self._thorough_due
        start = time.thread_time()
        found = self._tree.read(thorough=thorough, ceiling=limit)
        memory = found.memory or 0.0
        if thorough:
            cost = time.thread_time() - start
            interval = self.thorough_interval if self._tree.finds_new_quickly else 0.0
            self._thorough_due = now + min(LONGEST_INTERVAL, max(interval, 0.005, 20 * cost))
        self.peak = max(self.peak, memory)
        self.unseen_peak = max(self.unseen_peak, found.peak or 0.0)
        if self._last is not None and now > self._last[0]:
            growth = (memory - self._last[1]) / (now - self._last[0])
            self.growth = fastest_growth(self.growth, growth)
        self._last = (now, memory)
        return memory

    def end(self, snapshot: MemorySnapshot | None) -> None:
        """Add what the trial's process has read of itself after the objective."""
        if self._tree is not None and snapshot is not None:
            found = self._tree.end(snapshot)
            self.peak = max(self.peak, found.memory or 0.0)
            self.unseen_peak = max(self.unseen_peak, found.peak or 0.0)

    def at_most(self) -> float:
        return 0.0 if self._tree is None else self._tree.at_most()
