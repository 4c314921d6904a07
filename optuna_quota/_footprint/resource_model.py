"""The footprint of one resource: a warped Gaussian process with calibrated bounds.

The process of a time sees the trials' memory as one more column, which repeats itself and shows
what several parameters make up, such as the size of data; at new points it sees what is expected
of it, to first order with its uncertainty (Perdikaris et al., Nonlinear information fusion
algorithms for data-efficient multi-fidelity modelling, Proc. Royal Society A 473, 2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from optuna_quota._footprint import gaussian_process as gp
from optuna_quota._footprint.numerics import product, square_root
from optuna_quota._footprint.predictive import Predictive


# Candidate floors, as shares of the smallest amount. Closer to 1, small differences between the
# cheapest trials would become large differences of the logarithm.
FLOORS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
# Search the hyperparameters of a floor if its log density with those of the best floor so far
# comes this close to the best.
_FLOOR_MARGIN = 3.0
# Leave-one-out errors are slightly too small, as the hyperparameters were fitted to all trials.
# This factor, the two below and _FEW_TRIALS_WIDENING were chosen with each of fourteen workloads
# left out in turn (benchmarks/footprint_constants.py).
_LEAVE_ONE_OUT_BIAS = 1.1
# Weight of the residuals' overall size in the spread, against the model's deviation at a point.
_COMMON_SHARE = 0.2
# Lower bound of the ratio of residuals to the model's own deviations: less is chance.
_MIN_RATIO = 0.8
# With fewer trials, the spread is wider, as the hyperparameters are less certain.
_FEW_TRIALS_WIDENING = 8.0
# Prior deviation of the logarithm of a resource, with the weight of two trials.
_PRIOR_SCALE = 0.8
_PRIOR_WEIGHT = 2.0
_MIN_SCALE = 0.02
# Below _FEW trials there is no floor, below _FEWEST no search of hyperparameters.
_FEW = 8
_FEWEST = 4
# Draws are clipped to this many deviations of the target, so that no draw dominates a sum. From
# ten trials on it hardly matters (2 to 20 give the same); after five, intervals with 2 would hold
# too rarely, and with 6 be twice as wide for the same median.
_MAX_DRAWN_DEVIATION = 3.0
_MAX_DRAWN_EXPONENT = 300.0


@dataclass(frozen=True)
class ResourceData:
    """The trials in which one resource was measured, and prior knowledge about it.

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
        slopes: Expected effect of each column, in deviations of the logarithm; None for none.
        peak: Model of a peak of the same trials, which is one more column; None for none.
    """

    columns: np.ndarray
    amounts: np.ndarray
    censored: np.ndarray
    partial: np.ndarray
    floors: tuple[float, ...] = FLOORS
    noise: float = gp.NOISE
    drifts: bool = False
    bounded_peaks: bool = False
    slopes: np.ndarray | None = None
    peak: ResourceModel | None = None

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
        location: Mean of the logarithm; the process is fitted to what remains over ``scale``,
            beyond the expected slopes.
        scale: Standard deviation of the logarithm.
        inputs: The columns, with that of the peak.
        sites: Standardised observations, censored ones replaced.
    """

    def __init__(
        self,
        data: ResourceData,
        floor: float,
        hyperparameters: np.ndarray,
        lateness: float,
        start: gp.Sites | None = None,
    ) -> None:
        self.data, self.floor = data, floor
        self.hyperparameters, self.lateness = hyperparameters, lateness
        logs = np.log(data.amounts - floor)
        self.location, self.scale = _standard(logs)
        peak = data.peak
        self.inputs = data.columns if peak is None else _beside(data.columns, peak.levels)
        target = (logs - self.location) / self.scale - self.trend(data.columns)
        self._target = target
        self.sites = gp.propagate(
            self.inputs,
            target,
            data.censored,
            self.scale * gp.stop_rates(logs, data.censored, data.partial, lateness),
            hyperparameters,
            gp.initial_sites(target, data.censored) if start is None else start,
        )

    @cached_property
    def process(self) -> gp.GaussianProcess:
        """The Gaussian process of the standardised logarithm."""
        return gp.GaussianProcess(
            self.inputs,
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
        inputs, reach = columns, np.zeros(len(columns))
        if self.data.peak is not None:
            peak = self.data.peak.process
            level, unknown = peak.predict(columns)
            reach = self._reach(columns, level, np.sqrt(unknown + peak.noise))
            inputs = _beside(columns, level)
        mean, variance = self.process.predict(inputs)
        spread = self.spread(np.sqrt(variance + reach**2 + self.process.noise))
        center = self.location + self.scale * (mean + self.trend(columns))
        return Predictive(self.floor, center, self.scale * spread, self.df)

    def joint(self, columns: np.ndarray, ahead: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and covariance at points, as :meth:`GaussianProcess.joint` does."""
        if self.data.peak is None:
            mean, covariance = self.process.joint(columns, ahead)
        else:
            peak = self.data.peak.process
            level, unknown = peak.joint(columns)
            unknown.ravel()[:: len(columns) + 1] += peak.noise
            deviation = np.sqrt(np.diag(unknown))
            mean, covariance = self.process.joint(_beside(columns, level), ahead)
            slope = self._reach(columns, level, deviation) / deviation
            covariance = covariance + slope[:, None] * unknown * slope
        return mean + self.trend(columns), covariance

    def _reach(self, columns: np.ndarray, level: np.ndarray, deviation: np.ndarray) -> np.ndarray:
        """Return the effect of a deviation of the peak on the process at points."""
        ends = [_beside(columns, each) for each in (level + deviation, level - deviation)]
        above, below = (self.process.predict(each)[0] for each in ends)
        return np.asarray((above - below) / 2)

    @property
    def levels(self) -> np.ndarray:
        """Standardised logarithms of the trials' amounts, expected ones for lower bounds."""
        return np.where(self.censored, self.process.posterior()[0], self.sites.target)

    @property
    def is_predictable(self) -> bool:
        """Whether the columns explain more of the amounts than they leave unexplained."""
        known = ~self.censored
        residual, target = self.process.leave_one_out()[0][known], self.sites.target[known]
        return float(np.sum(residual**2)) < 0.5 * float(np.sum(target**2))

    def trend(self, columns: np.ndarray) -> np.ndarray:
        """Return the contribution of the expected slopes at points."""
        slopes = self.data.slopes
        return np.zeros(len(columns)) if slopes is None else np.asarray(columns @ slopes)

    def draw(
        self, columns: np.ndarray, count: int, generator: np.random.Generator, ahead: int = 1
    ) -> np.ndarray:
        """Return joint draws of amounts at points, shape ``(count, n_points)``.

        The noise is independent at each point. The uncertainty of the process is correlated as
        the process is, and the widening of the spread beyond it, for uncertain hyperparameters, is
        common to all points. Independent at each point, it would raise every total. The machine's
        level is its mean over the trials ``ahead``, and how it departs from that is noise.
        """
        mean, covariance = self.joint(columns, ahead)
        noise = self.process.noise + self.process.drift * (1 - gp.mean_nearness(ahead)[1])
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
        away = np.clip(away, -_MAX_DRAWN_DEVIATION, _MAX_DRAWN_DEVIATION)
        logs = self.location + self.scale * (mean + away)
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
        residual, own = (part[~self.censored] for part in self.leave_one_out())
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
        away = mean - self._target[held]
        spread = np.sqrt(np.maximum(variance, 1e-12))
        rate = gp.stop_rates(logs, held, self.data.partial, self.lateness)[held]
        r = self.scale * rate
        bounded = log_ndtr(away / spread - r * spread)
        # In units of the amount, as the others; see `gaussian_process.py`.
        own_part = np.log(np.maximum(rate, 1e-300)) - logs[held]
        shares = np.where(rate > 0, own_part - r * away + 0.5 * (r * spread) ** 2, 0.0)
        return float(np.sum(density) + np.sum(bounded) + np.sum(shares))

    def leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Return residual and deviation of each trial, its peak too, under all the others."""
        residual, own = self.process.leave_one_out()
        if self.data.peak is None:
            return residual, own
        missed, deviation = self.data.peak.leave_one_out()
        reach = self._reach(self.data.columns, self.data.peak.levels, deviation)
        return residual + missed * reach / deviation, np.hypot(own, reach)

    def log_leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Return leave-one-out residual and variance of the logarithm of each amount."""
        residual, own = self.leave_one_out()
        above = np.exp(
            self.location + self.scale * (self.sites.target + self.trend(self.data.columns))
        )
        share = self.scale * above / np.maximum(above + self.floor, 1e-300)
        # If all amounts are zero, the share of a negative floor is meaningless.
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
    n_inputs = data.columns.shape[1] + (data.peak is not None)
    if data.amounts.min() <= model.floor or n_inputs != model.inputs.shape[1]:
        return None
    return ResourceModel(data, model.floor, model.hyperparameters, model.lateness)


def _beside(columns: np.ndarray, levels: np.ndarray) -> np.ndarray:
    # As wide as other columns.
    return np.column_stack([columns, levels / 3**0.5])


def _candidates(amounts: np.ndarray, shares: tuple[float, ...]) -> list[float]:
    smallest = float(amounts.min())
    if smallest <= 0:
        return [-1e-3 * float(amounts.max()) or -1.0]
    return [share * smallest for share in (shares if len(amounts) >= _FEW else (0.0,))]


def _fit_lateness(model: ResourceModel) -> ResourceModel:
    data = model.data
    if not data.partial.any():
        return model
    screened = [
        ResourceModel(data, model.floor, model.hyperparameters, each) for each in gp.LATENESS
    ]
    best = max((model, *screened), key=lambda each: each.score)
    return model if best.lateness == model.lateness else _fit_with_floor(data, model.floor, best)


def _fit_with_floor(
    data: ResourceData, floor: float, start: ResourceModel | None
) -> ResourceModel:
    n_inputs = data.columns.shape[1] + (data.peak is not None)
    found = gp.prior_mean(n_inputs, data.noise, data.drifts)
    if start is not None and start.hyperparameters.shape == found.shape:
        found = start.hyperparameters
    model = ResourceModel(data, floor, found, 1.0 if start is None else start.lateness)
    is_exact = not data.censored.any()
    for _ in range(0 if len(data.amounts) < _FEWEST else 1 if is_exact else 2):
        found = gp.fit_hyperparameters(
            model.inputs,
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
