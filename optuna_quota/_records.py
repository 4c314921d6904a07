"""The attributes of trials and studies: every key, who writes it, and how it is read back.

A row is written by :func:`write_attributes`, :func:`write_one_by_one` and
:func:`write_record` alone.

==========================  ======  ==============================================================
key of a trial              kind    written by
==========================  ======  ==============================================================
``quota:<resource>``,       user    ``_enforcement.trial_result`` when the trial ends;
``outcome``, ``reason``,            ``_enforcement.pruner`` meanwhile, for studies without
``breach``, ``footprint``,          QuotaSampler; ``_ledger`` for a trial whose worker is gone;
``isolation``, ``host``,            ``_sampler.row_cleanup`` for one whose objective never ran.
``gpu_source``                      Users, for trials that run where this library can't see them
``quota:retry_of``          user    ``_enforcement.preemption``, when a preempted trial, one whose
                                    GPU was full or one that could not start is enqueued again
``quota:checkpoint``        user    ``_enforcement.preemptible``, when a trial starts
``quota:timeline``,         system  ``_enforcement.trial_result``, with the outcome after a breach:
``quota:breach_timeline``           memory, and the resource that was breached
``quota:constrained``       system  ``_enforcement.trial_result``, beside Optuna's ``constraints``
``quota:proposed``          user    ``_sampler.candidates``, when a point was replaced
``quota:reservation``       system  ``_ledger``, before the trial starts and at each heartbeat;
                                    ``_sampler.row_cleanup`` where it never started
``quota:crashed``           system  ``_isolation.outcome``
``quota:asked``             system  ``_storage_retry``, unless starts are stored exactly
==========================  ======  ==============================================================

``_sampler.row_cleanup`` clears what Optuna's retry callback copied from a failed trial.

==========================  ======  ==============================================================
key of a study              kind    written by
==========================  ======  ==============================================================
``quota:quota``,            user    ``_sampler``, when the first trial starts
``quota:limits``,
``quota:prices``
``quota:published``         system  ``dashboard``, at each publication
==========================  ======  ==============================================================

Anything that can reach the storage may have written what is read here. A malformed value is
unknown (None): it raises no error and is never executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
import math
from typing import Any, get_args, Literal

from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _optuna
from optuna_quota._limits import Limits, Quota
from optuna_quota._resources import get_resource, Isolation, Outcome, OUTCOMES
from optuna_quota._storage_retry import is_transient, retry
from optuna_quota._units import as_float
from optuna_quota._usage import Breach, Usage, usage_from_amounts


PREFIX = "quota:"
OUTCOME = PREFIX + "outcome"
REASON = PREFIX + "reason"
BREACH = PREFIX + "breach"
FOOTPRINT = PREFIX + "footprint"
ISOLATION = PREFIX + "isolation"
HOST = PREFIX + "host"
TIMELINE = PREFIX + "timeline"
BREACH_TIMELINE = PREFIX + "breach_timeline"
PROPOSED = PREFIX + "proposed"
GPU_SOURCE = PREFIX + "gpu_source"
# The number of the trial that this one repeats, and the folder that both share.
RETRY_OF = PREFIX + "retry_of"
CHECKPOINT = PREFIX + "checkpoint"

# Bookkeeping among workers.
RESERVATION = PREFIX + "reservation"
# The trial's own number where its process crashed: in a row copied from it, such as that of a
# retry, the number is another trial's.
CRASHED = PREFIX + "crashed"
# The resources whose constraints end Optuna's list, in its order.
CONSTRAINED = PREFIX + "constrained"

STUDY_QUOTA = PREFIX + "quota"
STUDY_LIMITS = PREFIX + "limits"
STUDY_PRICES = PREFIX + "prices"
# When and by whom the study was last published to optuna-dashboard.
STUDY_PUBLISHED = PREFIX + "published"

# Characters. MySQL takes 65,535 bytes of an attribute, and JSON needs twelve for some characters;
# a longer one would make it refuse everything that is written together with it.
MAX_REASON_LENGTH = 4000

_TEXTS = (OUTCOME, REASON, ISOLATION, HOST, GPU_SOURCE)
_TIMELINES = (TIMELINE, BREACH_TIMELINE)
_OTHERS = (BREACH, FOOTPRINT, *_TIMELINES, PROPOSED, RETRY_OF, CHECKPOINT)
_NOT_METERS = {key.removeprefix(PREFIX) for key in (*_TEXTS, *_OTHERS)}
# Columns of the trial table that are not attributes of ours, and how families of them begin.
_COLUMNS = {"number", "state", "value", "censored_by"}
_FAMILIES = ("values_", "params_", "footprint_", "breach_")
_BREACH_FLAGS = ("quota", "forecast", "refused")
_GPU_SOURCES = ("process", "device", "framework")
Evidence = Literal["value", "lower bound", "partial", "partial peak"]
_OUTCOME_OF_STATE: Mapping[str, Outcome] = {
    "COMPLETE": "completed",
    "PRUNED": "pruned",
    "FAIL": "failed",
}


@dataclass(frozen=True)
class Interval:
    """The projected usage of one resource by one trial, in SI base units."""

    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class TrialRecord:
    """The trial table's row of one trial, beyond what Optuna itself stores."""

    usage: Usage = field(default_factory=Usage)  # What was measured
    outcome: Outcome | None = None  # How it ended, None when this library did not see it end
    reason: str | None = None  # One sentence that explains the outcome
    breach: Breach | None = None  # The limit it was over
    # What was projected before it ran, by resource.
    footprint: Mapping[str, Interval] = field(default_factory=dict)
    # Whether it ran in its own process, in a thread, or shared one with others.
    isolation: Isolation | None = None
    host: str | None = None  # Name of the host it ran on
    # Pairs of seconds since the start and bytes of memory, thinned.
    timeline: tuple[tuple[float, float], ...] = ()
    # The same of the resource that was breached, where that is another.
    breach_timeline: tuple[tuple[float, float], ...] = ()
    # Where GPU usage comes from: "process", "device" or "framework".
    gpu_source: str | None = None

    @property
    def censored_by(self) -> str | None:
        """The resource whose limit ended the trial, None when no limit did."""
        return self.breach.resource if self.breach and self.outcome == "terminated" else None


def outcome_of(trial: FrozenTrial, record: TrialRecord) -> Outcome | None:
    """Return how a trial ended, by Optuna's state where this library did not see it end."""
    return record.outcome or _OUTCOME_OF_STATE.get(trial.state.name)


def evidence(resource: str, outcome: str | None, censored_by: str | None = None) -> Evidence:
    """Return how a trial's usage of a resource relates to the full usage at its point.

    - ``"value"``: equal, for a completed trial, even one over a limit.
    - ``"lower bound"``: at least as much (right-censored), for the resource whose limit ended the
      trial and, if that is a total, for the other totals, which grow along with it.
    - ``"partial"``: usage up to an unknown share of the run, for all other resources of a trial
      terminated for a peak, totals of a pruned trial, and a failed or preempted one. Its noise is
      that of the full usage, so as a lower bound it would bias a fit upwards, to several times the
      truth (``benchmarks/exponent_coverage.py``). Formulas exclude it, footprints model the share.
    - ``"partial peak"``: a peak of a trial that was pruned, or terminated for a total. It equals
      the full usage if all steps of a training are alike, not if later steps take more data or a
      larger model; a fit over many trials decides.

    Args:
        resource: Name of the resource.
        outcome: How the trial ended; None for one that has not.
        censored_by: The resource whose limit ended it; see :attr:`TrialRecord.censored_by`.
    """
    if outcome not in ("pruned", "terminated", "preempted", "failed"):
        return "value"
    if outcome == "terminated" and resource == censored_by:
        return "lower bound"
    by_total = censored_by is not None and not get_resource(censored_by).peak
    if outcome in ("failed", "preempted") or (outcome == "terminated" and not by_total):
        return "partial"
    if get_resource(resource).peak:
        return "partial peak"
    return "lower bound" if outcome == "terminated" else "partial"


def is_reserved(name: str) -> bool:
    """Return whether a name is reserved: a user's meter can't have its key or column."""
    taken = {key.removeprefix(PREFIX) for key in (STUDY_QUOTA, STUDY_LIMITS, STUDY_PRICES)}
    return name in _NOT_METERS | _COLUMNS | taken or name.startswith(_FAMILIES)


def write_attributes(
    storage: BaseStorage,
    trial_id: int,
    *,
    user: Mapping[str, Any] | None = None,
    system: Mapping[str, Any] | None = None,
) -> None:
    """Write attributes into an unfinished row; UpdateFinishedTrialError if it is finished."""
    # Not a method of the storage, which would be retried.
    retry(lambda: _optuna.write_attributes(storage, trial_id, user or {}, system or {}))


def write_record(storage: BaseStorage, trial_id: int, record: TrialRecord) -> None:
    """Write a record into an unfinished row; errors are those of :func:`write_attributes`."""
    user, system = record_attributes(record), system_attributes(record)
    write_attributes(storage, trial_id, user=user, system=system)


def write_one_by_one(
    storage: BaseStorage, trial_id: int, *, user: Mapping[str, Any], system: Mapping[str, Any]
) -> list[str]:
    """Write each attribute by itself, outcome and reason first; return the keys that failed.

    Stops at a transient error: the server is down, and each further attempt may take long.
    """
    keys = [*sorted(user, key=lambda key: key not in (OUTCOME, REASON)), *system]
    failed: list[str] = []
    for index, key in enumerate(keys):
        try:
            if key in user:
                storage.set_trial_user_attr(trial_id, key, user[key])
            else:
                storage.set_trial_system_attr(trial_id, key, system[key])
        except Exception as error:  # noqa: BLE001 - any backend's own; the others must be written
            if is_transient(error):
                return failed + keys[index:]
            failed.append(key)
    return failed


def record_attributes(record: TrialRecord) -> dict[str, Any]:
    """Return the user attributes of a record as JSON values, without unknown ones."""
    attributes: dict[str, Any] = {
        PREFIX + name: plain_number(value) for name, value in record.usage.amounts().items()
    }
    texts = {key: getattr(record, key.removeprefix(PREFIX)) for key in _TEXTS}
    attributes.update({key: value for key, value in texts.items() if value is not None})
    if len(attributes.get(REASON, "")) > MAX_REASON_LENGTH:
        attributes[REASON] = f"{attributes[REASON][:MAX_REASON_LENGTH]}…"
    if record.breach is not None:
        attributes[BREACH] = _breach_object(record.breach)
    if record.footprint:
        attributes[FOOTPRINT] = {
            name: {k: plain_number(float(f"{v:.5g}")) for k, v in vars(interval).items()}
            for name, interval in record.footprint.items()
        }
    return attributes


def system_attributes(record: TrialRecord) -> dict[str, Any]:
    """Return the timelines of a record as JSON values.

    optuna-dashboard shows each user attribute as a column, where a list takes forty lines.
    """
    timelines = {TIMELINE: record.timeline, BREACH_TIMELINE: record.breach_timeline}
    return {
        key: [[round(t, 3), plain_number(v)] for t, v in points]
        for key, points in timelines.items()
        if points
    }


def read_record(trial: FrozenTrial) -> TrialRecord:
    """Return the record in a row, without malformed values."""
    line, breach_line = (_read_timeline(trial.system_attrs.get(k)) for k in _TIMELINES)
    return replace(parse_record(trial.user_attrs), timeline=line, breach_timeline=breach_line)


def read_finished(study: Study) -> tuple[list[FrozenTrial], list[TrialRecord]]:
    """Return the finished trials of a study, and their records."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    return trials, [read_record(trial) for trial in trials]


def read_constrained(trial: FrozenTrial) -> list[str]:
    names = trial.system_attrs.get(CONSTRAINED)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def is_rejected(attributes: Mapping[str, Any]) -> bool:
    return attributes.get(OUTCOME) == "rejected"


def parse_record(attributes: Mapping[str, Any]) -> TrialRecord:
    """Return the record in user attributes, without timelines and malformed values."""

    def text(key: str, known: Sequence[str] | None = None) -> Any:
        value = attributes.get(key)
        valid = isinstance(value, str) and (known is None or value in known)
        return value if valid else None

    return TrialRecord(
        usage=_read_usage(attributes),
        outcome=text(OUTCOME, OUTCOMES),
        reason=text(REASON),
        breach=_read_breach(attributes.get(BREACH)),
        footprint=_read_footprint(attributes.get(FOOTPRINT)),
        isolation=text(ISOLATION, get_args(Isolation)),
        host=text(HOST),
        gpu_source=text(GPU_SOURCE, _GPU_SOURCES),
    )


def proposed_object(
    params: Mapping[str, Any],
    action: str,
    probability: float,
    resource: str | None,
    limit: float | None,
    median: float | None,
) -> dict[str, Any]:
    """Return the ``quota:proposed`` attribute: the point drawn first and why it was refused."""
    figures = {"limit": limit, "median": median}
    return {
        "action": action,
        "resource": resource,
        "probability": round(float(probability), 4),
        **{name: plain_number(value) for name, value in figures.items() if value is not None},
        "params": {name: _plain_param(value) for name, value in params.items()},
    }


def _plain_param(value: Any) -> Any:
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    return plain_number(value) if isinstance(value, float) and math.isfinite(value) else str(value)


def amounts_object(ceilings: Quota | Limits) -> dict[str, float]:
    return {name: plain_number(value) for name, value in ceilings.amounts().items()}


def read_amounts(value: Any) -> dict[str, float]:
    """Return amounts by resource from a study's attribute, without malformed values."""
    if not isinstance(value, Mapping):
        return {}
    amounts = ((name, number(v)) for name, v in value.items() if isinstance(name, str))
    return {name: v for name, v in amounts if v is not None and v > 0}


def plain_number(value: float) -> int | float:
    """Return a number that JSON can store: numpy scalars fail on RDB and Journal."""
    plain = float(value)
    return int(plain) if plain.is_integer() and abs(plain) < 2**53 else plain


def number(value: Any) -> float | None:
    """Return a nonnegative finite number, None for anything else."""
    # By type, which is fast: a study has hundreds of points of a timeline for each trial.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    plain = as_float(value)
    return plain if 0 <= plain < math.inf else None


def _numbers(values: Iterable[Any]) -> list[Any]:
    """Return nonnegative finite numbers, none where any value is something else."""
    found = [number(value) for value in values]
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else []


def _breach_object(breach: Breach) -> dict[str, Any]:
    return {
        "resource": breach.resource,
        "limit": plain_number(breach.limit),
        "observed": plain_number(breach.observed),
        "seconds": round(breach.seconds, 3),
        **{name: True for name in _BREACH_FLAGS if getattr(breach, name)},
    }


def _read_usage(attributes: Mapping[str, Any]) -> Usage:
    ours = ((k.removeprefix(PREFIX), v) for k, v in attributes.items() if k.startswith(PREFIX))
    found = ((n, number(v)) for n, v in ours if n.isidentifier() and n not in _NOT_METERS)
    return usage_from_amounts({name: amount for name, amount in found if amount is not None})


def _read_breach(value: Any) -> Breach | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("resource"), str):
        return None
    figures = _numbers(value.get(name) for name in ("limit", "observed", "seconds"))
    flags = {name: value.get(name) is True for name in _BREACH_FLAGS}
    return Breach(value["resource"], *figures, **flags) if figures else None


def _read_footprint(value: Any) -> dict[str, Interval]:
    footprint: dict[str, Interval] = {}
    for name, bounds in value.items() if isinstance(value, Mapping) else ():
        bounds = bounds if isinstance(name, str) and isinstance(bounds, Mapping) else {}
        if figures := _numbers(bounds.get(key) for key in ("lower", "median", "upper")):
            footprint[name] = Interval(*figures)
    return footprint


def _read_timeline(value: Any) -> tuple[tuple[float, float], ...]:
    points = []
    for pair in value if isinstance(value, list) else ():
        if isinstance(pair, list) and len(pair) == 2:
            seconds, amount = number(pair[0]), number(pair[1])
            if seconds is not None and amount is not None:
                points.append((seconds, amount))
    return tuple(points)
