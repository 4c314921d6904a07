"""Ranks candidate points by expected improvement per predicted cost.

The expected improvement over the best value is that of a Gaussian process on normal scores of the
values, as in the advice on the search space; it is divided by the median of the predicted cost.
See ``benchmarks/value_for_budget.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
import logging
import math
import threading
from typing import Any, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_quota import _optuna
from optuna_quota._footprint.features import Features
from optuna_quota._footprint.fit import fit_or_refresh
from optuna_quota._footprint.footprint import BaseFootprint
from optuna_quota._footprint.resource_model import ResourceData, ResourceModel
from optuna_quota._footprint.search_space import value_at
from optuna_quota._footprint.user_given import count_within
from optuna_quota._sampler.study_footprint import medians_of


_logger = logging.getLogger("optuna.quota.sampler")

# Completed trials before points are ranked, and at most in the model, whose fit is cubic in them.
MIN_COMPLETED = 5
MAX_FITTED = 100
# Lower bounds of the share of what is left that a point needs, and of the improvement.
_LEAST_SHARE = 1e-12
_LEAST_GAIN = 1e-300
# Hyperparameters are fitted again when the number of trials has grown by this factor.
_GROWTH = 1.25
# For the points of one trial; fewer are drawn if a user's function is slow.
_SECONDS = 1.0

Points = Sequence[Mapping[str, Any]]
# Returns the median usage at points, by resource.
Medians = Callable[[Points], Mapping[str, np.ndarray]]
# Returns a model of the data; the number is that of all trials.
Fit = Callable[[ResourceData, int], ResourceModel]


class Row(NamedTuple):
    params: Mapping[str, Any]
    space: Mapping[str, BaseDistribution]
    loss: float  # the less, the better


class Choice(NamedTuple):
    """Which of the points runs, and why."""

    chosen: int
    reason: str


def choose(
    rows: Sequence[Row], points: Points, medians: Medians, left: Mapping[str, float], fit: Fit
) -> Choice:
    """Return the point with the greatest expected improvement per predicted cost.

    The cost is the largest share of what is left of any total. Of equal points, the first is
    returned.
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


class Ranking:
    """Ranks the points of one study, and caches the hyperparameters of the model of its values.

    Raises:
        ValueError: If the study has several objectives.
    """

    def __init__(self, study: Study, n_candidates: int) -> None:
        directions = study.directions
        if len(directions) > 1:
            raise ValueError(
                "`n_candidates` must be 1 for a study of several objectives, as points are ranked "
                f"by one, but got {n_candidates} and {len(directions)} objectives."
            )
        self.n_candidates = n_candidates
        self._sign = -1.0 if directions[0] == StudyDirection.MAXIMIZE else 1.0
        self._model: ResourceModel | None = None
        self._n_searched = 0
        self._lock = threading.Lock()

    def rows(self, trials: Sequence[FrozenTrial]) -> list[Row]:
        """Return the trials that completed with a value and violate no constraint."""
        return [
            Row(trial.params, trial.distributions, self._sign * trial.values[0])
            for trial in trials
            if trial.state == TrialState.COMPLETE
            and trial.values
            and not math.isnan(trial.values[0])
            and all(each <= 0 for each in _optuna.constraints_of(trial).values())
        ]

    def begin(
        self,
        trials: Sequence[FrozenTrial],
        footprint: BaseFootprint | None,
        left: Mapping[str, float],
        fixed: Mapping[str, Any],
    ) -> RankedTrial | None:
        """Return the criterion that ranks a trial's points, None if too little is known."""
        rows = self.rows(trials) if footprint is not None and left else []
        space = _shared_space(rows)
        if footprint is None or not space:
            return None
        medians = partial(medians_of, footprint)
        recent = [row.params for row in rows[-MIN_COMPLETED:]]
        try:
            n_points = int(min(self.n_candidates, count_within(footprint, _SECONDS, recent)))
            if n_points < 2 or not medians(recent[-1:]).keys() & left.keys():
                return None
        except KeyError:
            # A user's function of a parameter that trials lack.
            return None
        return RankedTrial(self, rows, space, medians, left, fixed, n_points)

    def fit(self, data: ResourceData, n_rows: int) -> ResourceModel:
        with self._lock:
            search = n_rows > _GROWTH * self._n_searched
            self._model = fit_or_refresh(data, self._model, search)
            if search:
                self._n_searched = n_rows
            return self._model


@dataclass(frozen=True)
class RankedTrial:
    ranking: Ranking
    rows: Sequence[Row]
    space: Mapping[str, BaseDistribution]  # of the parameters to draw at once
    medians: Medians
    left: Mapping[str, float]
    fixed: Mapping[str, Any]  # parameters that all of its points have
    n_points: int  # to draw

    def differs_within(self, space: Mapping[str, BaseDistribution]) -> bool:
        """Return whether points of a space are complete and may differ."""
        fixed, varied = self.fixed.keys(), self.space.keys()
        return bool(varied - fixed) and varied <= space.keys() | fixed

    def choose(self, points: Points) -> Choice:
        """Return which point runs: the first if they can't be ranked."""
        same = {n: value_at(d, 0.0) for n, d in self.rows[-1].space.items() if d.single()}
        whole = [{**same, **point, **self.fixed} for point in points]
        try:
            return choose(self.rows, whole, self.medians, self.left, self.ranking.fit)
        except KeyError as missing:
            # A user's function of a parameter that the points lack.
            return Choice(0, f"the footprint needs {missing}")
        except (ArithmeticError, ValueError, np.linalg.LinAlgError) as fault:
            _logger.warning(f"Points could not be ranked: {fault!r}. The first one runs.")
            return Choice(0, "the values have no model")


def _shared_space(rows: Sequence[Row]) -> dict[str, BaseDistribution]:
    """Return the parameters with more than one value; none if recent trials' spaces differed.

    A range that depends on another parameter is known only once that parameter is drawn.
    """
    recent = [row.space for row in rows[-MAX_FITTED:]]
    if len(rows) < MIN_COMPLETED or any(each != recent[-1] for each in recent):
        return {}
    return {name: each for name, each in recent[-1].items() if not each.single()}
