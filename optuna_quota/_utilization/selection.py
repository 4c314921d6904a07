"""Selects the terms of a utilization model by information criteria.

A floor must lower BIC (Schwarz, Annals of Statistics 6, 1978): its gain in log-likelihood exceeds
½ log n. An interaction must lower the extended BIC of Chen and Chen (Biometrika 95, 2008),
½ log n + log(number of candidates), which corrects for the search: of many candidates one would
pass BIC by chance. Its robust interval must exclude 0 too, because BIC assumes homoscedasticity. A
scatter that goes with the law alone must lower the extended BIC likewise. All main effects stay,
so that their intervals are valid; only if they are too many for the trials, the weakest are
dropped. ``n`` is the number of trials that were observed to their end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._utilization.design import Column, Design, Product
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


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optuna_quota._utilization.design import Values

    Array = NDArray[np.float64]


MIN_OBSERVED = 8
_TRIALS_PER_TERM = 2.5
_TRIALS_PER_INTERACTION = 15
_MAX_INTERACTIONS = 4
_CANDIDATE_COLUMNS = 10


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

    ranks = [rankdata(y), *(rankdata(column.values(values)) for column in design.columns)]
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
    design, notes = selected.design.with_column(product), (*selected.notes, note)
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
    basis, _ = np.linalg.qr(selected.sample.x)
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
