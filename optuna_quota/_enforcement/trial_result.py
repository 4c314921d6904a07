"""The result of a trial: classify its outcome and write it into the row before it is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
import logging
import math
import socket
import statistics
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, Trial, TrialState

from optuna_quota import _optuna, _records
from optuna_quota._enforcement.nesting import find_nested, requires_uniform_constraints
from optuna_quota._enforcement.study_warnings import report_end
from optuna_quota._limits import Limits
from optuna_quota._metering import TrialMonitor, Verdict
from optuna_quota._optuna import TellCall
from optuna_quota._records import Interval, TrialRecord
from optuna_quota._resources import Outcome, RESOURCES
from optuna_quota._usage import Breach, Usage
from optuna_quota.exceptions import LimitBreached


_logger = logging.getLogger("optuna.quota.enforcement")

IGNORED_STOP = "The objective caught the stop and returned a value."
_OUTCOMES_OF: Mapping[TrialState, tuple[str, ...]] = {
    TrialState.COMPLETE: ("completed",),
    TrialState.PRUNED: ("pruned", "terminated", "rejected"),
    TrialState.FAIL: ("failed", "preempted", "rejected"),
}


def classify_end(
    state: TrialState,
    verdict: Verdict | None = None,
    breach: Breach | None = None,
    error: BaseException | None = None,
    tell_call: TellCall | None = None,
) -> TrialRecord:
    """Return the outcome, reason and breach of a trial that ends in a state.

    A trial that was stopped for a breach is ``terminated``, whatever its objective did next, with
    one exception: if it caught the stop and returned a value, the trial is completed. A breach
    that was measured counts too, even if the trial ended before it was stopped.
    """
    stop: tuple[Outcome, str] | None = None
    if verdict is not None:
        stop, breach = (verdict.outcome, verdict.reason), verdict.breach or breach
    elif isinstance(error, LimitBreached):
        breach = breach or _breach_in(error)
        stop = None if breach is None else ("terminated", breach.reason)
    if state == TrialState.COMPLETE:
        reason = None
        if stop is not None and stop[0] in ("terminated", "rejected"):
            reason = f"{stop[1]} {IGNORED_STOP}"
        elif breach is not None:
            reason = f"{breach.reason} The objective completed before it could be stopped."
        return TrialRecord(outcome="completed", reason=reason, breach=breach)
    end = _reason_of_unstopped(state, error, tell_call)
    if stop is None:
        ended: Outcome = "pruned" if state == TrialState.PRUNED else "failed"
        return TrialRecord(outcome=ended, reason=end, breach=breach)
    outcome, reason = stop
    if state == TrialState.FAIL and outcome in ("terminated", "rejected", "pruned"):
        # The objective was stopped, and raised another error while it ended.
        reason = f"{reason} {end}"
        outcome = "failed" if outcome == "pruned" else outcome
    return TrialRecord(outcome=outcome, reason=reason, breach=breach)


def _breach_in(error: LimitBreached) -> Breach | None:
    name, limit, observed = error.resource, error.limit, error.observed
    if name is None or name not in RESOURCES or limit is None or observed is None:
        return None
    return Breach(name, limit, observed, error.seconds or 0.0)


def _reason_of_unstopped(
    state: TrialState, error: BaseException | None, tell_call: TellCall | None
) -> str:
    tell_call = tell_call or TellCall(by_user=False)
    if tell_call.by_user and tell_call.state == state:
        return f"Ended by study.tell(state={state.name})."
    if state == TrialState.PRUNED:
        pruned = "The objective pruned itself"
        return f"{pruned}: {error}" if error is not None and str(error) else f"{pruned}."
    if error is not None:
        return f"The objective raised {_described(error)}."
    who = "study.tell was given" if tell_call.by_user else "The objective returned"
    problem = "" if tell_call.problem is None else f": {tell_call.problem.rstrip('.')}"
    return f"{who} no valid value{problem}."


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    # The cause is at the end of a message that has a traceback, such as that of a pool's worker.
    shown = text if len(text) <= 300 else f"{text[:100]} … {text[-200:]}"
    return f"{type(error).__name__}: {shown}".removesuffix(".") if shown else type(error).__name__


def record_result(
    study: Study,
    trial: FrozenTrial,
    monitor: TrialMonitor | None,
    state: TrialState,
    *,
    limits: Limits | None = None,
    footprint: Mapping[str, Interval] | None = None,
    expected: Mapping[str, float] | None = None,
    error: BaseException | None,
    tell_call: TellCall | None = None,
    of_rejected: Callable[[Usage], Mapping[str, Any]] = lambda usage: {},
) -> TrialRecord:
    """Close a trial's metering and write its record and constraints into its row.

    Call it before the row is finished; a second call for the same trial writes nothing. A storage
    error is logged and not raised, so that the trial's value is not lost. The row may have
    constraints of others, which are kept. ``expected`` is the usage of a trial that was rejected,
    ``of_rejected`` returns system attributes for what it had used by then.
    """
    if monitor is None:
        before = _records.read_record(trial)
        if before.outcome is not None and before.outcome in _OUTCOMES_OF.get(state, ()):
            # A second `tell`, as the state could not be stored: the first closed the metering.
            return before
    usage = Usage() if monitor is None else monitor.close()
    record = build_record(
        monitor, usage, state, error=error, tell_call=tell_call, footprint=footprint
    )
    if monitor is not None:
        if monitor.recorded:
            return record
        monitor.recorded = True
    if limits is None:
        limits = Limits() if monitor is None else monitor.limits
    amounts: Mapping[str, float] = usage.amounts()
    system: dict[str, Any] = {}
    if record.outcome == "rejected":
        # Samplers learn from the usage expected at its point, which did not run. What the
        # objective used before it drew the refused parameter is charged to the quota.
        record, amounts = replace(record, usage=Usage()), expected or {}
        system.update(of_rejected(usage))
    own = limit_constraints(limits, amounts, record.breach)
    if _shows_constraints(study, state, own):
        system.update(constraint_attributes(trial.system_attrs, own))
    elif own and state == TrialState.COMPLETE:
        system.update(_optuna.feasible_attributes(trial.system_attrs))
    save_record(study, trial, record, system)
    if monitor is not None:
        report_end(study, trial.number, monitor, record, error)
    return record


def _shows_constraints(study: Study, state: TrialState, own: Mapping[str, float]) -> bool:
    """Return whether to write the constraints of a trial's limits into its row.

    A trial that completed over a limit gets them, so that it can't be the best trial, unless the
    study's sampler would fail.
    """
    if state != TrialState.COMPLETE:
        return state == TrialState.PRUNED and bool(own)
    over = any(value > 0 for value in own.values())
    return over and not requires_uniform_constraints(study.sampler)


def read_row(study: Study, trial: Trial | FrozenTrial) -> FrozenTrial:
    """Return a trial's row from the storage, or Optuna's copy in memory if that fails."""
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    try:
        return storage.get_trial(trial_id)
    except Exception as error:  # noqa: BLE001 - any backend's own; the result must not be lost
        _logger.info(f"The row of trial {trial.number} could not be read: {error!r}.")
        return _optuna.cached_row(trial)


def build_record(
    monitor: TrialMonitor | None,
    usage: Usage,
    state: TrialState,
    *,
    error: BaseException | None = None,
    tell_call: TellCall | None = None,
    footprint: Mapping[str, Interval] | None = None,
) -> TrialRecord:
    """Return the record of a trial that ends in the given state; see :func:`record_result`."""
    verdict, breach = (None, None) if monitor is None else (monitor.verdict, monitor.breach)
    record = classify_end(state, verdict, breach, error, tell_call)
    host = socket.gethostname()
    record = replace(record, usage=usage, footprint=footprint or {}, host=host)
    if monitor is None:
        return record
    if record.breach is not None:
        resource = record.breach.resource
        other = () if resource == "memory" else monitor.timeline(resource)
        record = replace(record, timeline=monitor.timeline(), breach_timeline=other)
    gpu_source = None if monitor.gpu is None else monitor.gpu.source
    return replace(record, isolation=monitor.isolation, gpu_source=gpu_source)


def save_record(
    study: Study, trial: FrozenTrial, record: TrialRecord, system: Mapping[str, Any] | None = None
) -> None:
    """Write a record and system attributes into a row; log what the storage refuses.

    If that fails, each attribute is written by itself, so that one refused value does not lose
    the others.
    """
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    user = _records.record_attributes(record)
    system = {**_records.system_attributes(record), **(system or {})}
    try:
        _records.write_attributes(storage, trial_id, user=user, system=system)
    except Exception as error:  # noqa: BLE001 - any backend's own; the result must not be lost
        if isinstance(error, UpdateFinishedTrialError):
            lost = [*user, *system]
        else:
            lost = _records.write_one_by_one(storage, trial_id, user=user, system=system)
        if lost:
            _logger.warning(
                f"Trial {trial.number}: the storage could not record {', '.join(lost)}: {error!r}."
            )


def record_rejection(study: Study, trial: FrozenTrial, reason: str) -> TrialRecord:
    """Write why a trial was rejected into its row, and into Optuna's object of the trial."""
    record = TrialRecord(outcome="rejected", reason=reason, host=socket.gethostname())
    attributes = _records.record_attributes(record)
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    _records.write_attributes(storage, trial_id, user=attributes)
    trial.user_attrs = {**trial.user_attrs, **attributes}
    return record


def record_ignored_rejection(study: Study, trial: FrozenTrial) -> None:
    """Add to the reason of a rejected trial that its objective still returned a value."""
    reason = f"{_records.read_record(trial).reason or 'The trial was rejected.'} {IGNORED_STOP}"
    save_record(study, trial, TrialRecord(outcome="rejected", reason=reason))


# The constraint for an unknown usage.
NEUTRAL = 0.0


def limit_constraints(
    limits: Limits, amounts: Mapping[str, float], breach: Breach | None = None
) -> dict[str, float]:
    """Return observed / limit - 1 for each limited resource, sorted by the resource's name.

    A missing amount gives 0; a forecast breach counts as observed.
    """
    observed = dict(amounts)
    if breach is not None and not breach.quota:
        observed[breach.resource] = max(breach.observed, observed.get(breach.resource, 0.0))
    known = {name for name, amount in observed.items() if math.isfinite(amount)}
    ceilings = sorted(limits.amounts().items())
    return {n: observed[n] / limit - 1.0 if n in known else NEUTRAL for n, limit in ceilings}


def constraint_attributes(existing: Mapping[str, Any], own: Mapping[str, float]) -> dict[str, Any]:
    """Return the system attributes that hold our constraints beside those of others in a row.

    optuna-dashboard reads the list alone. Optuna calls its items "0", "1", and so on: where the
    user has set a constraint of such a key, ours get keys too.
    """
    listed = existing.get(_optuna.CONSTRAINTS)
    theirs = listed if isinstance(listed, (list, tuple)) else ()
    values = [*(float(value) for value in theirs), *own.values()]
    if any(f"{_optuna.CONSTRAINTS}:{index}" in existing for index in range(len(values))):
        return {
            f"{_optuna.CONSTRAINTS}:{_records.PREFIX}{name}": value for name, value in own.items()
        }
    return {_optuna.CONSTRAINTS: values, _records.CONSTRAINED: list(own)}


def uniform_constraints(trials: Sequence[FrozenTrial], limits: Limits) -> list[dict[str, float]]:
    """Return constraints with the same keys in the same order for each completed trial.

    First those that the user set on any of the trials, 0 for trials without them. Then one for
    each limit in force now, whatever was in force when the trial ran. An unknown usage counts as
    the median of the known ones, but not as a breach, so that it does not distort a model.
    """
    theirs = [_user_constraints(trial) for trial in trials]
    names = list(dict.fromkeys(name for each in theirs for name in each))
    ours = [_observed_constraints(trial, limits) for trial in trials]
    fill = {name: _typical(each.get(name) for each in ours) for name in sorted(limits.amounts())}
    return [
        {
            **{name: user.get(name, NEUTRAL) for name in names},
            **{f"{_records.PREFIX}{name}": own.get(name, value) for name, value in fill.items()},
        }
        for user, own in zip(theirs, ours, strict=True)
    ]


def _user_constraints(trial: FrozenTrial) -> dict[str, float]:
    """Return a trial's constraints without those that stand for limits."""
    # Those of limits are the last ones of the list, whose items are called "0", "1", and so on.
    n_list = len(trial.system_attrs.get(_optuna.CONSTRAINTS) or ())
    own = {str(index) for index in range(n_list - len(_records.read_constrained(trial)), n_list)}
    return {
        name: value
        for name, value in _optuna.constraints_of(trial).items()
        if not name.startswith(_records.PREFIX) and name not in own
    }


def _observed_constraints(trial: FrozenTrial, limits: Limits) -> dict[str, float]:
    record = _records.read_record(trial)
    amounts = record.usage.amounts()
    known = Limits.from_amounts({n: v for n, v in limits.amounts().items() if n in amounts})
    return limit_constraints(known, amounts, record.breach)


def _typical(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return min(NEUTRAL, statistics.median(known)) if known else NEUTRAL


class TolerantConstraintsFunc:
    """A sampler's ``constraints_func`` that may fail for trials that were stopped early.

    Optuna calls it for each pruned trial too, and an error ends the study; most functions read
    what the objective sets at its end. QuotaSampler catches the error itself; without it, the
    sampler gets this function instead. ``stopped`` has the trials for which it may fail.
    """

    @classmethod
    def of(cls, function: Any) -> TolerantConstraintsFunc:
        return function if isinstance(function, cls) else cls(function)

    def __init__(self, function: Callable[[FrozenTrial], Sequence[float]]) -> None:
        self.function = function
        self.stopped: set[int] = set()
        self._has_warned = False

    def __call__(self, trial: FrozenTrial) -> Sequence[float]:
        try:
            return self.function(trial)
        except Exception as error:
            if trial.number not in self.stopped:
                raise
            if not self._has_warned:
                self._has_warned = True
                _logger.warning(constraints_warning(trial.number, error))
            return ()
        finally:
            self.stopped.discard(trial.number)


def tolerate_constraints_failure(
    study: Study, trial: BaseTrial | FrozenTrial, monitor: TrialMonitor
) -> None:
    """Let ``constraints_func`` of the study's sampler fail for a trial that is being stopped."""
    if monitor.owner == "sampler":
        return
    samplers: list[Any] = find_nested(_optuna.unwrap_study(study).sampler, BaseSampler)
    for sampler in samplers:
        for function in _optuna.replace_constraints_func(sampler, TolerantConstraintsFunc.of):
            function.stopped.add(trial.number)


def constraints_warning(number: int, error: Exception) -> str:
    return (
        f"`constraints_func` failed for trial {number}, which did not complete: {error!r}. The "
        "trial gets no constraints from it; further failures of this kind are not reported."
    )
