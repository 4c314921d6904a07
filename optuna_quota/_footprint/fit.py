"""Fits a model for each resource; wall time may be CPU or GPU time multiplied by a ratio.

Clock time is noisy where a machine is shared, CPU time hardly, and their ratio depends on far
less. So ``log wall = log cpu + log(wall / cpu)``, each part a model of its own, learns from few
trials what a model of clock time alone would need many for. A trial that was stopped bounds its
CPU time from below, and its ratio is still a value. The ratio drifts with the machine's load, see
``drift.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from optuna_quota._footprint.gaussian_process import NOISE
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.resource_model import (
    fit_resource,
    FLOORS,
    Predictive,
    refresh_resource,
    ResourceModel,
)
from optuna_quota._resources import get_resource


_CHAINED = "wall_time"
_BASES = ("cpu_time", "gpu_time")
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

    def predict(self, columns: np.ndarray, base: Predictive | None = None) -> Predictive:
        """Return the predictive distribution at points, given that of the base if known."""
        base = self.base.predict(columns) if base is None else base
        ratio = self.ratio.predict(columns)
        median = np.maximum(base.quantile(0.5), 1e-300)
        # To first order, a change of the part above the floor moves the logarithm by its share.
        share = np.minimum(np.exp(base.center) / median, 1.0)
        spread = np.hypot(share * base.spread, ratio.spread)
        center = np.log(median) + ratio.center
        return Predictive(0.0, center, spread, min(base.df, ratio.df))

    def draw(self, columns: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        """Return joint draws at points, shape ``(count, n_points)``."""
        base = self.base.draw(columns, count, generator)
        return np.asarray(base * self.ratio.draw(columns, count, generator))


Model = ResourceModel | ChainedModel


def leave_one_out_density(model: Model, counted: np.ndarray | None = None) -> float:
    """Return the leave-one-out log density of the logarithms of a model's trials.

    Args:
        model: Of one resource.
        counted: True for the trials that count; by default those that are not lower bounds.
    """
    if isinstance(model, ChainedModel):
        (r0, v0), (r1, v1) = model.base.log_leave_one_out(), model.ratio.log_leave_one_out()
        residual, variance, censored = r0 + r1, v0 + v1, model.base.censored
    else:
        (residual, variance), censored = model.log_leave_one_out(), model.censored
    counted = ~censored if counted is None else counted
    residual, variance = residual[counted], np.maximum(variance[counted], 1e-12)
    return float(-0.5 * np.sum(residual**2 / variance + np.log(variance)))


def fit_resource_models(
    columns: np.ndarray,
    observations: Sequence[Observation],
    start: Mapping[str, Model],
    refit: bool,
) -> dict[str, Model]:
    """Return the model of each resource that was measured in any trial.

    Args:
        columns: Shape ``(n_trials, n_columns)``.
        observations: One a trial.
        start: Models of fewer trials to start from, over the same columns.
        refit: False to keep their hyperparameters where possible.
    """
    names = sorted({name for each in observations for name in each.usage.amounts()})
    data = {name: _ResourceData.of(name, columns, observations) for name in names}
    models: dict[str, Model] = {
        name: part.fit(start.get(name), refit) for name, part in data.items() if name != _CHAINED
    }
    if _CHAINED in data:
        models[_CHAINED] = _fit_chained(data, models, start.get(_CHAINED), refit)
    return dict(sorted(models.items()))


class _ResourceData:
    """The trials in which one resource was measured.

    Args:
        columns: Shape ``(n_trials, n_columns)``.
        amounts: SI base units, shape ``(n_trials,)``; NaN where unknown.
        censored: True where the amount is a lower bound.
        partial: True where it was used at an unknown share of the trial's run.
        maybe_censored: True where it is a peak that a stopped trial may not have reached.
        floors: Candidate floors, as shares of the smallest amount.
        noise: Logarithm of the expected variance of the noise.
        drifts: Whether the machine's speed changes the resource from trial to trial.
    """

    def __init__(
        self,
        columns: np.ndarray,
        amounts: np.ndarray,
        censored: np.ndarray,
        partial: np.ndarray,
        maybe_censored: np.ndarray,
        *,
        floors: tuple[float, ...],
        noise: float,
        drifts: bool,
    ) -> None:
        self.known = np.isfinite(amounts)
        self.columns = columns[self.known]
        self.amounts = amounts[self.known]
        self.censored = censored[self.known]
        self.partial = partial[self.known]
        self.maybe_censored = maybe_censored[self.known]
        self.floors = floors
        self.noise = noise
        self.drifts = drifts

    @classmethod
    def of(
        cls, name: str, columns: np.ndarray, observations: Sequence[Observation]
    ) -> _ResourceData:
        amounts = [each.usage.get(name) for each in observations]
        noise = NOISE
        if name == _CHAINED:
            noise = _RATIO_NOISE
        elif get_resource(name).peak:
            noise = _PEAK_NOISE
        return cls(
            columns,
            np.array([np.nan if amount is None else amount for amount in amounts]),
            np.array([name in each.censored | each.partial for each in observations]),
            np.array([name in each.partial for each in observations]),
            np.array([name in each.maybe_censored for each in observations]),
            floors=_NO_FLOOR if name == _CHAINED else FLOORS,
            noise=noise,
            drifts=not get_resource(name).peak,
        )

    def fit(self, start: Model | None, refit: bool) -> ResourceModel:
        """Return the model; a refit decides whether peaks of stopped trials are values."""
        earlier = start if isinstance(start, ResourceModel) else None
        observed = ~(self.censored | self.maybe_censored)
        if not self.maybe_censored.any() or np.sum(observed) < _MIN_TRIALS_TO_DECIDE:
            return self._fit(earlier, refit)
        bounds = self._with_bounded_peaks()
        if earlier is not None and not refit:
            held = earlier.stopped_peaks_censored
            model = (bounds if held else self)._fit(earlier, refit)
            return replace(model, stopped_peaks_censored=held)
        values = self._fit(earlier, refit)
        bounded = bounds._fit(values, refit)
        # The better one predicts the trials that ran to their end better.
        if leave_one_out_density(bounded, observed) > leave_one_out_density(values, observed):
            return replace(bounded, stopped_peaks_censored=True)
        return values

    def _with_bounded_peaks(self) -> _ResourceData:
        """Return the trials with the peaks of stopped trials as lower bounds."""
        return _ResourceData(
            self.columns,
            self.amounts,
            self.censored | self.maybe_censored,
            self.partial,
            self.maybe_censored,
            floors=self.floors,
            noise=self.noise,
            drifts=self.drifts,
        )

    def _fit(self, earlier: ResourceModel | None, refit: bool) -> ResourceModel:
        if earlier is not None and not refit:
            fresh = refresh_resource(
                self.columns, self.amounts, self.censored, self.partial, earlier
            )
            if fresh is not None:
                return fresh
        return fit_resource(
            self.columns,
            self.amounts,
            self.censored,
            self.partial,
            start=earlier,
            floors=self.floors,
            noise=self.noise,
            drifts=self.drifts,
        )

    def over(self, base: _ResourceData) -> _ResourceData | None:
        """Return the ratio to a base, None unless both were measured of the same trials."""
        if not np.array_equal(self.known, base.known) or base.amounts.min() <= 0:
            return None
        if not np.array_equal(self.censored, base.censored) or self.amounts.min() <= 0:
            return None
        # Both were stopped at the same moment: the ratio is a value, not a bound.
        none = np.zeros(len(self.amounts), dtype=bool)
        ratios = self.amounts / base.amounts
        return _ResourceData(
            self.columns,
            ratios,
            none,
            none,
            none,
            floors=_NO_FLOOR,
            noise=_RATIO_NOISE,
            drifts=True,
        )


def _fit_chained(
    data: Mapping[str, _ResourceData],
    models: Mapping[str, Model],
    start: Model | None,
    refit: bool,
) -> Model:
    """Return the likeliest model of clock time: by itself, or as a multiple of another time."""
    own = data[_CHAINED]
    ratios: dict[str, tuple[ResourceModel, _ResourceData]] = {}
    for name in _BASES:
        base, ratio = models.get(name), own.over(data[name]) if name in data else None
        if ratio is not None and isinstance(base, ResourceModel):
            ratios[name] = base, ratio
    earlier = start.ratio if isinstance(start, ChainedModel) else None
    if isinstance(start, ChainedModel) and not refit and start.on in ratios:
        base, ratio = ratios[start.on]
        return ChainedModel(start.on, base, ratio.fit(earlier, refit))
    direct = own.fit(start, refit)
    best: Model = direct
    observed = ~own.censored
    if np.sum(observed) < _MIN_TRIALS_TO_CHAIN or (start is not None and not refit):
        return best
    density = leave_one_out_density(direct, observed) - _CHAIN_MARGIN
    for name, (base, ratio) in ratios.items():
        model = ChainedModel(name, base, ratio.fit(earlier, refit))
        found = leave_one_out_density(model, observed)
        if found > density:
            best, density = model, found
    return best
