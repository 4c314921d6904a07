"""The footprint of one resource: a warped Gaussian process with calibrated bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import cached_property
from functools import lru_cache

import numpy as np

from optuna_quota._footprint.censoring import initial_sites
from optuna_quota._footprint.censoring import propagate
from optuna_quota._footprint.censoring import Sites
from optuna_quota._footprint.gaussian_process import fit_hyperparameters
from optuna_quota._footprint.gaussian_process import GaussianProcess
from optuna_quota._footprint.gaussian_process import Hyperparameters
from optuna_quota._footprint.gaussian_process import NOISE


# Amounts are e^center; beyond this a float would overflow.
_MAX_EXPONENT = 600.0


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
        logs = np.minimum(self.center + away, _MAX_EXPONENT)
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


# Candidate floors, as shares of the smallest amount seen.
FLOORS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
# A floor is worth a search of hyperparameters of its own where its log density without one comes
# so close to the best.
_FLOOR_MARGIN = 3.0
_TINY_SCALE = 0.02
# Leaving one out is a little too sure: the hyperparameters have seen it. This, the share below and
# the weight of what is not known were chosen with each of six workloads left out in turn
# (benchmarks/footprint_constants.py).
_LEAVE_ONE_OUT_BIAS = 1.05
# Share of the residuals' common size in the spread, beside the model's own deviation at the point.
_COMMON_SHARE = 0.2
# A common size that is smaller than the model's own by more than this is taken for luck.
_MIN_RATIO = 0.8
# The fewer trials, the less is known of the hyperparameters, for which the spread is wider.
_FEW_TRIALS_WIDENING = 8.0
# Deviation of the logarithm assumed of a resource of which next to nothing is known, weighing as
# much as two trials.
_PRIOR_SCALE = 0.8
_PRIOR_WEIGHT = 2.0
_FEW = 8
_FEWEST = 4
# A draw further off than this many deviations of the target says nothing that a sum should keep.
# From ten trials on it hardly matters (2 to 20 give the same); after five, 2 would hold too seldom
# and 6 make the interval twice as wide for the same median.
_FARTHEST = 3.0
_MAX_DRAWN_EXPONENT = 300.0


@dataclass(frozen=True)
class ResourceModel:
    """``log(amount - floor)`` as a Gaussian process over the columns.

    Attributes:
        columns: Shape ``(n_points, n_columns)``.
        floor: What every trial uses, SI base units.
        location: Mean of the logarithm, taken off before.
        scale: Deviation of the logarithm, divided by before.
        sites: Standardised observations, censored ones replaced.
        censored: True where a trial was stopped.
        hyperparameters: Of the Gaussian process.
        pruned_peaks_censored: Whether peaks of pruned trials count among the stopped ones.
    """

    columns: np.ndarray
    floor: float
    location: float
    scale: float
    sites: Sites
    censored: np.ndarray
    hyperparameters: Hyperparameters
    pruned_peaks_censored: bool = False
    process: GaussianProcess = field(init=False, repr=False)

    def __post_init__(self) -> None:
        process = GaussianProcess(
            self.columns,
            self.sites.target,
            self.hyperparameters,
            self.sites.extra,
            ~self.censored,
        )
        object.__setattr__(self, "process", process)

    def predict(self, columns: np.ndarray) -> Predictive:
        """Return what is expected at points."""
        mean, variance = self.process.predict(columns)
        spread = self.spread(np.sqrt(variance + self.process.noise))
        return Predictive(
            self.floor, self.location + self.scale * mean, self.scale * spread, self.df
        )

    def draw(self, columns: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        """Return joint draws of amounts at points, shape ``(count, n_points)``.

        The noise is each point's own. What the process does not know is correlated as the process
        is; by how much the spread is wider, because the hyperparameters are not known either, is
        common to all points. Were it each point's own, it would raise every total.
        """
        mean, covariance = self.process.joint(columns)
        noise = self.process.noise
        variance = np.maximum(np.diag(covariance), 1e-12)
        wider = self.spread(np.sqrt(variance + noise)) ** 2 / (variance + noise)
        within, beyond = np.minimum(wider, 1.0), np.maximum(wider - 1.0, 0.0)
        root = _square_root(covariance) * np.sqrt(within)[:, None]
        common, own = np.sqrt(beyond * variance), np.sqrt(within * noise)
        n = len(columns)
        heavy = np.sqrt(self.df / generator.chisquare(self.df, (count, 1)))
        away = generator.standard_normal((count, n)) @ root.T
        away = heavy * (away + generator.standard_normal((count, 1)) * common)
        away += own * generator.standard_normal((count, n))
        logs = self.location + self.scale * (mean + np.clip(away, -_FARTHEST, _FARTHEST))
        return np.asarray(
            np.maximum(self.floor + np.exp(np.minimum(logs, _MAX_DRAWN_EXPONENT)), 0.0)
        )

    @property
    def known(self) -> int:
        """Number of trials that were not stopped."""
        return int(np.sum(~self.censored))

    @property
    def df(self) -> float:
        """Degrees of freedom of the bounds."""
        return float(max(self.known - 2, 2))

    def spread(self, deviation: np.ndarray) -> np.ndarray:
        """Return calibrated deviations of new observations from the model's own.

        The model's own deviation times how far off it was when one was left out, and a share of
        how far off it was on average whatever it said itself.
        """
        flat, ratio, widened = self._calibration
        return np.asarray((flat + ratio * deviation) * widened)

    @cached_property
    def _calibration(self) -> tuple[float, float, float]:
        """A part of the spread, the rest as a multiple of the deviation, a factor on both."""
        residual, own = self._leave_one_out()
        n = max(len(residual), 1)
        if n < 3:
            return 0.0, 1.0, (1 + 1 / n) ** 0.5
        flat = float(np.sqrt(np.mean(residual**2)))
        ratio = max(float(np.sqrt(np.mean((residual / own) ** 2))), _MIN_RATIO)
        widened = (
            _LEAVE_ONE_OUT_BIAS * ((1 + 1 / n) * (1 + _FEW_TRIALS_WIDENING / max(n, _FEW))) ** 0.5
        )
        return _COMMON_SHARE * flat, (1 - _COMMON_SHARE) * ratio, widened

    def _leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        residual, own = self.process.leave_one_out()
        return residual[~self.censored], own[~self.censored]

    def score(self, amounts: np.ndarray) -> float:
        """Return the leave-one-out log density of amounts, of lower bounds their probability.

        Args:
            amounts: What the model was fitted on, SI base units.
        """
        from scipy.special import log_ndtr

        logs = np.log(amounts - self.floor)
        residual, own = self.process.leave_one_out()
        told, held = ~self.censored, self.censored
        r, s = residual[told], own[told]
        density = -0.5 * (r / s) ** 2 - np.log(s * self.scale) - logs[told]
        mean = (self.sites.target - residual)[held]
        variance = own[held] ** 2 - self.sites.extra[held] + self.process.noise
        away = mean - (logs[held] - self.location) / self.scale
        bounded = log_ndtr(away / np.sqrt(np.maximum(variance, 1e-12)))
        return float(np.sum(density) + np.sum(bounded))

    def log_leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Return residual and variance of each point's log amount under all the others."""
        residual, own = self.process.leave_one_out()
        above = np.exp(self.location + self.scale * self.sites.target)
        share = self.scale * above / np.maximum(above + self.floor, 1e-300)
        return residual * share, (own * share) ** 2


def fit_resource(
    columns: np.ndarray,
    amounts: np.ndarray,
    censored: np.ndarray,
    *,
    start: ResourceModel | None = None,
    floors: tuple[float, ...] = FLOORS,
    noise: float = NOISE,
) -> ResourceModel:
    """Return the model of one resource, its floor chosen by leave-one-out density.

    Args:
        columns: Shape ``(n_points, n_columns)``.
        amounts: SI base units, shape ``(n_points,)``.
        censored: True where the amount is a lower bound.
        start: A model of fewer trials to start from.
        floors: Candidates for what every trial uses, as shares of the smallest amount.
        noise: Logarithm of the variance of the noise that is expected, standardised.
    """
    candidates = _candidates(amounts, floors)
    tried: dict[int, ResourceModel] = {}

    def score(index: int) -> float:
        if not 0 <= index < len(candidates):
            return -np.inf
        if index not in tried:
            near = min(tried, key=lambda each: abs(each - index), default=None)
            first = start if near is None else tried[near]
            tried[index] = _fit_with_floor(
                columns, amounts, censored, candidates[index], first, noise=noise
            )
        return tried[index].score(amounts)

    def promising(index: int, best: int) -> bool:
        if not 0 <= index < len(candidates) or index in tried:
            return index in tried
        logs = np.log(amounts - candidates[index])
        screened = _with_logs(tried[best], columns, logs, censored, candidates[index])
        return screened.score(amounts) > tried[best].score(amounts) - _FLOOR_MARGIN

    if start is None or len(start.columns) < _FEW:
        best = max(range(len(candidates)), key=score)
    else:
        best = _climb(score, promising, _nearest(candidates, start.floor))
    return tried[best]


def _nearest(candidates: list[float], floor: float) -> int:
    return min(range(len(candidates)), key=lambda index: abs(candidates[index] - floor))


def _climb(
    score: Callable[[int], float], promising: Callable[[int, int], bool], index: int
) -> int:
    """Return where a score is largest, going by single promising steps from an index."""
    score(index)
    while True:
        beside = [each for each in (index - 1, index + 1) if promising(each, index)]
        best = max((index, *beside), key=score)
        if best == index:
            return index
        index = best


def refresh_resource(
    columns: np.ndarray, amounts: np.ndarray, censored: np.ndarray, model: ResourceModel
) -> ResourceModel | None:
    """Return a model with more trials and the same hyperparameters, None where it can't be.

    It can't where a trial used less than the floor or the columns are others.
    """
    if amounts.min() <= model.floor or columns.shape[1] != model.columns.shape[1]:
        return None
    return _with_logs(model, columns, np.log(amounts - model.floor), censored, model.floor)


def _with_logs(
    model: ResourceModel,
    columns: np.ndarray,
    logs: np.ndarray,
    censored: np.ndarray,
    floor: float,
) -> ResourceModel:
    """Return a model of other logarithms with the same hyperparameters."""
    location, scale = _standard(logs)
    target = (logs - location) / scale
    sites = initial_sites(target, censored)
    sites = propagate(columns, target, censored, model.hyperparameters, sites)
    return replace(
        model,
        columns=columns,
        floor=floor,
        location=location,
        scale=scale,
        sites=sites,
        censored=censored,
    )


def _candidates(amounts: np.ndarray, shares: tuple[float, ...]) -> list[float]:
    smallest = float(amounts.min())
    if smallest <= 0:
        return [-1e-3 * float(amounts.max()) or -1.0]
    return [share * smallest for share in (shares if len(amounts) >= _FEW else (0.0,))]


def _fit_with_floor(
    columns: np.ndarray,
    amounts: np.ndarray,
    censored: np.ndarray,
    floor: float,
    start: ResourceModel | None,
    *,
    noise: float,
) -> ResourceModel:
    logs = np.log(amounts - floor)
    location, scale = _standard(logs)
    target = (logs - location) / scale
    found = Hyperparameters.prior(columns.shape[1], noise)
    if start is not None and start.hyperparameters.values.shape == found.values.shape:
        found = start.hyperparameters
    sites = initial_sites(target, censored)
    sites = propagate(columns, target, censored, found, sites)
    for _ in range(0 if len(amounts) < _FEWEST else 2 if censored.any() else 1):
        found = fit_hyperparameters(
            columns, sites.target, start=found, extra=sites.extra, noisy=~censored, noise=noise
        )
        sites = propagate(columns, target, censored, found, sites)
    return ResourceModel(columns, floor, location, scale, sites, censored, found)


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """Return a matrix whose product with its transpose is the covariance."""
    scale = max(float(np.trace(covariance)) / len(covariance), 1e-12)
    try:
        # A tenth of the time of the eigenvalues.
        return np.linalg.cholesky(covariance + 1e-7 * scale * np.eye(len(covariance)))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def _standard(logs: np.ndarray) -> tuple[float, float]:
    location, n = float(logs.mean()), len(logs)
    squares = float(np.sum((logs - location) ** 2))
    if n < _FEW:
        squares, n = squares + _PRIOR_WEIGHT * _PRIOR_SCALE**2, n + int(_PRIOR_WEIGHT)
    return location, max((squares / n) ** 0.5, _TINY_SCALE)
