"""A process tree read from Linux's /proc, with descriptors that stay open.

Reading ``statm`` costs 0.6 µs a process, a tenth of psutil's. A process that was once seen in the
tree stays in it until it ends, so that one which left its session or lost its parent is still
measured.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
import contextlib
import math
import os
import time

from optuna_quota._metering.linux_process import LinuxProcess, PAGE, read_huge_pages
from optuna_quota._metering.process_tree import (
    CpuTimes,
    find_doubt,
    find_inherited,
    ProcessMemory,
    SharedPages,
    TreeCpuTime,
    TreeMemory,
    TreeReading,
)
from optuna_quota._metering.warn import warn_once


_LOADAVG = "/proc/loadavg"


class ProcessCreationProbe:
    """Cheap check (0.5 µs) for newly created processes.

    The last field of /proc/loadavg is the pid of the newest process or thread that this one can
    see. While it does not change nothing was created, so no tree can have grown; walking a tree
    costs 7 µs and more. In some containers lxcfs imitates the file with a useless field: the
    file's device shows that, and the tree is then walked each time.
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
        """Record what a walk cost: on a busy host at most a twentieth of the time is spent."""
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
    Clean pages of files don't count, nor memory that was reserved and never touched. Of pages
    shared with the fork server that the tree was forked from, its part among the most holders
    there ever were counts; pages shared with the study itself, under ``start_method="fork"``,
    don't count until the tree writes to them.

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
        self._shared = SharedPages()
        self._ceiling = math.inf

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
        memory = self._read_memory()
        if thorough:
            self._read_peaks()
        return TreeReading(memory, self._time.total, self._peak, tuple(self._members))

    def _read_memory(self) -> float:
        held = self._held()
        if not self._shared.is_due(held, self._ceiling, time.perf_counter(), self._faulted):
            return self._shared.memory(held)
        before, has_new = self._shared.memory(held), self._shared.has_new_processes(held)
        measured = self._measure(held)
        # A new process may be about to run another program: no breach before it has stayed.
        return max(before, min(measured, self._ceiling)) if has_new else measured

    def at_most(self) -> float:
        """Return an upper bound of the known processes' memory, at the least possible cost."""
        return self._shared.at_most(self._held())

    def reset_peak(self) -> None:
        self._peak = None
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
            # Its own time is not the tree's, its children's is.
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
        # In CPU time: on a busy host it takes longer without costing any more.
        begun, faulted = time.thread_time(), self._faulted()
        shareable = {pid: self._members[pid].shareable for pid in held.sizes}
        memories = {}
        for pid in held.sizes:
            with contextlib.suppress(OSError):
                memories[pid] = self._members[pid].proportional_memory()
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
        return self._shared.update(
            memories,
            faulted=faulted,
            cost=time.thread_time() - begun,
            now=time.perf_counter(),
            not_counted=inherited,
            doubt=find_doubt(memories, moved, ended),
        )

    def _measure_inherited(self, memories: Mapping[int, ProcessMemory]) -> int:
        """Return the bytes that don't count of the memory that the tree was forked with."""
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
        # A trial must not reach its limit because its neighbours have ended.
        self._outsiders = max(self._outsiders, pages.holders - pages.members)
        return round(max(0.0, pages.part() - pages.part(self._outsiders)))

    def _read_peaks(self) -> None:
        huge = read_huge_pages()
        for process in self._members.values():
            if process.knows_peak:
                with contextlib.suppress(OSError):
                    found = process.unseen_peak(huge)
                    # It may have begun to share pages since then: only what it surely held counts.
                    own = 0 if found is None else found - self._shared.excess
                    self._peak = max(self._peak or 0, own)


def _open_child(pid: int, parent: LinuxProcess, listed: float) -> LinuxProcess | None:
    """Return a process that was listed, None if it is gone or its pid was reused."""
    try:
        child = LinuxProcess(pid, parent)
    except (ProcessLookupError, PermissionError):
        return None
    except OSError as error:
        warn_once(
            "proc", f"A process of a trial can't be opened in /proc and is left out: {error}."
        )
        return None
    # Ticks are rounded down: a process created after the listing is not the one listed.
    if child.started > listed:
        child.close()
        return None
    return child
