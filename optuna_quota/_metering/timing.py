"""A steady clock that stands still while this process is stopped, by Ctrl-Z or SIGSTOP, say.

No clock of the system does, and nothing in it tells for how long a process was stopped. But a
thread that sleeps until a set time and wakes up long after it, without having run meanwhile, was
kept from running. One that waits for the interpreter's lock, which others hold, is woken up again
and again.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import math
import os
import sys
import threading
import time


# Seconds that a sleep may take too long before it counts as a pause: a busy machine may take some.
SHORTEST_PAUSE = 0.5
# Seconds between wakeups of the pulse. Of each pause, so much is missed at most.
_PERIOD = 0.2
# A thread that waits for the interpreter's lock wakes up once in each switch interval.
_SHARE_OF_TURNS = 0.1


class RunningClock:
    """Seconds on a steady clock without pauses of this process; for any thread.

    One thread sleeps again and again and says until when. Whoever reads the clock first after a
    pause finds it.

    Args:
        now: Seconds on a steady clock; for tests.
        turns: Returns how often the thread of an id was given a processor, None where that is
            not known; for tests.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        turns: Callable[[int], int | None] | None = None,
    ) -> None:
        self._now = now
        self._turns = turns or count_context_switches
        self._lock = threading.Lock()
        self._skipped = 0.0
        self._due = math.inf
        self._sleeper = 0
        self._turns_before: int | None = None

    @property
    def skipped(self) -> float:
        """The seconds that were left out, all of them together."""
        return self._skipped

    def __call__(self) -> float:
        """Return the seconds, counted from any moment."""
        now = self._now()
        if now - self._due > SHORTEST_PAUSE:
            self._look()
            now = self._now()
        return now - self._skipped

    def fall_asleep(self, seconds: float | None) -> None:
        """Tell that this thread sleeps from now on.

        Args:
            seconds: For how long at most; None for ever, which hides a pause.
        """
        with self._lock:
            self._sleeper = threading.get_native_id()
            self._turns_before = self._turns(self._sleeper)
            self._due = math.inf if seconds is None else self._now() + seconds

    def wake_up(self) -> None:
        """Tell that this thread is awake: what it does from now on may take its time."""
        self()
        with self._lock:
            self._due = math.inf

    def skip(self, seconds: float) -> None:
        """Leave out seconds that have passed."""
        with self._lock:
            self._skipped += seconds

    def _look(self) -> None:
        with self._lock:
            now = self._now()
            late = now - self._due
            if late > SHORTEST_PAUSE and self._was_stopped(late):
                self._skipped += late
            if late > 0:
                self._due = now

    def _was_stopped(self, late: float) -> bool:
        before, after = self._turns_before, self._turns(self._sleeper)
        if before is None or after is None:
            return False
        return after - before < _SHARE_OF_TURNS * late / sys.getswitchinterval()


class PauseDetector:
    """A thread that does nothing but sleep, by which a clock finds pauses of this process.

    One that also works would miss those that begin meanwhile.

    Args:
        clock: The clock.
        is_needed: Returns whether pauses matter at present; else the thread sleeps on.
    """

    def __init__(self, clock: RunningClock, is_needed: Callable[[], bool]) -> None:
        self._clock = clock
        self._is_needed = is_needed
        self._is_idle = False
        self._thread: threading.Thread | None = None
        # A lock as a flag: taken it means that there is no news.
        self._news = threading.Lock()
        self._news.acquire()

    def start(self) -> None:
        """Begin, now that it is needed; one call at a time."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="optuna-quota-pulse", daemon=True
            )
            self._thread.start()
        elif self._is_idle:
            with contextlib.suppress(RuntimeError):  # there is news already
                self._news.release()

    def _run(self) -> None:
        while True:
            # First the flag, then the question: whoever needs it meanwhile sees the flag.
            self._is_idle = True
            self._is_idle = not self._is_needed()
            wait = None if self._is_idle else _PERIOD
            self._clock.fall_asleep(wait)
            self._news.acquire(timeout=-1 if wait is None else wait)
            self._clock.wake_up()


def count_context_switches(thread: int) -> int | None:
    """Return how often a thread of this process was given a processor, None where unknown.

    Args:
        thread: Its native id.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        if thread == threading.get_native_id():
            return _count_own_turns()
        with open(f"/proc/self/task/{thread}/status", "rb") as file:
            lines = [line for line in file if b"ctxt_switches" in line]
        return sum(int(line.split()[1]) for line in lines)
    return None


def _count_own_turns() -> int | None:
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_THREAD)
    except (ImportError, AttributeError):
        return None
    return used.ru_nvcsw + used.ru_nivcsw


# Seconds. The longest wait bounds what a sum over a tree may miss, the shortest what sampling
# costs: 2,000 samples a second of about 10 µs are 2% of a core, for the instants before a breach.
LONGEST_INTERVAL = 0.1
# Of a single process the kernel keeps the exact peak, so nothing is missed between two looks, and
# while there is headroom for 0.25 s of growth no breach is found any later.
LONGEST_INTERVAL_ALONE = 0.25
SHORTEST_INTERVAL = 0.0005

# Bytes a second, before anything was seen: one thread that touches fresh pages reaches 2 to 4
# GB/s, so the first burst of a trial is met in time as well.
ASSUMED_GROWTH = 4e9


def fastest_growth(known: float, seen: float, cores: int | None = None) -> float:
    """Return the fastest growth to reckon with, in bytes a second.

    A process that appears brings all its memory at once: a step between two looks half a
    millisecond apart is no pace that all cores together could keep up.

    Args:
        known: The fastest so far.
        seen: The latest.
        cores: Threads that may run at once; those of this host by default.
    """
    most = ASSUMED_GROWTH * (cores or os.cpu_count() or 1)
    return max(known, min(seen, most))


def sampling_interval(
    headroom: float | None,
    growth: float,
    *,
    longest: float = LONGEST_INTERVAL,
    shortest: float = SHORTEST_INTERVAL,
) -> float:
    """Return min(longest, max(shortest, headroom / growth)) in seconds.

    Args:
        headroom: How far the usage is below its ceiling; None without a ceiling.
        growth: The fastest growth seen, in the same unit a second.
        longest: The wait while there is headroom in plenty.
        shortest: The wait at the ceiling.
    """
    if headroom is None or growth <= 0:
        return longest
    return min(longest, max(shortest, headroom / growth))


def next_due(due: float, now: float, period: float) -> float:
    """Return the next moment on the grid ``due + k * period`` after ``now``.

    Deadlines don't drift by the time a sample takes, and after a stall (a stopped process, a
    suspended machine) the missed ones are left out rather than made up for.
    """
    late = now - due
    if late < 0 or period <= 0:
        return due
    return due + period * (int(late / period) + 1)
