"""Advice to narrow the search space where that avoids breaches and costs no good trial.

Rules have the form ``x <= a``, ``x >= a`` or ``without x = level``, each also with a condition
``when y >= b`` (or ``<=``, or a level). The rule is chosen that removes most breaches less fitting
trials. It must remove at least half of the breaches; at least 80% of the trials that it removes
must have breached; none of them may be within 1% of the best; and the p-value of Fisher's exact
test, times the number of rules tried (Bonferroni), must be below 5%.

A rule looks better on the trials that it was chosen from than on others. So rules are also chosen
on four fifths of the trials at a time and judged on the fifth: these figures are given, and must
reach half of the breaches and 70% that breached. And at most a tenth of the best points that fit
may be lost, by a model of the objective (``best_points.py``). ``benchmarks/advice.py`` judges both
on fresh points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
import math
from typing import Any, TYPE_CHECKING

import numpy as np

from optuna_quota._analysis.advice import Advice, StudyFacts, TOLERANCE
from optuna_quota._analysis.best_points import best_fitting_points
from optuna_quota._resources import get_resource
from optuna_quota._utilization.data import Parameter


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optuna_quota._footprint.footprint import Footprint

    Mask = NDArray[np.bool_]


_MIN_BREACHES = 4
_MIN_SHARE = 0.5
_MIN_PRECISION = 0.8
_MAX_CUTS = 24
_MAX_PARAMS = 8
_SIGNIFICANCE = 0.05
# A condition must remove this many more breaches than the rule without it.
_MIN_GAIN_OF_CONDITION = 2
_FOLDS = 5
_MIN_HELD_OUT_PRECISION = 0.7
_MAX_LOST = 0.1


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


def advise_search_space(facts: StudyFacts, footprint: Footprint) -> Iterator[Advice]:
    """Suggest for each resource the edit of the search space that avoids most breaches."""
    censored_by = facts.table["censored_by"]
    for resource in censored_by.dropna().unique():
        breached = (censored_by == resource).to_numpy(dtype=bool)
        known = breached | np.isin(facts.data.ended, ("completed", "pruned"))
        if breached.sum() >= _MIN_BREACHES and (known & ~breached).any():
            yield from _advise(facts, footprint, str(resource), breached, known)


def _advise(
    facts: StudyFacts, footprint: Footprint, resource: str, breached: Mask, known: Mask
) -> Iterator[Advice]:
    # Points that are no trials choose nothing, but show what a rule removes of them.
    points = _best_points(facts, footprint, resource, breached)
    parameters = [_with_points(p, points) for p in facts.data.parameters]
    more = np.zeros(len(points), dtype=bool)
    breached, known, good = (np.append(m, more) for m in (breached, known, facts.near_best))
    rule, tried = _chosen(parameters, breached, known, good)
    if rule is None or not _is_significant(rule, breached, known, tried):
        return
    avoided = int((rule.removed & breached).sum())
    others = int((rule.removed & known & ~breached).sum())
    share, precision = _held_out(parameters, breached, known, good)
    lost = float(rule.removed[-len(points) :].mean()) if points else 0.0
    if share < _MIN_SHARE or precision < _MIN_HELD_OUT_PRECISION or lost > _MAX_LOST:
        return
    kept = f"no trial within {TOLERANCE:.0%} of the best" if good.any() else "no completed trial"
    text = (
        f"{rule.text} removes {avoided} of {breached.sum()} {get_resource(resource).title} "
        f"breaches and {kept}"
    )
    text += f" ({others} other{'s' * (others > 1)})." if others else "."
    text += (
        f" Rules chosen likewise removed {share:.0%} of the breaches among trials that they were "
        f"not chosen from; {precision:.0%} of what they removed there had breached."
    )
    if lost > 0:
        text += f" It loses about {lost:.0%} of the best points that fit."
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
            "held_out_share_removed": share,
            "held_out_precision": precision,
            "best_points_lost": lost,
        },
    )


def _chosen(
    parameters: Sequence[Parameter], breached: Mask, known: Mask, good: Mask
) -> tuple[Rule | None, int]:
    """Return the best rule and the number of rules tried."""
    promising = sorted(parameters, key=lambda p: -_contrast(p, breached, known))
    regions = [r for p in promising[:_MAX_PARAMS] for r in _regions(p, breached, known)]
    return _best_rule(regions, breached, known, good)


def _held_out(
    parameters: Sequence[Parameter], breached: Mask, known: Mask, good: Mask
) -> tuple[float, float]:
    """Return how many breaches rules remove among other trials, and how many of those breached."""
    fold = np.zeros(len(known), dtype=int)
    for among in (breached, known & ~breached):
        fold[among] = np.random.default_rng(0).permutation(int(among.sum())) % _FOLDS
    avoided = removed = 0
    for k in range(_FOLDS):
        seen, left = known & (fold != k), known & (fold == k)
        rule, _ = _chosen(parameters, breached & seen, seen, good & seen)
        if rule is not None:
            avoided += int((rule.removed & breached & left).sum())
            removed += int((rule.removed & left).sum())
    return avoided / max(int(breached.sum()), 1), avoided / max(removed, 1)


def _best_points(
    facts: StudyFacts, footprint: Footprint, resource: str, breached: Mask
) -> Sequence[Mapping[str, Any]]:
    limits = facts.table["breach_limit"][breached].dropna()
    if resource not in footprint.resources or limits.empty:
        return []
    return best_fitting_points(facts, footprint, resource, float(limits.median()))


def _with_points(parameter: Parameter, points: Sequence[Mapping[str, Any]]) -> Parameter:
    found = [p.get(parameter.name) for p in points]
    if parameter.levels:
        code = {level: float(i) for i, level in enumerate(parameter.levels)}
        values = [code.get(str(value), math.nan) for value in found]
    else:
        values = [math.nan if value is None else float(value) for value in found]
    return replace(parameter, values=np.concatenate([parameter.values, values]))


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
