"""Will a running trial breach a limit? A forecast from what it has reported and used: pure.

Conservative on purpose: to stop a trial that would have fitted loses a result, to let one go on
that will not costs no more than its limit. So each bound is taken on the side of the trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from itertools import pairwise
import math

from optuna_quota._resources import Breach


# A forecast needs this many steps or samples, and this much of the way behind it.
LEAST_POINTS = 8
LEAST_SHARE = 0.2
# Standard errors between the estimate and the bound that counts: 1 in 1,000, one-sided, for the
# normal distribution.
Z = 3.1
# Without knowing the end of a trial, growth alone stops it only this close to its limit.
NEAR_LIMIT = 0.8


def forecast_breach(
    ceilings: Mapping[str, tuple[float, bool]],
    elapsed: float,
    *,
    steps: Sequence[tuple[int, float]] = (),
    last_step: int | None = None,
    memory: Sequence[tuple[float, float]] = (),
) -> Breach | None:
    """Return the limit that a trial is heading for, None when that can't be said surely.

    Args:
        ceilings: The ceilings in force by resource, and whether each comes from a quota.
        elapsed: Seconds since the start.
        steps: Pairs of a reported step and the seconds at which it was reported.
        last_step: The step at which the trial would be complete, the least that is likely; None
            when unknown.
        memory: Pairs of seconds and bytes.
    """
    total = None if last_step is None else least_duration(steps, last_step)
    for name in ("wall_time", "trial_time"):
        if name in ceilings and total is not None and total > ceilings[name][0]:
            limit, quota = ceilings[name]
            return Breach(name, limit, total, elapsed, quota=quota, forecast=True)
    if "memory" not in ceilings:
        return None
    limit, quota = ceilings["memory"]
    heading_for = least_memory(memory, total, limit)
    if heading_for is None or heading_for <= limit:
        return None
    return Breach("memory", limit, heading_for, elapsed, quota=quota, forecast=True)


def least_duration(steps: Sequence[tuple[int, float]], last_step: int) -> float | None:
    """Return the lower bound of the seconds that a trial will take in all, None when unsure.

    The time of the remaining steps is n · (m − Z · s · √(1/k + 1/n)), with m and s the mean and
    standard deviation of the time per step over k reports: the lower prediction bound of a sum
    of n further steps. The pace that counts is the faster of the whole trial's and its later
    half's, for a trial may speed up.

    Args:
        steps: Pairs of a reported step and the seconds at which it was reported.
        last_step: The step at which the trial will be complete.
    """
    if len(steps) < LEAST_POINTS or steps[-1][0] - steps[0][0] < LEAST_SHARE * last_step:
        return None
    remaining = last_step - steps[-1][0]
    if remaining <= 0:
        return None
    bounds = [_least_time(part, remaining) for part in (steps, steps[len(steps) // 2 :])]
    return steps[-1][1] + min(bounds)


def _least_time(steps: Sequence[tuple[int, float]], remaining: int) -> float:
    paces = [(t - t0) / (s - s0) for (s0, t0), (s, t) in pairwise(steps) if s > s0 and t >= t0]
    if len(paces) < 2:
        return 0.0
    mean, deviation = _mean_and_deviation(paces)
    error = Z * deviation * math.sqrt(1 / len(paces) + 1 / remaining)
    return remaining * max(0.0, mean - error)


def least_memory(
    memory: Sequence[tuple[float, float]], total: float | None, limit: float
) -> float | None:
    """Return the lower bound of the memory that a trial will reach, None when unsure.

    The growth is the least of several stretches of the trial, so that one that has levelled off,
    or grows by jumps, is no growth at all.

    Args:
        memory: Pairs of seconds and bytes.
        total: The least that the trial will take in seconds; None when unknown, and then only a
            trial near its limit is stopped, if it would pass it in a quarter of its time so far.
        limit: The limit in bytes.
    """
    if len(memory) < 2 * LEAST_POINTS:
        return None
    (start, _), (now, held) = memory[0], memory[-1]
    growth = _least_growth(memory)
    if growth <= 0:
        return None
    if total is not None and total > now:
        return held + growth * (total - now)
    if held < NEAR_LIMIT * limit:
        return None
    return held + growth * (now - start) / 4


def _least_growth(memory: Sequence[tuple[float, float]]) -> float:
    """Return the least growth in bytes a second over four stretches of the trial."""
    size = len(memory) // 4
    slopes = []
    for first in range(len(memory) - 4 * size, len(memory), size):
        (t0, m0), (t, m) = memory[first], memory[first + size - 1]
        slopes.append((m - m0) / (t - t0) if t > t0 else 0.0)
    return min(slopes)


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance)
