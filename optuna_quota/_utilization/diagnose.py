"""What to be wary of in a fitted utilization model, in words, and its upper edge."""

from __future__ import annotations

from collections.abc import Iterator
import math
from typing import TYPE_CHECKING
import warnings

import numpy as np

from optuna_quota._resources import get_resource
from optuna_quota._utilization.design import Column
from optuna_quota._utilization.fit import leverage
from optuna_quota._utilization.fit import Slopes
from optuna_quota._utilization.fit import slopes


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optuna_quota._utilization.model import UtilizationModel

    Array = NDArray[np.float64]


EDGE = 0.95
# Quantile regression and the tests take at most so many trials, evenly spread over the study.
MOST_TRIALS = 2000
_MIN_TESTED = 20
_SUSPECT = 0.01
_MOST_VIF = 10.0


def diagnose(model: UtilizationModel) -> list[str]:
    """Return what stands out, worst first; an empty list where nothing does."""
    fit = model.selected.fit
    sample = model.selected.sample.under(fit)
    at_top = slopes(fit.theta, sample, fit.has_floor)
    scale = fit.scale(at_top.jacobian)
    seen = np.flatnonzero(~sample.censored)
    seen = seen[:: -(-len(seen) // MOST_TRIALS)]
    found = [*_censoring(model), *_influence(model, at_top), *_collinearity(model)]
    if len(seen) >= max(_MIN_TESTED, 2 * len(fit.theta)):
        residuals = ((sample.y - at_top.mean) / scale)[seen]
        if np.ptp(residuals) > 1e-9:
            found += _scatter(model, sample.x[seen], residuals)
            found += _bend(at_top.jacobian[seen] / scale[seen, None], at_top.mean[seen], residuals)
            found += _shape(model, residuals)
    if not fit.converged:
        found.append("The fit did not come to rest: treat the estimates as rough.")
    return [*found, *_pruned(model), *model.selected.design.notes]


def _pruned(model: UtilizationModel) -> Iterator[str]:
    if model.n_pruned_held:
        title = get_resource(model.resource).title
        yield (
            f"Of {model.n_pruned_held} stopped trials the {title} counts as a lower bound: it was "
            "still to grow, as the trials that completed show."
        )


def upper_edge(model: UtilizationModel) -> tuple[float, float, float]:
    """Return ``a, b, c`` of ``m + g · (a + b · (m - c))``, the 95% quantile of the log usage.

    Quantile regression (Koenker and Bassett, Econometrica 46, 1978) of the residuals over their
    scale ``g`` on the mean ``m``, so that the edge may widen with size. A lower bound takes the
    quantile of its residual at evenly spread chances above itself. From under 20 trials it is the
    normal quantile.
    """
    fit = model.selected.fit
    sample = model.selected.sample.under(fit)
    at_top = slopes(fit.theta, sample, fit.has_floor)
    scale = fit.scale(at_top.jacobian)
    centre = float(at_top.mean.mean())
    step = -(-len(sample.y) // MOST_TRIALS)
    mean = at_top.mean[::step] - centre
    standard = (sample.y - at_top.mean) / scale
    residuals = _completed(standard[::step], sample.censored[::step], model)
    if len(residuals) < _MIN_TESTED or np.ptp(residuals) < 1e-9:
        return 1.6448536269514722 * model.sigma, 0.0, centre
    if np.ptp(mean) < 1e-9:
        return float(np.quantile(residuals, EDGE)), 0.0, centre
    return (*_quantile_line(mean, residuals), centre)


def _quantile_line(mean: Array, residuals: Array) -> tuple[float, float]:
    import statsmodels.api as sm

    exog = np.column_stack([np.ones(len(mean)), mean])
    with warnings.catch_warnings():
        # Its iterations may cycle between neighbouring lines, either of which serves.
        warnings.simplefilter("ignore")
        params = sm.QuantReg(residuals, exog).fit(q=EDGE, max_iter=200).params
    intercept, slope = map(float, params)
    if not math.isfinite(intercept) or not math.isfinite(slope):
        return float(np.quantile(residuals, EDGE)), 0.0
    return intercept, slope


def _completed(residuals: Array, censored: NDArray[np.bool_], model: UtilizationModel) -> Array:
    """Replace the residual of each lower bound by a quantile of what lies above it."""
    from scipy.special import ndtr
    from scipy.special import ndtri

    below = ndtr(residuals[censored] / model.sigma)
    chances = (np.arange(len(below)) * 0.6180339887498949 + 0.5) % 1.0
    drawn = ndtri(np.minimum(below + (1 - below) * chances, 1 - 1e-9)) * model.sigma
    whole: Array = residuals.copy()
    whole[censored] = np.maximum(drawn, residuals[censored])
    return whole


def _censoring(model: UtilizationModel) -> Iterator[str]:
    n = len(model.numbers)
    if model.n_censored > n / 2:
        yield (
            f"{model.n_censored} of {n} trials ended early and are lower bounds: the estimates "
            "lean on the power law and on normal residuals where nothing was observed."
        )


def _influence(model: UtilizationModel, at_top: Slopes) -> Iterator[str]:
    """Cook's distance, ``z² h / (p (1 - h)²)``, above 1 (Cook and Weisberg, 1982)."""
    sample, h = model.selected.sample, leverage(at_top)
    scale = model.sigma * model.selected.fit.scale(at_top.jacobian)
    z = np.where(sample.censored, 0.0, (sample.y - at_top.mean) / scale)
    distance = z**2 * h / (at_top.jacobian.shape[1] * np.maximum(1 - h, 1e-3) ** 2)
    worst = np.argsort(distance)[::-1][:3]
    numbers = [int(model.numbers[i]) for i in worst if distance[i] > 1]
    if numbers:
        shown = ", ".join(map(str, numbers))
        yield (
            f"Trial{'s' * (len(numbers) > 1)} {shown} alone move{'s' * (len(numbers) == 1)} the "
            "estimates (Cook's distance above 1): look whether something else was going on."
        )


def _collinearity(model: UtilizationModel) -> Iterator[str]:
    """Variance inflation: the diagonal of the inverse of the correlations."""
    columns, x = model.selected.design.columns, model.selected.sample.x[:, 1:]
    mains = [i for i, c in enumerate(columns) if isinstance(c, Column) and c.form != "active"]
    if len(mains) < 2:
        return
    related = np.corrcoef(x[:, mains].T)
    inflation = np.diag(np.linalg.pinv(related))
    for i in np.argsort(inflation)[::-1][:2]:
        if inflation[i] > _MOST_VIF:
            others = np.abs(related[i]).copy()
            others[i] = 0.0
            one, other = (columns[mains[int(j)]].term for j in (i, others.argmax()))
            yield (
                f"{one} went together with {other} (variance inflation {inflation[i]:.0f}): their "
                "coefficients can hardly be told apart."
            )


def _scatter(model: UtilizationModel, x: Array, residuals: Array) -> Iterator[str]:
    from statsmodels.stats.diagnostic import het_breuschpagan

    if np.linalg.matrix_rank(x) < 2:
        return
    p_value = float(het_breuschpagan(residuals, x)[1])
    if p_value < _SUSPECT:
        related = [_related(column, np.abs(residuals)) for column in x[:, 1:].T]
        most = int(np.argmax(np.abs(related)))
        verb = "grows" if related[most] > 0 else "shrinks"
        yield (
            f"The scatter {verb} with {model.selected.design.columns[most].term} (Breusch-Pagan "
            f"p = {p_value:.2g}): the intervals allow for it (HC3), the band of predictions is "
            "too wide on one side and too narrow on the other."
        )


def _bend(jacobian: Array, mean: Array, residuals: Array) -> Iterator[str]:
    """Ramsey's RESET with the squared mean (Journal of the Royal Statistical Society B 31)."""
    import statsmodels.api as sm

    squared = (mean - mean.mean()) ** 2
    size = float(np.linalg.norm(squared))
    basis, _ = np.linalg.qr(jacobian)
    left = squared - basis @ (basis.T @ squared)
    if not np.linalg.norm(left) > 1e-6 * size:
        return
    exog = np.column_stack([jacobian, left / np.linalg.norm(left)])
    results = sm.OLS(residuals, exog).fit(cov_type="HC3", use_t=True)
    p_value = float(results.pvalues[-1])
    if p_value < _SUSPECT:
        side = "more" if results.params[-1] > 0 else "less"
        yield (
            f"The power law bends (RESET p = {p_value:.2g}): the smallest and largest trials use "
            f"{side} than it says; do not extrapolate."
        )


def _shape(model: UtilizationModel, residuals: Array) -> Iterator[str]:
    from statsmodels.stats.stattools import jarque_bera

    _, p_value, skew, kurtosis = map(float, jarque_bera(residuals))
    if p_value < 1e-3 and (model.n_censored or abs(skew) > 1):
        leans = "the treatment of lower bounds leans" if model.n_censored else "the band leans"
        yield (
            f"The residuals are not normal on the log scale (skew {skew:+.1f}, kurtosis "
            f"{kurtosis:.1f}; Jarque-Bera p = {p_value:.2g}), on which {leans}."
        )


def _related(x: Array, y: Array) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / size if size > 0 else 0.0
