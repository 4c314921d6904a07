"""Projects a study against its quota: rejects it before it starts, warns while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
import logging
import math
from typing import Any, TYPE_CHECKING

from optuna.samplers import QMCSampler, RandomSampler
from optuna.search_space import intersection_search_space

from optuna_quota import _optuna
from optuna_quota._footprint.future_points import simulate_future_points
from optuna_quota._footprint.observations import read_observation
from optuna_quota._footprint.user_given import as_footprint, UnknownFootprintError
from optuna_quota._ledger import status
from optuna_quota._projection import describe_nearest, project, project_end, Projection
from optuna_quota._resources import format_amount, get_resource, Limits, Quota, Strategy
from optuna_quota._sampler.candidates import enumerates_points
from optuna_quota._sampler.study_footprint import MIN_TRIALS, StudyFootprint
from optuna_quota.exceptions import StudyRejected


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial


_logger = logging.getLogger("optuna.quota.sampler")

# The running projection is computed again after this factor more trials.
_GROWTH = 1.3


@dataclass(frozen=True)
class StudyProjection:
    """Projects the rest of a study's strategy.

    Attributes:
        strategy: All trials of the study, including those that ran; None without one.
        stated: What the user stated of each trial; None to learn it from the trials alone.
        base_sampler: Whether it is adaptive decides where the next points are.
        quota: The quota.
        confidence: The probability with which the strategy has to fit.
    """

    strategy: Strategy | None
    stated: Any
    base_sampler: BaseSampler
    quota: Quota
    confidence: float

    def admit(
        self,
        limits: Limits,
        study: Study | None = None,
        footprint: StudyFootprint | None = None,
    ) -> bool:
        """Decide whether the rest of the strategy fits, as soon as enough is known.

        Args:
            limits: The limits on each trial.
            study: The study, once there is one: its trials show the search space.
            footprint: What the trials of a study that is resumed are expected to use: once there
                are enough, they know more than the user stated.

        Returns:
            Whether enough was known to decide.

        Raises:
            StudyRejected: If it does not fit.
        """
        if self.strategy is None or self.stated is None:
            return True
        used = {} if study is None else _used(study)
        rest = self._rest(used)
        if rest is None:
            return True
        trials = [] if study is None else study.get_trials(deepcopy=False)
        if study is not None and footprint is not None and footprint.has_learned(trials):
            return self._admitted(self.project(study, footprint, limits))
        points = None
        if rest.search_space is None and study is not None:
            space = intersection_search_space(trials)
            rest = replace(rest, search_space=space or None)
            points = _conditional_points(space, trials, rest.n_trials)
        if not (rest.search_space or points or as_footprint(self.stated).points):
            # The points to come are not known yet.
            return False
        try:
            return self._admitted(self._project(rest, self.stated, limits, used, points))
        except KeyError as missing:
            # A function of a parameter that no trial has had yet, or that is conditional.
            _logger.debug(f"The strategy is not projected yet: {missing}")
            return False

    def _admitted(self, projection: Projection) -> bool:
        if not projection.fits:
            raise rejection(projection)
        return True

    def project(self, study: Study, footprint: StudyFootprint, limits: Limits) -> Projection:
        """Return what a study will have used at the end of the strategy.

        Args:
            study: The study.
            footprint: What its trials are expected to use. What the user stated holds until eight
                trials have run.
            limits: The limits on each trial.

        Raises:
            ValueError: If there is no strategy, or nothing is known of what a trial uses.
        """
        if self.strategy is None:
            raise ValueError("`strategy` must be given to QuotaSampler to project a study.")
        learner, stated = footprint.learner, footprint.given
        learned = learner.learn(study.get_trials(deepcopy=False), fresh=True)
        trusted = learned is not None and (stated is None or learner.n_observations >= MIN_TRIALS)
        expected = footprint.corrected(learned) or (learned if trusted else stated)
        used = _used(study)
        rest = self._rest(used)
        if rest is None:
            return project_end(self.strategy, used, self.quota, self.confidence)
        if expected is None:
            raise ValueError(
                "A running projection needs a footprint or finished trials, but "
                f"{study.study_name!r} has none."
            )
        rows = learner.observations
        if stated is not None and expected is not learned:
            # Others may have ended before a parameter that a user's function needs.
            rows = [row for row in rows if row.is_complete]
        kind = _optuna.unwrap_partial_fixed(self.base_sampler)
        adaptive = not (enumerates_points(kind) or isinstance(kind, (RandomSampler, QMCSampler)))
        points = None
        if rows and (rest.search_space is None or adaptive):
            points = simulate_future_points(rows, rest.n_trials, adaptive=adaptive)
        return self._project(rest, expected, limits, used, points)

    def _rest(self, used: Mapping[str, float]) -> Strategy | None:
        """Return the strategy of the trials that are left, None without any."""
        assert self.strategy is not None
        n_trials = self.strategy.n_trials - int(used.get("n_trials", 0))
        return replace(self.strategy, n_trials=n_trials) if n_trials > 0 else None

    def _project(
        self,
        rest: Strategy,
        footprint: Any,
        limits: Limits,
        used: Mapping[str, float],
        points: Sequence[Mapping[str, Any]] | None,
    ) -> Projection:
        return project(
            rest,
            footprint,
            quota=self.quota,
            limits=limits,
            used=used,
            points=points,
            confidence=self.confidence,
        )


def rejection(projection: Projection) -> StudyRejected:
    """Return the error of a study that does not fit."""
    worst = projection.unfit[0]
    return StudyRejected(
        str(projection),
        resource=worst.resource,
        quota=worst.quota,
        observed=worst.median,
        projection=projection,
    )


def _used(study: Study) -> dict[str, float]:
    return {line.resource: line.used for line in status(study).lines}


def _conditional_points(
    space: Mapping[str, BaseDistribution], trials: Sequence[FrozenTrial], n_trials: int
) -> Sequence[Mapping[str, Any]] | None:
    """Return points to come where trials had conditional parameters, else None."""
    known = (
        row for trial in trials if (row := read_observation(trial)) is not None and row.params
    )
    # Others may have ended before a parameter that a user's function needs.
    rows = [row for row in known if row.is_complete]
    if all(row.distributions.keys() <= space.keys() for row in rows):
        return None
    return simulate_future_points(rows, n_trials, adaptive=False)


class QuotaWarning:
    """Warns once when the quota of a study is likely to run out."""

    def __init__(self) -> None:
        self._n_trials = 0
        self._warned = False

    def check(self, n_trials: int, project: Callable[[], Projection]) -> Projection | None:
        """Return the projection by which the quota is likely to run out, and warn.

        Args:
            n_trials: Number of measured trials; nothing is done until there are more by a factor.
            project: Projects the study.
        """
        if self._warned or n_trials < max(MIN_TRIALS, self._n_trials * _GROWTH):
            return None
        self._n_trials = n_trials
        try:
            projection = project()
        except (ArithmeticError, LookupError, ValueError) as fault:
            # A user's function that fails was reported before.
            level = logging.DEBUG if isinstance(fault, UnknownFootprintError) else logging.WARNING
            _logger.log(level, f"The rest of the strategy could not be projected: {fault!r}.")
            return None
        if projection.probability > 1 - projection.confidence:
            return None
        self._warned = True
        # Others don't fit with the required confidence, but most likely.
        over = [row for row in projection.unfit if row.median > (row.quota or math.inf)]
        figures = "; ".join(
            f"{format_amount(row.resource, row.median)} projected, "
            f"{format_amount(row.resource, row.quota)} allowed "
            f"({get_resource(row.resource).title})"
            for row in over or projection.unfit
        )
        _logger.warning(
            f"The quota is likely to run out before the study ends: {figures}. "
            f"{describe_nearest(projection)}"
        )
        return projection
