"""A fitted utilization model in words: its formula, and warnings that a reader should act on."""

from __future__ import annotations

from collections.abc import Iterator
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._resources import get_resource
from optuna_quota._utilization.design import Column, Product
from optuna_quota._utilization.fit import derivatives_at, leverage
from optuna_quota._utilization.selection import Selected


if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


_MAX_VIF = 10.0
_MAX_LOG = 700.0  # e to more would overflow
# By unit: below it an amount would be shown as zeros.
_LEAST = {"B": 0.1, "s": 1e-5}


def bounded_exp(value: float) -> float:
    return math.exp(min(float(value), _MAX_LOG))


def plain_number(value: float, digits: int = 3) -> str:
    """Return a number of few digits, without an exponent unless it is very large or small."""
    return f"{float(f'{value:.{digits}g}'):.15g}"


def formula_text(resource: str, selected: Selected, floor: float, p_values: Array) -> str:
    """Return a model as a formula of its clear terms, such that it can be computed.

    Each factor is 1 at the middle of its parameter, and at the most frequent level of a category.
    So the constant is an amount of a usual size, and the rounding of exponents moves little. The
    p-values are those of all coefficients, adjusted for all tests.
    """
    level, *slopes = selected.fit.beta
    terms = zip(selected.design.columns, slopes, p_values[-len(slopes) :], strict=False)
    factors = [_factor(column, float(b)) for column, b, p_value in terms if p_value < 0.05]
    if not factors:
        total = _amount(resource, floor + bounded_exp(level))
        return f"{resource} = {total} (no single term is clear)"
    parts = [_amount(resource, floor)] if floor else []
    power = " · ".join([_amount(resource, bounded_exp(level)), *factors])
    return f"{resource} = {' + '.join([*parts, power])}"


def _factor(column: Column | Product, b: float) -> str:
    columns = (column.one, column.other) if isinstance(column, Product) else (column,)
    shown = {"level": "{0.param}={0.level}", "active": "{0.param} set"}
    where = "".join(f"[{shown[c.form].format(c)}]" for c in columns if c.form in shown)
    numbers = [c for c in columns if c.form not in shown]
    if not numbers:
        return f"{plain_number(bounded_exp(b), 2 if abs(b) < 4.6 else 3)}{where}"
    if len(numbers) == 1 and numbers[0].form != "linear":
        return f"({_relative(numbers[0])})^{b:.2f}{where}"
    return f"exp({b:.3g} · {' · '.join(map(_deviation, numbers))}){where}"


def _relative(column: Column) -> str:
    """Return a number over its middle, at which its factor is 1."""
    name = column.param if column.form == "power" else f"(1 + {column.param})"
    return f"{name}/{plain_number(math.exp(column.centre))}"


def _deviation(column: Column) -> str:
    if column.form == "linear":
        return f"({column.param} − {plain_number(column.centre)})"
    return f"ln({_relative(column)})"


def _amount(resource: str, value: float) -> str:
    """Return an amount as text, in scientific notation where it would be all zeros."""
    known = get_resource(resource)
    symbol = known.unit.symbol
    enough = value >= _LEAST.get(symbol, 0.01)
    return known.format(value) if enough else f"{value:.2g} {symbol}".rstrip()


def diagnose(
    resource: str, selected: Selected, numbers: NDArray[np.int64], n_stopped_peaks: int
) -> list[str]:
    """Return warnings about a fit to the trials of these numbers, the most serious first."""
    censored, found = selected.sample.censored, []
    if 2 * censored.sum() > len(censored):
        found.append(
            f"{censored.sum()} of {len(censored)} trials ended early and are lower bounds: the "
            "estimates rely on the power law and on normal residuals where nothing was observed. "
            "Let some of the largest trials run to their end."
        )
    found += [*_influence(selected, numbers), *_collinearity(selected)]
    if not selected.fit.converged:
        found.append("The fit did not converge: treat the estimates as rough.")
    if n_stopped_peaks:
        found.append(
            f"The {get_resource(resource).title} of {n_stopped_peaks} stopped "
            f"trial{'s' * (n_stopped_peaks != 1)} is left out: the completed trials show that it "
            "was still growing."
        )
    return [*found, *selected.design.notes]


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
                "their coefficients can hardly be told apart. Vary them independently."
            )
