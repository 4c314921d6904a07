"""A process tree read through psutil: any system, and wherever /proc fails."""

from __future__ import annotations

from collections.abc import Collection
import math
import os
import time
from typing import TYPE_CHECKING

from optuna_quota._metering.cpu_time import Times
from optuna_quota._metering.cpu_time import TreeTime
from optuna_quota._metering.tree import TreeReading


if TYPE_CHECKING:
    import psutil


class PsutilTree:
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
