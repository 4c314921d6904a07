"""What is expected of one resource at some points, as a distribution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


# Amounts are e^center; beyond this a float would overflow.
_LARGEST = 600.0


@dataclass(frozen=True)
class Predictive:
    """``floor + exp(center + spread · T)`` at each point, T of Student's t distribution.

    Attributes:
        floor: What every trial uses, such as the memory of the bare process; SI base units. One
            for all points, or one each.
        center: Shape ``(n_points,)``.
        spread: Shape ``(n_points,)``; 0 where the amount is certain.
        df: Degrees of freedom.
    """

    floor: float | np.ndarray
    center: np.ndarray
    spread: np.ndarray
    df: float

    @classmethod
    def certain(cls, amounts: np.ndarray) -> Predictive:
        """Return a distribution without any spread."""
        with np.errstate(divide="ignore"):
            return cls(0.0, np.log(amounts), np.zeros(len(amounts)), np.inf)

    def times(self, factor: np.ndarray) -> Predictive:
        """Return the distribution of ``factor``, positive, times the amounts."""
        return Predictive(self.floor * factor, self.center + np.log(factor), self.spread, self.df)

    def quantile(self, probability: float) -> np.ndarray:
        """Return the amounts undercut with a probability, nonnegative."""
        away = self.spread * _t_quantile(probability, self.df) if probability != 0.5 else 0.0
        logs = np.minimum(self.center + away, _LARGEST)
        return np.asarray(np.maximum(self.floor + np.exp(logs), 0.0))

    def above(self, limit: float) -> np.ndarray:
        """Return the probability of an amount over ``limit``."""
        from scipy.special import stdtr

        with np.errstate(divide="ignore"):
            away = np.log(np.maximum(limit - self.floor, 0.0)) - self.center
        safe = np.where(self.spread > 0, self.spread, 1.0)
        uncertain = 1 - stdtr(self.df if np.isfinite(self.df) else 1e9, away / safe)
        # A certain amount exactly at the limit fits: the tolerance is that of exp(log(x)).
        return np.asarray(np.where(self.spread > 0, uncertain, away < -1e-9))


@lru_cache(maxsize=256)
def _t_quantile(probability: float, df: float) -> float:
    from scipy.special import ndtri
    from scipy.special import stdtrit

    return float(stdtrit(df, probability) if np.isfinite(df) else ndtri(probability))
