"""The footprint of one resource: a warped Gaussian process with calibrated bounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from optuna_quota._footprint.gaussian_process import (
    fit_hyperparameters,
    GaussianProcess,
    initial_sites,
    LATENESS,
    mean_nearness,
    NOISE,
    prior_mean,
    propagate,
    Sites,
    stop_rates,
)
from optuna_quota._footprint.numerics import product, square_root
from optuna_quota._records import Interval


# Candidate floors, as shares of the smallest amount. Closer ones turn small differences between
# the cheapest trials into large ones of the logarithm.
FLOORS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
# Search the hyperparameters of a floor if its log density with those of the best floor so far
# comes this close to the best.
_FLOOR_MARGIN = 3.0
# Leave-one-out errors are a little small, as the hyperparameters were fitted to all trials. This
# factor, the two below and _FEW_TRIALS_WIDENING were chosen with each of fourteen workloads left
# out in turn (benchmarks/footprint_constants.py).
_LEAVE_ONE_OUT_BIAS = 1.1
# Share of the residuals' overall size in the spread, beside the model's own deviation at a point.
_COMMON_SHARE = 0.2
# Least ratio of the residuals' size to the model's own deviations: a smaller one is chance.
_MIN_RATIO = 0.8
# The fewer trials, the less certain the hyperparameters, for which the spread is wider.
_FEW_TRIALS_WIDENING = 8.0
# Prior deviation of the logarithm of a resource, with the weight of two trials.
_PRIOR_SCALE = 0.8
_PRIOR_WEIGHT = 2.0
_MIN_SCALE = 0.02
# Below _FEW trials there is no floor, below _FEWEST no search of hyperparameters.
_FEW = 8
_FEWEST = 4
# Draws are clipped to this many deviations of the target, so that none of them rules a sum. From
# ten trials on it hardly matters (2 to 20 give the same); after five, 2 would hold too seldom and
# 6 make the interval twice as wide for the same median.
_MAX_DRAWN_DEVIATION = 3.0
_MAX_DRAWN_EXPONENT = 300.0
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


@dataclass(frozen=True)
class ResourceData:
    """The trials in which one resource was measured, and what is known of it beforehand.

    Attributes:
        columns: Shape ``(n_trials, n_columns)``.
        amounts: SI base units, shape ``(n_trials,)``.
        censored: True where the amount is a lower bound.
        partial: True where it was used at an unknown share of the trial's run, because something
            else stopped it; these are lower bounds too.
        floors: Candidate floors, as shares of the smallest amount.
        noise: Prior mean of the logarithm of the noise's variance, standardised.
        drifts: Whether the machine's speed changes the resource from trial to trial.
        bounded_peaks: Whether peaks of stopped trials are among the lower bounds.
    """

    columns: np.ndarray
    amounts: np.ndarray
    censored: np.ndarray
    partial: np.ndarray
    floors: tuple[float, ...] = FLOORS
    noise: float = NOISE
    drifts: bool = False
    bounded_peaks: bool = False

    @classmethod
    def exact(cls, columns: np.ndarray, amounts: np.ndarray, **options: Any) -> ResourceData:
        """Return trials of which no amount is a lower bound."""
        none = np.zeros(len(amounts), dtype=bool)
        return cls(columns, amounts, none, none, **options)

    @classmethod
    def of_ranks(cls, columns: np.ndarray, losses: np.ndarray) -> ResourceData:
        """Return trials by the normal scores of their losses, as logarithms of amounts."""
        from scipy.special import ndtri
        from scipy.stats import rankdata

        scores = ndtri((rankdata(losses) - 0.5) / len(losses))
        return cls.exact(columns, np.exp(scores), floors=(0.0,))


class ResourceModel:
    """``log(amount - floor)`` as a Gaussian process over the columns.

    Args:
        data: The trials.
        floor: What every trial uses, SI base units.
        hyperparameters: Of the Gaussian process.
        lateness: How late in their run the partial ones were stopped; 1 is anywhere.
        start: Sites to start from, of similar hyperparameters.

    Attributes:
        location: Mean of the logarithm; the process is fitted to what remains over ``scale``.
        scale: Standard deviation of the logarithm.
        sites: Standardised observations, censored ones replaced.
    """

    def __init__(
        self,
        data: ResourceData,
        floor: float,
        hyperparameters: np.ndarray,
        lateness: float = 1.0,
        start: Sites | None = None,
    ) -> None:
        self.data, self.floor = data, floor
        self.hyperparameters, self.lateness = hyperparameters, lateness
        logs = np.log(data.amounts - floor)
        self.location, self.scale = _standard(logs)
        target = (logs - self.location) / self.scale
        self.sites = propagate(
            data.columns,
            target,
            data.censored,
            self.scale * stop_rates(logs, data.censored, data.partial, lateness),
            hyperparameters,
            initial_sites(target, data.censored) if start is None else start,
        )

    @cached_property
    def process(self) -> GaussianProcess:
        """The Gaussian process of the standardised logarithm."""
        return GaussianProcess(
            self.data.columns,
            self.sites.target,
            self.hyperparameters,
            self.sites.extra,
            ~self.censored,
        )

    @property
    def censored(self) -> np.ndarray:
        """True where the amount of a trial is a lower bound."""
        return self.data.censored

    def predict(self, columns: np.ndarray) -> Predictive:
        """Return the predictive distribution at points."""
        mean, variance = self.process.predict(columns)
        spread = self.spread(np.sqrt(variance + self.process.noise))
        return Predictive(
            self.floor, self.location + self.scale * mean, self.scale * spread, self.df
        )

    def draw(
        self, columns: np.ndarray, count: int, generator: np.random.Generator, ahead: int = 1
    ) -> np.ndarray:
        """Return joint draws of amounts at points, shape ``(count, n_points)``.

        The noise is independent at each point. The uncertainty of the process is correlated as
        the process is, and the widening of the spread beyond it, for uncertain hyperparameters, is
        common to all points. Independent at each point, it would raise every total. The machine's
        level is its mean over the trials ``ahead``, and how it departs from that is noise.
        """
        mean, covariance = self.process.joint(columns, ahead)
        noise = self.process.noise + self.process.drift * (1 - mean_nearness(ahead)[1])
        variance = np.maximum(np.diag(covariance), 1e-12)
        wider = self.spread(np.sqrt(variance + noise)) ** 2 / (variance + noise)
        within, beyond = np.minimum(wider, 1.0), np.maximum(wider - 1.0, 0.0)
        root = square_root(covariance) * np.sqrt(within)[:, None]
        common, own = np.sqrt(beyond * variance), np.sqrt(within * noise)
        n = len(columns)
        heavy = np.sqrt(self.df / generator.chisquare(self.df, (count, 1)))
        away = product(generator.standard_normal((count, n)), root.T)
        away = heavy * (away + generator.standard_normal((count, 1)) * common)
        away += own * generator.standard_normal((count, n))
        logs = self.location + self.scale * (
            mean + np.clip(away, -_MAX_DRAWN_DEVIATION, _MAX_DRAWN_DEVIATION)
        )
        return np.asarray(
            np.maximum(self.floor + np.exp(np.minimum(logs, _MAX_DRAWN_EXPONENT)), 0.0)
        )

    @property
    def df(self) -> float:
        """Degrees of freedom of the bounds."""
        return float(max(int(np.sum(~self.censored)) - 2, 2))

    def spread(self, deviation: np.ndarray) -> np.ndarray:
        """Return calibrated deviations of new observations from the model's own.

        They are a mean of the model's own deviation, scaled by its leave-one-out errors, and of
        the overall size of these errors.
        """
        common, ratio, widening = self._calibration
        return np.asarray((common + ratio * deviation) * widening)

    @cached_property
    def _calibration(self) -> tuple[float, float, float]:
        """The common part of the spread, the multiple of the deviation, and a factor on both."""
        residual, own = (part[~self.censored] for part in self.process.leave_one_out())
        n = max(len(residual), 1)
        if n < 3:
            return 0.0, 1.0, (1 + 1 / n) ** 0.5
        common = float(np.sqrt(np.mean(residual**2)))
        ratio = max(float(np.sqrt(np.mean((residual / own) ** 2))), _MIN_RATIO)
        unknown = (1 + 1 / n) * (1 + _FEW_TRIALS_WIDENING / max(n, _FEW))
        widening = _LEAVE_ONE_OUT_BIAS * unknown**0.5
        return _COMMON_SHARE * common, (1 - _COMMON_SHARE) * ratio, widening

    @cached_property
    def score(self) -> float:
        """Return the leave-one-out log density of the fitted amounts, in SI base units.

        Lower bounds count with the logarithm of their probability.
        """
        from scipy.special import log_ndtr

        logs = np.log(self.data.amounts - self.floor)
        residual, own = self.process.leave_one_out()
        seen, held = ~self.censored, self.censored
        r, s = residual[seen], own[seen]
        density = -0.5 * (r / s) ** 2 - np.log(s * self.scale) - logs[seen]
        mean = (self.sites.target - residual)[held]
        variance = own[held] ** 2 - self.sites.extra[held] + self.process.noise
        away = mean - (logs[held] - self.location) / self.scale
        spread = np.sqrt(np.maximum(variance, 1e-12))
        rate = stop_rates(logs, held, self.data.partial, self.lateness)[held]
        r = self.scale * rate
        bounded = log_ndtr(away / spread - r * spread)
        # In units of the amount, as the others; see `gaussian_process.py`.
        own_part = np.log(np.maximum(rate, 1e-300)) - logs[held]
        shares = np.where(rate > 0, own_part - r * away + 0.5 * (r * spread) ** 2, 0.0)
        return float(np.sum(density) + np.sum(bounded) + np.sum(shares))

    def log_leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Return leave-one-out residual and variance of the logarithm of each amount."""
        residual, own = self.process.leave_one_out()
        above = np.exp(self.location + self.scale * self.sites.target)
        share = self.scale * above / np.maximum(above + self.floor, 1e-300)
        # Where all is zero, the share of a negative floor is without meaning.
        with np.errstate(over="ignore"):
            return residual * share, (own * share) ** 2


def fit_resource(data: ResourceData, start: ResourceModel | None = None) -> ResourceModel:
    """Return the model of one resource, its floor chosen by leave-one-out density.

    The search begins from ``start``, a model of fewer trials.
    """
    candidates = _candidates(data.amounts, data.floors)
    tried: dict[int, ResourceModel] = {}

    def score(index: int) -> float:
        if index not in tried:
            near = min(tried, key=lambda each: abs(each - index), default=None)
            first = start if near is None else tried[near]
            tried[index] = _fit_with_floor(data, candidates[index], first)
        return tried[index].score

    def is_promising(index: int, best: int) -> bool:
        if not 0 <= index < len(candidates) or index in tried:
            return index in tried
        known = tried[best]
        screened = ResourceModel(data, candidates[index], known.hyperparameters, known.lateness)
        return screened.score > known.score - _FLOOR_MARGIN

    if start is None or len(start.data.columns) < _FEW:
        return _fit_lateness(tried[max(range(len(candidates)), key=score)])
    # Climb from the earlier floor by single promising steps.
    best = min(range(len(candidates)), key=lambda each: abs(candidates[each] - start.floor))
    score(best)
    while True:
        beside = [each for each in (best - 1, best + 1) if is_promising(each, best)]
        found = max((best, *beside), key=score)
        if found == best:
            return _fit_lateness(tried[best])
        best = found


def refresh_resource(data: ResourceData, model: ResourceModel) -> ResourceModel | None:
    """Return a model of more trials with the same hyperparameters and floor, None if unfit."""
    if data.amounts.min() <= model.floor or data.columns.shape[1] != model.data.columns.shape[1]:
        return None
    return ResourceModel(data, model.floor, model.hyperparameters, model.lateness)


def _candidates(amounts: np.ndarray, shares: tuple[float, ...]) -> list[float]:
    smallest = float(amounts.min())
    if smallest <= 0:
        return [-1e-3 * float(amounts.max()) or -1.0]
    return [share * smallest for share in (shares if len(amounts) >= _FEW else (0.0,))]


def _fit_lateness(model: ResourceModel) -> ResourceModel:
    data = model.data
    if not data.partial.any():
        return model
    screened = [ResourceModel(data, model.floor, model.hyperparameters, each) for each in LATENESS]
    best = max((model, *screened), key=lambda each: each.score)
    return model if best.lateness == model.lateness else _fit_with_floor(data, model.floor, best)


def _fit_with_floor(
    data: ResourceData, floor: float, start: ResourceModel | None
) -> ResourceModel:
    found = prior_mean(data.columns.shape[1], data.noise, data.drifts)
    if start is not None and start.hyperparameters.shape == found.shape:
        found = start.hyperparameters
    model = ResourceModel(data, floor, found, 1.0 if start is None else start.lateness)
    is_exact = not data.censored.any()
    for _ in range(0 if len(data.amounts) < _FEWEST else 1 if is_exact else 2):
        found = fit_hyperparameters(
            data.columns,
            model.sites.target,
            start=model.hyperparameters,
            extra=model.sites.extra,
            noisy=~data.censored,
            noise=data.noise,
            drifts=data.drifts,
        )
        model = ResourceModel(data, floor, found, model.lateness, model.sites)
    return model


def _standard(logs: np.ndarray) -> tuple[float, float]:
    location, n = float(logs.mean()), len(logs)
    squares = float(np.sum((logs - location) ** 2))
    if n < _FEW:
        squares, n = squares + _PRIOR_WEIGHT * _PRIOR_SCALE**2, n + int(_PRIOR_WEIGHT)
    return location, max((squares / n) ** 0.5, _MIN_SCALE)
