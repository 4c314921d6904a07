"""Filters the points that the base sampler draws: admitted, replaced, or rejected.

The replacement of a refused point was chosen by ``benchmarks/point_admission.py``. With the
nearest admitted point instead of another draw, TPE wastes significantly less and NSGA-II finds
significantly more, and neither is significantly worse. A random search also gains, but is no
longer random, so it draws again; so do samplers that were not compared. GPSampler returns the same
point when asked again. GridSampler and BruteForceSampler enumerate points, and count a point as
visited when its trial ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
from dataclasses import dataclass, field, replace
import logging
import threading
from typing import Any, NoReturn, TypeAlias

import numpy as np
from optuna import samplers
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _optuna
from optuna_quota._footprint.search_space import likely_completions
from optuna_quota._limits import Limits
from optuna_quota._records import Interval, PROPOSED, proposed_object, write_attributes
from optuna_quota._sampler.admission import (
    is_audit_due,
    nearest_admitted,
    PointAdmission,
    PointVerdict,
)
from optuna_quota._sampler.options import OnVeto, SamplerOptions
from optuna_quota._sampler.ranking import RankedTrial, Ranking
from optuna_quota._sampler.row_cleanup import fail_unfinished_trial
from optuna_quota._sampler.study_footprint import Forecast, StudyFootprint
from optuna_quota.exceptions import TrialRejected


_logger = logging.getLogger("optuna.quota.sampler")

_ENUMERATING = (samplers.GridSampler, samplers.BruteForceSampler)
_TAKING_NEAREST = (
    samplers.TPESampler,
    samplers.NSGAIISampler,
    samplers.NSGAIIISampler,
    samplers.GPSampler,
)
# Share of the refused points that is run under the hard limit if trials are isolated.
_AUDIT_SHARE = 0.05
# What was done about a refused point, in its row and in the log.
_ACTIONS = {
    "redrawn": "another one was drawn",
    "moved": "the nearest that fits runs instead",
    "audited": "it runs all the same, to check that",
    "rejected": "the trial does not run",
}
_MAX_REDRAWS = 16
_MAX_PARAM_REDRAWS = 8

Point: TypeAlias = "dict[str, Any]"
Space: TypeAlias = "dict[str, BaseDistribution]"


def replacement_for(sampler: samplers.BaseSampler, on_veto: OnVeto) -> OnVeto:
    """Return what replaces a refused point: ``"redraw"``, ``"nearest"`` or ``"skip"``."""
    if enumerates_points(sampler):
        return "skip"
    if on_veto != "auto":
        return on_veto
    return "nearest" if isinstance(sampler, _TAKING_NEAREST) else "redraw"


def enumerates_points(sampler: samplers.BaseSampler) -> bool:
    return isinstance(sampler, _ENUMERATING)


@dataclass
class _TrialPoint:
    forecast: Forecast = field(default_factory=Forecast)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    base_space: Space = field(default_factory=dict)
    common: Space = field(default_factory=dict)
    space: Space = field(default_factory=dict)
    drawn: Point = field(default_factory=dict)
    rejected: PointVerdict | None = None
    is_audit: bool = False
    ranked: RankedTrial | None = None  # None where the first point runs

    @property
    def admission(self) -> PointAdmission | None:
        return self.forecast.admission

    def judge(self, drawn: Mapping[str, Any]) -> PointVerdict:
        if self.admission is None:
            return PointVerdict(True)
        return self.admission.judge({**drawn, **self.fixed})


class CandidateFilter:
    """Filters the points of one study in this process."""

    def __init__(self, options: SamplerOptions, ranking: Ranking | None) -> None:
        self.footprint = StudyFootprint(options)  # The expected usage of its trials
        self._ranking = ranking
        self._base, self._audits = options.base_sampler, options.audits
        kind = _optuna.unwrap_partial_fixed(self._base)
        self._replacement = replacement_for(kind, options.on_veto)
        # Whether the base sampler walks a fixed list of points.
        self.enumerates = enumerates_points(kind)
        self._keeps_point = _optuna.needs_drawn_point(kind)
        # BruteForceSampler treats an incomplete point as a leaf of its tree.
        self._needs_complete_points = isinstance(kind, samplers.BruteForceSampler)
        self._trials: dict[int, _TrialPoint] = {}
        self._lock = threading.Lock()
        self._n_refusals = self._n_audits = 0
        self._logged = False
        self._generator = np.random.default_rng(0)

    def begin(
        self,
        study: Study,
        trial: FrozenTrial,
        limits: Limits,
        trials: Sequence[FrozenTrial],
        left: Mapping[str, float],
        totals: Mapping[str, float],
    ) -> None:
        """Start a trial; a point that was enqueued completely is judged here.

        ``totals`` is what is left of the study's totals, ``left`` the same near their end.
        """
        forecast = self.footprint.forecast(trials, limits, left)
        enqueued = _optuna.fixed_params_of(trial)
        # A PartialFixedSampler may be inside of ours or around it.
        fixed = {
            **_optuna.partial_fixed_params(self._base),
            **_optuna.partial_fixed_params(study.sampler),
            **enqueued,
        }
        state = _TrialPoint(forecast, fixed, limits)
        self._trials[_optuna.trial_id_of(trial)] = state
        if self._ranking is not None:
            state.ranked = self._ranking.begin(trials, forecast.at_points, totals, fixed)
        admission = state.admission
        if admission is None or not fixed:
            return
        if enqueued and admission.complete is not None:
            # Complete for the first trials, and if a completed trial had the same parameters.
            known = [point.keys() for point in admission.complete]
            if not known or enqueued.keys() in known:
                admission = replace(admission, declared=frozenset(enqueued))
        if not self._can_reject(admission, fixed):
            return
        verdict = admission.judge(fixed)
        if verdict.admitted or self._audit(study, trial, fixed, verdict):
            return

        def reject() -> NoReturn:
            # Where the trial suggests: enqueued parameters do not go through the sampler.
            with fail_unfinished_trial(study, trial):
                raise self._reject(study, trial, fixed, verdict)

        _optuna.raise_on_next_suggest(trial, reject)

    def bounds_at(
        self, trial: FrozenTrial, drawn: Mapping[str, Any], *, is_complete: bool = False
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return upper bounds of a trial's usage at its point, and what to reserve of totals.

        Both are empty until the point is complete, the latter also where nothing is reserved.
        """
        state = self._state(trial)
        point = {**state.drawn, **trial.params, **drawn, **state.fixed}
        bounds = self.footprint.bounds_at(state.forecast, point, is_complete=is_complete)
        if not bounds or not self.reserves(trial):
            return bounds, {}
        return bounds, self.footprint.needs_at(state.forecast, point)

    def reserves(self, trial: FrozenTrial) -> bool:
        """Return whether a trial reserves what its point needs of the study's totals."""
        admission = self._state(trial).admission
        # A learned footprint takes longer to compute, so it is only asked near the totals' end.
        return self.footprint.given is not None or (admission is not None and bool(admission.left))

    def set_left(self, study: Study, trial: FrozenTrial, left: Mapping[str, float]) -> None:
        """Judge the point of a trial again, by what is left of the study's totals."""
        state = self._state(trial)
        trials = study.get_trials(deepcopy=False)
        state.forecast, state.drawn = self.footprint.forecast(trials, state.limits, left), {}
        if state.is_audit:
            # An audit of a refused point is dropped.
            state.is_audit = False
            with self._lock:
                self._n_refusals -= 1
                self._n_audits -= 1
            storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
            write_attributes(storage, trial_id, user={PROPOSED: None})

    def relative_space(self, trial: FrozenTrial, space: Space) -> Space:
        """Return the parameters to draw together: the base sampler's, and those of all trials.

        A point is judged as a whole, so parameters that the base sampler would draw one by one are
        drawn in advance.
        """
        state = self._state(trial)
        state.base_space = space
        ranked = {} if state.ranked is None else state.ranked.space
        common = {} if state.admission is None else state.admission.common_space()
        state.common = {**common, **ranked}
        added = {**({} if self._replacement == "skip" else common), **ranked}.items()
        more = {n: each for n, each in added if n not in space and not each.single()}
        return {**space, **more}

    def sample_relative(self, study: Study, trial: FrozenTrial, space: Space) -> Point:
        """Return an admitted point; raise TrialRejected if there is none."""
        state = self._state(trial)
        admission = state.admission
        if not space or (admission is None and state.ranked is None):
            return self._base.sample_relative(study, trial, space)
        state.space = dict(space)
        # A PartialFixedSampler around ours has taken out what it fixes.
        state.base_space = {n: each for n, each in state.base_space.items() if n in space}
        first = self._draw(study, trial)
        verdict = state.judge(first)
        if not verdict.admitted and self._audit(study, trial, first, verdict):
            state.drawn = first
            return first
        found, action = self._choose(study, trial, first, verdict), "redrawn"
        if found is None and admission is not None:
            found, action = self._replace(study, trial, admission, first)
        if found is None:
            raise self._reject(study, trial, first, verdict)
        if not verdict.admitted:
            self._record(study, trial, first, verdict, action)
        state.drawn = found
        return found

    def sample_independent(
        self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        """Return a value with which the point is admitted; raise TrialRejected if none is."""

        def draw() -> Any:
            return self._base.sample_independent(study, trial, name, distribution)

        state, value = self._state(trial), draw()
        admission = state.admission
        if admission is None or state.is_audit:
            return value
        known = {**state.drawn, **trial.params, **state.fixed}
        first = {**known, name: value}
        if not self._can_reject(admission, first):
            return value
        verdict = admission.judge(first)
        if verdict.admitted or self._audit(study, trial, first, verdict):
            return value
        if self._replacement != "skip":
            for _ in range(_MAX_PARAM_REDRAWS):
                other = draw()
                if admission.judge({**known, name: other}).admitted:
                    self._record(study, trial, first, verdict, "redrawn")
                    return other
            if not self._keeps_point:
                near = nearest_admitted(
                    admission, first, {name: distribution}, known, self._generator
                )
                if near is not None:
                    self._record(study, trial, first, verdict, "moved")
                    return near[name]
        state.space[name] = distribution
        raise self._reject(study, trial, first, verdict)

    def finish(
        self, trial: FrozenTrial, *, completed: bool
    ) -> tuple[PointVerdict | None, dict[str, Interval], dict[str, float]]:
        """Remove a trial; return its rejection, projected usage, and the medians if rejected."""
        state = self._trials.pop(_optuna.trial_id_of(trial), None)
        if state is None or state.forecast.expected is None:
            return None, {}, {}
        intervals: Mapping[str, Interval] = {}
        # A completed trial has no parameters but those that it suggested.
        params = trial.params if completed else {**state.drawn, **trial.params}
        if completed or self.footprint.is_complete(params):
            # Where a user's function fails or returns no Usage, what the trial used is recorded
            # nevertheless; the next trial raises the latter.
            with contextlib.suppress(KeyError, TypeError):
                intervals = state.forecast.expected.intervals(params)
        if state.rejected is None:
            return None, dict(intervals), {}
        medians = {name: each.median for name, each in intervals.items()}
        if state.rejected.resource is not None and state.rejected.median is not None:
            medians.setdefault(state.rejected.resource, state.rejected.median)
        return state.rejected, dict(intervals), medians

    def _state(self, trial: FrozenTrial) -> _TrialPoint:
        # Another process may have asked for the trial, or it began before the sampler was copied.
        return self._trials.setdefault(_optuna.trial_id_of(trial), _TrialPoint())

    def _can_reject(self, admission: PointAdmission, point: Mapping[str, Any]) -> bool:
        """Return whether a row may end with only these parameters."""
        past, declared = admission.past, admission.declared
        if not self._needs_complete_points or (declared and declared <= point.keys()):
            return True
        return bool(past) and likely_completions(point, past) == [point]

    def _draw(self, study: Study, trial: FrozenTrial) -> Point:
        """Draw a whole point; parameters that the base sampler omits are drawn one by one."""
        state = self._state(trial)
        drawn = dict(self._base.sample_relative(study, trial, state.base_space))
        # In the order of suggestion, so that a seed gives the values that it gives without limits.
        # Conditional parameters are omitted: the trial may never suggest them.
        for name in state.common:
            if name in state.space and name not in drawn and name not in state.fixed:
                distribution = state.space[name]
                drawn[name] = self._base.sample_independent(study, trial, name, distribution)
        return drawn

    def _choose(
        self, study: Study, trial: FrozenTrial, first: Point, verdict: PointVerdict
    ) -> Point | None:
        """Return the first point if it is admitted, or with ranking the best admitted one."""
        state, last = self._state(trial), first
        admitted = [first] if verdict.admitted else []
        if state.ranked is not None and state.ranked.differs_within(state.space):
            for _ in range(state.ranked.n_points - 1):
                last = self._draw(study, trial)
                if state.judge(last).admitted:
                    admitted.append(last)
        if not admitted:
            return None
        index = 0
        if state.ranked is not None and len(admitted) > 1:
            index, reason = state.ranked.choose(admitted)
            _logger.debug(f"Trial {trial.number}: point {index} of {len(admitted)} {reason}.")
        if admitted[index] is not last:
            self._share(study, trial, admitted[index])
        return admitted[index]

    def _share(self, study: Study, trial: FrozenTrial, point: Point) -> None:
        """Tell the base sampler which point runs, unless it drew that point last."""
        base_space = self._state(trial).base_space
        relative = {name: point[name] for name in base_space if name in point}
        _optuna.share_relative_params(_optuna.unwrap_study(study), trial, relative)

    def _replace(
        self, study: Study, trial: FrozenTrial, admission: PointAdmission, first: Point
    ) -> tuple[Point | None, str]:
        """Return an admitted point instead of the first one, and how it was found."""
        state, last = self._state(trial), first
        for _ in range(_MAX_REDRAWS if self._replacement == "redraw" else 0):
            before, last = last, self._draw(study, trial)
            if state.judge(last).admitted:
                return last, "redrawn"
            if last == before:
                # The sampler draws the same point again.
                break
        if self._replacement == "skip" or self._keeps_point:
            return None, ""
        near = nearest_admitted(admission, last, state.space, state.fixed, self._generator)
        if near is not None:
            self._share(study, trial, near)
        return near, "moved"

    def _audit(
        self, study: Study, trial: FrozenTrial, point: Point, verdict: PointVerdict
    ) -> bool:
        """Count a refusal; return whether to run the point nevertheless, as an audit."""
        if verdict.by_quota:
            return False
        share = self._audits
        if share is None:
            share = _AUDIT_SHARE if self.footprint.learner.isolated else 0.0
        with self._lock:
            self._n_refusals += 1
            due = is_audit_due(self._n_refusals, self._n_audits, share)
            self._n_audits += due
        if due:
            self._state(trial).is_audit = True
            self._record(study, trial, point, verdict, "audited")
        return due

    def _reject(
        self, study: Study, trial: FrozenTrial, point: Point, verdict: PointVerdict
    ) -> TrialRejected:
        """Complete the row of a trial that is not run, and return the error to raise."""
        state = self._state(trial)
        state.rejected, state.drawn = verdict, {**point, **state.fixed}
        self._write_params(study, trial)
        self._record(study, trial, state.drawn, verdict, "rejected")
        return TrialRejected(
            verdict.reason,
            resource=verdict.resource,
            limit=verdict.limit,
            observed=verdict.median,
            probability=verdict.probability,
        )

    def _write_params(self, study: Study, trial: FrozenTrial) -> None:
        """Write the parameters of a rejected trial into its row.

        They show enumerating samplers what was visited; without them, TPESampler's intersection
        search space would be empty.
        """
        state, whole = self._state(trial), _optuna.unwrap_study(study)
        earlier = {} if state.admission is None else state.admission.space
        point, space = state.drawn, {**earlier, **state.space}
        # In the order of earlier rows, which is the path in BruteForceSampler's tree.
        for name in space:
            if name in trial.params or name not in point:
                continue
            try:
                _optuna.write_param(whole, trial, name, point[name], space[name])
            except ValueError as fault:
                # An enqueued value outside of the range that earlier trials had.
                _logger.debug(f"Trial {trial.number}: {name} is not in the row: {fault}")

    def _record(
        self, study: Study, trial: FrozenTrial, point: Point, verdict: PointVerdict, action: str
    ) -> None:
        """Write a refused point into the row, and log the first one of the study."""
        proposed = proposed_object(
            point, action, verdict.probability, verdict.resource, verdict.limit, verdict.median
        )
        storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
        write_attributes(storage, trial_id, user={PROPOSED: proposed})
        with self._lock:
            logged, self._logged = self._logged, True
        text = f"Trial {trial.number}: the point drawn was refused; {_ACTIONS[action]}."
        if logged:
            _logger.debug(f"{text} {verdict.reason}")
        else:
            later = f"Later ones are only recorded in {PROPOSED!r}."
            _logger.info(f"{text} {verdict.reason} {later}")
