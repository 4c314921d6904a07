"""The features of a power law, from hyperparameters, and the selection of its terms.

A positive number enters by its log, so that its coefficient is an exponent; a nonnegative one by
``log(1 + x)``; any other as it is, so that its coefficient is the log of a factor per unit. Each
is centred on its mean, and 0 where a conditional parameter is inactive. A category has a column
for each level but the most frequent, with the log of the ratio to that one as its coefficient. If
no category determines whether a conditional parameter is active, it gets a column of its own.

Terms are selected by information criteria. A floor must lower BIC (Schwarz, Annals of Statistics
6, 1978): its gain in log-likelihood exceeds ½ log n. An interaction must lower the extended BIC of
Chen and Chen (Biometrika 95, 2008), ½ log n + log(number of candidates), which corrects for the
search: of many candidates one would pass BIC by chance. Its robust interval must exclude 0 too,
because BIC assumes homoscedasticity. A scatter that goes with the law alone must lower the
extended BIC likewise. All main effects stay, so that their intervals are valid; only if they are
too many for the trials, the weakest are dropped. ``n`` is the number of trials that were observed
to their end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from optuna_quota._footprint.numerics import orthonormal
from optuna_quota._utilization.data import Parameter
from optuna_quota._utilization.fit import (
    Derivatives,
    derivatives,
    derivatives_at,
    Fit,
    fit,
    fit_with_largest_floor,
    intervals,
    maximize,
    Sample,
)


Array = NDArray[np.float64]
Values = Mapping[str, NDArray[np.float64]]

Form = Literal["power", "power1p", "linear", "level", "active"]
# A level in fewer trials can't be distinguished from noise.
MIN_LEVEL = 3
MIN_OBSERVED = 8
_TRIALS_PER_TERM = 2.5
_TRIALS_PER_INTERACTION = 15
_MAX_INTERACTIONS = 4
_CANDIDATE_COLUMNS = 10


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


@dataclass(frozen=True)
class Selected:
    """The selected terms with the observations and their fit."""

    design: Design
    sample: Sample
    fit: Fit
    notes: tuple[str, ...]  # what was left out or added
    # Of the main effects with a floor that the trials neither require nor exclude: where the
    # largest trials are missing, the exponents above it may be much larger.
    floored: Fit | None = None

    @property
    def sigma(self) -> float:
        """Standard deviation of the log of the usage around the model, corrected for its terms."""
        n = int((~self.sample.censored).sum())
        return self.fit.sigma * math.sqrt(n / max(n - len(self.fit.theta) + 1, 1))


def select(design: Design, values: Values, y: Array, censored: NDArray[np.bool_]) -> Selected:
    """Return the terms selected from all main effects, with their fit.

    Arrays have the shape ``(n,)``: values by parameter, log of the usage, where it is censored.
    """
    observed = int((~censored).sum())
    design = _screened(design, values, y, censored, observed)
    sample = Sample(y, design.matrix(values, len(y)), censored)
    plain = fit(sample, has_floor=False)
    best, possible = plain, None
    if len(design.columns):
        floored = fit(sample, has_floor=True)
        gain = floored.loglike - plain.loglike
        if gain > 0 and _is_identified(floored, sample):
            enough = gain > 0.5 * math.log(observed)
            best, possible = (floored, None) if enough else (plain, floored)
        else:
            possible = fit_with_largest_floor(sample, plain)
    selected = Selected(design, sample, best, design.notes, possible)
    for _ in range(min(_MAX_INTERACTIONS, observed // _TRIALS_PER_INTERACTION)):
        larger = _with_interaction(selected, values, observed)
        if larger is None:
            break
        selected = larger
    return selected


def _is_identified(fit: Fit, sample: Sample) -> bool:
    """Return whether the data determine both the floor and the law."""
    jacobian = derivatives(fit.theta, sample, fit.has_floor).jacobian
    sizes = np.linalg.norm(jacobian, axis=0)
    if not np.isfinite(sizes).all() or (sizes == 0).any():
        return False
    return float(np.linalg.svd(jacobian / sizes, compute_uv=False)[-1]) > 1e-6


def _screened(
    design: Design, values: Values, y: Array, censored: NDArray[np.bool_], observed: int
) -> Design:
    most = max(1, int(observed / _TRIALS_PER_TERM) - 2)
    if len(design.columns) <= most:
        return design
    from scipy.stats import rankdata

    ranks = [rankdata(each) for each in (y, *(c.values(values) for c in design.columns))]
    with np.errstate(invalid="ignore", divide="ignore"):  # of a constant column
        strength = np.nan_to_num(np.abs(np.atleast_2d(np.corrcoef(ranks))[0, 1:]))
    best = sorted(np.argsort(strength)[::-1][:most])
    kept = tuple(design.columns[int(i)] for i in best)
    left = [c.term for c in design.columns if c not in kept]
    note = (
        f"{observed} trials are too few for {len(design.columns)} terms. Left out, as least "
        f"correlated with the usage: {', '.join(left[:6])}{', …' * (len(left) > 6)}."
    )
    return replace(design, columns=kept, notes=(*design.notes, note))


def _with_interaction(selected: Selected, values: Values, observed: int) -> Selected | None:
    """Return the terms with the most useful interaction added, None if none is needed."""
    last, sample = selected.fit, selected.sample
    at_fit = derivatives_at(last, sample)
    candidates = _candidates(selected, at_fit, values)
    if not candidates:
        return None
    gains = _score_test(at_fit, sample.x.shape[1], [column for _, column in candidates])
    best = int(np.argmax(gains))
    needed = 0.5 * math.log(observed) + math.log(len(candidates))
    if gains[best] < 0.5 * needed:
        return None
    product, column = candidates[best]
    larger = replace(sample, x=np.column_stack([sample.x, column]))
    scaled = replace(larger, scale=sample.with_scale(last).scale)
    found = maximize(np.insert(last.theta, -1, 0.0), scaled, has_floor=last.has_floor)
    found = replace(found, epsilon=last.epsilon)
    gain = found.loglike - last.loglike
    if not math.isfinite(gain) or gain <= needed:
        return None
    # By Bonferroni's correction for the search.
    _, lower, upper, _ = intervals(found, larger, level=1 - 0.05 / len(candidates))[-1]
    if lower <= 0 <= upper:
        return None
    note = (
        f"{product.term} is included: it raises the log-likelihood by {gain:.1f}, the extended "
        f"BIC requires {needed:.1f}."
    )
    design = replace(selected.design, columns=(*selected.design.columns, product))
    notes = (*selected.notes, note)
    return replace(selected, design=design, sample=larger, fit=found, notes=notes)


def _candidates(
    selected: Selected, at_fit: Derivatives, values: Values
) -> list[tuple[Product, Array]]:
    """Return the interactions of the main effects of largest z-values, and their columns."""
    columns, beta = selected.design.columns, selected.fit.beta
    mains = [c for c in columns if isinstance(c, Column)]
    variance = np.abs(np.diag(np.linalg.pinv(at_fit.information)))[:-1]
    z = np.abs(beta) / np.sqrt(variance[-len(beta) :])
    strongest = np.argsort(-z[1 : 1 + len(mains)], kind="stable")[:_CANDIDATE_COLUMNS]
    taken = {c.term for c in columns}
    basis = orthonormal(selected.sample.x)
    found = []
    for i, j in combinations(sorted(strongest), 2):
        product = Product(mains[i], mains[j])
        if mains[i].param == mains[j].param or product.term in taken:
            continue
        column = product.values(values)
        left = column - basis @ (basis.T @ column)
        # Skip what the other columns determine, and levels with next to no trials.
        if np.linalg.norm(left) > 1e-4 * np.linalg.norm(column) and (column != 0).sum() >= 6:
            found.append((product, column))
    return found


def _score_test(at_fit: Derivatives, n_terms: int, columns: Sequence[Array]) -> Array:
    """Return the approximate gain in log-likelihood of each column, by its score test.

    The column's score is divided by its information after the fitted terms are projected out.
    """
    share = at_fit.jacobian[:, -n_terms]  # ∂m/∂constant: the power law's share
    added = np.column_stack(columns) * share[:, None]
    slope = at_fit.score_obs[:, -1 - n_terms]
    by_mean = np.divide(slope, share, out=np.zeros_like(slope), where=share > 0)
    weighted = at_fit.jacobian * at_fit.weight[:, None]
    within = np.linalg.pinv(at_fit.jacobian.T @ weighted)
    across = weighted.T @ added
    information = (added**2 * at_fit.weight[:, None]).sum(axis=0)
    information = information - np.einsum("ij,ik,kj->j", across, within, across)
    score = by_mean @ added
    return np.asarray(0.5 * score**2 / np.where(information > 1e-9, information, np.inf))
