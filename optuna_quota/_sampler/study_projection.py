"""The projection of a study that runs: what is used, and what the rest will use."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
import logging
from typing import Any
from typing import TYPE_CHECKING

from optuna.samplers import QMCSampler
from optuna.samplers import RandomSampler
from optuna.search_space import intersection_search_space

from optuna_quota import _optuna
from optuna_quota._footprint.future_points import simulate_future_points
from optuna_quota._footprint.observations import read_observation
from optuna_quota._footprint.user_given import as_footprint
from optuna_quota._ledger import status
from optuna_quota._projection import project
from optuna_quota._projection import project_end
from optuna_quota._projection import Projection
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota
from optuna_quota._resources import Strategy
from optuna_quota._sampler.candidates import draws_from_a_list
from optuna_quota._sampler.candidates import FEWEST
from optuna_quota.exceptions import StudyRejected


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from optuna_quota._footprint.footprint import BaseFootprint
    from optuna_quota._footprint.footprint import Footprint
    from optuna_quota._footprint.online import Learner


_logger = logging.getLogger("optuna.quota.sampler")

# It is looked at again when there are so many times more trials.
_GROWTH = 1.3


def project_rest(
    study: Study,
    strategy: Strategy,
    learner: Learner,
    given: Any,
    base_sampler: BaseSampler,
    *,
    corrected: Callable[[Footprint | None], BaseFootprint | None],
    quota: Quota,
    limits: Limits,
    confidence: float,
) -> Projection:
    """Return what a study will have used at the end of its strategy.

    Args:
        study: The study.
        strategy: All of it, what ran included.
        learner: What its trials taught.
        given: A footprint that the user stated, in force until eight trials told theirs.
        base_sampler: Says whether the rest is drawn around the newest points.
        corrected: Returns what the user stated as what was learned corrects it, None for neither.
        quota: Its quota.
        limits: Of each trial.
        confidence: The probability that is enough.

    Raises:
        ValueError: If nothing is known of what a trial uses.
    """
    learned = learner.learn(study.get_trials(deepcopy=False), fresh=True)
    trusted = learned is not None and (given is None or learner.n_observations >= FEWEST)
    expected = corrected(learned) or (learned if trusted else given)
    used = used_so_far(study, learner)
    rest = strategy.n_trials - int(used.get("n_trials", 0))
    if rest <= 0:
        return project_end(strategy, used, quota, confidence)
    if expected is None:
        raise ValueError(
            "A running projection must have a footprint or finished trials to go by, but "
            f"{study.study_name!r} has none."
        )
    kind = _optuna.unwrap_partial_fixed(base_sampler)
    adaptive = not draws_from_a_list(kind) and not isinstance(kind, (RandomSampler, QMCSampler))
    rows = learner.observations
    if given is not None and expected is not learned:
        # A user's function may need any parameter; other trials may have ended before theirs.
        rows = [row for row in rows if row.is_complete]
    points = None
    if rows and (strategy.search_space is None or adaptive):
        points = simulate_future_points(rows, rest, adaptive=adaptive)
    return project(
        replace(strategy, n_trials=rest),
        expected,
        quota=quota,
        limits=limits,
        used=used,
        points=points,
        confidence=confidence,
    )


def used_so_far(study: Study, learner: Learner) -> dict[str, float]:
    """Return what a study used, by resource: the ledger's figures, and sums where it has none."""
    used: dict[str, float] = {"n_trials": 0.0}
    for row in learner.observations:
        used["n_trials"] += 1
        for name in ("wall_time", "cpu_time", "gpu_time", "energy"):
            amount = row.usage.get(name)
            if amount is not None:
                total = "trial_time" if name == "wall_time" else name
                used[total] = used.get(total, 0.0) + amount
    used.update({line.resource: line.used for line in status(study).lines})
    return used


class EarlyWarning:
    """Tells once when it has become clear that the quota will not do."""

    def __init__(self) -> None:
        self._looked = 0
        self._told = False

    def is_due(self, usable: int) -> bool:
        """Return whether to look, at a spacing that grows with the trials."""
        if self._told or usable < FEWEST or usable < self._looked * _GROWTH:
            return False
        self._looked = usable
        return True

    def judge(self, projection: Projection) -> bool:
        """Return whether the quota will not do, with the confidence asked for; say so once."""
        if projection.probability > 1 - projection.confidence:
            return False
        self._told = True
        _logger.warning(f"The quota will not do for the rest of the study. {projection}")
        return True


def has_totals(quota: Quota) -> Mapping[str, float]:
    """Return the quotas that a study can outgrow."""
    return {name: value for name, value in quota.totals.items() if name != "n_trials"}


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
    known = (
        row for trial in trials if (row := read_observation(trial)) is not None and row.params
    )
    # Others may have ended before all that a user's function needs was drawn.
    rows = [row for row in known if row.is_complete]
    if all(row.distributions.keys() <= space.keys() for row in rows):
        return None
    return simulate_future_points(rows, n_trials, adaptive=False)


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
