"""A process tree read from Linux's /proc with descriptors that stay open.

Reading ``statm`` costs 0.6 µs a process, a tenth of psutil's. Whatever was once seen in the tree
stays in it until it ends, so that a process which left its session or lost its parent is still
metered.
"""

from __future__ import annotations

from collections.abc import Collection
import contextlib
import os
import time

from optuna_quota._metering.births import Births
from optuna_quota._metering.cpu_time import Times
from optuna_quota._metering.cpu_time import TreeTime
from optuna_quota._metering.proc_process import ProcProcess
from optuna_quota._metering.tree import TreeReading
from optuna_quota._metering.warn import warn_once


# What processes share is measured again when the tree's memory has changed by this factor.
_OVERLAP_DRIFT = 0.1


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
    themselves: a forked worker's resident memory holds its parent's pages, which exist once. The
    overlap is known from their proportional set sizes. Asking costs 1 ms a gigabyte, so it is
    asked for trees of more than one process only, when their members or memory have changed, and
    before a verdict.

    Args:
        pid: The root; None for this process.

    Raises:
        ProcessLookupError: If there is no such process.
        OSError: If /proc can't be read.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._opened = since_boot()
        self._root = ProcProcess(os.getpid() if pid is None else pid)
        self._members: dict[int, ProcProcess] = {self._root.pid: self._root}
        self._foreign: dict[int, ProcProcess] = {}
        self._births = Births()
        self._time = TreeTime()
        self._peak: int | None = None
        self._overlap = 0
        self._overlap_for: tuple[int, int] = (1, 0)
        self._overlap_due = 0.0

    def read(
        self, *, thorough: bool, without: Collection[int] = (), exact: bool = False
    ) -> TreeReading:
        """Return what the tree holds and has used."""
        self._disown(without)
        if thorough:
            self._read_times()
        if (thorough or self._births.is_reliable) and self._births.seen():
            self._grow(without)
        sizes = self._sizes()
        memory = self._without_overlap(sizes, exact=exact)
        if thorough:
            self._read_peaks()
        return TreeReading(memory, self._time.total, self._peak, tuple(self._members))

    def glance(self) -> float | None:
        """Return the memory of the processes known so far, None when only a reading can tell."""
        if not self._births.is_reliable or self._births.pending():
            return None
        try:
            total = sum([process.memory() for process in self._members.values()])
        except OSError:
            return None
        count = len(self._members)
        if count == 1:
            return total
        return None if self._has_drifted(count, total) else total - self._overlap

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
        self._members.clear()
        self._foreign.clear()
        self._births.close()

    def _grow(self, without: Collection[int]) -> None:
        """Take in new descendants, but for subtrees that belong to others."""
        begun, moment = time.perf_counter(), since_boot()
        queue = list(self._members.values())
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
                    now[process] = Times(own, reaped, process.parent, foreign)
        self._time.update(now)

    def _sizes(self) -> list[int]:
        sizes = []
        for process in self._members.values():
            with contextlib.suppress(OSError):
                sizes.append(process.memory())
        return sizes

    def _without_overlap(self, sizes: list[int], *, exact: bool) -> int:
        total = sum(sizes)
        if len(sizes) < 2:
            return total
        if exact or self._has_drifted(len(sizes), total):
            self._measure_overlap(sizes, total)
        return max(total - self._overlap, max(sizes))

    def _has_drifted(self, count: int, total: int) -> bool:
        known, then = self._overlap_for
        drifted = count != known or abs(total - then) > _OVERLAP_DRIFT * then
        return drifted and time.perf_counter() >= self._overlap_due

    def _measure_overlap(self, sizes: list[int], total: int) -> None:
        begun = time.perf_counter()
        try:
            own = sum(p.own_memory() for p in self._members.values())
        except OSError:
            # Gone, or it may not be asked (another user's): the plain sum is all there is.
            own = total
        self._overlap = max(0, total - max(own, max(sizes)))
        self._overlap_for = (len(sizes), total)
        # No more than a hundredth of the time is spent on it.
        self._overlap_due = time.perf_counter() + 100 * (time.perf_counter() - begun)

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
