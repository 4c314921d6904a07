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
from dataclasses import dataclass
from dataclasses import replace
from itertools import combinations
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._utilization.design import Column
from optuna_quota._utilization.design import Design
from optuna_quota._utilization.design import Product
from optuna_quota._utilization.fit import derivatives
from optuna_quota._utilization.fit import Fit
from optuna_quota._utilization.fit import fit
from optuna_quota._utilization.fit import maximize
from optuna_quota._utilization.fit import robust_covariance
from optuna_quota._utilization.fit import Sample


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
    """The selected terms with the observations and their fit; ``notes`` say what was left out."""

    design: Design
    sample: Sample
    fit: Fit
    notes: tuple[str, ...]

    @property
    def sigma(self) -> float:
        """Standard deviation of the log of the usage around the model, corrected for its terms."""
        n = len(self.sample.y)
        return self.fit.sigma * math.sqrt(n / max(n - len(self.fit.theta) + 1, 1))


def select(design: Design, values: Values, y: Array, censored: NDArray[np.bool_]) -> Selected:
    """Return the selected terms with their fit.

    Args:
        design: All main effects.
        values: Values of the parameters at the trials, each of shape ``(n,)``.
        y: Log of the usage, shape ``(n,)``.
        censored: Where it is a lower bound, shape ``(n,)``.
    """
    observed = int((~censored).sum())
    design = _screened(design, values, y, censored, observed)
    sample = Sample(y, design.matrix(values, len(y)), censored)
    plain = fit(sample, has_floor=False)
    best = plain
    if len(design.columns):
        floored = fit(sample, has_floor=True)
        gain = floored.loglike - plain.loglike
        if gain > 0.5 * math.log(observed) and _is_identified(floored, sample):
            best = floored
    chosen = Selected(design, sample, best, design.notes)
    for _ in range(min(_MAX_INTERACTIONS, observed // _TRIALS_PER_INTERACTION)):
        larger = _with_interaction(chosen, values, observed)
        if larger is None:
            break
        chosen = larger
    return chosen


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

    ranks = rankdata(y)
    strength = [_correlation(rankdata(c.values(values)), ranks) for c in design.columns]
    best = sorted(np.argsort(strength)[::-1][:most])
    kept = tuple(design.columns[int(i)] for i in best)
    left = [c.term for c in design.columns if c not in kept]
    note = (
        f"{observed} trials are too few for {len(design.columns)} terms: the {len(left)} least "
        f"correlated with the usage are left out ({', '.join(left[:6])}{', …' * (len(left) > 6)})."
    )
    return replace(design, columns=kept, notes=(*design.notes, note))


def _correlation(x: Array, y: Array) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return abs(float(x @ y)) / size if size > 0 else 0.0


def _with_interaction(chosen: Selected, values: Values, observed: int) -> Selected | None:
    candidates = _candidates(chosen, values)
    if not candidates:
        return None
    gains = _gains(chosen, [values_ for _, values_ in candidates])
    best = int(np.argmax(gains))
    needed = 0.5 * math.log(observed) + math.log(len(candidates))
    if gains[best] < 0.5 * needed:
        return None
    product, column = candidates[best]
    sample = replace(chosen.sample, x=np.column_stack([chosen.sample.x, column]))
    start = np.insert(chosen.fit.theta, -1, 0.0)
    held = replace(sample, scale=chosen.sample.with_scale(chosen.fit).scale)
    larger = maximize(start, held, has_floor=chosen.fit.has_floor)
    larger = replace(larger, epsilon=chosen.fit.epsilon)
    gain = larger.loglike - chosen.fit.loglike
    if not math.isfinite(gain) or gain <= needed:
        return None
    if not _is_clear(larger, sample):
        return None
    note = (
        f"{product.term} is included: it raises the log-likelihood by {gain:.1f}, the extended "
        f"BIC requires {needed:.1f}."
    )
    return Selected(chosen.design.with_column(product), sample, larger, (*chosen.notes, note))


def _is_clear(fit: Fit, sample: Sample) -> bool:
    """Return whether the last term's robust interval excludes 0."""
    from scipy.special import stdtrit

    covariance = robust_covariance(fit, sample)
    place = len(fit.theta) - 2
    half = float(stdtrit(len(sample.y) - len(fit.theta), 0.975))
    return abs(float(fit.theta[place])) > half * math.sqrt(covariance[place, place])


def _candidates(chosen: Selected, values: Values) -> list[tuple[Product, Array]]:
    mains = [c for c in chosen.design.columns if isinstance(c, Column)]
    taken = {c.term for c in chosen.design.columns}
    strongest = _strongest(chosen, mains)
    products = [
        Product(one, other)
        for one, other in combinations(strongest, 2)
        if one.param != other.param and f"{one.term}:{other.term}" not in taken
    ]
    found = []
    basis, _ = np.linalg.qr(chosen.sample.x)
    for product in products:
        column = product.values(values)
        left = column - basis @ (basis.T @ column)
        # Skip what the other columns determine, and levels with next to no trials.
        if np.linalg.norm(left) > 1e-4 * np.linalg.norm(column) and (column != 0).sum() >= 6:
            found.append((product, column))
    return found


def _strongest(chosen: Selected, mains: Sequence[Column]) -> list[Column]:
    """Return the main effects of largest z-value, so that candidates stay few."""
    at_fit = derivatives(
        chosen.fit.theta, chosen.sample.with_scale(chosen.fit), chosen.fit.has_floor
    )
    variance = np.abs(np.diag(np.linalg.pinv(at_fit.information)))[:-1]
    z = np.abs(chosen.fit.beta) / np.sqrt(variance[-len(chosen.fit.beta) :])
    terms = [c.term for c in chosen.design.columns]
    order = sorted(mains, key=lambda c: -float(z[1 + terms.index(c.term)]))
    strongest = order[:_CANDIDATE_COLUMNS]
    return [c for c in mains if c in strongest]


def _gains(chosen: Selected, columns: Sequence[Array]) -> Array:
    """Return what each column would add to the log-likelihood, by its score test.

    The column's score is divided by its information after the fitted terms are projected out.
    """
    at_fit = derivatives(
        chosen.fit.theta, chosen.sample.with_scale(chosen.fit), chosen.fit.has_floor
    )
    share = at_fit.jacobian[:, -chosen.sample.x.shape[1]]  # ∂m/∂constant: the power law's share
    added = np.column_stack(columns) * share[:, None]
    slope = at_fit.score_obs[:, -1 - chosen.sample.x.shape[1]]
    by_mean = np.divide(slope, share, out=np.zeros_like(slope), where=share > 0)
    weighted = at_fit.jacobian * at_fit.weight[:, None]
    within = np.linalg.pinv(at_fit.jacobian.T @ weighted)
    across = weighted.T @ added
    information = (added**2 * at_fit.weight[:, None]).sum(axis=0)
    information = information - np.einsum("ij,ik,kj->j", across, within, across)
    score = by_mean @ added
    safe = np.where(information > 1e-9, information, np.inf)
    gains: Array = 0.5 * score**2 / safe
    return gains
