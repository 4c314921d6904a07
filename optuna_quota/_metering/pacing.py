"""How long to wait until the next sample: pure, from headroom and growth."""

from __future__ import annotations

import os


# Seconds. The longest wait bounds what a sum over a tree may miss, the shortest what sampling
# costs: 2,000 samples a second of about 10 µs are 2% of a core, for the instants before a breach.
LONGEST_WAIT = 0.1
# Of a single process the kernel keeps the exact peak, so nothing is missed between two looks, and
# while there is headroom for 0.25 s of growth no breach is found any later.
LONGEST_WAIT_ALONE = 0.25
SHORTEST_WAIT = 0.0005

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


def wait_for(
    headroom: float | None,
    growth: float,
    *,
    longest: float = LONGEST_WAIT,
    shortest: float = SHORTEST_WAIT,
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
