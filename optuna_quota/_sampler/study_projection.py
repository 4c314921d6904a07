"""Projects a study against its quota: rejects it before it starts, warns while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
import logging
import math
import sys
from typing import Any, get_args, Literal

from optuna.distributions import BaseDistribution
from optuna.samplers import QMCSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _optuna
from optuna_quota._enforcement.study_warnings import note_topics
from optuna_quota._footprint.observations import read_observation
from optuna_quota._footprint.search_space import simulate_future_points
from optuna_quota._footprint.user_given import as_footprint, UnknownFootprintError
from optuna_quota._ledger.status import status
from optuna_quota._limits import Limits, Strategy
from optuna_quota._projection.projection import (
    describe_nearest,
    describe_probability,
    ProjectedResource,
    Projection,
)
from optuna_quota._projection.simulation import project, project_end
from optuna_quota._resources import format_amount, get_resource
from optuna_quota._sampler.candidates import enumerates_points
from optuna_quota._sampler.options import SamplerOptions
from optuna_quota._sampler.study_footprint import MIN_TRIALS, StudyFootprint
from optuna_quota.exceptions import StudyRejected


_logger = logging.getLogger("optuna.quota.sampler")

# Without a stated footprint, the first running projection comes after this many trials, and the
# next ones when their number has grown by this factor.
_FIRST_TRIALS = 5
_GROWTH = 1.3


def admit_strategy(
    options: SamplerOptions,
    limits: Limits,
    study: Study | None = None,
    footprint: StudyFootprint | None = None,
) -> bool:
    """Raise StudyRejected if the rest of the strategy does not fit; return if enough is known.

    Trials of a resumed study show the search space, and enough of them the footprint.
    """
    stated = options.footprint
    if options.strategy is None or stated is None:
        return True
    used = {} if study is None else _used(study, options)
    rest = _rest(options.strategy, used)
    if rest is None:
        return True
    trials = [] if study is None else study.get_trials(deepcopy=False)
    if study is not None and footprint is not None and footprint.has_learned(trials):
        projection = project_study(options, limits, study, footprint)
    else:
        points = None
        if rest.search_space is None and study is not None:
            space = intersection_search_space(trials)
            rest = replace(rest, search_space=space or None)
            points = _conditional_points(space, trials, rest.n_trials)
        if not (rest.search_space or points or as_footprint(stated).points):
            # Future points are not known yet.
            return False
        try:
            projection = _project(options, rest, stated, limits, used, points)
        except KeyError as missing:
            # A function of a parameter that no trial had so far, or that is conditional.
            _logger.debug(f"The strategy is not projected yet: {missing}")
            return False
    if not projection.fits:
        raise rejection(projection)
    return True


def project_study(
    options: SamplerOptions, limits: Limits, study: Study, footprint: StudyFootprint
) -> Projection:
    """Return what a study will have used at the end of the strategy.

    A footprint that the user stated is used until eight trials have run.

    Raises:
        ValueError: If there is no strategy, or nothing is known of what a trial uses.
    """
    if options.strategy is None:
        raise ValueError("`strategy` must be given to QuotaSampler to project a study.")
    learner, stated = footprint.learner, footprint.given
    learned = learner.learn(study.get_trials(deepcopy=False), fresh=True)
    trusted = learned is not None and (stated is None or learner.n_observations >= MIN_TRIALS)
    expected = footprint.corrected(learned) or (learned if trusted else stated)
    used = _used(study, options)
    rest = _rest(options.strategy, used)
    if rest is None:
        return project_end(options.strategy, used, options.quota, options.confidence)
    if expected is None:
        raise ValueError(
            "A running projection needs a footprint or finished trials, but "
            f"{study.study_name!r} has none."
        )
    rows = learner.observations
    if stated is not None and expected is not learned:
        # Others may lack a parameter that a user's function needs.
        rows = [row for row in rows if row.is_complete]
    kind = _optuna.unwrap_partial_fixed(options.base_sampler)
    adaptive = not (enumerates_points(kind) or isinstance(kind, (RandomSampler, QMCSampler)))
    points = None
    if rows and (rest.search_space is None or adaptive):
        points = simulate_future_points(rows, rest.n_trials, adaptive=adaptive)
    return _project(options, rest, expected, limits, used, points)


def _project(
    options: SamplerOptions,
    rest: Strategy,
    footprint: Any,
    limits: Limits,
    used: Mapping[str, float],
    points: Sequence[Mapping[str, Any]] | None,
) -> Projection:
    return project(
        rest,
        footprint,
        quota=options.quota,
        limits=limits,
        used=used,
        points=points,
        confidence=options.confidence,
    )


def _rest(strategy: Strategy, used: Mapping[str, float]) -> Strategy | None:
    n_trials = strategy.n_trials - int(used.get("n_trials", 0))
    return replace(strategy, n_trials=n_trials) if n_trials > 0 else None


def rejection(projection: Projection) -> StudyRejected:
    worst = projection.unfit[0]
    return StudyRejected(
        str(projection),
        resource=worst.resource,
        quota=worst.quota,
        observed=worst.median,
        projection=projection,
    )


def _used(study: Study, options: SamplerOptions) -> dict[str, float]:
    # Not by the study's quota: this worker's may have other prices while others run.
    found = status(study, quota=options.quota)
    # A sum of huge amounts is infinite, its cost at a price of 0 no number.
    most = sys.float_info.max
    return {n.resource: n.used if n.used < most else most for n in found.lines}


def _conditional_points(
    space: Mapping[str, BaseDistribution], trials: Sequence[FrozenTrial], n_trials: int
) -> Sequence[Mapping[str, Any]] | None:
    """Return future points if trials had conditional parameters, else None."""
    known = (
        row for trial in trials if (row := read_observation(trial)) is not None and row.params
    )
    # Others may have ended before a parameter that a user's function needs.
    rows = [row for row in known if row.is_complete]
    if all(row.distributions.keys() <= space.keys() for row in rows):
        return None
    return simulate_future_points(rows, n_trials, adaptive=False)


Outlook = Literal["fits", "uncertain", "unlikely", "hopeless"]
_WORSENING: tuple[Outlook, ...] = get_args(Outlook)


def outlook_of(projection: Projection) -> Outlook:
    """Return whether a strategy fits: surely, most likely, most likely not, or surely not."""
    if projection.fits:
        return "fits"
    if projection.probability >= 0.5:
        return "uncertain"
    surely_not = projection.probability <= 1 - projection.confidence
    return "hopeless" if surely_not else "unlikely"


class QuotaOutlook:
    """Logs early what a study will most likely use of its quota, and again if that gets worse.

    If it ``learns`` from trials alone, first after the fifth trial, else after the eighth. Logs
    again for another ``plan``.
    """

    def __init__(self, plan: object = None, *, learns: bool = True) -> None:
        self._plan = plan
        self._next = _FIRST_TRIALS if learns else MIN_TRIALS
        self._found = False

    def check(
        self, study: Study, n_trials: int, project: Callable[[], Projection]
    ) -> Projection | None:
        """Log what a study will most likely use, if that is due and worse than before.

        It is due when the number of measured trials has grown by a factor. Returns, once, the
        projection by which the quota is likely to run out.
        """
        if self._found or n_trials < self._next:
            return None
        self._next = max(MIN_TRIALS, math.ceil(n_trials * _GROWTH))
        try:
            projection = project()
        except (ArithmeticError, LookupError, ValueError) as fault:
            # A user's function that fails was reported before.
            level = logging.DEBUG if isinstance(fault, UnknownFootprintError) else logging.WARNING
            _logger.log(level, f"The rest of the strategy could not be projected: {fault!r}.")
            return None
        outlook = outlook_of(projection)
        # Better outlooks are not logged later.
        better = _WORSENING[: _WORSENING.index(outlook) + 1]
        if note_topics(study, *(f"{each} of {self._plan}" for each in better)):
            level = logging.WARNING if outlook in ("unlikely", "hopeless") else logging.INFO
            _logger.log(level, describe_outlook(projection, outlook, n_trials))
        self._found = outlook == "hopeless" and n_trials >= MIN_TRIALS
        return projection if self._found else None


def describe_outlook(projection: Projection, outlook: Outlook, n_trials: int) -> str:
    judged = [r for r in projection.resources if r.probability is not None]
    if outlook in ("fits", "uncertain"):
        shown = [r for r in judged if r.resource != "n_trials"]
        figures = ", ".join(
            f"{_expected(row)} of {format_amount(row.resource, row.quota)} "
            f"({get_resource(row.resource).title})"
            for row in shown
        )
        return (
            f"After {n_trials} trials, the whole strategy is projected to use {figures}; "
            f"probability that it fits: {describe_probability(projection)}."
        )
    # Others fit most likely, but not with the required confidence.
    over = [row for row in projection.unfit if row.median > (row.quota or math.inf)]
    figures = "; ".join(
        f"{_expected(row)} projected, {format_amount(row.resource, row.quota)} allowed "
        f"({get_resource(row.resource).title})"
        for row in over or projection.unfit
    )
    return (
        f"The quota is likely to run out before the study ends: {figures}. "
        f"{describe_nearest(projection)}"
    )


def _expected(row: ProjectedResource) -> str:
    lower, median, upper = (
        format_amount(row.resource, amount) for amount in (row.lower, row.median, row.upper)
    )
    return f"{median} ({lower} to {upper})"
