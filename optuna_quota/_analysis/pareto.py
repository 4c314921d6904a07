"""Best trials and Pareto fronts."""

from __future__ import annotations

from collections.abc import Iterable
import math

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _optuna


def best_numbers(study: Study, trials: Iterable[FrozenTrial]) -> list[int]:
    """Return the number of the best completed one of a study's trials, or the Pareto front's.

    Trials that violate a constraint or have a value that is not finite are left out.
    """
    completed = [t for t in trials if t.state.name == "COMPLETE" and is_feasible(t)]
    if not completed:
        return []
    losses = np.array([t.values for t in completed], dtype=float) * loss_signs(study)
    return [completed[i].number for i in pareto_front(losses)]


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether a trial violates no constraint and all its values are finite."""
    finite = all(math.isfinite(v) for v in trial.values or ())
    return finite and all(v <= 0 for v in _optuna.constraints_of(trial).values())


def loss_signs(study: Study) -> NDArray[np.float64]:
    """Return 1 for each objective to minimize and -1 for each to maximize."""
    return np.array([-1.0 if d.name == "MAXIMIZE" else 1.0 for d in study.directions])


def pareto_front(losses: NDArray[np.float64]) -> list[int]:
    """Return the rows of losses, shape ``(n, n_objectives)``, that no other row dominates.

    Of a single column, that is the first minimum.
    """
    if losses.shape[1] == 1:
        return [int(losses[:, 0].argmin())]
    kept: list[int] = []
    for i in np.lexsort(losses.T[::-1]):
        better = (losses[kept] <= losses[i]).all(axis=1) & (losses[kept] < losses[i]).any(axis=1)
        if not better.any():
            kept.append(int(i))
    return sorted(kept)


def cost_front(costs: NDArray[np.float64], losses: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of the Pareto front of cost and loss, cheapest first.

    Of equal points, the first is on the front.
    """
    order = np.lexsort([losses, costs])
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], losses[order]]))[:-1]
    return np.asarray(order[losses[order] < best_before])
