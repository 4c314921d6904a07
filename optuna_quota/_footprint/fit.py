"""Fits a model for each resource; wall time may be CPU or GPU time multiplied by a ratio.

Clock time is noisy on a shared machine, CPU time hardly, and their ratio depends on few
hyperparameters. So ``log wall = log cpu + log(wall / cpu)``, with a model for each part, needs
fewer trials than a model of clock time alone. If a trial was stopped, its CPU time is a lower
bound, but its ratio is a value. Times drift with the machine's load, see ``gaussian_process.py``,
and are learned beside memory, see ``resource_model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from optuna_quota._footprint.gaussian_process import NOISE
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.predictive import Predictive
from optuna_quota._footprint.resource_model import (
    fit_resource,
    FLOORS,
    refresh_resource,
    ResourceData,
    ResourceModel,
)
from optuna_quota._resources import get_resource


_CHAINED = "wall_time"
_BASES = ("cpu_time", "gpu_time")
# Times are learned together with this peak; the ratio of two times does not gain by it.
_PEAK = "memory"
_MIN_TRIALS_TO_CHAIN = 6
_MIN_TRIALS_TO_DECIDE = 4
# Leave-one-out densities of few trials are noisy: prefer a chain unless it is clearly worse.
_CHAIN_MARGIN = 3.0
# The expected noise before any trial, as the logarithm of its variance in units of the resource's
# own: peaks repeat themselves, and the ratio of clock time to another time is mostly noise. Chosen
# with each of fourteen workloads left out in turn (benchmarks/footprint_constants.py); less noise
# yet would be likelier, but bounds would not hold.
_PEAK_NOISE = -3.5
_RATIO_NOISE = -1.0
# Trials without correlation that a correlation is estimated with.
_UNCORRELATED = 4.0
# Clock time is too noisy to tell a floor from a short trial.
_NO_FLOOR = (0.0,)


@dataclass(frozen=True)
class ChainedModel:
    """A resource as a base resource times a ratio.

    Attributes:
        on: The base resource.
        base: The model of the base resource.
        ratio: The model of amount over base amount.
    """

    on: str
    base: ResourceModel
    ratio: ResourceModel

    def predict(self, columns: np.ndarray, base: Predictive) -> Predictive:
        """Return the predictive distribution at points, given that of the base."""
        ratio = self.ratio.predict(columns)
        median = np.maximum(base.quantile(0.5), 1e-300)
        # To first order, a change of the part above the floor moves the logarithm by its share.
        share = np.minimum(np.exp(base.center) / median, 1.0)
        own = share * base.spread
        spread = np.sqrt(own**2 + ratio.spread**2 + 2 * self.correlation * own * ratio.spread)
        center = np.log(median) + ratio.center
        return Predictive(0.0, center, spread, min(base.df, ratio.df))

    @property
    def censored(self) -> np.ndarray:
        """True where a trial's usage of the base resource is a lower bound."""
        return self.base.censored

    @cached_property
    def correlation(self) -> float:
        """Correlation of the residuals of base and ratio: a busy machine may raise both."""
        base, ratio = (
            (residual / deviation)[~self.censored]
            for residual, deviation in (self.base.leave_one_out(), self.ratio.leave_one_out())
        )
        certain = len(base) / (len(base) + _UNCORRELATED)
        size = float(np.sum(base**2) * np.sum(ratio**2)) ** 0.5
        return float(certain * np.sum(base * ratio) / max(size, 1e-12))

    def log_leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        base, ratio = self.base.log_leave_one_out(), self.ratio.log_leave_one_out()
        both = 2 * self.correlation * np.sqrt(base[1]) * np.sqrt(ratio[1])
        return base[0] + ratio[0], base[1] + ratio[1] + both

    def draw(
        self, columns: np.ndarray, count: int, generator: np.random.Generator, ahead: int = 1
    ) -> np.ndarray:
        # Independently: intervals of totals hold often enough without the correlation.
        base = self.base.draw(columns, count, generator, ahead)
        return np.asarray(base * self.ratio.draw(columns, count, generator, ahead))


Model = ResourceModel | ChainedModel


def leave_one_out_density(model: Model, counted: np.ndarray | None = None) -> float:
    """Return the leave-one-out log density of the logarithms of a model's trials.

    Over the ``counted`` trials; by default those that are not lower bounds.
    """
    residual, variance = model.log_leave_one_out()
    counted = ~model.censored if counted is None else counted
    residual, variance = residual[counted], np.maximum(variance[counted], 1e-12)
    return float(-0.5 * np.sum(residual**2 / variance + np.log(variance)))


def fit_resource_models(
    columns: np.ndarray,
    observations: Sequence[Observation],
    start: Mapping[str, Model],
    refit: bool,
    slopes: np.ndarray,
) -> dict[str, Model]:
    """Return the model of each resource that was measured in any trial.

    Args:
        columns: Shape ``(n_trials, n_columns)``.
        observations: One a trial.
        start: Models of fewer trials to start from, over the same columns.
        refit: False to keep their hyperparameters where possible.
        slopes: Expected effect of each column on a time, in deviations of its logarithm.
    """
    names = sorted({name for each in observations for name in each.usage.amounts()})
    measured = {name: _Measured.of(name, columns, observations, slopes) for name in names}
    models: dict[str, Model] = {}
    if _PEAK in measured:
        models[_PEAK] = peak = measured[_PEAK].fit(start.get(_PEAK), refit)
        if peak.is_predictable:
            measured = {n: each.beside(measured[_PEAK], peak) for n, each in measured.items()}
    models |= {
        name: each.fit(start.get(name), refit)
        for name, each in measured.items()
        if name not in (_PEAK, _CHAINED)
    }
    if _CHAINED in measured:
        models[_CHAINED] = _fit_chained(measured, models, start.get(_CHAINED), refit)
    return dict(sorted(models.items()))


@dataclass(frozen=True)
class _Measured:
    """One resource of the trials that it was measured in.

    Attributes:
        known: True for these trials, of all.
        maybe_censored: True where it is a peak that a stopped trial may not have reached.
        data: What the models are fitted to.
    """

    known: np.ndarray
    maybe_censored: np.ndarray
    data: ResourceData

    @classmethod
    def of(
        cls,
        name: str,
        columns: np.ndarray,
        observations: Sequence[Observation],
        slopes: np.ndarray,
    ) -> _Measured:
        known = np.array([each.usage.get(name) is not None for each in observations])
        rows = [each for each, is_known in zip(observations, known, strict=True) if is_known]
        is_peak = get_resource(name).peak
        data = ResourceData(
            columns[known],
            np.array([each.usage.get(name) for each in rows], dtype=float),
            np.array([name in each.censored | each.partial for each in rows]),
            np.array([name in each.partial for each in rows]),
            floors=_NO_FLOOR if name == _CHAINED else FLOORS,
            noise=_RATIO_NOISE if name == _CHAINED else _PEAK_NOISE if is_peak else NOISE,
            drifts=not is_peak,
            # Peaks did not gain by them.
            slopes=None if is_peak or rows[0].is_ratio else slopes,
        )
        return cls(known, np.array([name in each.maybe_censored for each in rows]), data)

    def beside(self, other: _Measured, peak: ResourceModel) -> _Measured:
        """Return a time with the peak as one more column, if it is known for all trials."""
        is_time = self.data.slopes is not None
        if not is_time or not np.array_equal(self.known, other.known):
            return self
        return replace(self, data=replace(self.data, peak=peak))

    def fit(self, start: Model | None, refit: bool) -> ResourceModel:
        """Return the model; a refit decides whether peaks of stopped trials are values."""
        earlier = start if isinstance(start, ResourceModel) else None
        data, observed = self.data, ~(self.data.censored | self.maybe_censored)
        if not self.maybe_censored.any() or np.sum(observed) < _MIN_TRIALS_TO_DECIDE:
            return fit_or_refresh(data, earlier, refit)
        bounds = replace(data, censored=~observed, bounded_peaks=True)
        if earlier is not None and not refit:
            return fit_or_refresh(bounds if earlier.data.bounded_peaks else data, earlier, refit)
        values = fit_or_refresh(data, earlier, refit)
        bounded = fit_or_refresh(bounds, values, refit)
        # The better one is that which predicts completed trials better.
        if leave_one_out_density(bounded, observed) > leave_one_out_density(values, observed):
            return bounded
        return values

    def over(self, base: _Measured) -> ResourceData | None:
        """Return the ratio to a base, None unless both were measured in the same trials."""
        own, other = self.data, base.data
        if not np.array_equal(self.known, base.known) or other.amounts.min() <= 0:
            return None
        if not np.array_equal(own.censored, other.censored) or own.amounts.min() <= 0:
            return None
        # Both were stopped at the same moment: the ratio is a value, not a bound.
        return ResourceData.exact(
            own.columns,
            own.amounts / other.amounts,
            floors=_NO_FLOOR,
            noise=_RATIO_NOISE,
            drifts=True,
        )


def fit_or_refresh(
    data: ResourceData, earlier: ResourceModel | None, refit: bool
) -> ResourceModel:
    """Return a model; unless ``refit``, with the hyperparameters of an earlier one if they fit."""
    fresh = None if earlier is None or refit else refresh_resource(data, earlier)
    return fit_resource(data, earlier) if fresh is None else fresh


def _fit_chained(
    measured: Mapping[str, _Measured],
    models: Mapping[str, Model],
    start: Model | None,
    refit: bool,
) -> Model:
    """Return the likeliest model of clock time: by itself, or as a multiple of another time."""
    own = measured[_CHAINED]
    ratios: dict[str, tuple[ResourceModel, ResourceData]] = {}
    for name in _BASES:
        base, ratio = models.get(name), own.over(measured[name]) if name in measured else None
        if ratio is not None and isinstance(base, ResourceModel):
            ratios[name] = base, ratio
    earlier = start.ratio if isinstance(start, ChainedModel) else None
    if isinstance(start, ChainedModel) and not refit and start.on in ratios:
        base, ratio = ratios[start.on]
        return ChainedModel(start.on, base, fit_or_refresh(ratio, earlier, refit))
    best: Model = own.fit(start, refit)
    observed = ~own.data.censored
    if np.sum(observed) < _MIN_TRIALS_TO_CHAIN or (start is not None and not refit):
        return best
    density = leave_one_out_density(best, observed) - _CHAIN_MARGIN
    for name, (base, ratio) in ratios.items():
        model = ChainedModel(name, base, fit_or_refresh(ratio, earlier, refit))
        found = leave_one_out_density(model, observed)
        if found > density:
            best, density = model, found
    return best
