"""Two bounds of the search space that would halve the cost of a trial and keep the best points.

Of the points of a Latin hypercube that most likely fit the study's limits, the footprint gives the
cost and a Gaussian process of the objective's normal scores the best, both as draws of the whole
function. A bound is ``x <= a``, ``x >= a`` or ``without x = level``. Of all pairs under which a
trial costs at most half on average and no trial near the best is lost, that is suggested under
which one of the best hundredth of the points stays in most draws, at least in nine of ten.
``benchmarks/advice.py`` judges both on fresh points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TYPE_CHECKING

import numpy as np

from optuna_quota._analysis.best_points import objective_model
from optuna_quota._analysis.cost_drivers import log_draws
from optuna_quota._footprint.search_space import latin_hypercube, points_from_unit_cube
from optuna_quota._resources import get_resource, Limits
from optuna_quota._utilization.description import plain_number


if TYPE_CHECKING:
    from numpy.typing import NDArray
    from optuna.distributions import BaseDistribution

    from optuna_quota._analysis.advice import StudyFacts
    from optuna_quota._footprint.footprint import Footprint

    Points = Sequence[Mapping[str, Any]]


_POINTS = 512
_MIN_FITTING = 64
_DRAWS = 200
_CUTS = 16
_MAX_COST = 0.5
# Of the variance of the normal scores at trials left out; else the best may be anywhere.
_MAX_UNEXPLAINED = 0.5
_BEST_SHARE = 0.01
_MIN_KEPT = 0.9
_MIN_GAIN_OF_SECOND = 0.02


@dataclass(frozen=True)
class CheaperSpace:
    """Bounds under which a trial costs about half on average.

    Attributes:
        resource: The cost.
        bounds: One or two, such as ``rows <= 1500``.
        cost: Mean cost of a trial as a share of that over the whole space.
        best_kept: Probability that one of the best hundredth of the points that fit stays.
    """

    resource: str
    bounds: tuple[str, ...]
    cost: float
    best_kept: float

    def __str__(self) -> str:
        return (
            f"Half the cost: with {' and '.join(self.bounds)}, a trial takes {self.cost:.0%} of "
            f"the {get_resource(self.resource).title} that it takes over the whole space. No "
            "trial near the best is lost, and one of the best hundredth of the points stays with "
            f"probability {min(self.best_kept, 0.99):.0%} (by the footprint and a model of the "
            "value)."
        )


def cheaper_space(
    facts: StudyFacts,
    footprint: Footprint,
    resource: str,
    limits: Mapping[str, float],
    near_best: Points,
) -> CheaperSpace | None:
    """Return the bounds; None where none would do, or too little is known to tell.

    Args:
        facts: The study.
        footprint: Fitted to its trials.
        resource: The cost.
        limits: The study's limits, in SI base units.
        near_best: Points of the trials near the best, which must stay.
    """
    objective = objective_model(facts, footprint)
    if objective is None or resource not in footprint.resources:
        return None
    if float(np.mean(objective.log_leave_one_out()[0] ** 2)) > _MAX_UNEXPLAINED:
        return None
    features = footprint.contents.features
    space = features.distributions()
    unit = latin_hypercube(_POINTS, len(space), np.random.default_rng(0))
    drawn = points_from_unit_cube(space, unit)
    over = footprint.breaches(drawn, Limits.from_amounts(limits))
    fits = np.all([np.ones(_POINTS), *(each < 0.5 for each in over.values())], axis=0)
    points = [drawn[int(i)] for i in np.flatnonzero(fits)]
    if len(points) < _MIN_FITTING:
        return None
    scores, _ = log_draws(objective, features.scale(points), _DRAWS)
    best = np.argsort(scores, axis=1)[:, : round(_BEST_SHARE * len(points)) or 1]
    logs, _ = log_draws(footprint.contents.models[resource], features.encode(points), _DRAWS)
    costs = np.exp(logs - logs.max(axis=1, keepdims=True))
    costs /= costs.mean(axis=1, keepdims=True)
    bounds = [("", np.ones(len(points)))]
    for text, within in _bounds(space, [*near_best, *points], footprint.points):
        if within[: len(near_best)].all():
            bounds.append((text, within[len(near_best) :].astype(float)))
    inside = np.array([mask for _, mask in bounds])
    count = inside @ inside.T
    cost = (inside * costs.mean(axis=0)) @ inside.T / np.maximum(count, 1.0)
    stays = np.mean([inside[:, each] @ inside[:, each].T > 0 for each in best], axis=0)
    # Of those that keep the best as surely, one bound, and what leaves most of the space.
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
        whole = all(float(point[name]).is_integer() for point in tried)
        for end in np.quantile(x, np.arange(1, _CUTS) / _CUTS):
            bound = f"{end:.0f}" if whole and abs(end) < 100 else plain_number(end, 2)
            yield f"{name} <= {bound}", x <= float(bound)
            yield f"{name} >= {bound}", x >= float(bound)
