"""Utilization models: how the hyperparameters drive a resource, as a formula with intervals.

Without lower bounds, the statsmodels results are those of the Gauss-Newton regression (Davidson
and MacKinnon, Estimation and Inference in Econometrics, ch. 6): least squares of
``J θ̂ + residual`` on the Jacobian ``J``, weighted by the scatter, returns θ̂ itself, and with it
HC3 errors (MacKinnon and White, Journal of Econometrics 29, 1985), leverage and influence. With
lower bounds they are those of maximum likelihood with a sandwich of the same kind, see
:func:`~optuna_quota._utilization.fit.robust_covariance`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_quota._resources import get_resource
from optuna_quota._table import DataFrame
from optuna_quota._units import counted
from optuna_quota._utilization.data import StudyData
from optuna_quota._utilization.design import (
    build_design,
    Column,
    MIN_OBSERVED,
    Product,
    select,
    Selected,
    values_of,
)
from optuna_quota._utilization.fit import (
    derivatives,
    derivatives_at,
    Fit,
    intervals,
    leverage,
    robust_covariance,
    Sample,
    without_numeric_warnings,
)


Array = NDArray[np.float64]

_NO_TERM = " (no single term is clear)"
_KINDS = {
    "power": "exponent",
    "power1p": "exponent",
    "linear": "log factor",
    "level": "log ratio",
    "active": "log ratio",
}
_MAX_VIF = 10.0
_MAX_LOG = 700.0  # e to more would overflow
# By unit: below it an amount would be shown as zeros.
_LEAST = {"B": 0.1, "s": 1e-5}


class UtilizationModel:
    """A floor plus a power law for one resource, fitted to the trials of a study.

    ``log(usage) = log(floor + constant · x₁^β₁ · x₂^β₂ · …) + σ · e``. Trials that were ended by
    a limit on the resource count as lower bounds: for memory the model is Tobit's, for time the
    log-normal accelerated failure time model. Trials that something else stopped are left out.
    Any other attribute is that of the statsmodels ``results``, so ``model.params``, ``model.bse``
    and ``model.rsquared`` work.

    Attributes:
        resource: Name of the resource.
        selected: The selected terms, the observations and their fit.
        numbers: Numbers of the trials it is fitted to, shape ``(n,)``.
        n_observed: How many of them were observed to their end.
        n_censored: How many count as lower bounds.
        n_stopped_peaks: How many trials are left out, as they were stopped before their peak.
    """

    def __init__(
        self,
        resource: str,
        selected: Selected,
        numbers: NDArray[np.int64],
        n_stopped_peaks: int = 0,
    ) -> None:
        self.resource = resource
        self.numbers = numbers
        self.n_censored = int(selected.sample.censored.sum())
        self.n_observed = len(numbers) - self.n_censored
        self.n_stopped_peaks = n_stopped_peaks
        self.selected = selected
        self._p_adjusted: Array | None = None

    def log_likelihood(self, numbers: NDArray[np.int64]) -> float:
        """Return the log-likelihood of the usage of the trials of these numbers."""
        terms = derivatives_at(self.selected.fit, self.selected.sample).loglike_obs
        return float(terms[np.isin(self.numbers, numbers)].sum())

    @property
    def kind(self) -> str:
        if not self.n_censored:
            return "nonlinear least squares on the log scale"
        if get_resource(self.resource).peak:
            return "Tobit model on the log scale"
        return "log-normal accelerated failure time model"

    @cached_property
    def results(self) -> Any:
        """The statsmodels results; the parameters are on the log scale, errors are HC3."""
        fit, sample = self.selected.fit, self.selected.sample.with_scale(self.selected.fit)
        names = [*["log(floor)"][: int(fit.has_floor)], *self.selected.design.terms]
        if self.n_censored:
            return _likelihood_results(fit, sample, [*names, "log(sigma)"])
        return _regression_results(fit, sample, names)

    @property
    def floor(self) -> float:
        """What a trial uses whatever its parameters, in SI base units; 0 without a floor."""
        return math.exp(self.selected.fit.gamma)

    @property
    def sigma(self) -> float:
        return self.selected.sigma

    @cached_property
    def coefficients(self) -> DataFrame:
        """The coefficients by term, with 95% intervals.

        The columns are ``estimate, lower, upper, p_value, kind, p_adjusted``. ``p_adjusted`` is
        Holm's over the terms of all models of the study. ``kind`` is ``exponent`` for a
        number, ``log ratio`` for a level against the most frequent one, ``log factor`` for what
        enters per unit, and ``amount`` (SI base units) for ``floor`` and ``constant``: what the
        power law comes to at the middle of all parameters and the most frequent levels.
        """
        p_values = self._coefficients["p_value"].to_numpy(dtype=float)
        adjusted = holm(p_values) if self._p_adjusted is None else self._p_adjusted
        table: DataFrame = self._coefficients.assign(p_adjusted=adjusted)
        return table

    @cached_property
    def _coefficients(self) -> DataFrame:
        import pandas as pd

        selected, offset = self.selected, int(self.selected.fit.has_floor)
        figures = intervals(selected.fit, selected.sample)
        if selected.floored is not None:
            # A claim about a main effect holds with and without the floor.
            k = len(selected.floored.beta)
            main_effects = replace(selected.sample, x=selected.sample.x[:, :k])
            own, other = figures[1:k], intervals(selected.floored, main_effects)[2:]
            own[:, 1] = np.minimum(own[:, 1], other[:, 1])
            own[:, 2:] = np.maximum(own[:, 2:], other[:, 2:])
        amounts, terms = figures[: offset + 1], figures[offset + 1 :].tolist()
        rows: list[list[Any]] = [
            [*map(_bounded_exp, amount[:3]), math.nan, "amount"] for amount in amounts.tolist()
        ]
        for column, row in zip(selected.design.columns, terms, strict=False):
            kind = _KINDS[column.form] if isinstance(column, Column) else "interaction"
            rows.append([*row, kind])
        table: DataFrame = pd.DataFrame(
            rows,
            index=pd.Index([*["floor"][:offset], *selected.design.terms], name="term"),
            columns=["estimate", "lower", "upper", "p_value", "kind"],
        )
        return table

    @cached_property
    def formula(self) -> str:
        """The model as text, with the terms that are clear: ``p_adjusted`` below 5%.

        It can be computed. Each factor is 1 at the middle of its parameter, and at the most
        frequent level of a category. So the constant is an amount of a usual size, and the
        rounding of exponents moves little.
        """
        level, *slopes = self.selected.fit.beta
        p_values = self.coefficients["p_adjusted"].to_numpy(dtype=float)[-len(slopes) :]
        terms = zip(self.selected.design.columns, slopes, p_values, strict=False)
        factors = [_factor(column, float(b)) for column, b, p_value in terms if p_value < 0.05]
        if not factors:
            total = _amount(self.resource, self.floor + _bounded_exp(level))
            return f"{self.resource} = {total}{_NO_TERM}"
        parts = [_amount(self.resource, self.floor)] if self.floor else []
        power = " · ".join([_amount(self.resource, _bounded_exp(level)), *factors])
        return f"{self.resource} = {' + '.join([*parts, power])}"

    @property
    def has_clear_term(self) -> bool:
        """Whether the formula has any term besides a constant."""
        return not self.formula.endswith(_NO_TERM)

    @cached_property
    def diagnostics(self) -> list[str]:
        """Warnings to act on, the most serious first; empty if there are none."""
        found, n = [], len(self.numbers)
        if 2 * self.n_censored > n:
            found.append(
                f"{self.n_censored} of {n} trials ended early and are lower bounds: the estimates "
                "rely on the power law and on normal residuals where nothing was observed. Let "
                "some of the largest trials run to their end."
            )
        found += [*_influence(self.selected, self.numbers), *_collinearity(self.selected)]
        if not self.selected.fit.converged:
            found.append("The fit did not converge: treat the estimates as rough.")
        if self.n_stopped_peaks:
            found.append(
                f"The {get_resource(self.resource).title} of "
                f"{counted(self.n_stopped_peaks, 'stopped trial')} is left out: the completed "
                "trials show that it was still growing."
            )
        return [*found, *self.selected.design.notes]

    @property
    def notes(self) -> list[str]:
        return list(self.selected.notes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "selected" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.results, name)

    def __getstate__(self) -> dict[str, Any]:
        # Results of a censored fit hold functions, and are quickly computed again.
        return {name: value for name, value in vars(self).items() if name != "results"}

    def __repr__(self) -> str:
        return f"<UtilizationModel {self.formula} (n = {len(self.numbers)})>"


def _regression_results(fit: Fit, sample: Sample, names: list[str]) -> Any:
    import pandas as pd
    import statsmodels.api as sm

    at_fit = derivatives(fit.theta, sample, fit.has_floor)
    response = at_fit.jacobian @ fit.theta[:-1] + (sample.y - at_fit.mean)
    model = sm.WLS(
        pd.Series(response, name="log(usage)"),
        pd.DataFrame(at_fit.jacobian, columns=names),
        weights=1 / fit.scale(at_fit.jacobian) ** 2,
        hasconst=True,
    )
    with without_numeric_warnings():
        return model.fit(cov_type="HC3", use_t=True)


def _likelihood_results(fit: Fit, sample: Sample, names: list[str]) -> Any:
    from statsmodels.base.model import (
        GenericLikelihoodModel,
        GenericLikelihoodModelResults,
        LikelihoodModelResults,
    )

    def log_likelihood(theta: Array) -> Array:
        return derivatives(np.asarray(theta), sample, fit.has_floor).loglike_obs

    model = GenericLikelihoodModel(
        sample.y,
        sample.x,
        loglike=lambda theta: float(log_likelihood(theta).sum()),
        extra_params_names=[*names[: int(fit.has_floor)], names[-1]],
    )
    model.loglikeobs = log_likelihood
    model.data.xnames = names
    model.k_constant = model.k_extra = 0
    model.df_model, model.df_resid = len(names), len(sample.y) - len(names)
    covariance = robust_covariance(fit, sample)
    mle = LikelihoodModelResults(model, fit.theta, normalized_cov_params=covariance, scale=1.0)
    mle.mle_retvals = {"converged": fit.converged}
    mle.mle_settings = {"optimizer": "damped Newton"}
    results = GenericLikelihoodModelResults(model, mle)
    results.use_t = True
    # A lower bound says little of the spread.
    results.df_resid_inference = max(1, int((~sample.censored).sum()) - len(names))
    results.cov_type = "HC3"
    results.cov_kwds = {"description": "Sandwich of scores over one minus leverage, as HC3"}
    return results


def fit_utilization_models(
    data: StudyData,
) -> tuple[dict[str, UtilizationModel], dict[str, str]]:
    """Return a model for each resource that has enough trials, and why the others have none."""
    models: dict[str, UtilizationModel] = {}
    missing: dict[str, str] = {}
    for resource in data.resources:
        found = fit_utilization_model(data, resource)
        if isinstance(found, str):
            missing[resource] = found
        else:
            models[resource] = found
    # The p-values of the terms of all models are adjusted together.
    tables = [m._coefficients["p_value"].to_numpy(dtype=float) for m in models.values()]
    adjusted = holm(np.concatenate([*tables, np.zeros(0)]))
    ends = np.cumsum([len(table) for table in tables])
    for model, own in zip(models.values(), np.split(adjusted, ends)[:-1], strict=True):
        model._p_adjusted = own
    return models, missing


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p-values adjusted by Holm's method; NaN stays NaN and is no test."""
    adjusted = np.full(len(p_values), math.nan)
    known = np.isfinite(p_values)
    order = np.argsort(p_values)[: known.sum()]  # NaN is last
    steps = p_values[order] * np.arange(len(order), 0, -1)
    # Not by statsmodels, whose function triggers a garbage collection.
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def fit_utilization_model(data: StudyData, resource: str) -> UtilizationModel | str:
    """Return the model of one resource, or a sentence why there is none.

    The peak of a stopped trial is a value if all steps of a training are alike, and unknown if
    later steps take more data or a larger model. It is treated as unknown if the gain in
    likelihood of the completed trials would justify as many parameters by BIC as the model has.
    """
    as_value = _fit_model(data, resource)
    if isinstance(as_value, str) or not data.stopped_peaks(resource).any():
        return as_value
    without = replace(data, partial_peaks=data.partial_peaks | {resource})
    as_unknown = _fit_model(without, resource)
    if isinstance(as_unknown, str):
        return as_value
    completed = as_unknown.numbers
    gain = as_unknown.log_likelihood(completed) - as_value.log_likelihood(completed)
    price = 0.5 * len(as_unknown.selected.fit.theta) * math.log(as_unknown.n_observed)
    return as_unknown if gain > price else as_value


def _fit_model(data: StudyData, resource: str) -> UtilizationModel | str:
    amounts, censored = data.amounts(resource), data.censored(resource)
    kept = data.informative(resource) & (amounts > 0)
    observed, title = kept & ~censored, get_resource(resource).title
    if observed.sum() < MIN_OBSERVED:
        n = int(observed.sum())
        were = "was observed to its end" if n == 1 else "were observed to their end"
        return f"No model of {title}: {counted(n, 'trial')} {were}, {MIN_OBSERVED} are needed."
    if np.ptp(np.log(amounts[observed])) < 1e-9:
        return f"No model of {title}: every trial used the same."
    design = build_design(data.parameters, kept)
    if not design.columns:
        return f"No model of {title}: no hyperparameter varied."
    selected = select(
        design, values_of(data.parameters, kept), np.log(amounts[kept]), censored[kept]
    )
    numbers = data.table["number"].to_numpy()[kept]
    left_out = int(data.stopped_peaks(resource).sum()) if resource in data.partial_peaks else 0
    return UtilizationModel(resource, selected, numbers, left_out)


def _bounded_exp(value: float) -> float:
    return math.exp(min(float(value), _MAX_LOG))


def short_number(value: float, digits: int = 3) -> str:
    """Return a number of few digits, without an exponent unless it is very large or small."""
    return f"{float(f'{value:.{digits}g}'):.15g}"


def _factor(column: Column | Product, b: float) -> str:
    columns = (column.one, column.other) if isinstance(column, Product) else (column,)
    shown = {"level": "{0.param}={0.level}", "active": "{0.param} set"}
    where = "".join(f"[{shown[c.form].format(c)}]" for c in columns if c.form in shown)
    numbers = [c for c in columns if c.form not in shown]
    if not numbers:
        return f"{short_number(_bounded_exp(b), 2 if abs(b) < 4.6 else 3)}{where}"
    if len(numbers) == 1 and numbers[0].form != "linear":
        return f"({_relative(numbers[0])})^{b:.2f}{where}"
    return f"exp({b:.3g} · {' · '.join(map(_deviation, numbers))}){where}"


def _relative(column: Column) -> str:
    """Return a number over its middle, at which its factor is 1."""
    name = column.param if column.form == "power" else f"(1 + {column.param})"
    return f"{name}/{short_number(math.exp(column.centre))}"


def _deviation(column: Column) -> str:
    if column.form == "linear":
        return f"({column.param} − {short_number(column.centre)})"
    return f"ln({_relative(column)})"


def _amount(resource: str, value: float) -> str:
    """Return an amount as text, in scientific notation where it would be all zeros."""
    known = get_resource(resource)
    symbol = known.unit.symbol
    enough = value >= _LEAST.get(symbol, 0.01)
    return known.format(value) if enough else f"{value:.2g} {symbol}".rstrip()


def _influence(selected: Selected, numbers: NDArray[np.int64]) -> Iterator[str]:
    """Cook's distance, ``z² h / (p (1 - h)²)``, above 1 (Cook and Weisberg, 1982)."""
    sample, at_fit = selected.sample, derivatives_at(selected.fit, selected.sample)
    h, k = leverage(at_fit), at_fit.jacobian.shape[1]
    spread = selected.sigma * selected.fit.scale(at_fit.jacobian)
    z = np.where(sample.censored, 0.0, (sample.y - at_fit.mean) / spread)
    distance = z**2 * h / (k * np.maximum(1 - h, 1e-3) ** 2)
    worst = np.argsort(distance)[::-1][:3]
    found = [str(numbers[i]) for i in worst if distance[i] > 1]
    if found:
        yield (
            f"Trial{'s' * (len(found) > 1)} {' and '.join(found)} move"
            f"{'s' * (len(found) == 1)} the estimates much (Cook's distance above 1): check what "
            "else happened there."
        )


def _collinearity(selected: Selected) -> Iterator[str]:
    """Variance inflation: the diagonal of the inverse of the correlations."""
    columns, x = selected.design.columns, selected.sample.x[:, 1:]
    mains = [i for i, c in enumerate(columns) if isinstance(c, Column) and c.form != "active"]
    if len(mains) < 2:
        return
    related = np.corrcoef(x[:, mains].T)
    inflation = np.diag(np.linalg.pinv(related))
    for i in np.argsort(inflation)[::-1][:2]:
        if inflation[i] > _MAX_VIF:
            others = np.abs(related[i]).copy()
            others[i] = 0.0
            one, other = (columns[mains[int(j)]].term for j in (i, others.argmax()))
            yield (
                f"{one} varied together with {other} (variance inflation {inflation[i]:.0f}): "
                "their coefficients can hardly be separated. Vary them independently."
            )
