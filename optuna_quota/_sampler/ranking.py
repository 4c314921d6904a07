"""Chooses among points that the base sampler offers: the one worth most for what it costs.

The expected improvement over the best value is that of a Gaussian process of the values' normal
scores, as in the advice on the search space; it is divided by the median of the predicted cost.
``benchmarks/value_for_budget.py`` says what that finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution

from optuna_quota._footprint.features import Features
from optuna_quota._footprint.resource_model import ResourceData, ResourceModel


Points = Sequence[Mapping[str, Any]]
# Returns the median usage at points, by resource.
Medians = Callable[[Points], Mapping[str, np.ndarray]]
# Returns a model of the data, selected from so many trials.
Fit = Callable[[ResourceData, int], ResourceModel]

# Completed trials before points are ranked, and at most in the model, which costs their cube.
MIN_COMPLETED = 5
MAX_FITTED = 100
# Least share of what is left that a point counts as taking, and least improvement.
_LEAST_SHARE = 1e-12
_LEAST_GAIN = 1e-300


class Row(NamedTuple):
    """A completed trial."""

    params: Mapping[str, Any]
    space: Mapping[str, BaseDistribution]
    loss: float  # the less, the better


class Choice(NamedTuple):
    """Which of the points runs, and why."""

    chosen: int
    reason: str


def choose(
    rows: Sequence[Row],
    points: Points,
    medians: Medians,
    left: Mapping[str, float],
    fit: Fit,
) -> Choice:
    """Return the point with the greatest expected improvement per predicted cost.

    Its cost is the largest share that it takes of what is left of a total, by resource. Where
    nothing tells the points apart, the first is returned.
    """
    from scipy.special import ndtr

    n, usage = len(rows), medians(points)
    known = [usage[name] / max(each, 1e-9) for name, each in left.items() if name in usage]
    shares = np.max([np.full(len(points), _LEAST_SHARE), *known], axis=0)
    best = int(np.argmin([row.loss for row in rows]))
    kept = [rows[i] for i in sorted({best, *range(max(0, n - MAX_FITTED + 1), n)})]
    features = Features.of([row.space for row in kept])
    columns = features.scale([row.params for row in kept])
    data = ResourceData.of_ranks(columns, np.array([row.loss for row in kept]))
    model = fit(data, n)
    mean, variance = model.process.predict(features.scale(points))
    spread = model.scale * np.sqrt(variance)
    z = (np.log(data.amounts.min()) - model.location - model.scale * mean) / spread
    gains = spread * (z * ndtr(z) + np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi))
    index = int(np.argmax(np.log(np.maximum(gains, _LEAST_GAIN)) - np.log(shares)))
    reason = f"improves by {gains[index]:.2g} for {shares[index]:.2g} of what is left"
    return Choice(index, reason)
