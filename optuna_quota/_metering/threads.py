"""CPU time of one thread, and the parts that trials in threads have in their process's."""

from __future__ import annotations

from collections.abc import Sequence
import threading
import time


class ThreadTime:
    """CPU-seconds of the thread that made this object, 0 where the system has no such clock."""

    def __init__(self) -> None:
        self._clock: int | None = None
        if hasattr(time, "pthread_getcpuclockid"):
            # Asked for once, from the thread itself: asking for a thread that has ended would
            # crash, while reading the clock of one merely fails.
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._last = self._now()

    def growth(self) -> float:
        """Return what was used since the last call, 0 once the thread has ended."""
        now = self._now()
        spent, self._last = max(0.0, now - self._last), now
        return spent

    def _now(self) -> float:
        if self._clock is None:
            return 0.0
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return 0.0


def apportion(spent: float, weights: Sequence[float]) -> list[float]:
    """Return the parts of a total by weight; even parts when all weights are 0.

    Args:
        spent: CPU-seconds of the whole process tree.
        weights: CPU-seconds of each trial's own thread. What BLAS workers and other helpers used
            goes to the trials in proportion to what their own threads did: the sum over trials
            is exact, the parts are an estimate.
    """
    whole = sum(weights)
    if whole <= 0:
        return [spent / len(weights) for _ in weights]
    return [spent * weight / whole for weight in weights]
