"""Advice to narrow the search space where that avoids breaches and costs no good trial.

Rules have the form ``x <= a``, ``x >= a`` or ``without x = level``, each also with a condition
``when y >= b`` (or ``<=``, or a level). The rule is chosen that removes most breaches less fitting
trials. It must remove at least half of the breaches; at least 80% of the trials that it removes
must have breached; none of them may be within 1% of the best; and the p-value of Fisher's exact
test, times the number of rules tried (Bonferroni), must be below 5%.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._analysis.advice import Advice, StudyFacts, TOLERANCE
from optuna_quota._resources import get_resource
from optuna_quota._utilization.data import Parameter


if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]


_MIN_BREACHES = 4
_MIN_SHARE = 0.5
_MIN_PRECISION = 0.8
_MAX_CUTS = 24
_MAX_PARAMS = 8
_SIGNIFICANCE = 0.05
# A condition must remove this many more breaches than the rule without it.
_MIN_GAIN_OF_CONDITION = 2


@dataclass(frozen=True)
class Region:
    """Trials on one side of a cut, or at one level.

    Attributes:
        inside: Which trials lie in it, shape ``(n_trials,)``.
        text: The region, such as ``width >= 512``.
        complement: The rest of the space, such as ``width <= 511``.
        param: Name of the parameter.
    """

    inside: Mask
    text: str
    complement: str
    param: str


@dataclass(frozen=True)
class Rule:
    """Trials that an edit of the search space would have removed."""

    removed: Mask
    text: str
    score: float


def advise_search_space(facts: StudyFacts) -> Iterator[Advice]:
    """Suggest for each resource the edit of the search space that avoids most breaches."""
    censored_by = facts.table["censored_by"]
    for resource in censored_by.dropna().unique():
        breached = (censored_by == resource).to_numpy(dtype=bool)
        known = breached | np.isin(facts.data.ended, ("completed", "pruned"))
        if breached.sum() >= _MIN_BREACHES and (known & ~breached).any():
            yield from _advise(facts, str(resource), breached, known)


def _advise(facts: StudyFacts, resource: str, breached: Mask, known: Mask) -> Iterator[Advice]:
    good = facts.near_best
    promising = sorted(facts.data.parameters, key=lambda p: -_contrast(p, breached, known))
    regions = [r for p in promising[:_MAX_PARAMS] for r in _regions(p, breached, known)]
    rule, tried = _best_rule(regions, breached, known, good)
    if rule is None or not _is_significant(rule, breached, known, tried):
        return
    avoided = int((rule.removed & breached).sum())
    others = int((rule.removed & known & ~breached).sum())
    kept = f"no trial within {TOLERANCE:.0%} of the best" if good.any() else "no completed trial"
    text = (
        f"{rule.text} removes {avoided} of {breached.sum()} {get_resource(resource).title} "
        f"breaches and {kept}"
    )
    text += f" ({others} other{'s' * (others > 1)})." if others else "."
    yield Advice(
        "search space",
        text,
        {
            "resource": resource,
            "rule": rule.text,
            "breaches_removed": avoided,
            "breaches": int(breached.sum()),
            "others_removed": others,
            "near_best_removed": int((rule.removed & good).sum()),
        },
    )


def _contrast(parameter: Parameter, breached: Mask, known: Mask) -> float:
    """How much the parameter's ranks differ between trials that breached and those that fit."""
    from scipy.stats import rankdata

    kept = known & parameter.active
    hit = breached[kept]
    if not hit.any() or hit.all():
        return 0.0
    if parameter.levels:
        codes = parameter.values[kept]
        shares = [hit[codes == code].mean() for code in np.unique(codes)]
        return float(max(shares) - min(shares))
    ranks = rankdata(parameter.values[kept]) / len(hit)
    return float(2 * abs(ranks[hit].mean() - ranks[~hit].mean()))


def _regions(parameter: Parameter, breached: Mask, known: Mask) -> Iterator[Region]:
    x, name = parameter.values, parameter.name
    kept = known & parameter.active
    seen = np.unique(x[kept])
    if parameter.levels:
        for code in seen if len(seen) > 1 else ():
            level = f"{name} = {parameter.levels[int(code)]}"
            yield Region(x == code, level, f"without {level}", name)
        return
    for below, above in _cuts(seen, x[kept], breached[kept]):
        bounds = _bounds(below, above, whole=bool((seen == np.round(seen)).all()))
        # Six digits where they are exact: a rounded bound may let breaches in.
        under, over = (f"{end:g}" if float(f"{end:g}") == end else f"{end:.17g}" for end in bounds)
        with np.errstate(invalid="ignore"):
            yield Region(x >= above, f"{name} >= {over}", f"{name} <= {under}", name)
            yield Region(x <= below, f"{name} <= {under}", f"{name} >= {over}", name)


def _cuts(
    seen: NDArray[np.float64], x: NDArray[np.float64], hit: Mask
) -> Iterator[tuple[float, float]]:
    """Neighbouring values to cut between: the best cut has a breach on one side of it."""
    place = np.searchsorted(seen, x)
    share = np.bincount(place, hit) / np.bincount(place)
    found = np.flatnonzero((share[:-1] != share[1:]) | (share[:-1] % 1 > 0))
    few = np.unique(np.linspace(0, len(found) - 1, min(_MAX_CUTS, len(found))).astype(int))
    for i in found[few]:
        yield float(seen[i]), float(seen[i + 1])


def _bounds(below: float, above: float, *, whole: bool) -> tuple[float, float]:
    """Return the bounds below and above a cut, with as few digits as tell them apart."""
    if whole:
        return below, above
    middle = math.sqrt(below * above) if below > 0 else (below + above) / 2
    for digits in range(2, 17):
        short = float(f"{middle:.{digits}g}")
        if below <= short < above:
            return short, short
    return below, above


def _best_rule(
    regions: Sequence[Region], breached: Mask, known: Mask, good: Mask
) -> tuple[Rule | None, int]:
    if not regions:
        return None, 0
    inside = np.array([r.inside for r in regions])
    fits = known & ~breached
    counts = [(inside & mask).sum(axis=1).astype(float) for mask in (breached, fits, good)]
    alone = _best_of(counts)
    best = (
        None if alone is None else Rule(inside[alone[0]], regions[alone[0]].complement, alone[1])
    )
    pairs = _pair_counts(inside, (breached, fits, good))
    own = np.array([[a.param == b.param for b in regions] for a in regions])
    score = np.where((pairs[2] > 0) | own, -np.inf, pairs[0] - pairs[1])
    place = int(score.argmax())
    one, other = divmod(place, len(regions))
    needed = _MIN_GAIN_OF_CONDITION + (alone[1] if alone else 0.0)
    tried = len(regions) + int((~own).sum()) // 2
    if math.isfinite(score[one, other]) and score[one, other] >= needed:
        first, second = regions[one], regions[other]
        text = f"{first.complement} when {second.text}"
        best = Rule(first.inside & second.inside, text, float(score[one, other]))
    return best, tried


def _best_of(counts: Sequence[NDArray[np.float64]]) -> tuple[int, float] | None:
    score = np.where(counts[2] > 0, -np.inf, counts[0] - counts[1])
    place = int(score.argmax())
    return (place, float(score[place])) if math.isfinite(score[place]) else None


def _pair_counts(inside: Mask, masks: Sequence[Mask]) -> list[NDArray[np.float64]]:
    """How many trials of each mask lie in both of two regions, each of shape ``(n, n)``."""
    return [(among := inside[:, mask].astype(np.float32)) @ among.T for mask in masks]


def _is_significant(rule: Rule, breached: Mask, known: Mask, tried: int) -> bool:
    from scipy.stats import hypergeom

    removed = int((rule.removed & known).sum())
    avoided = int((rule.removed & breached).sum())
    total = int(breached.sum())
    if avoided < max(_MIN_BREACHES, _MIN_SHARE * total) or avoided < _MIN_PRECISION * removed:
        return False
    chance = float(hypergeom.sf(avoided - 1, int(known.sum()), total, removed))
    return chance * max(tried, 1) < _SIGNIFICANCE
