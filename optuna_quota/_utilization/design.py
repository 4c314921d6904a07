"""The features of a power law, from hyperparameters.

A positive number enters by its log, so that its coefficient is an exponent; a nonnegative one by
``log(1 + x)``; any other as it is, so that its coefficient is the log of a factor per unit. Each
is centred on its mean, and 0 where a conditional parameter is inactive. A category has a column
for each level but the most frequent, with the log of the ratio to that one as its coefficient. If
no category determines whether a conditional parameter is active, it gets a column of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
import math
from typing import Literal, TYPE_CHECKING

import numpy as np

from optuna_quota._utilization.data import Parameter


if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Values = Mapping[str, NDArray[np.float64]]


Form = Literal["power", "power1p", "linear", "level", "active"]
# A level in fewer trials can't be distinguished from noise.
MIN_LEVEL = 3


@dataclass(frozen=True)
class Column:
    """One feature of one parameter."""

    param: str
    form: Form
    centre: float = 0.0  # what is subtracted
    code: float = math.nan  # of the level of a category
    level: str = ""

    @property
    def term(self) -> str:
        """Name of the coefficient; it contains the parameter's name."""
        shapes = {
            "power": self.param,
            "power1p": f"1 + {self.param}",
            "linear": f"exp({self.param})",
            "level": f"{self.param}[{self.level}]",
            "active": f"{self.param}[set]",
        }
        return shapes[self.form]

    def values(self, values: Values) -> Array:
        """Return the feature, shape ``(n,)``, from the values of all parameters."""
        x = values[self.param]
        if self.form == "level":
            return np.asarray(x == self.code, dtype=float)
        if self.form == "active":
            return np.isfinite(x).astype(float)
        return np.where(np.isfinite(x), transformed(x, self.form) - self.centre, 0.0)


@dataclass(frozen=True)
class Product:
    """An interaction: the product of two features."""

    one: Column
    other: Column

    @property
    def term(self) -> str:
        """Name of the coefficient; it contains both parameters'."""
        return f"{self.one.term}:{self.other.term}"

    def values(self, values: Values) -> Array:
        """Return the feature, shape ``(n,)``, from the values of all parameters."""
        return self.one.values(values) * self.other.values(values)


@dataclass(frozen=True)
class Design:
    """The features of a model; ``notes`` say what was left out, and why."""

    columns: tuple[Column | Product, ...]  # without the constant
    notes: tuple[str, ...] = ()

    @property
    def terms(self) -> list[str]:
        """Names of the coefficients, the constant first; one whose name is taken is marked."""
        taken = ["floor", "log(floor)", "log(sigma)", "constant"]
        for column in self.columns:
            name = column.term or "(unnamed)"
            while name in taken:
                name = f"{name} (parameter)"
            taken.append(name)
        return taken[3:]

    def matrix(self, values: Values, n: int) -> Array:
        """Return the features with a leading column of ones, shape ``(n, 1 + n_columns)``."""
        return np.column_stack([np.ones(n), *(column.values(values) for column in self.columns)])

    def with_column(self, column: Column | Product) -> Design:
        return replace(self, columns=(*self.columns, column))


def transformed(x: Array, form: Form) -> Array:
    """Return the values of a number on the scale where the model is linear."""
    if form == "power":
        return np.log(np.where(x > 0, x, math.nan))
    if form == "power1p":
        return np.log1p(np.where(x >= 0, x, math.nan))
    return x


def build_design(parameters: Sequence[Parameter], kept: NDArray[np.bool_]) -> Design:
    """Return the main effects among the trials ``kept``, shape ``(n_trials,)``, independent."""
    columns: list[Column] = []
    notes: list[str] = []
    for parameter in parameters:
        found, note = _columns(parameter, kept)
        columns.extend(found)
        notes.extend(note)
    for parameter in parameters:
        n_active = parameter.active[kept].sum()
        if MIN_LEVEL <= n_active <= kept.sum() - MIN_LEVEL:
            columns.append(Column(parameter.name, "active"))
    values = values_of(parameters, kept)
    independent, dependent = _independent(columns, values, int(kept.sum()))
    notes.extend(
        f"{c.term} is left out: other terms determine it." for c in dependent if c.form != "active"
    )
    return Design(tuple(independent), tuple(notes))


def values_of(parameters: Iterable[Parameter], kept: NDArray[np.bool_]) -> Values:
    """Return the values of the parameters at the trials ``kept``, by name."""
    return {p.name: p.values[kept] for p in parameters}


def _columns(parameter: Parameter, kept: NDArray[np.bool_]) -> tuple[list[Column], list[str]]:
    x = parameter.values[kept]
    x = x[np.isfinite(x)]
    if len(x) == 0 or (x == x[0]).all():
        return [], [f"{parameter.name} is left out: it never varied."] if len(x) else []
    if parameter.levels:
        return _level_columns(parameter, x)
    form: Form = "power" if x.min() > 0 else "power1p" if x.min() >= 0 else "linear"
    return [Column(parameter.name, form, float(transformed(x, form).mean()))], []


def _level_columns(parameter: Parameter, codes: Array) -> tuple[list[Column], list[str]]:
    found, counts = np.unique(codes, return_counts=True)
    reference, names = found[counts.argmax()], parameter.levels
    often = found[(counts >= MIN_LEVEL) & (found != reference)]
    rare = found[(counts < MIN_LEVEL) & (found != reference)]
    columns = [Column(parameter.name, "level", code=float(c), level=names[int(c)]) for c in often]
    if not len(rare):
        return columns, []
    shown = ", ".join(names[int(c)] for c in rare[:5])
    return columns, [
        f"{parameter.name}: levels seen in fewer than {MIN_LEVEL} trials count as "
        f"{names[int(reference)]} ({shown}{', …' if len(rare) > 5 else ''})."
    ]


def _independent(
    columns: Sequence[Column], values: Values, n: int
) -> tuple[list[Column], list[Column]]:
    """Split the columns into those that are independent of the ones before, and the rest."""
    basis = np.ones((n, 1)) / math.sqrt(max(n, 1))
    kept: list[Column] = []
    dropped: list[Column] = []
    for column in columns:
        x = column.values(values)
        size = float(np.linalg.norm(x))
        for _ in range(2):  # once more, against rounding
            x = x - basis @ (basis.T @ x)
        left = float(np.linalg.norm(x))
        if left > 1e-7 * size:
            basis = np.column_stack([basis, x / left])
            kept.append(column)
        else:
            dropped.append(column)
    return kept, dropped
