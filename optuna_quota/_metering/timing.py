"""Sampling intervals, and a clock that excludes pauses of this process (Ctrl-Z, SIGSTOP).

No system clock does, and the system does not report how long a process was stopped. But a thread
that wakes up long after the end of its sleep, without having run meanwhile, was stopped. One that
waits for the interpreter lock wakes up repeatedly instead.
"""

from __future__ import annotations

from collections.abc import Callable
import math
import os
import sys
import threading
import time


# Seconds. The longest interval bounds what a sum over a tree may miss, the shortest what sampling
# costs: 2,000 samples a second of about 10 µs are 2% of a core, for the instants before a breach.
LONGEST_INTERVAL = 0.1
# The kernel keeps the exact peak of a single process, so nothing is missed between two samples,
# and far from a limit (0.25 s of growth) no breach is found any later.
LONGEST_INTERVAL_ALONE = 0.25
SHORTEST_INTERVAL = 0.0005

# Bytes per second, before any growth was seen: one thread that touches fresh pages reaches 2 to 4
# GB/s, so that a first burst is noticed in time as well.
ASSUMED_GROWTH = 4e9
CORES = os.cpu_count() or 1

# Seconds of delay from which on a late wakeup counts as a pause: a busy machine delays it too.
SHORTEST_PAUSE = 0.5
# Seconds between wakeups of the pause detector; of each pause, at most as much is missed.
_PERIOD = 0.2
# A thread that waits for the interpreter lock wakes up once in each switch interval; this share
# of those wakeups shows that it was not stopped.
_SHARE_OF_SWITCHES = 0.1


def fastest_growth(known: float, seen: float) -> float:
    """Return the fastest growth to expect, given the fastest so far and the latest, in bytes/s.

    A new process adds all its memory at once, which looks like a rate that even all cores together
    could not sustain.
    """
    return max(known, min(seen, ASSUMED_GROWTH * CORES))


def sampling_interval(
    headroom: float | None, growth: float, *, longest: float = LONGEST_INTERVAL
) -> float:
    """Return the seconds until a breach is possible, within the shortest and longest interval.

    The headroom is how far the usage is below its ceiling, None without one; the growth is the
    fastest to expect, in the same unit a second.
    """
    if headroom is None or growth <= 0:
        return longest
    return min(longest, max(SHORTEST_INTERVAL, headroom / growth))


def next_due(due: float, now: float, period: float) -> float:
    """Return the next moment on the grid ``due + k * period`` after ``now``.

    Deadlines don't drift by the duration of samples, and those missed during a pause are skipped.
    """
    late = now - due
    if late < 0 or period <= 0:
        return due
    return due + period * (int(late / period) + 1)


class RunningClock:
    """A steady clock in seconds without pauses of this process; thread-safe.

    One thread sleeps repeatedly and records until when. The first reading of the clock after a
    pause detects it, and adds it to ``skipped``.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        count_switches: Callable[[int], int | None] | None = None,
    ) -> None:
        self._now = now
        self._count_switches = count_switches or count_context_switches
        self._lock = threading.Lock()
        self.skipped = 0.0
        self._due = math.inf
        self._sleeper = 0
        self._switches_before: int | None = None

    def __call__(self) -> float:
        """Return the seconds since an arbitrary moment."""
        now = self._now()
        if now - self._due > SHORTEST_PAUSE:
            self._skip_pause()
            now = self._now()
        return now - self.skipped

    def fall_asleep(self, seconds: float | None) -> None:
        """Record that this thread sleeps for at most ``seconds``; None detects no pause."""
        with self._lock:
            self._sleeper = threading.get_native_id()
            self._switches_before = self._count_switches(self._sleeper)
            self._due = math.inf if seconds is None else self._now() + seconds

    def wake_up(self) -> None:
        """Record that this thread is awake: later delays are not pauses."""
        self()
        with self._lock:
            self._due = math.inf

    def skip(self, seconds: float) -> None:
        with self._lock:
            self.skipped += seconds

    def _skip_pause(self) -> None:
        with self._lock:
            now = self._now()
            late = now - self._due
            if late > SHORTEST_PAUSE and self._was_stopped(late):
                self.skipped += late
            if late > 0:
                self._due = now

    def _was_stopped(self, late: float) -> bool:
        before, after = self._switches_before, self._count_switches(self._sleeper)
        if before is None or after is None:
            return False
        return after - before < _SHARE_OF_SWITCHES * late / sys.getswitchinterval()


class PauseDetector:
    """A thread that only sleeps, by which a clock detects pauses of this process.

    A thread that also works would miss pauses that begin meanwhile. It sleeps on while pauses
    don't matter.
    """

    def __init__(self, clock: RunningClock, is_needed: Callable[[], bool]) -> None:
        self._clock = clock
        self._is_needed = is_needed
        self._wakeup = threading.Event()
        self._is_idle = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start or continue detecting pauses; not thread-safe."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="optuna-quota-pauses", daemon=True
            )
            self._thread.start()
        elif self._is_idle:
            self._wakeup.set()

    def _run(self) -> None:
        while True:
            # Idle before the check, for a `start` in between.
            self._wakeup.clear()
            self._is_idle = True
            self._is_idle = not self._is_needed()
            interval = None if self._is_idle else _PERIOD
            self._clock.fall_asleep(interval)
            self._wakeup.wait(interval)
            self._clock.wake_up()


def count_context_switches(thread: int) -> int | None:
    """Return the context switches of a thread by its native id, None if unknown."""
    try:
        if thread == threading.get_native_id():
            import resource

            used = resource.getrusage(resource.RUSAGE_THREAD)
            return used.ru_nvcsw + used.ru_nivcsw
        with open(f"/proc/self/task/{thread}/status", "rb") as file:
            lines = [line for line in file if b"ctxt_switches" in line]
        return sum(int(line.split()[1]) for line in lines)
    except (ImportError, AttributeError, OSError, ValueError, IndexError):
        return None
