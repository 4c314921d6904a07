"""How a trial ended, in one word and one sentence: pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
import logging
import socket
from typing import Any
from typing import TYPE_CHECKING

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement.constraints import clashes
from optuna_quota._enforcement.constraints import joined_constraints
from optuna_quota._enforcement.constraints import limit_constraints
from optuna_quota._enforcement.nesting import requires_uniform_constraints
from optuna_quota._optuna import TellCall
from optuna_quota._records import CONSTRAINED
from optuna_quota._records import Interval
from optuna_quota._records import OUTCOME
from optuna_quota._records import read_record
from optuna_quota._records import REASON
from optuna_quota._records import record_attributes
from optuna_quota._records import system_attributes
from optuna_quota._records import TrialRecord
from optuna_quota._resources import Breach
from optuna_quota._resources import Limits
from optuna_quota._resources import Outcome
from optuna_quota._resources import RESOURCES
from optuna_quota._resources import Usage
from optuna_quota._storage_retry import is_transient
from optuna_quota._storage_retry import retry
from optuna_quota.exceptions import LimitBreached


if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial

    from optuna_quota._metering import TrialMonitor
    from optuna_quota._metering import Verdict


IGNORED_STOP = "The objective was told to stop but returned a value."


@dataclass(frozen=True)
class TrialEnd:
    """How a trial ended.

    Attributes:
        outcome: The word for it.
        reason: One sentence for a person; None for a trial that completed within its limits.
        breach: The limit it was over.
    """

    outcome: Outcome
    reason: str | None
    breach: Breach | None = None


def classify_end(
    state: TrialState,
    verdict: Verdict | None = None,
    breach: Breach | None = None,
    error: BaseException | None = None,
    told: TellCall | None = None,
) -> TrialEnd:
    """Return how a trial ended.

    A trial that was stopped for a breach is ``terminated``, whatever its objective made of it,
    but for one: where it caught the stop and returned a value, Optuna has a completed trial.

    Args:
        state: The state that Optuna is about to store.
        verdict: What whoever stopped it says.
        breach: What the meters saw; a trial may have ended before anything could act on it.
        error: What the objective raised, where that is known.
        told: What ``tell`` was called with, where that is known.
    """
    stop = None if verdict is None else (verdict.outcome, verdict.reason)
    if verdict is None and isinstance(error, LimitBreached):
        breach = breach or _breach_in(error)
        if breach is not None:
            stop = ("terminated", breach.reason)
    if verdict is not None and verdict.breach is not None:
        breach = verdict.breach
    if state == TrialState.COMPLETE:
        return TrialEnd("completed", _why_completed(stop, breach), breach)
    end = _end(state, error, told)
    if stop is None:
        return TrialEnd("pruned" if state == TrialState.PRUNED else "failed", end, breach)
    outcome, reason = stop
    if state == TrialState.FAIL and outcome in ("terminated", "rejected", "pruned"):
        # The objective was told to stop, and ended in its own way.
        reason = f"{reason} {end}"
        outcome = "failed" if outcome == "pruned" else outcome
    return TrialEnd(outcome, reason, breach)


def _breach_in(error: LimitBreached) -> Breach | None:
    """Return the breach whose figures an error carries, None for one without any."""
    name, limit, observed = error.resource, error.limit, error.observed
    if name is None or name not in RESOURCES or limit is None or observed is None:
        return None
    return Breach(name, limit, observed, error.seconds or 0.0)


def _why_completed(stop: tuple[Outcome, str] | None, breach: Breach | None) -> str | None:
    if stop is not None and stop[0] in ("terminated", "rejected"):
        return f"{stop[1]} {IGNORED_STOP}"
    if breach is None:
        return None
    return f"{breach.reason} The objective completed before it could be stopped."


def _end(state: TrialState, error: BaseException | None, told: TellCall | None) -> str:
    by_user = told is not None and told.by_user
    if by_user and told is not None and told.state == state:
        return f"Ended by study.tell(state={state.name})."
    if state == TrialState.PRUNED:
        return _said("The objective pruned itself", error)
    if error is not None:
        return f"The objective raised {_described(error)}."
    who = "study.tell was given" if by_user else "The objective returned"
    problem = "" if told is None or told.problem is None else f": {told.problem.rstrip('.')}"
    return f"{who} no valid value{problem}."


def _said(what: str, error: BaseException | None) -> str:
    return f"{what}: {error}" if error is not None and str(error) else f"{what}."


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    shown = text if len(text) <= 300 else f"{text[:300]}…"
    return f"{type(error).__name__}: {shown}".removesuffix(".") if shown else type(error).__name__


_logger = logging.getLogger("optuna.quota.enforcement")

_OUTCOMES_OF: Mapping[TrialState, tuple[str, ...]] = {
    TrialState.COMPLETE: ("completed",),
    TrialState.PRUNED: ("pruned", "terminated", "rejected"),
    TrialState.FAIL: ("failed", "rejected"),
}


def record_result(
    study: Study,
    trial: FrozenTrial,
    watch: TrialMonitor | None,
    state: TrialState,
    *,
    limits: Limits | None = None,
    footprint: Mapping[str, Interval] | None = None,
    expected: Mapping[str, float] | None = None,
    error: BaseException | None = None,
    told: _optuna.TellCall | None = None,
) -> TrialRecord:
    """Close a trial's metering and write its record and constraints into its row.

    To be called before the row is finished; a second call for the same trial writes nothing. A
    fault of the storage is logged and not raised: the trial's result is worth more.

    Args:
        study: The study.
        trial: Its row as it is now; constraints in it that others wrote are kept.
        watch: Its metering; None when it ran where this process can't see.
        state: The state that is about to be stored.
        limits: The limits on the trial; those of the watch by default.
        footprint: What was projected before it ran, as intervals by resource.
        expected: What a trial that was not run would have used, by resource.
        error: What the objective raised, where that is known.
        told: What ``tell`` was called with, where that is known.
    """
    if watch is None:
        before = read_record(trial)
        if before.outcome is not None and before.outcome in _OUTCOMES_OF.get(state, ()):
            # TellCall again, as its state could not be stored the first time: that time knew more.
            return before
    usage = Usage() if watch is None else watch.close()
    record = build_record(watch, usage, state, error=error, told=told, footprint=footprint)
    if watch is not None and watch.settled:
        return record
    if watch is not None:
        watch.settled = True
    if limits is None:
        limits = Limits() if watch is None else watch.limits
    if record.outcome == "rejected":
        # Not run: what it used is nothing, what it would have used is what samplers should heed.
        record = replace(record, usage=Usage())
    amounts = usage.amounts() if record.outcome != "rejected" else expected or {}
    own = limit_constraints(limits, amounts, record.breach)
    shown = _are_shown(study, state, own)
    system = constraint_attributes(trial.system_attrs, own) if shown else {}
    write(study, trial, record, system)
    return record


def _are_shown(study: Study, state: TrialState, own: Mapping[str, float]) -> bool:
    """Return whether a row shows the constraints of its limits to Optuna.

    One that completed over a limit does, so that it is not taken for the best trial, unless it
    would break the study's sampler.
    """
    if state != TrialState.COMPLETE:
        return state == TrialState.PRUNED and bool(own)
    over = any(value > 0 for value in own.values())
    return over and not requires_uniform_constraints(study.sampler)


def read_row(study: Study, trial: Trial | FrozenTrial) -> FrozenTrial:
    """Return a trial's row as it is now, or as Optuna remembers it where it can't be read."""
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    try:
        return retry(lambda: storage.get_trial(trial_id))
    except Exception as fault:  # noqa: BLE001 - any backend's own; the result must not be lost
        _logger.info(f"The row of trial {trial.number} could not be read: {fault!r}.")
        return _optuna.cached_row(trial)


def build_record(
    watch: TrialMonitor | None,
    usage: Usage,
    state: TrialState,
    *,
    error: BaseException | None = None,
    told: _optuna.TellCall | None = None,
    footprint: Mapping[str, Interval] | None = None,
) -> TrialRecord:
    """Return the record of a trial that ends in the given state."""
    verdict, breach = (None, None) if watch is None else (watch.verdict, watch.breach)
    end = classify_end(state, verdict, breach, error, told)
    return TrialRecord(
        usage=usage,
        outcome=end.outcome,
        reason=end.reason,
        breach=end.breach,
        footprint=footprint or {},
        isolation=None if watch is None else watch.isolation,
        host=socket.gethostname(),
        timeline=watch.timeline() if watch is not None and end.breach is not None else (),
        gpu_source=None if watch is None or watch.gpu is None else watch.gpu.source,
    )


def write(
    study: Study, trial: FrozenTrial, record: TrialRecord, system: Mapping[str, Any]
) -> None:
    """Write a record and system attributes into a row; a fault of the storage is logged.

    What is refused together is tried once more one by one: a fault of an instant costs nothing
    then, and a value that the storage will never take costs no other.
    """
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    shown, hidden = record_attributes(record), {**system_attributes(record), **system}
    try:
        retry(lambda: _optuna.write_attributes(storage, trial_id, shown, hidden))
    except Exception as fault:  # noqa: BLE001 - any backend's own; the result must not be lost
        apart = not isinstance(fault, UpdateFinishedTrialError)
        lost = _write_apart(storage, trial_id, shown, hidden) if apart else [*shown, *hidden]
        if lost:
            _logger.warning(
                f"Of trial {trial.number}, {', '.join(lost)} could not be recorded: {fault!r}."
            )


def _write_apart(
    storage: BaseStorage, trial_id: int, shown: Mapping[str, Any], hidden: Mapping[str, Any]
) -> list[str]:
    """Write attributes one by one, how the trial ended and why first; return what is lost."""
    writes: list[tuple[dict[str, Any], dict[str, Any]]]
    writes = [({key: value}, {}) for key, value in shown.items()]
    writes.sort(key=lambda write: not write[0].keys() & {OUTCOME, REASON})
    writes += [({}, {key: value}) for key, value in hidden.items()]
    lost: list[str] = []
    while writes:
        user, system = writes.pop(0)
        try:
            _optuna.write_attributes(storage, trial_id, user, system)
        except Exception as fault:  # noqa: BLE001 - as above
            lost += [*user, *system]
            if is_transient(fault):
                # Patience is at its end: nobody is there, and each attempt may take long.
                return lost + [key for attributes in writes for part in attributes for key in part]
    return lost


def constraint_attributes(existing: Mapping[str, Any], own: Mapping[str, float]) -> dict[str, Any]:
    """Return the system attributes that hold constraints beside those of others.

    Args:
        existing: The row's system attributes.
        own: Our constraints by resource, sorted.
    """
    values = joined_constraints(existing.get(_optuna.CONSTRAINTS), own.values())
    if not clashes(len(values), existing, _optuna.CONSTRAINTS):
        return {_optuna.CONSTRAINTS: values, CONSTRAINED: list(own)}
    return {f"{_optuna.CONSTRAINTS}:quota:{name}": value for name, value in own.items()}


def record_rejection(study: Study, trial: FrozenTrial, reason: str) -> TrialRecord:
    """Write into the row of a trial that must not run that it was rejected, and why.

    Args:
        study: The study.
        trial: The trial that was drawn; the object that Optuna keeps for it learns it too.
        reason: One sentence for a person.
    """
    record = TrialRecord(outcome="rejected", reason=reason, host=socket.gethostname())
    attributes = record_attributes(record)
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    _optuna.write_attributes(storage, trial_id, attributes, {})
    trial.user_attrs = {**trial.user_attrs, **attributes}
    return record


def record_ignored_rejection(study: Study, trial: FrozenTrial) -> None:
    """Add to the reason of a rejected trial that its objective returned a value all the same."""
    reason = f"{read_record(trial).reason or 'The trial was rejected.'} {IGNORED_STOP}"
    write(study, trial, TrialRecord(outcome="rejected", reason=reason), {})
