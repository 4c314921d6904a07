"""Clock time as CPU or GPU time by how fast that goes.

Clock time is noisy where a machine is shared, CPU time hardly, and their ratio depends on far
less. So ``log wall = log cpu + log(wall / cpu)``, each part a model of its own, learns from few
trials what a model of clock time alone would need many for. A trial that was stopped bounds its
CPU time, and still tells the ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace

import numpy as np

from optuna_quota._footprint.gaussian_process import NOISE
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.resource_model import fit_resource
from optuna_quota._footprint.resource_model import FLOORS
from optuna_quota._footprint.resource_model import Predictive
from optuna_quota._footprint.resource_model import refresh_resource
from optuna_quota._footprint.resource_model import ResourceModel
from optuna_quota._resources import get_resource


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
        """Return what is expected at points, given what is of the base resource if known."""
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


def chain_density(base: ResourceModel, ratio: ResourceModel, told: np.ndarray) -> float:
    """Return the leave-one-out log density of the logarithms of chained amounts.

    Args:
        base: The model of the base resource, on the same points as ``ratio``.
        ratio: The model of the ratio.
        told: True for the points that count.
    """
    (r0, v0), (r1, v1) = base.log_leave_one_out(), ratio.log_leave_one_out()
    return _density((r0 + r1)[told], (v0 + v1)[told])


def direct_density(model: ResourceModel, told: np.ndarray) -> float:
    """Return the same of a model that takes the resource by itself."""
    residual, variance = model.log_leave_one_out()
    return _density(residual[told], variance[told])


def _density(residual: np.ndarray, variance: np.ndarray) -> float:
    variance = np.maximum(variance, 1e-12)
    return float(-0.5 * np.sum(residual**2 / variance + np.log(variance)))


Model = ResourceModel | ChainedModel

NOISY = "wall_time"
# What clock time may be a multiple of.
_BASES = ("cpu_time", "gpu_time")
_FEWEST_TO_CHAIN = 6
_FEWEST_TO_DECIDE = 4
# Leave-one-out densities of few trials are noisy; a chain must be clearly worse to be passed over.
_CHAIN_BONUS = -3.0
# What is expected of the noise before any trial told of it, as the logarithm of its variance, in
# units of the resource's own: peaks repeat themselves, and how far clock time is from another time
# is noise for the most part. Chosen with each of six workloads left out in turn
# (benchmarks/footprint_constants.py); quieter still would be likelier, but bounds would not hold.
_PEAK_NOISE = -3.5
_RATIO_NOISE = -1.0
# Clock time is too noisy to tell a floor from a short trial.
_NO_FLOOR = (0.0,)


def fit_models(
    columns: np.ndarray,
    rows: Sequence[Observation],
    start: Mapping[str, Model],
    refit: bool,
) -> dict[str, Model]:
    """Return the model of each resource that any row knows.

    Args:
        columns: Shape ``(n_rows, n_columns)``.
        rows: What was measured.
        start: Models of fewer trials to start from, over the same columns.
        refit: False to keep their hyperparameters where that can be.
    """
    names = sorted({name for row in rows for name in row.usage.amounts()})
    data = {name: _Column.of(name, columns, rows) for name in names}
    models: dict[str, Model] = {
        name: part.fit(start.get(name), refit) for name, part in data.items() if name != NOISY
    }
    if NOISY in data:
        models[NOISY] = _fit_noisy(data, models, start.get(NOISY), refit)
    return dict(sorted(models.items()))


class _Column:
    """What rows say of one resource."""

    def __init__(
        self,
        columns: np.ndarray,
        amounts: np.ndarray,
        censored: np.ndarray,
        maybe_censored: np.ndarray,
        *,
        noisy: bool,
        noise: float,
    ) -> None:
        self.known = np.isfinite(amounts)
        self.columns = columns[self.known]
        self.amounts = amounts[self.known]
        self.censored = censored[self.known]
        self.maybe_censored = maybe_censored[self.known]
        self.noisy = noisy
        self.noise = noise

    @classmethod
    def of(cls, name: str, columns: np.ndarray, rows: Sequence[Observation]) -> _Column:
        amounts = [row.usage.get(name) for row in rows]
        plain = np.array([np.nan if amount is None else amount for amount in amounts])
        censored = np.array([name in row.censored for row in rows])
        maybe = np.array([name in row.maybe_censored for row in rows])
        noise = (
            _RATIO_NOISE if name == NOISY else _PEAK_NOISE if get_resource(name).peak else NOISE
        )
        return cls(columns, plain, censored, maybe, noisy=name == NOISY, noise=noise)

    def fit(self, start: Model | None, refit: bool) -> ResourceModel:
        """Return the model; a refit decides whether peaks of pruned trials are values."""
        earlier = start if isinstance(start, ResourceModel) else None
        told = ~(self.censored | self.maybe_censored)
        if not self.maybe_censored.any() or np.sum(told) < _FEWEST_TO_DECIDE:
            return self._fit(self.censored, earlier, refit)
        if earlier is not None and not refit:
            model = self._fit(self._held(earlier.pruned_peaks_censored), earlier, refit)
            return replace(model, pruned_peaks_censored=earlier.pruned_peaks_censored)
        values = self._fit(self.censored, earlier, refit)
        bounds = replace(self._fit(self._held(True), values, refit), pruned_peaks_censored=True)
        # Right is what foretells the others better: the trials that ran to their end.
        better = direct_density(bounds, told) > direct_density(values, told)
        return bounds if better else values

    def _held(self, pruned_peaks_censored: bool) -> np.ndarray:
        return (
            np.asarray(self.censored | self.maybe_censored)
            if pruned_peaks_censored
            else self.censored
        )

    def _fit(
        self, censored: np.ndarray, earlier: ResourceModel | None, refit: bool
    ) -> ResourceModel:
        if earlier is not None and not refit:
            fresh = refresh_resource(self.columns, self.amounts, censored, earlier)
            if fresh is not None:
                return fresh
        return fit_resource(
            self.columns,
            self.amounts,
            censored,
            start=earlier,
            floors=_NO_FLOOR if self.noisy else FLOORS,
            noise=self.noise,
        )

    def over(self, base: _Column) -> _Column | None:
        """Return the ratio to a base, None unless both were measured of the same trials."""
        if not np.array_equal(self.known, base.known) or base.amounts.min() <= 0:
            return None
        if not np.array_equal(self.censored, base.censored) or self.amounts.min() <= 0:
            return None
        # Both stopped at the same moment: the ratio is a value, not a bound.
        none = np.zeros(len(self.amounts), dtype=bool)
        return _Column(
            self.columns, self.amounts / base.amounts, none, none, noisy=True, noise=_RATIO_NOISE
        )


def _fit_noisy(
    data: Mapping[str, _Column], models: Mapping[str, Model], start: Model | None, refit: bool
) -> Model:
    """Return the likeliest of clock time by itself and as a multiple of another time."""
    own = data[NOISY]
    if isinstance(start, ChainedModel) and not refit:
        for name in _BASES:
            base, ratio = models.get(name), own.over(data[name]) if name in data else None
            if ratio is not None and isinstance(base, ResourceModel) and start.on == name:
                return ChainedModel(name, base, ratio.fit(start.ratio, refit))
    direct = own.fit(start, refit)
    best: Model = direct
    told = ~own.censored
    if np.sum(told) < _FEWEST_TO_CHAIN or (start is not None and not refit):
        return best
    density = direct_density(direct, told) + _CHAIN_BONUS
    for name in _BASES:
        base = models.get(name)
        ratio = own.over(data[name]) if name in data else None
        if ratio is None or not isinstance(base, ResourceModel):
            continue
        earlier = start.ratio if isinstance(start, ChainedModel) else None
        model = ratio.fit(earlier, refit)
        found = chain_density(base, model, told)
        if found > density:
            best, density = ChainedModel(name, base, model), found
    return best
