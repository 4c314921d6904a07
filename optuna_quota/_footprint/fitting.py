"""One model a resource, from rows."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from optuna_quota._footprint.chained_model import chain_density
from optuna_quota._footprint.chained_model import ChainedModel
from optuna_quota._footprint.chained_model import direct_density
from optuna_quota._footprint.gaussian_process import NOISE
from optuna_quota._footprint.resource_model import fit_resource
from optuna_quota._footprint.resource_model import FLOORS
from optuna_quota._footprint.resource_model import refresh_resource
from optuna_quota._footprint.resource_model import ResourceModel
from optuna_quota._footprint.rows import FootprintRow
from optuna_quota._resources import get_resource


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
_QUIET = -3.5
_LOUD = -1.0
# Clock time is too noisy to tell a floor from a short trial.
_NO_FLOOR = (0.0,)


def fit_models(
    columns: np.ndarray,
    rows: Sequence[FootprintRow],
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
        unsure: np.ndarray,
        *,
        noisy: bool,
        noise: float,
    ) -> None:
        self.known = np.isfinite(amounts)
        self.columns = columns[self.known]
        self.amounts = amounts[self.known]
        self.censored = censored[self.known]
        self.unsure = unsure[self.known]
        self.noisy = noisy
        self.noise = noise

    @classmethod
    def of(cls, name: str, columns: np.ndarray, rows: Sequence[FootprintRow]) -> _Column:
        amounts = [row.usage.get(name) for row in rows]
        plain = np.array([np.nan if amount is None else amount for amount in amounts])
        censored = np.array([name in row.censored for row in rows])
        unsure = np.array([name in row.unsure for row in rows])
        noise = _LOUD if name == NOISY else _QUIET if get_resource(name).peak else NOISE
        return cls(columns, plain, censored, unsure, noisy=name == NOISY, noise=noise)

    def fit(self, start: Model | None, refit: bool) -> ResourceModel:
        """Return the model; whether what is unsure are values or bounds is decided at refits."""
        earlier = start if isinstance(start, ResourceModel) else None
        told = ~(self.censored | self.unsure)
        if not self.unsure.any() or np.sum(told) < _FEWEST_TO_DECIDE:
            return self._fit(self.censored, earlier, refit)
        if earlier is not None and not refit:
            model = self._fit(self._held(earlier.unsure_held), earlier, refit)
            return replace(model, unsure_held=earlier.unsure_held)
        values = self._fit(self.censored, earlier, refit)
        bounds = replace(self._fit(self._held(True), values, refit), unsure_held=True)
        # Right is what foretells the others better: the trials that ran to their end.
        better = direct_density(bounds, told) > direct_density(values, told)
        return bounds if better else values

    def _held(self, unsure_held: bool) -> np.ndarray:
        return np.asarray(self.censored | self.unsure) if unsure_held else self.censored

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
            self.columns, self.amounts / base.amounts, none, none, noisy=True, noise=_LOUD
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
