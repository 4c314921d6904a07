"""The trial table's attributes: the only module that knows their keys.

What is read here may have been written by anything that can reach the storage. A value of the
wrong kind is unknown (None), never an error and never executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import math
from typing import Any
from typing import cast
from typing import TYPE_CHECKING

from optuna_quota._resources import Breach
from optuna_quota._resources import Isolation
from optuna_quota._resources import Limits
from optuna_quota._resources import Outcome
from optuna_quota._resources import OUTCOMES
from optuna_quota._resources import Quota
from optuna_quota._resources import Usage
from optuna_quota._resources import USAGE_RESOURCES


if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial


PREFIX = "quota:"
OUTCOME = PREFIX + "outcome"
REASON = PREFIX + "reason"
BREACH = PREFIX + "breach"
FOOTPRINT = PREFIX + "footprint"
ISOLATION = PREFIX + "isolation"
HOST = PREFIX + "host"
TIMELINE = PREFIX + "timeline"
PROPOSED = PREFIX + "proposed"
GPU_SOURCE = PREFIX + "gpu_source"

# A system attribute: bookkeeping of the workers, not a column for people.
RESERVATION = PREFIX + "reservation"
# A system attribute: the trial's own number where its process crashed. A row that was copied from
# it, such as that of a retry, has another number.
CRASHED = PREFIX + "crashed"
# A system attribute: the resources whose constraints end Optuna's list, in its order.
CONSTRAINED = PREFIX + "constrained"

STUDY_QUOTA = PREFIX + "quota"
STUDY_LIMITS = PREFIX + "limits"
STUDY_PRICES = PREFIX + "prices"
# A system attribute of the study: when and by whom it was last published to optuna-dashboard.
STUDY_PUBLISHED = PREFIX + "published"

# Characters. MySQL takes 65,535 bytes of an attribute, and JSON needs twelve for some characters;
# it would refuse all that is written together with a longer one.
LONGEST_REASON = 4000

_NOT_METERS = {
    key.removeprefix(PREFIX)
    for key in (
        OUTCOME,
        REASON,
        BREACH,
        FOOTPRINT,
        ISOLATION,
        HOST,
        TIMELINE,
        PROPOSED,
        GPU_SOURCE,
    )
}
# Columns of the trial table that are no attributes of ours, and how families of them begin.
_COLUMNS = {"number", "state", "value", "censored_by"}
_FAMILIES = ("values_", "params_", "footprint_", "breach_")
_ISOLATIONS = ("process", "thread", "shared")
_GPU_SOURCES = ("process", "device", "framework")


@dataclass(frozen=True)
class Interval:
    """What was projected for one resource of one trial, in SI base units."""

    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class TrialRecord:
    """What the trial table says of one trial beyond what Optuna keeps itself.

    Attributes:
        usage: What was measured.
        outcome: How it ended, None when this library did not see it end.
        reason: One sentence for a person.
        breach: The limit it was over.
        footprint: What was projected before it ran, by resource.
        isolation: Where it ran.
        host: Where that was.
        timeline: Pairs of seconds since the start and bytes of memory, thinned.
        gpu_source: How its use of GPUs was told: by process, by what its devices held, or by the
            framework's own counters.
    """

    usage: Usage = field(default_factory=Usage)
    outcome: Outcome | None = None
    reason: str | None = None
    breach: Breach | None = None
    footprint: Mapping[str, Interval] = field(default_factory=dict)
    isolation: Isolation | None = None
    host: str | None = None
    timeline: tuple[tuple[float, float], ...] = ()
    gpu_source: str | None = None


def is_reserved(name: str) -> bool:
    """Return whether a name can't be that of a user's meter: its key or column is taken."""
    taken = {key.removeprefix(PREFIX) for key in (STUDY_QUOTA, STUDY_LIMITS, STUDY_PRICES)}
    return name in _NOT_METERS | _COLUMNS | taken or name.startswith(_FAMILIES)


def write_record(storage: BaseStorage, trial_id: int, record: TrialRecord) -> None:
    """Write what is known of a trial into its row, which must not be finished yet."""
    for key, value in record_attributes(record).items():
        storage.set_trial_user_attr(trial_id, key, value)
    for key, value in system_attributes(record).items():
        storage.set_trial_system_attr(trial_id, key, value)


def record_attributes(record: TrialRecord) -> dict[str, Any]:
    """Return the user attributes of a record as JSON values; what is unknown has none."""
    attributes: dict[str, Any] = {
        PREFIX + name: plain_number(value) for name, value in record.usage.amounts().items()
    }
    reason = record.reason
    if reason is not None and len(reason) > LONGEST_REASON:
        reason = f"{reason[:LONGEST_REASON]}…"
    texts = {
        OUTCOME: record.outcome,
        REASON: reason,
        ISOLATION: record.isolation,
        HOST: record.host,
        GPU_SOURCE: record.gpu_source,
    }
    attributes.update({key: value for key, value in texts.items() if value is not None})
    if record.breach is not None:
        attributes[BREACH] = _breach_object(record.breach)
    if record.footprint:
        attributes[FOOTPRINT] = {
            name: {k: plain_number(float(f"{v:.5g}")) for k, v in vars(interval).items()}
            for name, interval in record.footprint.items()
        }
    return attributes


def system_attributes(record: TrialRecord) -> dict[str, Any]:
    """Return what of a record is kept out of sight, as JSON values: the timeline.

    A dashboard makes a column of each user attribute; a list of points made rows of forty lines.
    """
    points = [[round(t, 3), plain_number(m)] for t, m in record.timeline]
    return {TIMELINE: points} if points else {}


def read_record(trial: FrozenTrial) -> TrialRecord:
    """Return what a row says; whatever is malformed in it is left out."""
    record = parse_record(trial.user_attrs)
    if record.timeline:
        return record
    return replace(record, timeline=_read_timeline(trial.system_attrs.get(TIMELINE)))


def read_constrained(trial: FrozenTrial) -> list[str]:
    """Return the resources whose constraints end the row's list of constraints."""
    names = trial.system_attrs.get(CONSTRAINED)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def is_rejected(attributes: Mapping[str, Any]) -> bool:
    """Return whether a row's user attributes say that its trial must not run."""
    return attributes.get(OUTCOME) == "rejected"


def parse_record(attributes: Mapping[str, Any]) -> TrialRecord:
    """Return what user attributes say; whatever is malformed in them is left out."""
    outcome = attributes.get(OUTCOME)
    isolation = attributes.get(ISOLATION)
    gpu_source = attributes.get(GPU_SOURCE)
    return TrialRecord(
        usage=_read_usage(attributes),
        outcome=cast("Outcome", outcome) if outcome in OUTCOMES else None,
        reason=_text(attributes.get(REASON)),
        breach=_read_breach(attributes.get(BREACH)),
        footprint=_read_footprint(attributes.get(FOOTPRINT)),
        isolation=cast("Isolation", isolation) if isolation in _ISOLATIONS else None,
        host=_text(attributes.get(HOST)),
        timeline=_read_timeline(attributes.get(TIMELINE)),
        gpu_source=gpu_source if gpu_source in _GPU_SOURCES else None,
    )


def proposed_object(
    params: Mapping[str, Any],
    action: str,
    probability: float,
    resource: str | None,
    limit: float | None,
    median: float | None,
) -> dict[str, Any]:
    """Return as an attribute which point was drawn first, why it was refused, and what became."""
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


def quota_object(quota: Quota) -> dict[str, float]:
    """Return a quota as the study's attribute: plain numbers by resource."""
    return {name: plain_number(value) for name, value in quota.amounts().items()}


def limits_object(limits: Limits) -> dict[str, float]:
    """Return limits as the study's attribute: plain numbers by resource."""
    return {name: plain_number(value) for name, value in limits.amounts().items()}


def read_amounts(value: Any) -> dict[str, float]:
    """Return amounts by resource from a study's attribute, without what is malformed."""
    if not isinstance(value, Mapping):
        return {}
    amounts = ((name, number(v)) for name, v in value.items() if isinstance(name, str))
    return {name: v for name, v in amounts if v is not None and v > 0}


def plain_number(value: float) -> int | float:
    """Return a number that JSON keeps: numpy's scalars would fail on RDB and Journal."""
    plain = float(value)
    return int(plain) if plain.is_integer() and abs(plain) < 2**53 else plain


def number(value: Any) -> float | None:
    """Return a nonnegative finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        plain = float(value)
    except OverflowError:
        return None
    return plain if math.isfinite(plain) and plain >= 0 else None


def _breach_object(breach: Breach) -> dict[str, Any]:
    found: dict[str, Any] = {
        "resource": breach.resource,
        "limit": plain_number(breach.limit),
        "observed": plain_number(breach.observed),
        "seconds": round(breach.seconds, 3),
    }
    flags = {"quota": breach.quota, "forecast": breach.forecast, "refused": breach.refused}
    return {**found, **{name: True for name, flag in flags.items() if flag}}


def _read_usage(attributes: Mapping[str, Any]) -> Usage:
    amounts: dict[str, float] = {}
    for key, value in attributes.items():
        name = key.removeprefix(PREFIX) if key.startswith(PREFIX) else ""
        amount = number(value)
        if name.isidentifier() and name not in _NOT_METERS and amount is not None:
            amounts[name] = amount
    known = {name: amounts.pop(name) for name in USAGE_RESOURCES if name in amounts}
    return Usage(**known, custom=amounts)


def _read_breach(value: Any) -> Breach | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("resource"), str):
        return None
    figures = [number(value.get(name)) for name in ("limit", "observed", "seconds")]
    limit, observed, seconds = figures
    if limit is None or observed is None or seconds is None:
        return None
    return Breach(
        value["resource"],
        limit,
        observed,
        seconds,
        quota=value.get("quota") is True,
        forecast=value.get("forecast") is True,
        refused=value.get("refused") is True,
    )


def _read_footprint(value: Any) -> dict[str, Interval]:
    footprint: dict[str, Interval] = {}
    for name, bounds in value.items() if isinstance(value, Mapping) else ():
        if not isinstance(name, str) or not isinstance(bounds, Mapping):
            continue
        lower, median, upper = (number(bounds.get(k)) for k in ("lower", "median", "upper"))
        if lower is not None and median is not None and upper is not None:
            footprint[name] = Interval(lower, median, upper)
    return footprint


def _read_timeline(value: Any) -> tuple[tuple[float, float], ...]:
    points = []
    for pair in value if isinstance(value, list) else ():
        if not isinstance(pair, list) or len(pair) != 2:
            continue
        seconds, memory = number(pair[0]), number(pair[1])
        if seconds is not None and memory is not None:
            points.append((seconds, memory))
    return tuple(points)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
