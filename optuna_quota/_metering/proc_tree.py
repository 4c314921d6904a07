"""A process tree read from Linux's /proc with descriptors that stay open.

Reading ``statm`` costs 0.6 µs a process, a tenth of psutil's. Whatever was once seen in the tree
stays in it until it ends, so that a process which left its session or lost its parent is still
metered.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
import contextlib
import math
import os
import time

from optuna_quota._metering.births import Births
from optuna_quota._metering.cpu_time import Times
from optuna_quota._metering.cpu_time import TreeTime
from optuna_quota._metering.overlap import Overlap
from optuna_quota._metering.proc_process import ProcProcess
from optuna_quota._metering.tree import TreeReading
from optuna_quota._metering.warn import warn_once


def is_available() -> bool:
    """Return whether this system's /proc lists memory and children of processes."""
    return os.path.exists("/proc/self/statm") and os.path.exists(
        f"/proc/self/task/{os.getpid()}/children"
    )


def since_boot() -> float:
    """Return the seconds since the boot, by the clock that /proc dates processes with."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class ProcTree:
    """The tree under a process, by /proc.

    Memory is the sum of the resident memory of the processes, less what they share among
    themselves: a forked worker's resident memory holds its parent's pages, which exist once.

    Args:
        pid: The root; None for this process.
        reaper: A process that inherits the orphans of the tree and has no other children than
            these and the root; None without one.

    Raises:
        ProcessLookupError: If there is no such process.
        OSError: If /proc can't be read.
    """

    def __init__(self, pid: int | None = None, reaper: int | None = None) -> None:
        self._opened = since_boot()
        self._root = ProcProcess(os.getpid() if pid is None else pid)
        self._reaper = None if reaper is None else self._open_reaper(reaper)
        self._members: dict[int, ProcProcess] = {self._root.pid: self._root}
        self._foreign: dict[int, ProcProcess] = {}
        self._births = Births()
        self._time = TreeTime()
        self._peak: int | None = None
        self._overlap = Overlap()
        self._ceiling = math.inf

    def _open_reaper(self, pid: int) -> ProcProcess:
        try:
            return ProcProcess(pid)
        except OSError:
            self._root.close()
            raise

    def read(
        self, *, thorough: bool, without: Collection[int] = (), ceiling: float = math.inf
    ) -> TreeReading:
        """Return what the tree holds and has used."""
        self._ceiling = ceiling
        self._disown(without)
        if thorough:
            self._read_times()
        if (thorough or self._births.is_reliable) and self._births.seen():
            grown = self._grow(without)
            if thorough and grown:
                self._read_times()
        sizes = self._sizes()
        if self._is_overlap_due(sizes):
            self._measure_overlap()
            sizes = self._sizes()
        memory = self._overlap.memory(sizes)
        if thorough:
            self._read_peaks()
        return TreeReading(memory, self._time.total, self._peak, tuple(self._members))

    def glance(self) -> float | None:
        """Return the memory of the processes known so far, None when only a reading can tell."""
        if not self._births.is_reliable or self._births.pending():
            return None
        if len(self._members) == 1:
            try:
                return self._root.memory() if self._root.pid in self._members else None
            except OSError:
                return None
        sizes = self._sizes()
        if len(sizes) < len(self._members) or self._is_overlap_due(sizes):
            return None
        return self._overlap.memory(sizes)

    def age(self) -> float:
        """Return the seconds since the root was created, to a clock tick."""
        return since_boot() - self._root.started

    def reset_peak(self) -> None:
        """Forget the peaks so far."""
        self._peak = None
        for process in self._members.values():
            process.reset_peak()

    def close(self) -> None:
        """Close all descriptors."""
        for process in (*self._members.values(), *self._foreign.values()):
            process.close()
        if self._reaper is not None:
            self._reaper.close()
        self._members.clear()
        self._foreign.clear()
        self._births.close()

    def _grow(self, without: Collection[int]) -> bool:
        """Take in new descendants, but for subtrees that belong to others; tell of any."""
        known = len(self._members)
        begun, moment = time.perf_counter(), since_boot()
        queue = [*self._members.values(), *self._reapers()]
        while queue:
            parent = queue.pop()
            for pid in parent.children():
                child = None if self._knows(pid) else _open_child(pid, parent, moment)
                if child is None:
                    continue
                if pid in without:
                    self._foreign[pid] = child
                else:
                    child.knows_peak = child.started >= self._opened
                    self._members[pid] = child
                    queue.append(child)
        self._births.walked(time.perf_counter() - begun)
        return len(self._members) > known

    def _reapers(self) -> tuple[ProcProcess, ...]:
        return () if self._reaper is None else (self._reaper,)

    def _knows(self, pid: int) -> bool:
        return pid in self._members or pid in self._foreign

    def _disown(self, without: Collection[int]) -> None:
        for pid in without:
            if pid in self._members:
                self._foreign[pid] = self._members.pop(pid)

    def _read_times(self) -> None:
        """Refresh the CPU times and let go of the dead."""
        now: dict[object, Times] = {}
        for processes, foreign in ((self._members, False), (self._foreign, True)):
            for pid, process in list(processes.items()):
                try:
                    own, reaped = process.times()
                except OSError:
                    processes.pop(pid).close()
                else:
                    now[process] = Times(own, reaped, process.parent or self._reaper, foreign)
        for reaper in self._reapers():
            # What it uses itself is not the tree's; what its children had used is.
            with contextlib.suppress(OSError):
                now[reaper] = Times(0.0, reaper.times()[1])
        self._time.update(now)

    def _sizes(self) -> dict[int, int]:
        sizes = {}
        for pid, process in self._members.items():
            with contextlib.suppress(OSError):
                sizes[pid] = process.memory()
        return sizes

    def _is_overlap_due(self, sizes: Mapping[int, int]) -> bool:
        return self._overlap.is_due(sizes, self._ceiling, time.perf_counter(), self._faulted)

    def _faulted(self) -> int:
        total = 0
        for process in self._members.values():
            with contextlib.suppress(OSError):
                total += process.faulted()
        return total

    def _measure_overlap(self) -> None:
        # In CPU time: on a busy host it takes longer without costing any more.
        begun, faulted = time.thread_time(), self._faulted()
        shares = {}
        for pid, process in self._members.items():
            with contextlib.suppress(OSError):
                shares[pid] = process.share()
        cost = time.thread_time() - begun
        self._overlap.take(shares, faulted=faulted, cost=cost, now=time.perf_counter())

    def _read_peaks(self) -> None:
        for process in self._members.values():
            if process.knows_peak:
                with contextlib.suppress(OSError):
                    self._peak = max(self._peak or 0, process.peak())


def _open_child(pid: int, parent: ProcProcess, listed: float) -> ProcProcess | None:
    """Return a process that was listed, None when it is gone or its number is another's by now."""
    try:
        child = ProcProcess(pid, parent)
    except (ProcessLookupError, PermissionError):
        return None
    except OSError as error:
        warn_once(
            "proc", f"A process of a trial can't be opened in /proc and is left out: {error}."
        )
        return None
    # Dates are in ticks, rounded down: one created after the listing is not the one listed.
    if child.started > listed:
        child.close()
        return None
    return child
