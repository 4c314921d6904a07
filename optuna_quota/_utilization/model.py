"""Utilization models: what drives a resource, as a formula with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._resources import get_resource
from optuna_quota._utilization.data import StudyData
from optuna_quota._utilization.design import build_design
from optuna_quota._utilization.design import values_of
from optuna_quota._utilization.fit import mean_and_jacobian
from optuna_quota._utilization.fit import slopes
from optuna_quota._utilization.select import MIN_OBSERVED
from optuna_quota._utilization.select import select
from optuna_quota._utilization.select import Selected


if TYPE_CHECKING:
    from numpy.typing import NDArray
    import pandas as pd

    Array = NDArray[np.float64]


class UtilizationModel:
    """A floor plus a power law for one resource, fitted to the trials of a study.

    ``log(usage) = log(floor + constant · x₁^β₁ · x₂^β₂ · …) + σ · e``. Trials that ended early
    count as lower bounds: for memory the model is Tobit's, for time the log-normal accelerated
    failure time model. Any attribute that is not here is that of the statsmodels ``results``, so
    ``model.params``, ``model.bse`` and ``model.rsquared`` work.

    Attributes:
        resource: Name of the resource.
        numbers: Numbers of the trials it is fitted to, shape ``(n,)``.
        n_observed: How many of them were observed to their end.
        n_censored: How many count as lower bounds.
        n_pruned_held: How many of these are peaks that a stopped trial had not reached.
        criterion: What was chosen by which criterion, in words.
    """

    def __init__(
        self,
        resource: str,
        selected: Selected,
        numbers: NDArray[np.int64],
        n_pruned_held: int = 0,
    ) -> None:
        self.resource = resource
        self.numbers = numbers
        self.n_censored = int(selected.sample.censored.sum())
        self.n_observed = len(numbers) - self.n_censored
        self.criterion = "floor by BIC, interactions by extended BIC, all main effects"
        self.n_pruned_held = n_pruned_held
        self._selected = selected

    def log_likelihood(self, numbers: NDArray[np.int64]) -> float:
        """Return the log-likelihood of the usage of the trials of these numbers."""
        found = self._selected
        terms = slopes(found.fit.theta, found.sample.under(found.fit), found.fit.has_floor)
        return float(terms.loglike_obs[np.isin(self.numbers, numbers)].sum())

    @property
    def kind(self) -> str:
        """Name of the statistical model."""
        if not self.n_censored:
            return "nonlinear least squares on the log scale"
        if get_resource(self.resource).peak:
            return "Tobit model on the log scale"
        return "log-normal accelerated failure time model"

    @cached_property
    def results(self) -> Any:
        """The statsmodels results; the parameters are on the log scale, errors are HC3."""
        from optuna_quota._utilization.censored import results_of

        chosen = self._selected
        return results_of(chosen.fit, chosen.sample, chosen.design.terms)

    @property
    def floor(self) -> float:
        """What a trial uses whatever its parameters, in SI base units; 0 without a floor."""
        return math.exp(self._selected.fit.gamma) if self._selected.fit.has_floor else 0.0

    @property
    def sigma(self) -> float:
        """Standard deviation of the log of the usage around the model, unbiased by its terms."""
        fit, n = self._selected.fit, len(self.numbers)
        return fit.sigma * math.sqrt(n / max(n - len(fit.theta) + 1, 1))

    @property
    def df(self) -> int:
        """Degrees of freedom of the intervals: trials less parameters."""
        fit = self._selected.fit
        return max(1, len(self.numbers) - len(fit.theta) + (not self.n_censored))

    @cached_property
    def coefficients(self) -> pd.DataFrame:
        """The coefficients by term, with 95% intervals.

        The columns are ``estimate, lower, upper, p_value, kind``. ``kind`` is ``exponent`` for a
        number, ``log ratio`` for a level against the most frequent one, ``log factor`` for what
        enters per unit, and ``amount`` (SI base units) for ``floor`` and ``constant``.
        """
        from optuna_quota._utilization.report import coefficient_table

        return coefficient_table(self)

    @cached_property
    def formula(self) -> str:
        """The model for a person, with the terms whose 95% interval leaves out no effect."""
        from optuna_quota._utilization.report import formula_text

        return formula_text(self)

    @cached_property
    def diagnostics(self) -> list[str]:
        """What to be wary of, in words; empty where nothing stands out."""
        from optuna_quota._utilization.diagnose import diagnose

        return diagnose(self)

    @property
    def notes(self) -> list[str]:
        """What was left out or added, and why, in words."""
        return list(self._selected.notes)

    @property
    def selected(self) -> Selected:
        """The chosen terms, the observations and their fit."""
        return self._selected

    @cached_property
    def edge(self) -> tuple[float, float, float]:
        """Intercept, slope and centre of the 95% quantile of the residuals by the mean.

        See :func:`optuna_quota._utilization.diagnose.upper_edge`.
        """
        from optuna_quota._utilization.diagnose import upper_edge

        return upper_edge(self)

    def predict(self, params: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        """Return what trials of these parameters would use, in SI base units.

        Args:
            params: One mapping of names to values a trial.

        Returns:
            Columns ``lower``, ``median`` and ``upper`` (each of ``lower`` and ``upper`` missed by
            5%), and ``edge``, the 95% quantile by quantile regression.
        """
        return self._predict(self._selected.design.encode(params), len(params))

    def curve(self, param: str, points: int = 50) -> pd.DataFrame:
        """Return the model along one parameter, the others at their typical values.

        Args:
            param: Name of the parameter.
            points: How many values, evenly spread on the scale on which it varied.

        Returns:
            Columns ``param`` (its value or level), ``lower``, ``median``, ``upper`` and ``edge``.

        Raises:
            KeyError: If the model knows no such parameter.
        """
        design = self._selected.design
        if param not in design.typical:
            raise KeyError(f"{param!r} is none of {', '.join(design.typical)}.")
        grid, shown = self._grid(param, points)
        values = {
            name: grid if name == param else np.full(len(grid), typical)
            for name, typical in design.typical.items()
        }
        table = self._predict(values, len(grid))
        table.insert(0, "param", shown)
        return table

    def _grid(self, param: str, points: int) -> tuple[Array, list[Any]]:
        design = self._selected.design
        if param in design.levels:
            levels = design.levels[param]
            return np.arange(len(levels), dtype=float), list(levels)
        low, high = design.ranges[param]
        spread = np.geomspace if low > 0 and high / low > 5 else np.linspace
        grid = spread(low, high, points)
        return grid, grid.tolist()

    def _predict(self, values: Mapping[str, Array], n: int) -> pd.DataFrame:
        from optuna_quota._utilization.report import prediction_table

        fit = self._selected.fit
        x = self._selected.design.matrix(values, n)
        mean, jacobian = mean_and_jacobian(fit.theta, x, fit.has_floor)
        return prediction_table(self, mean, jacobian)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_selected" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.results, name)

    def __repr__(self) -> str:
        return f"<UtilizationModel {self.formula} (n = {len(self.numbers)})>"


def with_peaks_settled(data: StudyData, models: Mapping[str, UtilizationModel]) -> StudyData:
    """Return a study's data with the peaks of pruned trials taken as its models took them."""
    unreached = frozenset(name for name, model in models.items() if model.n_pruned_held)
    return replace(data, unreached=unreached)


def fit_models(data: StudyData) -> tuple[dict[str, UtilizationModel], dict[str, str]]:
    """Return a model for each resource that has enough trials, and why the others have none.

    Args:
        data: The study.
    """
    models: dict[str, UtilizationModel] = {}
    missing: dict[str, str] = {}
    for resource in data.resources:
        found = fit_model(data, resource)
        if isinstance(found, str):
            missing[resource] = found
        else:
            models[resource] = found
    return models, missing


def fit_model(data: StudyData, resource: str) -> UtilizationModel | str:
    """Return the model of one resource, or a sentence that says why there is none.

    The peak of a stopped trial is a value where each step of a training repeats the one before,
    and a lower bound where later steps take more data or a larger model. Bounds they are where the
    trials that completed are so much likelier under that model that BIC would grant as many
    parameters as it has.
    """
    as_value = _fit_model(data, resource)
    if isinstance(as_value, str) or not data.unsure(resource).any():
        return as_value
    held = replace(data, unreached=data.unreached | {resource})
    as_bound = _fit_model(held, resource)
    if isinstance(as_bound, str):
        return as_value
    completed = data.table["number"].to_numpy()[~held.censored(resource)]
    gain = as_bound.log_likelihood(completed) - as_value.log_likelihood(completed)
    price = 0.5 * len(as_bound.selected.fit.theta) * math.log(as_bound.n_observed)
    return as_bound if gain > price else as_value


def _fit_model(data: StudyData, resource: str) -> UtilizationModel | str:
    amounts, censored = data.amounts(resource), data.censored(resource)
    kept = np.isfinite(amounts) & (amounts > 0)
    observed, title = kept & ~censored, get_resource(resource).title
    if observed.sum() < MIN_OBSERVED:
        return (
            f"No model of {title}: {int(observed.sum())} trials were observed to their end, "
            f"it takes {MIN_OBSERVED}."
        )
    if np.ptp(np.log(amounts[observed])) < 1e-9:
        return f"No model of {title}: every trial used the same."
    design = build_design(data.parameters, kept)
    if not design.columns:
        return f"No model of {title}: no hyperparameter varied."
    selected = select(
        design, values_of(data.parameters, kept), np.log(amounts[kept]), censored[kept]
    )
    return UtilizationModel(
        resource,
        selected,
        data.table["number"].to_numpy()[kept],
        n_pruned_held=int(data.unsure(resource)[kept].sum()) if resource in data.unreached else 0,
    )
