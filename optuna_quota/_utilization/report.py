"""A fitted utilization model in tables and words."""

from __future__ import annotations

from collections.abc import Iterator
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._utilization.design import Column
from optuna_quota._utilization.design import Product


if TYPE_CHECKING:
    from numpy.typing import NDArray
    import pandas as pd

    from optuna_quota._utilization.model import UtilizationModel

    Array = NDArray[np.float64]
    Row = tuple[float, float, float, float, str]


_KINDS = {
    "power": "exponent",
    "power1p": "exponent",
    "linear": "log factor",
    "level": "log ratio",
    "active": "log ratio",
}
_MOST_LOG = 700.0


def coefficient_table(model: UtilizationModel) -> pd.DataFrame:
    """Return the coefficients by term; see :attr:`UtilizationModel.coefficients`."""
    import pandas as pd

    selected, results = model.selected, model.results
    columns = selected.design.columns
    offset = int(selected.fit.has_floor)
    first = offset + 1
    figures = np.column_stack([results.params, results.conf_int(), results.pvalues])
    rows = [_floor_row(*figures[0, :3])] if offset else []
    rows.append(_constant_row(model))
    for i, column in enumerate(columns, start=first):
        kind = _KINDS[column.form] if isinstance(column, Column) else "interaction"
        estimate, lower, upper, p_value = map(float, figures[i])
        rows.append((estimate, lower, upper, p_value, kind))
    terms = [*(["floor"] if offset else []), *selected.design.terms]
    table: pd.DataFrame = pd.DataFrame(
        rows,
        index=pd.Index(terms, name="term"),
        columns=["estimate", "lower", "upper", "p_value", "kind"],
    )
    return table


def _floor_row(gamma: float, lower: float, upper: float) -> Row:
    return _exp(gamma), _exp(lower), _exp(upper), math.nan, "amount"


def _constant_row(model: UtilizationModel) -> Row:
    """The constant where every log and every level is 0: features are centred elsewhere."""
    from scipy.special import stdtrit

    origin = np.array([1.0, *(_at_origin(c) for c in model.selected.design.columns)])
    offset = int(model.selected.fit.has_floor)
    place = slice(offset, offset + len(origin))
    value = float(origin @ np.asarray(model.results.params)[place])
    covariance = np.asarray(model.results.cov_params())[place, place]
    half = float(stdtrit(model.df, 0.975)) * math.sqrt(abs(origin @ covariance @ origin))
    return _exp(value), _exp(value - half), _exp(value + half), math.nan, "amount"


def _at_origin(column: Column | Product) -> float:
    if isinstance(column, Product):
        return _at_origin(column.one) * _at_origin(column.other)
    return -column.centre


def formula_text(model: UtilizationModel) -> str:
    """Return the model as a formula; see :attr:`UtilizationModel.formula`."""
    place = int(model.selected.fit.has_floor)
    level, *slopes = np.asarray(model.results.params, dtype=float)[place:]
    clear = np.asarray(model.results.pvalues, dtype=float)[place + 1 :] < 0.05
    terms = zip(model.selected.design.columns, slopes, clear, strict=False)
    columns = [(column, float(b)) for column, b, is_clear in terms if is_clear]
    mains = [(c, b) for c, b in columns if isinstance(c, Column)]
    constant = _exp(level - sum(c.centre * b for c, b in mains))
    shown = [(c, b) for c, b in columns if not _is_curved(c)]
    power = " · ".join([_amount(model.resource, constant), *(_factor(c, b) for c, b in shown)])
    parts = [format_amount(model.resource, model.floor)] if model.floor else []
    text = f"{model.resource} = {' + '.join([*parts, power])}"
    if not columns:
        return f"{text} (no hyperparameter moves it clearly)"
    hidden = len(columns) - len(shown)
    return f"{text} (and {hidden} interaction{'s' * (hidden > 1)} of numbers)" if hidden else text


def _is_curved(column: Column | Product) -> bool:
    """Whether it multiplies two numbers, which no formula shows well."""
    return isinstance(column, Product) and all(
        c.form not in ("level", "active") for c in (column.one, column.other)
    )


def _factor(column: Column | Product, b: float) -> str:
    if isinstance(column, Product):
        return "".join(_product(column.one, column.other, b))
    if column.form == "power":
        return f"{column.param}^{_short(b)}"
    if column.form == "power1p":
        return f"(1 + {column.param})^{_short(b)}"
    if column.form == "linear":
        return f"exp({_short(b)} · {column.param})"
    return f"{_ratio(b)}{_condition(column)}"


def _product(one: Column, other: Column, b: float) -> Iterator[str]:
    conditions = [c for c in (one, other) if c.form in ("level", "active")]
    numbers = [c for c in (one, other) if c not in conditions]
    if not numbers:
        yield _ratio(b)
    else:
        yield f"{_relative(numbers[0])}^{_short(b)}"
    yield from map(_condition, conditions)


def _relative(column: Column) -> str:
    if column.form == "power":
        return f"({column.param}/{math.exp(column.centre):.3g})"
    if column.form == "power1p":
        return f"((1 + {column.param})/{math.exp(column.centre):.3g})"
    return f"(e^({column.param} − {column.centre:.3g}))"


def _condition(column: Column) -> str:
    shown = f"{column.param}={column.level}" if column.form == "level" else f"{column.param} set"
    return f"[{shown}]"


def _ratio(b: float) -> str:
    return f"{_exp(b):.2g}" if _exp(b) < 99.5 else f"{_exp(b):.0f}"


def _short(b: float) -> str:
    return f"{b:.1f}" if abs(b) >= 1 else f"{b:.2f}"


def _amount(resource: str, value: float) -> str:
    """An amount for a person, and in scientific notation where that would be all zeros."""
    known = get_resource(resource)
    symbol = known.unit.symbol
    least = {"B": 0.1, "s": 1e-5}.get(symbol, 0.01)
    return known.format(value) if value >= least else f"{value:.2g} {symbol}".rstrip()


def prediction_table(model: UtilizationModel, mean: Array, jacobian: Array) -> pd.DataFrame:
    """Return medians with their bounds; see :meth:`UtilizationModel.predict`."""
    import pandas as pd
    from scipy.special import stdtrit

    places = jacobian.shape[1]
    covariance = np.asarray(model.results.cov_params())[:places, :places]
    uncertain = np.maximum(np.einsum("ij,jk,ik->i", jacobian, covariance, jacobian), 0.0)
    scale = model.selected.fit.scale(jacobian)
    half = float(stdtrit(model.df, 0.95)) * np.sqrt((model.sigma * scale) ** 2 + uncertain)
    intercept, slope, centre = model.edge
    logs = {
        "lower": mean - half,
        "median": mean,
        "upper": mean + half,
        "edge": mean + scale * (intercept + slope * (mean - centre)),
    }
    table: pd.DataFrame = pd.DataFrame(
        {name: np.exp(np.minimum(v, _MOST_LOG)) for name, v in logs.items()}
    )
    return table


def _exp(value: float) -> float:
    return math.exp(min(float(value), _MOST_LOG))
