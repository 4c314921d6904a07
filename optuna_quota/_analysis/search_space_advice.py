"""Suggests edits of the search space that avoid breaches or halve the cost, but keep good trials.

Rules against breaches have the form ``x <= a``, ``x >= a`` or ``without x = level``, each also
with a condition ``when y >= b`` (or ``<=``, or a level). The rule is chosen that removes most
breaches less fitting trials. It must remove at least half of the breaches; at least 80% of the
trials that it removes must have breached; none of them may be within 1% of the best; and the
p-value of Fisher's exact test, times the number of rules tried (Bonferroni), must be below 5%.

A rule looks better on the trials that it was chosen from than on others. So rules are also chosen
on four fifths of the trials at a time and judged on the fifth: these figures are given, and must
reach half of the breaches and 70% that breached. And at most a tenth of the best points that fit
may be lost, by a model of the objective.

Bounds that halve the cost are judged on points of a Latin hypercube that most likely fit the
study's limits: the footprint gives their cost, and a Gaussian process of the objective's normal
scores the best of them, both as draws of the whole function. A bound is ``x <= a``, ``x >= a`` or
``without x = level``. Of all pairs under which a trial costs at most half on average and no trial
near the best is lost, that is suggested under which one of the best hundredth of the points stays
in most draws, at least in nine of ten. ``benchmarks/advice.py`` judges both on fresh points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution

from optuna_quota._analysis.advice import Advice, StudyFacts, TOLERANCE
from optuna_quota._analysis.drivers import log_draws
from optuna_quota._footprint.footprint import Footprint
from optuna_quota._footprint.numerics import product
from optuna_quota._footprint.resource_model import fit_resource, ResourceData, ResourceModel
from optuna_quota._footprint.search_space import latin_hypercube, points_from_unit_cube
from optuna_quota._limits import Limits
from optuna_quota._resources import get_resource
from optuna_quota._utilization.data import Parameter
from optuna_quota._utilization.model import short_number


Mask = NDArray[np.bool_]
Points = Sequence[Mapping[str, Any]]

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
# Of the model of the objective. The process costs the cube of its trials.
_MIN_COMPLETED = 20
_MAX_FITTED = 200
_DRAWN = 1024
_BEST_SHARE = 0.05
# Of bounds that halve the cost.
_POINTS = 512
_MIN_FITTING = 64
_DRAWS = 200
_CUTS = 16
_MAX_BOUNDS = 256  # 8 parameters; of 300, all pairs took 148 s and 8 GiB
_MAX_COST = 0.5
# Of the variance of the normal scores at trials left out; else the best may be anywhere.
_MAX_UNEXPLAINED = 0.5
_HUNDREDTH = 0.01
_MIN_KEPT = 0.9
_MIN_GAIN_OF_SECOND = 0.02


@dataclass(frozen=True)
class Rule:
    """Trials that an edit of the search space would have removed.

    Those of a region are on one side of a cut, or at one level; a pair of regions has no
    condition.
    """

    removed: Mask  # shape (n_trials,)
    text: str  # what is left of the space, such as "width <= 511"
    condition: str = ""  # what is removed, such as "width >= 512"
    param: str = ""


def advise_search_space(
    facts: StudyFacts, footprint: Footprint, fit_objective: Callable[[], ResourceModel | None]
) -> Iterator[Advice]:
    """Suggest for each resource the edit of the search space that avoids most breaches.

    The model of the objective is fitted only where points are compared by it.
    """
    censored_by = facts.table["censored_by"]
    # A breach of the quota depends on other trials.
    of_quota = np.array([r.breach is not None and r.breach.quota for r in facts.data.records])
    for resource in censored_by.dropna().unique():
        breached = (censored_by == resource).to_numpy(dtype=bool) & ~of_quota
        known = breached | np.isin(facts.data.ended, ("completed", "pruned"))
        if breached.sum() >= _MIN_BREACHES and (known & ~breached).any():
            limits = facts.table["breach_limit"][breached].dropna()
            points: Points = []
            if str(resource) in footprint.resources and not limits.empty:
                objective, limit = fit_objective(), float(limits.median())
                if objective is not None:
                    points = _best_points(footprint, objective, str(resource), limit)
            yield from _advise(facts, str(resource), breached, known, points)


def _advise(
    facts: StudyFacts, resource: str, breached: Mask, known: Mask, points: Points
) -> Iterator[Advice]:
    # Points without a trial don't affect the choice, but show what a rule removes.
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
        f" In cross-validation, rules removed {share:.0%} of the breaches, and {precision:.0%} of "
        "the trials that they removed had breached."
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
    footprint: Footprint, objective: ResourceModel, resource: str, limit: float
) -> Points:
    """Return the best twentieth of fresh points that most likely stay below the limit."""
    fresh = _fresh_points(footprint, _DRAWN)
    over = footprint.expected(fresh)[resource].above(limit)
    fits = np.flatnonzero(over < 0.5)
    expected = objective.predict(footprint.contents.features.scale(fresh)).center[fits]
    best = fits[np.argsort(expected)[: max(1, int(_BEST_SHARE * len(fits)))]]
    return [fresh[int(i)] for i in best]


def _fresh_points(footprint: Footprint, count: int) -> Points:
    space = footprint.contents.features.distributions()
    unit = latin_hypercube(count, len(space), np.random.default_rng(0))
    return points_from_unit_cube(space, unit)


def objective_model(facts: StudyFacts, footprint: Footprint) -> ResourceModel | None:
    """Return a Gaussian process of the objective's normal scores, over the scaled parameters.

    None for several objectives, conditional parameters or few trials.
    """
    done = np.flatnonzero(facts.completed & facts.feasible)[-_MAX_FITTED:]
    features = footprint.contents.features
    names = [part.name for part in features.parts]
    known = all(f"params_{name}" in facts.table for name in names)
    if facts.values is None or len(done) < _MIN_COMPLETED or not known or not names:
        return None
    if facts.data.is_conditional:
        return None
    rows = facts.table[[f"params_{name}" for name in names]].iloc[done].to_numpy(dtype=object)
    columns = features.scale([dict(zip(names, row, strict=True)) for row in rows])
    return fit_resource(ResourceData.of_ranks(columns, facts.sign * facts.values[done]))


def _with_points(parameter: Parameter, points: Points) -> Parameter:
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


def _regions(parameter: Parameter, breached: Mask, known: Mask) -> Iterator[Rule]:
    x, name = parameter.values, parameter.name
    kept = known & parameter.active
    seen = np.unique(x[kept])
    if parameter.levels:
        for code in seen if len(seen) > 1 else ():
            level = f"{name} = {parameter.levels[int(code)]}"
            yield Rule(x == code, f"without {level}", level, name)
        return
    for below, above in _cuts(seen, x[kept], breached[kept]):
        bounds = _bounds_at(below, above, whole=bool((seen == np.round(seen)).all()))
        # Six digits if exact: a rounded bound may admit breaches.
        under, over = (f"{end:g}" if float(f"{end:g}") == end else f"{end:.17g}" for end in bounds)
        with np.errstate(invalid="ignore"):
            yield Rule(x >= above, f"{name} <= {under}", f"{name} >= {over}", name)
            yield Rule(x <= below, f"{name} >= {over}", f"{name} <= {under}", name)


def _cuts(
    seen: NDArray[np.float64], x: NDArray[np.float64], hit: Mask
) -> Iterator[tuple[float, float]]:
    """Neighbouring values to cut between; the best cut has a breach next to it."""
    place = np.searchsorted(seen, x)
    share = np.bincount(place, hit) / np.bincount(place)
    found = np.flatnonzero((share[:-1] != share[1:]) | (share[:-1] % 1 > 0))
    few = np.unique(np.linspace(0, len(found) - 1, min(_MAX_CUTS, len(found))).astype(int))
    for i in found[few]:
        yield float(seen[i]), float(seen[i + 1])


def _bounds_at(below: float, above: float, *, whole: bool) -> tuple[float, float]:
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
    regions: Sequence[Rule], breached: Mask, known: Mask, good: Mask
) -> tuple[Rule | None, int]:
    """Return the best region, or pair of regions of two parameters, and the number tried."""
    if not regions:
        return None, 0
    inside = np.array([r.removed for r in regions])
    # How many trials of each kind lie in both of two regions, each of shape (n, n).
    among = [inside[:, mask].astype(np.float32) for mask in (breached, known & ~breached, good)]
    hit, fit, lost = (product(each, each.T) for each in among)
    score = np.where(lost > 0, -np.inf, hit - fit)
    alone = int(score.diagonal().argmax())
    most = float(score[alone, alone])
    own = np.array([[a.param == b.param for b in regions] for a in regions])
    pairs = np.where(own, -np.inf, score)
    first, second = (regions[i] for i in divmod(int(pairs.argmax()), len(regions)))
    tried = len(regions) + int((~own).sum()) // 2
    if pairs.max() >= _MIN_GAIN_OF_CONDITION + (most if math.isfinite(most) else 0.0):
        text = f"{first.text} when {second.condition}"
        return Rule(first.removed & second.removed, text), tried
    return regions[alone] if math.isfinite(most) else None, tried


def _is_significant(rule: Rule, breached: Mask, known: Mask, tried: int) -> bool:
    from scipy.stats import hypergeom

    removed = int((rule.removed & known).sum())
    avoided = int((rule.removed & breached).sum())
    total = int(breached.sum())
    if avoided < max(_MIN_BREACHES, _MIN_SHARE * total) or avoided < _MIN_PRECISION * removed:
        return False
    chance = float(hypergeom.sf(avoided - 1, int(known.sum()), total, removed))
    return chance * max(tried, 1) < _SIGNIFICANCE


@dataclass(frozen=True)
class CheaperSpace:
    """Bounds under which a trial costs about half on average."""

    resource: str  # the cost
    bounds: tuple[str, ...]  # one or two, such as "rows <= 1500"
    cost: float  # mean cost of a trial as a share of that over the whole space
    best_kept: float  # probability that one of the best hundredth of the points that fit stays

    def __str__(self) -> str:
        return (
            f"Half the cost: with {' and '.join(self.bounds)}, a trial takes {self.cost:.0%} of "
            f"the {get_resource(self.resource).title} over the whole space. It keeps all trials "
            "near the best, and with probability "
            f"{min(self.best_kept, 0.99):.0%} one of the best 1% of points (by the footprint and "
            "a model of the value)."
        )


def cheaper_space(
    footprint: Footprint,
    objective: ResourceModel | None,
    resource: str,
    limits: Mapping[str, float],
    near_best: Points,
) -> CheaperSpace | None:
    """Return bounds that halve a cost; None if there are none or too little is known.

    Points of trials near the best must stay inside.
    """
    if objective is None or resource not in footprint.resources:
        return None
    if float(np.mean(objective.log_leave_one_out()[0] ** 2)) > _MAX_UNEXPLAINED:
        return None
    features, drawn = footprint.contents.features, _fresh_points(footprint, _POINTS)
    over = footprint.breaches(drawn, Limits.from_amounts(limits))
    fits = np.all([np.ones(_POINTS), *(each < 0.5 for each in over.values())], axis=0)
    points = [drawn[int(i)] for i in np.flatnonzero(fits)]
    if len(points) < _MIN_FITTING:
        return None
    scores, _ = log_draws(objective, features.scale(points), _DRAWS)
    best = np.argsort(scores, axis=1)[:, : round(_HUNDREDTH * len(points)) or 1]
    logs, _ = log_draws(footprint.contents.models[resource], features.encode(points), _DRAWS)
    costs = np.exp(logs - logs.max(axis=1, keepdims=True))
    costs /= costs.mean(axis=1, keepdims=True)
    bounds = [("", np.ones(len(points)))]
    for text, within in _bounds(features.distributions(), [*near_best, *points], footprint.points):
        if within[: len(near_best)].all():
            bounds.append((text, within[len(near_best) :].astype(float)))
    inside = np.array([mask for _, mask in bounds])
    mean_cost = costs.mean(axis=0)
    # Two bounds keep the best with at most the probability of each.
    keeps = np.mean([inside[:, each].any(axis=1) for each in best], axis=0) >= _MIN_KEPT
    alone = inside @ mean_cost / np.maximum(inside.sum(axis=1), 1.0)
    cheapest = sorted(np.flatnonzero(keeps).tolist(), key=lambda i: float(alone[i]))
    chosen = sorted({0, *cheapest[:_MAX_BOUNDS]})
    bounds, inside = [bounds[i] for i in chosen], inside[chosen]
    count = product(inside, inside.T)
    cost = product(inside * mean_cost, inside.T) / np.maximum(count, 1.0)
    stays = np.mean([inside[:, each] @ inside[:, each].T > 0 for each in best], axis=0)
    # Of equal ones, prefer a single bound, then the larger rest of the space.
    second = np.logical_and.outer(*2 * [np.arange(len(bounds)) > 0])
    score = stays + 1e-3 * count / len(points) - _MIN_GAIN_OF_SECOND * second
    score = np.where((cost <= _MAX_COST) & (stays >= _MIN_KEPT), score, 0.0)
    pair = divmod(int(score.argmax()), len(bounds))
    if not score[pair] > 0:
        return None
    texts = tuple(text for text in dict.fromkeys(bounds[i][0] for i in pair) if text)
    return CheaperSpace(resource, texts, float(cost[pair]), float(stays[pair]))


def _bounds(
    space: Mapping[str, BaseDistribution], points: Points, tried: Points
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield bounds, and which points are within each; they are whole where all tried ones are."""
    for name, distribution in space.items():
        values = [point[name] for point in points]
        if not hasattr(distribution, "high"):
            for choice in getattr(distribution, "choices", ()):
                kept = np.array([repr(value) != repr(choice) for value in values])
                yield f"without {name} = {choice}", kept
            continue
        x = np.array(values, dtype=float)
        whole = all(float(point[name]).is_integer() for point in tried if name in point)
        for end in np.quantile(x, np.arange(1, _CUTS) / _CUTS):
            bound = f"{end:.0f}" if whole and abs(end) < 100 else short_number(end, 2)
            yield f"{name} <= {bound}", x <= float(bound)
            yield f"{name} >= {bound}", x >= float(bound)
