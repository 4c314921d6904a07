"""Edits of the search space that would have spared breaches and cost nothing good.

Rules are of the form ``x <= a``, ``x >= a``, ``not x = level``, each also with ``when y >= b``
(or ``<=``, or a level). The one is chosen that spares most breaches less the fitting trials that
it costs; it must spare at least half of the breaches, four of five trials that it removes must
have breached, no trial within 1% of the best may be among them, and Fisher's exact test, times
the number of rules that were tried, must be below 5%.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._analysis.advice import Advice
from optuna_quota._analysis.advise_cheapest import near_best
from optuna_quota._analysis.advise_cheapest import TOLERANCE
from optuna_quota._resources import get_resource
from optuna_quota._utilization.data import Parameter


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optuna_quota._analysis.report import UtilizationReport

    Mask = NDArray[np.bool_]


_MIN_BREACHES = 4
_MIN_SHARE = 0.5
_MIN_PRECISION = 0.8
_MOST_CUTS = 24
_MOST_PARAMS = 8
_LEVEL = 0.05
# A condition must spare so many more breaches than the rule without it.
_WORTH_A_CONDITION = 2


@dataclass(frozen=True)
class Region:
    """Trials on one side of a cut, or of one level.

    Attributes:
        inside: Which trials lie in it, shape ``(n_trials,)``.
        text: The region, such as ``width >= 512``.
        rest: What keeps out of it, such as ``width <= 511``.
        param: Name of the parameter.
    """

    inside: Mask
    text: str
    rest: str
    param: str


@dataclass(frozen=True)
class Rule:
    """Trials that an edit of the search space would have removed."""

    removed: Mask
    text: str
    score: float


def advise_space(report: UtilizationReport) -> Iterator[Advice]:
    """Say which edit of the search space spares most breaches, by the resource breached."""
    censored_by = report.table["censored_by"]
    for resource in censored_by.dropna().unique():
        breached = (censored_by == resource).to_numpy(dtype=bool)
        known = breached | np.isin(report.data.ended, ("completed", "pruned"))
        if breached.sum() >= _MIN_BREACHES and (known & ~breached).any():
            yield from _advise(report, str(resource), breached, known)


def _advise(
    report: UtilizationReport, resource: str, breached: Mask, known: Mask
) -> Iterator[Advice]:
    good = near_best(report)
    regions = [
        r for p in _promising(report, breached, known) for r in _regions(p, breached, known)
    ]
    rule, tried = _best_rule(regions, breached, known, good)
    if rule is None or not _holds(rule, breached, known, tried):
        return
    spared, cost = (
        int((rule.removed & breached).sum()),
        int((rule.removed & known & ~breached).sum()),
    )
    total = int(breached.sum())
    loss = f"no trial within {TOLERANCE:.0%} of the best" if good.any() else "no completed trial"
    others = f" ({cost} other{'s' * (cost > 1)})" if cost else ""
    text = (
        f"{rule.text} removes {spared} of {total} {get_resource(resource).title} breaches and "
        f"{loss}{others}."
    )
    yield Advice(
        "search space",
        text,
        {
            "resource": resource,
            "rule": rule.text,
            "breaches_removed": spared,
            "breaches": total,
            "others_removed": cost,
            "near_best_removed": int((rule.removed & good).sum()),
        },
    )


def _promising(report: UtilizationReport, breached: Mask, known: Mask) -> Sequence[Parameter]:
    """The parameters whose ranks differ most between trials that breached and those that fit."""
    return sorted(report.data.parameters, key=lambda p: -_contrast(p, breached, known))[
        :_MOST_PARAMS
    ]


def _contrast(parameter: Parameter, breached: Mask, known: Mask) -> float:
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
        ends = _between(below, above, whole=bool((seen == np.round(seen)).all()))
        # Six digits where they say it exactly; a bound that is rounded may let breaches in.
        under, over = (f"{end:g}" if float(f"{end:g}") == end else f"{end:.17g}" for end in ends)
        with np.errstate(invalid="ignore"):
            yield Region(x >= above, f"{name} >= {over}", f"{name} <= {under}", name)
            yield Region(x <= below, f"{name} <= {under}", f"{name} >= {over}", name)


def _cuts(
    seen: NDArray[np.float64], x: NDArray[np.float64], hit: Mask
) -> Iterator[tuple[float, float]]:
    """Neighbouring values between which to cut: the best cut has a breach on one side of it."""
    place = np.searchsorted(seen, x)
    share = np.bincount(place, hit) / np.bincount(place)
    found = np.flatnonzero((share[:-1] != share[1:]) | (share[:-1] % 1 > 0))
    few = np.unique(np.linspace(0, len(found) - 1, min(_MOST_CUTS, len(found))).astype(int))
    for i in found[few]:
        yield float(seen[i]), float(seen[i + 1])


def _between(below: float, above: float, *, whole: bool) -> tuple[float, float]:
    """Return the ends of the two sides of a cut, as short as they can be written."""
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
    best = None if alone is None else Rule(inside[alone[0]], regions[alone[0]].rest, alone[1])
    pairs = _pair_counts(inside, (breached, fits, good))
    own = np.array([[a.param == b.param for b in regions] for a in regions])
    score = np.where((pairs[2] > 0) | own, -np.inf, pairs[0] - pairs[1])
    place = int(score.argmax())
    one, other = divmod(place, len(regions))
    needed = _WORTH_A_CONDITION + (alone[1] if alone else 0.0)
    tried = len(regions) + int((~own).sum()) // 2
    if math.isfinite(score[one, other]) and score[one, other] >= needed:
        first, second = regions[one], regions[other]
        text = f"{first.rest} when {second.text}"
        best = Rule(first.inside & second.inside, text, float(score[one, other]))
    return best, tried


def _best_of(counts: Sequence[NDArray[np.float64]]) -> tuple[int, float] | None:
    score = np.where(counts[2] > 0, -np.inf, counts[0] - counts[1])
    place = int(score.argmax())
    return (place, float(score[place])) if math.isfinite(score[place]) else None


def _pair_counts(inside: Mask, masks: Sequence[Mask]) -> list[NDArray[np.float64]]:
    """How many trials of each mask lie in both of two regions, shape ``(n, n)`` each."""
    return [(among := inside[:, mask].astype(np.float32)) @ among.T for mask in masks]


def _holds(rule: Rule, breached: Mask, known: Mask, tried: int) -> bool:
    from scipy.stats import hypergeom

    removed, spared = int((rule.removed & known).sum()), int((rule.removed & breached).sum())
    total = int(breached.sum())
    if spared < max(_MIN_BREACHES, _MIN_SHARE * total) or spared < _MIN_PRECISION * removed:
        return False
    chance = float(hypergeom.sf(spared - 1, int(known.sum()), total, removed))
    return chance * max(tried, 1) < _LEVEL
