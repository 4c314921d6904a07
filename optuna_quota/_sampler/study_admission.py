"""Will the study fit its quota? Asked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
import logging
from typing import Any
from typing import TYPE_CHECKING

from optuna.search_space import intersection_search_space

from optuna_quota._footprint.given import as_footprint
from optuna_quota._footprint.rows import footprint_row
from optuna_quota._footprint.whereabouts import points_to_come
from optuna_quota._projection import project
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota
from optuna_quota._resources import Strategy
from optuna_quota.exceptions import StudyRejected


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from optuna_quota._projection import Projection


_logger = logging.getLogger("optuna.quota.sampler")


class StudyAdmission:
    """Decides once whether a strategy fits a quota, as soon as enough is known.

    Args:
        quota: The quota.
        strategy: What is about to run; None decides nothing.
        footprint: What each trial is expected to use; None decides nothing.
        confidence: The probability with which it has to fit.
    """

    def __init__(
        self, quota: Quota, strategy: Strategy | None, footprint: Any, confidence: float
    ) -> None:
        self._quota = quota
        self._strategy = strategy
        self._footprint = footprint
        self._confidence = confidence

    def decide(
        self, limits: Limits, study: Study | None = None, used: Mapping[str, float] | None = None
    ) -> bool:
        """Return whether enough was known to decide.

        Args:
            limits: The limits on each trial.
            study: The study, once there is one: its trials tell the search space.
            used: What it used so far, by resource; the trials that ran are those of the strategy.

        Raises:
            StudyRejected: If the rest of the strategy does not fit.
        """
        if self._strategy is None or self._footprint is None:
            return True
        rest = self._strategy.n_trials - int((used or {}).get("n_trials", 0))
        if rest <= 0:
            return True
        strategy, points = replace(self._strategy, n_trials=rest), None
        if strategy.search_space is None and study is not None:
            trials = study.get_trials(deepcopy=False)
            space = intersection_search_space(trials)
            strategy = replace(strategy, search_space=space or None)
            points = _points_beyond(space, trials, rest)
        known = strategy.search_space or points or as_footprint(self._footprint).points
        if not known:
            # Nobody knows yet where the study will go.
            return False
        try:
            projection = project(
                strategy,
                self._footprint,
                quota=self._quota,
                limits=limits,
                used=used,
                points=points,
                confidence=self._confidence,
            )
        except KeyError as missing:
            # A function of a parameter that trials have not shown, or that hangs on others.
            _logger.debug(f"The strategy is not projected yet: {missing}")
            return False
        if not projection.fits:
            raise rejection(projection)
        return True


def _points_beyond(
    space: Mapping[str, BaseDistribution], trials: Sequence[FrozenTrial], n_trials: int
) -> Sequence[Mapping[str, Any]] | None:
    """Return points as they will be drawn where some parameters hang on others, else None."""
    known = (row for trial in trials if (row := footprint_row(trial)) is not None and row.params)
    # Others may have ended before all that a user's function needs was drawn.
    rows = [row for row in known if row.whole]
    if all(row.distributions.keys() <= space.keys() for row in rows):
        return None
    return points_to_come(rows, n_trials, adaptive=False)


def rejection(projection: Projection) -> StudyRejected:
    """Return the error that says what does not fit."""
    worst = projection.unfit[0]
    return StudyRejected(
        str(projection),
        resource=worst.resource,
        quota=worst.quota,
        observed=worst.median,
        projection=projection,
    )
