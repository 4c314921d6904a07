"""The predictive distribution of one resource's usage at points."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from optuna_quota._records import Interval


# Amounts are e^center; beyond this a float would overflow.
_MAX_EXPONENT = 600.0


@dataclass(frozen=True)
class Predictive:
    """``floor + exp(center + spread · T)`` at each point, T of Student's t distribution.

    Attributes:
        floor: What every trial uses, such as the memory of the bare process; SI base units. One
            for all points, or one each.
        center: Shape ``(n_points,)``.
        spread: Positive, shape ``(n_points,)``.
        df: Degrees of freedom.
    """

    floor: float | np.ndarray
    center: np.ndarray
    spread: np.ndarray
    df: float

    def times(self, factor: np.ndarray) -> Predictive:
        """Return the distribution of the amounts times ``factor``, which is positive."""
        return Predictive(self.floor * factor, self.center + np.log(factor), self.spread, self.df)

    def quantile(self, probability: float) -> np.ndarray:
        """Return the quantiles of the amounts, nonnegative, shape ``(n_points,)``."""
        away = self.spread * _t_quantile(probability, self.df) if probability != 0.5 else 0.0
        logs = np.minimum(self.center + away, _MAX_EXPONENT)
        return np.asarray(np.maximum(self.floor + np.exp(logs), 0.0))

    def intervals(self, confidence: float) -> list[Interval]:
        """Return lower, median and upper at each point, each bound one-sided."""
        bounds = [self.quantile(p).tolist() for p in (1 - confidence, 0.5, confidence)]
        return [Interval(*each) for each in zip(*bounds, strict=True)]

    def above(self, limit: float) -> np.ndarray:
        """Return the probability of an amount over ``limit``."""
        from scipy.special import stdtr

        with np.errstate(divide="ignore"):
            away = np.log(np.maximum(limit - self.floor, 0.0)) - self.center
        return np.asarray(1 - stdtr(self.df, away / self.spread))


@lru_cache(maxsize=256)
def _t_quantile(probability: float, df: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(df, probability))
