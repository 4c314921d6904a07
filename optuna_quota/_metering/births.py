"""Tells at the price of one short read whether new processes may have appeared."""

from __future__ import annotations

import contextlib
import os
import time


_LOADAVG = "/proc/loadavg"


class Births:
    """Says when a process tree must be walked again to find new members.

    The last field of /proc/loadavg is the number given to the newest process or thread that this
    one can see. While it stands still nothing was created, so no tree can have grown. That costs
    0.5 µs where a walk costs 7 µs and more. In some containers the file is an imitation (lxcfs)
    whose field says nothing: it is then known by its device, and every asking means a walk.
    """

    def __init__(self) -> None:
        self._handle = -1
        self._newest = b""
        self._not_before = 0.0
        self.is_reliable = False
        with contextlib.suppress(OSError):
            self.is_reliable = os.stat(_LOADAVG).st_dev == os.stat("/proc/self").st_dev
            self._handle = os.open(_LOADAVG, os.O_RDONLY)

    def pending(self) -> bool:
        """Return whether anything may have been created since the last walk, to be walked for."""
        if not self.is_reliable or self._handle < 0:
            return True
        newest = os.pread(self._handle, 128, 0).rsplit(None, 1)[-1]
        return newest != self._newest and time.perf_counter() >= self._not_before

    def seen(self) -> bool:
        """Return what :meth:`pending` does, and take it as walked for."""
        if not self.pending():
            return False
        if self._handle >= 0:
            self._newest = os.pread(self._handle, 128, 0).rsplit(None, 1)[-1]
        return True

    def walked(self, seconds: float) -> None:
        """Tell what the walk cost: on a busy host no more than a twentieth is spent walking."""
        self._not_before = time.perf_counter() + 20 * seconds

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)
