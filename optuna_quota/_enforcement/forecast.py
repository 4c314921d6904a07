"""Will a running trial breach a limit? A forecast from what it has reported and used: pure.

Conservative on purpose: to stop a trial that would have fitted loses a result, to let one go on
that will not costs no more than its limit. So each bound is taken on the side of the trial, and
what earlier trials did counts for it as well: steps that compile or fill a cache are slow at
first, memory that a cache takes stops growing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from itertools import pairwise
import math
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from optuna.trial import TrialState

from optuna_quota._metering.breach import Ceilings
from optuna_quota._metering.breach import find_breaches
from optuna_quota._records import read_record
from optuna_quota._resources import Breach


if TYPE_CHECKING:
    from optuna.study import Study


# Pairs of a reported step and the seconds since the start at which it was reported.
Steps = Sequence[tuple[int, float]]

# A forecast needs this many steps or samples, and this much of the way behind it.
LEAST_POINTS = 8
LEAST_SHARE = 0.2
# No trial is stopped for its pace in the first half of its time: little would be saved, and much
# may still change.
LEAST_TIME = 0.5
# Trials that have to complete before others are compared with them.
LEAST_TRIALS = 3
# Standard errors between the estimate and the bound that counts: 1 in 1,000, one-sided, for the
# normal distribution.
Z = 3.1
# The pace is judged over the last of so many halvings of the trial, as long as they have
# `_LEAST_PACES`; the fastest counts.
_WINDOWS = (1, 2, 4, 8)
_LEAST_PACES = 4
# A trial may be slow at first for so many times the steps that earlier trials were.
_LONGER = 2
# Without knowing the end of a trial, growth alone stops it only this close to its limit.
NEAR_LIMIT = 0.85
_STRETCHES = 4
_MOST_PROFILES = 20


class Profile:
    """By how much a trial that completed became faster, from each of its steps on.

    Args:
        steps: What it reported, to its end.
    """

    def __init__(self, steps: Steps) -> None:
        timed = _timed(steps)
        paces = [pace for _, pace in timed]
        sums = [0.0, *accumulate(paces)]
        self._steps = [step for step, _ in timed[1:]]
        speed_ups = []
        for k in range(1, len(paces)):
            rest = (sums[-1] - sums[k]) / (len(paces) - k)
            before = (sums[k] - sums[k // 2]) / (k - k // 2)
            speed_ups.append(before / rest if rest > 0 else 1.0)
        # The largest from each step on.
        self._speed_ups = [*accumulate(reversed(speed_ups), max)][::-1]

    def speed_up(self, step: int) -> float:
        """Return by how much the trial became faster after a step, or after one half as far.

        It compares the pace of the rest of the trial with that of the steps before, of half of
        them. Another trial may be slow for twice as many steps as this one was.
        """
        index = bisect_left(self._steps, step / _LONGER)
        return max(1.0, self._speed_ups[index]) if index < len(self._speed_ups) else 1.0


@dataclass(frozen=True)
class Earlier:
    """What is known of the trials of the study that completed.

    Attributes:
        last_step: The least of their last steps; None while fewer than three completed.
        longest: Seconds that the longest took, None where that is unknown.
        memory: Bytes that the largest held, None where that is unknown.
        profiles: How the pace of some of them changed.
    """

    last_step: int | None = None
    longest: float | None = None
    memory: float | None = None
    profiles: Sequence[Profile] = ()


# In memory alone: a storage would have to take the time of each report.
_profiles: WeakKeyDictionary[Study, deque[Profile]] = WeakKeyDictionary()


def remember_profile(study: Study, steps: Steps) -> None:
    """Keep how the pace of a trial that completed changed, to compare later ones with."""
    if len(steps) >= LEAST_POINTS:
        _profiles.setdefault(study, deque(maxlen=_MOST_PROFILES)).append(Profile(steps))


def earlier_trials(study: Study) -> Earlier:
    """Return what is known of the trials of a study that completed."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    steps = [step for trial in done if (step := trial.last_step) is not None]
    if len(steps) < LEAST_TRIALS:
        return Earlier()
    usages = [read_record(trial).usage for trial in done]
    return Earlier(
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
    earlier: Earlier | None = None,
    memory: Sequence[tuple[float, float]] = (),
) -> Breach | None:
    """Return the limit that a trial is heading for, None when that can't be said surely.

    Args:
        ceilings: The ceilings in force by resource, and whether each comes from a quota.
        elapsed: Seconds since the start.
        steps: What it has reported.
        earlier: What is known of trials that completed; without them, the end of the trial is
            unknown.
        memory: Pairs of seconds and bytes.
    """
    earlier = earlier or Earlier()
    total = None
    if earlier.last_step is not None:
        total = least_duration(steps, earlier.last_step, earlier.profiles)
    amounts: dict[str, float | None] = {}
    for name in ("wall_time", "trial_time"):
        if name in ceilings and elapsed >= _time_to_wait(ceilings[name][0], earlier):
            amounts[name] = total
    if "memory" in ceilings:
        amounts["memory"] = least_memory(memory, total, ceilings["memory"][0], earlier.memory)
    found = find_breaches(amounts, ceilings, elapsed, forecast=True)
    return found[0] if found else None


def _time_to_wait(limit: float, earlier: Earlier) -> float:
    """Return the seconds before which no pace is judged.

    Without their steps, earlier trials tell only that a trial as slow as them is none too slow.
    """
    known = len(earlier.profiles) >= LEAST_TRIALS or earlier.longest is None
    return max(LEAST_TIME * limit, 0.0 if known else earlier.longest or 0.0)


def least_duration(steps: Steps, last_step: int, profiles: Sequence[Profile] = ()) -> float | None:
    """Return the lower bound of the seconds that a trial will take in all, None when unsure.

    The time of the remaining steps is n · (m − Z · s · √(1/k + 1/n)), with m and s the mean and
    standard deviation of the time per step over k reports: the lower prediction bound of a sum
    of n further steps. The pace that counts is the fastest of the whole trial and its last half,
    quarter and eighth, divided by what earlier trials became faster by at such a step; but what
    this trial has become faster by already is behind it.

    Args:
        steps: What the trial has reported.
        last_step: The step at which it will be complete.
        profiles: How the pace of trials that completed changed.
    """
    if len(steps) < LEAST_POINTS or steps[-1][0] - steps[0][0] < LEAST_SHARE * last_step:
        return None
    remaining = last_step - steps[-1][0]
    if remaining <= 0:
        return steps[-1][1]
    paces = [pace for _, pace in _timed(steps)]
    windows = [
        window
        for share in _WINDOWS
        if len(window := paces[-(-len(paces) // share) * -1 :]) >= _LEAST_PACES
    ]
    if not windows:
        return None
    faster = max((profile.speed_up(steps[-1][0]) for profile in profiles), default=1.0)
    bound = min(_least_time(window, remaining) for window in windows)
    return steps[-1][1] + bound / max(1.0, faster / _speed_up_so_far(paces))


def _speed_up_so_far(paces: Sequence[float]) -> float:
    """Return by how much the last quarter of some steps is faster than any quarter was."""
    size = max(1, len(paces) // 4)
    quarters = [_mean(paces[i : i + size]) for i in range(0, len(paces) - size + 1, size)]
    last = _mean(paces[-size:])
    return max(1.0, max(quarters) / last) if last > 0 else math.inf


def _timed(steps: Steps) -> list[tuple[int, float]]:
    """Return pairs of a step and the seconds that each of the steps from there on took."""
    return [
        (s0, (t - t0) / (s - s0)) for (s0, t0), (s, t) in pairwise(steps) if s > s0 and t >= t0
    ]


def _least_time(paces: Sequence[float], remaining: int) -> float:
    mean = _mean(paces)
    variance = sum((pace - mean) ** 2 for pace in paces) / (len(paces) - 1)
    error = Z * math.sqrt(variance * (1 / len(paces) + 1 / remaining))
    return remaining * max(0.0, mean - error)


def least_memory(
    memory: Sequence[tuple[float, float]],
    total: float | None,
    limit: float,
    usual: float | None = None,
) -> float | None:
    """Return the lower bound of the memory that a trial will reach, None when unsure.

    The trial is cut into four stretches. Its growth is the least from one to the next, of both
    what they held at least and at most, so that one that has levelled off, goes up and down, or
    grows by jumps, does not grow at all. Where it became less from one to the next, it goes on to
    become less by as much.

    Args:
        memory: Pairs of seconds and bytes.
        total: The least that the trial will take in seconds; None when unknown, and then only a
            trial near its limit is stopped, if it would pass it in a quarter of its time so far.
        limit: The limit in bytes.
        usual: What trials that completed held at most, in bytes: up to there, growth is no sign.
    """
    if len(memory) < 2 * LEAST_POINTS:
        return None
    (start, _), (now, held) = memory[0], memory[-1]
    if held <= (usual or 0.0):
        return None
    growth, decay = _least_growth([value for _, value in memory])
    if growth <= 0:
        return None
    stretch = (now - start) / _STRETCHES
    if total is not None:
        return held + growth * _sum_of_decaying(max(0.0, total - now) / stretch, decay)
    if held < NEAR_LIMIT * limit:
        return None
    return held + growth * decay


def _least_growth(values: Sequence[float]) -> tuple[float, float]:
    """Return the least growth in bytes from one of four stretches to the next, and its decay."""
    size = len(values) // _STRETCHES
    begin = len(values) - _STRETCHES * size
    parts = [values[i : i + size] for i in range(begin, len(values), size)]
    growths = [min(min(b) - min(a), max(b) - max(a)) for a, b in pairwise(parts)]
    decay = min((b / a for a, b in pairwise(growths) if a > 0), default=0.0)
    return min(growths), min(1.0, max(0.0, decay))


def _sum_of_decaying(count: float, decay: float) -> float:
    """Return the sum of ``decay ** i`` for i from 1 to ``count``, which may be a fraction."""
    if decay >= 1.0:
        return count
    return decay * (1 - decay**count) / (1 - decay) if decay > 0 else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
