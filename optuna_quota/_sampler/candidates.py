"""Points between the base sampler and the trial: admitted, replaced, or not run."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import logging
import threading
from typing import Any
from typing import get_args
from typing import Literal
from typing import NoReturn
from typing import TYPE_CHECKING

import numpy as np
from optuna.samplers import BaseSampler
from optuna.samplers import BruteForceSampler
from optuna.samplers import GPSampler
from optuna.samplers import GridSampler
from optuna.samplers import NSGAIIISampler
from optuna.samplers import NSGAIISampler
from optuna.samplers import TPESampler

from optuna_quota import _optuna
from optuna_quota._footprint.footprint import BaseFootprint
from optuna_quota._footprint.footprint import Footprint
from optuna_quota._footprint.online import Learner
from optuna_quota._footprint.search_space import certain_completions
from optuna_quota._footprint.search_space import likely_completions
from optuna_quota._footprint.user_given import as_footprint
from optuna_quota._footprint.user_given import FootprintCalibrator
from optuna_quota._footprint.user_given import UserFootprint
from optuna_quota._records import Interval
from optuna_quota._records import PROPOSED
from optuna_quota._records import proposed_object
from optuna_quota._records import write_attributes
from optuna_quota._resources import Limits
from optuna_quota._resources import Usage
from optuna_quota._sampler.admission import audit_is_due
from optuna_quota._sampler.admission import Gate
from optuna_quota._sampler.admission import PointVerdict
from optuna_quota._sampler.nearest_point import nearest_admitted
from optuna_quota._sampler.row_cleanup import none_left_running
from optuna_quota.exceptions import TrialRejected


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial


_logger = logging.getLogger("optuna.quota.sampler")

# Trials that told something before the first point is refused.
FEWEST = 8
_FEWEST_WHOLE = 3
# Of the trials that ran isolated, this share of the refused points is run under the hard limit.
AUDITED = 0.05
_PAST = 200
_DRAWS = 16
_DRAWS_OF_ONE = 8
# Points of past trials that tell what one to come will hold at most.
_PROMISED = 30
# A learned bound is exceeded now and then: what it promises has room for that, which a trial asks
# for more before it uses up.
_MARGIN = 1.1


@dataclass(frozen=True)
class Rules:
    """How points are admitted.

    Attributes:
        footprint: What a user gave; None to learn from the study alone.
        confidence: One-sided, of the bounds.
        threshold: The probability of a breach above which a point is refused.
        on_veto: What replaces it.
        audits: Share of the refused points that is run; None for 5% where trials are isolated.
        declared: All parameters, where the user said which they are.
    """

    footprint: Any = None
    confidence: float = 0.95
    threshold: float = 0.5
    on_veto: OnVeto = "auto"
    audits: float | None = None
    declared: frozenset[str] | None = None


@dataclass
class _Trial:
    """One trial as its point is drawn."""

    gate: Gate | None
    expected: BaseFootprint | None
    fixed: Mapping[str, Any]
    base_space: dict[str, BaseDistribution] = field(default_factory=dict)
    space: dict[str, BaseDistribution] = field(default_factory=dict)
    drawn: dict[str, Any] = field(default_factory=dict)
    rejected: PointVerdict | None = None
    exempt: bool = False
    is_known: bool = False


@dataclass(frozen=True)
class _Call:
    """What Optuna calls for: the row as it is now, and what is known since it began."""

    study: Study
    trial: FrozenTrial
    state: _Trial


class Proposals:
    """The points of one study in this process.

    Args:
        base_sampler: Draws them.
        rules: How they are admitted.
    """

    def __init__(self, base_sampler: BaseSampler, rules: Rules) -> None:
        earlier = rules.footprint if isinstance(rules.footprint, Footprint) else None
        given = None if rules.footprint is None or earlier else as_footprint(rules.footprint)
        self.learner = Learner(earlier, confidence=rules.confidence)
        self._earlier, self._given = earlier, given
        self._calibrator = None
        if isinstance(given, UserFootprint) and not isinstance(given.usage, Usage):
            self._calibrator = FootprintCalibrator(given)
        self._base, self._rules = base_sampler, rules
        self._kind = _optuna.unwrap_partial_fixed(base_sampler)
        self._trials: dict[int, _Trial] = {}
        self._lock = threading.Lock()
        self._vetoes = self._audits = 0
        self._told = False
        self._generator = np.random.default_rng(0)
        # What is known before a trial's point is, and the bounds by it of all that may come.
        self._known: BaseFootprint | None = earlier or given
        self._bounds: tuple[BaseFootprint, dict[str, float]] | None = None

    @property
    def given(self) -> BaseFootprint | None:
        """What the user stated of each trial."""
        return self._given

    def corrected(self, learned: Footprint | None) -> BaseFootprint | None:
        """Return what the user stated as the study's trials correct it, None before they do."""
        if self._calibrator is None or learned is None or not self._knows_enough():
            return None
        try:
            return self._calibrator.calibrate(learned, self.learner.observations)
        except (ArithmeticError, ValueError, np.linalg.LinAlgError) as fault:
            _logger.warning(f"The footprint given could not be corrected: {fault!r}.")
            return None

    def begin(
        self, study: Study, trial: FrozenTrial, limits: Limits, trials: Sequence[FrozenTrial]
    ) -> None:
        """Fix what decides about a trial; one that is enqueued as a whole is decided here.

        Args:
            study: The study.
            trial: The trial.
            limits: The limits on it.
            trials: All trials of the study by number, as its admission read them.
        """
        learned = self._learn(trials)
        expected = self.corrected(learned) or self._given or learned
        # The same for all points tells none from another: the study's own trials have to.
        judge = learned if isinstance(self._rules.footprint, Usage) else expected
        known = self._calibrator or judge is self._given or self._earlier or self._knows_enough()
        gate = None
        if judge is not None and known and limits and self._rules.threshold < 1:
            past = [row.params for row in self.learner.observations[-_PAST:]]
            gate = Gate(
                judge,
                limits,
                past,
                self.learner.space,
                self._rules.threshold,
                whole=None if self._calibrator is None else self._whole(),
                declared=self._rules.declared,
            )
        # A PartialFixedSampler may stand inside of ours or around it.
        fixed = {
            **_optuna.partial_fixed_params(self._base),
            **_optuna.partial_fixed_params(study.sampler),
            **_optuna.fixed_params_of(trial),
        }
        self._known = expected if known else None
        state = _Trial(gate, expected, fixed, is_known=bool(known))
        self._trials[_optuna.trial_id_of(trial)] = state
        enqueued = _optuna.fixed_params_of(trial).keys()
        if gate is not None and enqueued and _may_be_all(enqueued, gate.whole):
            gate = replace(gate, declared=frozenset(enqueued))
        if gate is not None and fixed and self._may_end_at(gate, fixed):
            call, verdict = _Call(study, trial, state), gate.judge(fixed)
            if not verdict.admitted and not self._is_audit(call, fixed, verdict):
                _optuna.raise_on_next_suggest(trial, lambda: self._refuse(call, fixed, verdict))

    def bounds(self, held: Mapping[str, float], fixed: Mapping[str, Any]) -> dict[str, float]:
        """Return upper bounds of what a trial will hold that starts now, where that is known.

        Args:
            held: What all trials may hold at one moment, by resource: no bound is more.
            fixed: What it was enqueued with; as a whole it tells the point.
        """
        expected, rows = self._known, self.learner.observations[-_PROMISED:]
        if expected is None or not held:
            return {}
        if fixed and likely_completions(fixed, [row.params for row in rows]) == [fixed]:
            found = _uppers(expected, [fixed])
        elif self._bounds is not None and self._bounds[0] is expected:
            found = self._bounds[1]
        else:
            points = [row.params for row in rows]
            if not points and not isinstance(expected, UserFootprint):
                points = list(expected.points[-_PROMISED:])
            found = _uppers(expected, points)
            self._bounds = expected, found
        return {name: min(found[name], most) for name, most in held.items() if name in found}

    def bounds_at(self, trial: FrozenTrial, drawn: Mapping[str, Any]) -> dict[str, float]:
        """Return upper bounds of what a trial will use by its point; nothing until it is whole.

        Args:
            trial: The trial.
            drawn: What was drawn of its point now.
        """
        state = self._state(trial)
        if state.expected is None or not state.is_known:
            return {}
        point = {**state.drawn, **trial.params, **drawn, **state.fixed}
        past = [row.params for row in self.learner.observations[-_PAST:]]
        if not point or (past and likely_completions(point, past) != [point]):
            return {}
        return _uppers(state.expected, [point])

    def _refuse(self, call: _Call, point: Mapping[str, Any], verdict: PointVerdict) -> NoReturn:
        """End a trial where it suggests; no hook is asked for what it was enqueued with."""
        with none_left_running(call.study, call.trial):
            raise self._rejected(call, point, verdict)

    def relative_space(
        self, study: Study, trial: FrozenTrial, space: dict[str, BaseDistribution]
    ) -> dict[str, BaseDistribution]:
        """Return the space to draw at once: the base sampler's, and what all trials have.

        A point is admitted as a whole, so that what the base sampler would draw one by one is
        drawn before it is judged.
        """
        state = self._state(trial)
        state.base_space = space
        if state.gate is None or replacement_for(self._kind, self._rules.on_veto) == "skip":
            return space
        common = state.gate.common_space()
        more = {n: each for n, each in common.items() if n not in space and not each.single()}
        return {**space, **more}

    def relative(
        self, study: Study, trial: FrozenTrial, space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a point of the space that may run."""
        state = self._state(trial)
        if state.gate is None or not space:
            return self._base.sample_relative(study, trial, space)
        state.space = dict(space)
        # A PartialFixedSampler around ours has taken out what it fixes.
        state.base_space = {n: each for n, each in state.base_space.items() if n in space}
        call = _Call(study, trial, state)
        first = self._draw(call, space)
        verdict = state.gate.judge({**first, **state.fixed})
        if verdict.admitted or self._is_audit(call, first, verdict):
            state.drawn = first
            return first
        found, how = self._replaced(call, space, first)
        if found is None:
            raise self._rejected(call, first, verdict)
        self._note(call, first, verdict, how)
        state.drawn = found
        return found

    def independent(
        self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        """Return a value of one parameter with which the point may run."""

        def draw() -> Any:
            return self._base.sample_independent(study, trial, name, distribution)

        state, value = self._state(trial), draw()
        if state.gate is None or state.exempt:
            return value
        known = {**state.drawn, **trial.params, **state.fixed}
        first = {**known, name: value}
        if not self._may_end_at(state.gate, first):
            return value
        call, verdict = _Call(study, trial, state), state.gate.judge(first)
        if verdict.admitted or self._is_audit(call, first, verdict):
            return value
        if replacement_for(self._kind, self._rules.on_veto) != "skip":
            for _ in range(_DRAWS_OF_ONE):
                other = draw()
                if state.gate.judge({**known, name: other}).admitted:
                    self._note(call, first, verdict, "redrawn")
                    return other
        state.space[name] = distribution
        raise self._rejected(call, first, verdict)

    def finish(
        self, trial: FrozenTrial, *, completed: bool
    ) -> tuple[dict[str, Interval], dict[str, float]]:
        """Return what was projected of a trial before it ran, and the medians if it was rejected.

        Args:
            trial: Its row, with its parameters.
            completed: Whether it completed, so that no parameter is missing.
        """
        state = self._trials.pop(_optuna.trial_id_of(trial), None)
        if state is None or state.expected is None:
            return {}, {}
        intervals: Mapping[str, Interval] = {}
        # What was drawn and not suggested is no parameter of a trial that completed.
        params = trial.params if completed else {**state.drawn, **trial.params}
        if completed or self._calibrator is None or self._is_whole(params):
            with contextlib.suppress(KeyError):
                intervals = state.expected.intervals(params)
        if state.rejected is None:
            return dict(intervals), {}
        medians = {name: each.median for name, each in intervals.items()}
        if state.rejected.resource is not None and state.rejected.median is not None:
            medians.setdefault(state.rejected.resource, state.rejected.median)
        return dict(intervals), medians

    def rejection(self, trial: FrozenTrial) -> PointVerdict | None:
        """Return why a trial was not run, None when it was."""
        state = self._trials.get(_optuna.trial_id_of(trial))
        return None if state is None else state.rejected

    def _learn(self, trials: Sequence[FrozenTrial]) -> Footprint | None:
        try:
            return self.learner.learn(trials)
        except (ArithmeticError, ValueError, TypeError, np.linalg.LinAlgError) as fault:
            # The study is worth more than its projection.
            _logger.warning(f"The footprint could not be learned: {fault!r}.")
            return None

    def _whole(self) -> list[Mapping[str, Any]]:
        """Return the points of the newest trials that completed."""
        return [row.params for row in self.learner.observations[-_PAST:] if row.is_complete]

    def _is_whole(self, params: Mapping[str, Any]) -> bool:
        declared = self._rules.declared
        known = declared is not None and declared <= params.keys()
        return known or certain_completions(params, self._whole())[-1:] == [params]

    def _may_end_at(self, gate: Gate, point: Mapping[str, Any]) -> bool:
        """Return whether a row may hold no more than this point."""
        if not needs_whole_points(self._kind):
            return True
        return bool(gate.past) and likely_completions(point, gate.past) == [point]

    def _knows_enough(self) -> bool:
        # Where next to all trials were stopped, nothing says yet that others would not be.
        return self.learner.n_observations >= FEWEST and self.learner.n_uncensored >= _FEWEST_WHOLE

    def _state(self, trial: FrozenTrial) -> _Trial:
        # A trial that another process asked for, or one begun before a copy of the sampler.
        return self._trials.setdefault(_optuna.trial_id_of(trial), _Trial(None, None, {}))

    def _draw(self, call: _Call, space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """Return a whole point: what the base sampler leaves open is drawn one by one."""
        study, trial = call.study, call.trial
        drawn = dict(self._base.sample_relative(study, trial, call.state.base_space))
        for name, distribution in space.items():
            if name not in drawn and name not in call.state.fixed:
                drawn[name] = self._base.sample_independent(study, trial, name, distribution)
        return drawn

    def _replaced(
        self, call: _Call, space: dict[str, BaseDistribution], first: dict[str, Any]
    ) -> tuple[dict[str, Any] | None, str]:
        state, how = call.state, replacement_for(self._kind, self._rules.on_veto)
        gate = state.gate
        assert gate is not None
        last = first
        for _ in range(_DRAWS if how == "redraw" else 0):
            before, last = last, self._draw(call, space)
            if gate.judge({**last, **state.fixed}).admitted:
                return last, "redrawn"
            if last == before:
                # It repeats itself.
                break
        if how == "skip" or _optuna.needs_drawn_point(self._kind):
            return None, ""
        near = nearest_admitted(gate, last, space, state.fixed, self._generator)
        if near is not None:
            relative = {name: near[name] for name in state.base_space if name in near}
            _optuna.share_relative_params(_optuna.unwrap_study(call.study), call.trial, relative)
        return near, "moved"

    def _is_audit(self, call: _Call, point: Mapping[str, Any], verdict: PointVerdict) -> bool:
        """Count a veto, and return whether the point is run all the same to try it."""
        share = self._rules.audits
        if share is None:
            share = AUDITED if self.learner.isolated else 0.0
        with self._lock:
            self._vetoes += 1
            due = audit_is_due(self._vetoes, self._audits, share)
            self._audits += due
        if due:
            call.state.exempt = True
            self._note(call, point, verdict, "audited")
        return due

    def _rejected(
        self, call: _Call, point: Mapping[str, Any], verdict: PointVerdict
    ) -> TrialRejected:
        point = {**point, **call.state.fixed}
        call.state.rejected = verdict
        call.state.drawn = dict(point)
        self._complete_row(call, point)
        self._note(call, point, verdict, "rejected")
        return TrialRejected(
            verdict.reason,
            resource=verdict.resource,
            limit=verdict.limit,
            observed=verdict.median,
            probability=verdict.probability,
        )

    def _complete_row(self, call: _Call, point: Mapping[str, Any]) -> None:
        """Write the parameters of a rejected trial into its row.

        Lists tell by them what they have visited, and a row without them would end the search
        space that TPESampler finds in all rows.
        """
        trial, state = call.trial, call.state
        assert state.gate is not None
        space, whole = {**state.gate.space, **state.space}, _optuna.unwrap_study(call.study)
        # In the order of earlier rows: BruteForceSampler takes it for the way down its tree.
        for name in space:
            if name in trial.params or name not in point:
                continue
            try:
                _optuna.write_param(whole, trial, name, point[name], space[name])
            except ValueError as fault:
                # An enqueued value outside of the range that earlier trials had.
                _logger.debug(f"Trial {trial.number}: {name} is not in the row: {fault}")

    def _note(
        self, call: _Call, point: Mapping[str, Any], verdict: PointVerdict, how: str
    ) -> None:
        """Keep what was proposed in the row, and say so in the log, once a study."""
        note = proposed_object(
            point, how, verdict.probability, verdict.resource, verdict.limit, verdict.median
        )
        storage, trial_id = _optuna.storage_of(call.study), _optuna.trial_id_of(call.trial)
        write_attributes(storage, trial_id, user={PROPOSED: note})
        with self._lock:
            told, self._told = self._told, True
        (_logger.debug if told else _logger.info)(
            f"Trial {call.trial.number}: the point drawn was {how}. {verdict.reason}"
            + ("" if told else f" Further ones are only noted in {PROPOSED!r}.")
        )


def _uppers(expected: BaseFootprint, points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the largest upper bound at any of some points, by resource."""
    margin = 1.0 if isinstance(expected, UserFootprint) else _MARGIN
    found: dict[str, float] = {}
    try:
        for point in points:
            for name, each in expected.intervals(point).items():
                found[name] = max(found.get(name, 0.0), margin * each.upper)
    except KeyError:
        # A function of a parameter that the point does not have.
        return {}
    return found


def _may_be_all(names: Collection[str], whole: Sequence[Mapping[str, Any]] | None) -> bool:
    """Return whether a trial that is enqueued with these parameters may have no others.

    It is, when a trial that completed had the same, and for the first ones of a study.
    """
    if whole is None:
        return False
    return not whole or any(names == point.keys() for point in whole)


OnVeto = Literal["auto", "redraw", "nearest", "skip"]
ON_VETO: tuple[str, ...] = get_args(OnVeto)

_LISTS = (GridSampler, BruteForceSampler)
_NEAREST = (TPESampler, NSGAIISampler, NSGAIIISampler, GPSampler)


def replacement_for(sampler: BaseSampler, on_veto: OnVeto) -> OnVeto:
    """Return what replaces a refused point: ``"redraw"``, ``"nearest"`` or ``"skip"``.

    A sampler that is asked to redraw and repeats itself is found out in doing so.
    """
    if draws_from_a_list(sampler):
        return "skip"
    if on_veto != "auto":
        return on_veto
    return "nearest" if isinstance(sampler, _NEAREST) else "redraw"


def needs_whole_points(sampler: BaseSampler) -> bool:
    """Return whether a trial must not end before its point is whole.

    BruteForceSampler takes a point that breaks off for a leaf of its tree.
    """
    return isinstance(sampler, BruteForceSampler)


def draws_from_a_list(sampler: BaseSampler) -> bool:
    """Return whether a sampler walks a list of points."""
    return isinstance(sampler, _LISTS)
