"""How much slower or faster the machine is today than it was on average over the trials.

The residuals of a model, in the order of the trials, are taken as a level that wanders plus noise
(the local level model of Durbin and Koopman, Time Series Analysis by State Space Methods, 2012,
chapter 2), and the level after the last trial comes from a Kalman filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math


# Variance of the level's steps as a share of the noise's.
_STEPS = (0.01, 0.03, 0.1, 0.3)
# A level that stays where it was is preferred unless it is clearly less likely.
_MARGIN = 2.0
_MIN_TRIALS = 8


@dataclass(frozen=True)
class Level:
    """Mean and variance of the level of the next trial, in units of the residuals."""

    mean: float = 0.0
    variance: float = 0.0


def current_level(residuals: Sequence[float], extra: Sequence[float]) -> Level:
    """Return the level after the last of the residuals, none where they seem not to drift.

    Args:
        residuals: Observed minus predicted, oldest first.
        extra: Variance of each beyond the noise: of trials that stand for lower bounds.
    """
    known = [r for r, more in zip(residuals, extra, strict=True) if not more]
    if len(known) < _MIN_TRIALS:
        return Level()
    noise = max(sum(r * r for r in known) / len(known), 1e-12)
    rows = list(zip(residuals, extra, strict=True))
    best, level = _filter(rows, noise, 0.0)[0] + _MARGIN, Level()
    for step in _STEPS:
        likelihood, found = _filter(rows, noise, step)
        if likelihood > best:
            best, level = likelihood, found
    return level


def _filter(rows: Sequence[tuple[float, float]], noise: float, step: float) -> tuple[float, Level]:
    """Return the log likelihood and the level of the next trial."""
    mean, variance, likelihood = 0.0, 0.0, 0.0
    for residual, extra in rows:
        variance += step * noise
        total, away = variance + noise + extra, residual - mean
        likelihood -= 0.5 * (math.log(total) + away * away / total)
        gain = variance / total
        mean, variance = mean + gain * away, variance * (1 - gain)
    return likelihood, Level(mean, variance + step * noise)
