"""Forecast whether a running trial will breach a limit, from its reports and its usage so far.

The forecast is conservative: stopping a trial that would have stayed within its limit loses a
result, while running one that exceeds it costs at most the limit. So each estimate is a lower
bound, and allows for what earlier trials show: first steps are slow where they compile or fill a
cache, and a cache stops growing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
import math
from weakref import WeakKeyDictionary

import numpy as np
from optuna.study import Study
from optuna.trial import TrialState

from optuna_quota._metering.breach import Ceilings, find_breaches
from optuna_quota._records import read_record
from optuna_quota._resources import CLOCK_RESOURCES
from optuna_quota._usage import Breach


# Pairs of a reported step and the seconds since the start at which it was reported.
Steps = Sequence[tuple[int, float]]

# A forecast needs this many steps or samples, and this share of all steps behind it.
MIN_POINTS = 8
MIN_PROGRESS = 0.2
# No trial is stopped for its pace in the first half of its time, when its pace may still change.
MIN_TIME_SHARE = 0.5
# Trials that have to complete before others are compared with them.
MIN_TRIALS = 3
# Standard errors between the estimate and its lower bound: 1 in 1,000, one-sided, for the normal
# distribution.
Z = 3.1
# The pace is taken from the whole trial and its last half, quarter and eighth, as long as they
# have `_MIN_PACES` steps; the fastest counts.
_WINDOWS = (1, 2, 4, 8)
_MIN_PACES = 4
# A trial may be slow at first for this many times as many steps as earlier trials.
_LONGER = 2
# If the end of a trial is unknown, its growth stops it only this close to its limit.
NEAR_LIMIT = 0.85
_STRETCHES = 4
_MOST_PROFILES = 20


class PaceProfile:
    """By how much a completed trial became faster after each of the steps that it reported."""

    def __init__(self, steps: Steps) -> None:
        timed = _seconds_per_step(steps)
        n = len(timed)
        sums = np.concatenate([[0.0], np.cumsum([pace for _, pace in timed])])
        k = np.arange(1, n)
        rest, before = (sums[-1] - sums[k]) / (n - k), (sums[k] - sums[k // 2]) / (k - k // 2)
        speed_ups = np.divide(before, rest, out=np.ones_like(rest), where=rest > 0)
        self._steps = [step for step, _ in timed[1:]]
        # The largest from each step on.
        self._speed_ups = np.maximum.accumulate(speed_ups[::-1])[::-1].tolist()

    def speed_up(self, step: int) -> float:
        """Return by how much the trial became faster after a step, or after half as many.

        That is the mean time of the steps of the last half so far over that of all later steps.
        Half as many, since another trial may be slow for twice as many steps as this one was.
        """
        index = bisect_left(self._steps, step / _LONGER)
        return max(1.0, self._speed_ups[index]) if index < len(self._speed_ups) else 1.0


@dataclass(frozen=True)
class CompletedTrials:
    """Duration, steps and memory of a study's completed trials."""

    # The smallest of their last steps; None while fewer than three completed.
    last_step: int | None = None
    longest: float | None = None  # Seconds of the longest, None if unknown
    memory: float | None = None  # Bytes of the largest, None if unknown
    profiles: Sequence[PaceProfile] = ()  # How the pace of some of them changed


# Kept in memory alone: in a storage, they would take the time of each report.
_profiles: WeakKeyDictionary[Study, deque[PaceProfile]] = WeakKeyDictionary()


def record_pace(study: Study, steps: Steps) -> None:
    """Store how the pace of a completed trial changed, to compare later trials with it."""
    if len(steps) >= MIN_POINTS:
        _profiles.setdefault(study, deque(maxlen=_MOST_PROFILES)).append(PaceProfile(steps))


def completed_trials(study: Study) -> CompletedTrials:
    """Return duration, steps and memory of a study's completed trials."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    steps = [step for trial in done if (step := trial.last_step) is not None]
    if len(steps) < MIN_TRIALS:
        return CompletedTrials()
    usages = [read_record(trial).usage for trial in done]
    return CompletedTrials(
        min(steps),
        max((u.wall_time for u in usages if u.wall_time is not None), default=None),
        max((u.memory for u in usages if u.memory is not None), default=None),
        tuple(_profiles.get(study, ())),
    )


def forecast_breach(
    ceilings: Ceilings,
    elapsed: float,
    *,
    steps: Steps = (),
    completed: CompletedTrials | None = None,
    memory: Sequence[tuple[float, float]] = (),
) -> Breach | None:
    """Return the breach that a trial is heading for, None if it may stay within its limits.

    ``memory`` has pairs of seconds and bytes; without ``completed``, only memory is forecast.
    """
    completed = completed or CompletedTrials()
    duration = None
    if completed.last_step is not None:
        duration = lowest_duration(steps, completed.last_step, completed.profiles)
    amounts: dict[str, float | None] = {}
    for name in CLOCK_RESOURCES:
        if name in ceilings and elapsed >= _earliest_stop(ceilings[name][0], completed):
            amounts[name] = duration
    if "memory" in ceilings:
        limit = ceilings["memory"][0]
        amounts["memory"] = lowest_peak(memory, duration, limit, completed.memory)
    found = find_breaches(amounts, ceilings, elapsed, forecast=True)
    return found[0] if found else None


def _earliest_stop(limit: float, completed: CompletedTrials) -> float:
    """Return the seconds before which a trial is not stopped for its pace.

    Where the steps of completed trials are unknown, a trial as slow as they were may still fit.
    """
    known = len(completed.profiles) >= MIN_TRIALS or completed.longest is None
    return max(MIN_TIME_SHARE * limit, 0.0 if known else completed.longest or 0.0)


def lowest_duration(steps: Steps, last_step: int, profiles: Sequence[PaceProfile]) -> float | None:
    """Return a lower bound of a trial's total seconds, None with too few reports.

    The time of the remaining steps is n · (m − Z · s · √(1/k + 1/n)), with m and s the mean and
    standard deviation of the time per step over k reports: the lower prediction bound of a sum
    of n further steps. The fastest of the whole trial and its last half, quarter and eighth
    counts, divided by how much faster earlier trials became after such a step; what this trial
    has become faster by already is subtracted from that.
    """
    if len(steps) < MIN_POINTS or steps[-1][0] - steps[0][0] < MIN_PROGRESS * last_step:
        return None
    remaining = last_step - steps[-1][0]
    if remaining <= 0:
        return steps[-1][1]
    paces = np.array([pace for _, pace in _seconds_per_step(steps)])
    windows = [paces[len(paces) - -(-len(paces) // share) :] for share in _WINDOWS]
    bounds = [_lowest_time(w, remaining) for w in windows if len(w) >= _MIN_PACES]
    if not bounds:
        return None
    expected = max((profile.speed_up(steps[-1][0]) for profile in profiles), default=1.0)
    return steps[-1][1] + min(bounds) / max(1.0, expected / _speed_up_so_far(paces))


def _seconds_per_step(steps: Steps) -> list[tuple[int, float]]:
    """Return pairs of a step and the seconds that each step took from there to the next report."""
    return [
        (s0, (t - t0) / (s - s0)) for (s0, t0), (s, t) in pairwise(steps) if s > s0 and t >= t0
    ]


def _lowest_time(paces: np.ndarray, remaining: int) -> float:
    error = Z * paces.std(ddof=1) * math.sqrt(1 / len(paces) + 1 / remaining)
    return remaining * max(0.0, float(paces.mean() - error))


def _speed_up_so_far(paces: np.ndarray) -> float:
    """Return the mean pace of the slowest quarter over that of the last."""
    size = max(1, len(paces) // 4)
    quarters = [paces[i : i + size].mean() for i in range(0, len(paces) - size + 1, size)]
    last = paces[-size:].mean()
    return max(1.0, float(max(quarters) / last)) if last > 0 else math.inf


def lowest_peak(
    memory: Sequence[tuple[float, float]],
    duration: float | None,
    limit: float,
    typical: float | None,
) -> float | None:
    """Return a lower bound of a trial's peak bytes, None with too few samples.

    The trial so far is cut into four stretches. Its growth is the smallest from one to the next,
    of both their minimum and their maximum: a trial that has levelled off, goes up and down, or
    grows in jumps does not grow at all. Where growth has decreased, it keeps decreasing. Up to
    the ``typical`` peak of completed trials, growth says nothing. Without a lower bound of its
    duration, only a trial near its limit is stopped, if it would pass it in a quarter of its time
    so far.
    """
    if len(memory) < 2 * MIN_POINTS:
        return None
    (start, _), (now, held) = memory[0], memory[-1]
    if held <= (typical or 0.0):
        return None
    growth, decay = _smallest_growth([value for _, value in memory])
    if growth <= 0:
        return None
    stretch = (now - start) / _STRETCHES
    if duration is not None:
        return held + growth * _geometric_sum(max(0.0, duration - now) / stretch, decay)
    if held < NEAR_LIMIT * limit:
        return None
    return held + growth * decay


def _smallest_growth(values: Sequence[float]) -> tuple[float, float]:
    """Return the smallest growth in bytes from a stretch to the next one, and its decay."""
    size = len(values) // _STRETCHES
    parts = np.array(values[len(values) - _STRETCHES * size :]).reshape(_STRETCHES, size)
    growths = np.minimum(np.diff(parts.min(axis=1)), np.diff(parts.max(axis=1))).tolist()
    decay = min((b / a for a, b in pairwise(growths) if a > 0), default=0.0)
    return min(growths), min(1.0, max(0.0, decay))


def _geometric_sum(count: float, decay: float) -> float:
    """Return the sum of ``decay ** i`` for i from 1 to ``count``, which may be a fraction."""
    if decay >= 1.0:
        return count
    return decay * (1 - decay**count) / (1 - decay) if decay > 0 else 0.0
