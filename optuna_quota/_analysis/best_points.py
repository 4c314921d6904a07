"""The best points of the search space that fit, as far as the trials tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TYPE_CHECKING

import numpy as np

from optuna_quota._footprint.resource_model import fit_resource, ResourceData, ResourceModel
from optuna_quota._footprint.search_space import latin_hypercube, points_from_unit_cube


if TYPE_CHECKING:
    from optuna_quota._analysis.advice import StudyFacts
    from optuna_quota._footprint.footprint import Footprint


_MIN_COMPLETED = 20
_DRAWN = 1024
_BEST_SHARE = 0.05
# The process costs the cube of its trials.
_MAX_FITTED = 200


def objective_model(facts: StudyFacts, footprint: Footprint) -> ResourceModel | None:
    """Return a Gaussian process of the objective's normal scores, over the scaled parameters.

    None for several objectives, conditional parameters or few trials.
    """
    from scipy.special import ndtri
    from scipy.stats import rankdata

    done = np.flatnonzero(facts.completed & facts.feasible)[-_MAX_FITTED:]
    features = footprint.contents.features
    names = [part.name for part in features.parts]
    known = all(f"params_{name}" in facts.table for name in names)
    if facts.values is None or len(done) < _MIN_COMPLETED or not known or not names:
        return None
    if not all(parameter.active.all() for parameter in facts.data.parameters):
        return None
    rows = facts.table[[f"params_{name}" for name in names]].iloc[done].to_numpy(dtype=object)
    losses = facts.sign * facts.values[done]
    scores = ndtri((rankdata(losses) - 0.5) / len(losses))
    columns = features.scale([dict(zip(names, row, strict=True)) for row in rows])
    return fit_resource(ResourceData.exact(columns, np.exp(scores), floors=(0.0,)))


def best_fitting_points(
    facts: StudyFacts, footprint: Footprint, resource: str, limit: float
) -> Sequence[Mapping[str, Any]]:
    """Return the best twentieth of fresh points that most likely stay below a limit."""
    objective = objective_model(facts, footprint)
    if objective is None:
        return []
    features = footprint.contents.features
    unit = latin_hypercube(_DRAWN, len(features.parts), np.random.default_rng(0))
    fresh = points_from_unit_cube(features.distributions(), unit)
    fits = np.flatnonzero(footprint.expected(fresh)[resource].above(limit) < 0.5)
    expected = objective.predict(features.scale(fresh)).center[fits]
    best = fits[np.argsort(expected)[: max(1, int(_BEST_SHARE * len(fits)))]]
    return [fresh[int(i)] for i in best]
