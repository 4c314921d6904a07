"""The finished trials of a study as the pictures need them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
import math
from typing import Any
from typing import TYPE_CHECKING

from optuna_quota import _records
from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import OUTCOMES
from optuna_quota._resources import USAGE_RESOURCES


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from optuna_quota._records import TrialRecord


@dataclass(frozen=True)
class Row:
    """One finished trial.

    Attributes:
        trial: The row itself.
        record: What this library wrote into it.
        outcome: How it ended: as recorded, else what its state says.
        amounts: Usage by resource in SI base units; where no wall time was recorded, the time
            from start to end that Optuna keeps; of a breached peak at least what it reached for.
    """

    trial: FrozenTrial
    record: TrialRecord
    outcome: str
    amounts: Mapping[str, float]

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.trial.number

    @property
    def params(self) -> Mapping[str, Any]:
        """Its hyperparameters."""
        return self.trial.params

    @property
    def distributions(self) -> Mapping[str, BaseDistribution]:
        """Their distributions."""
        return self.trial.distributions

    @property
    def start(self) -> datetime | None:
        """When it started."""
        return self.trial.datetime_start

    @property
    def end(self) -> datetime | None:
        """When it ended."""
        return self.trial.datetime_complete

    def censored(self, resource: str) -> bool:
        """Return whether the usage is a lower bound only, since the trial would have gone on."""
        return resource in self.amounts and _records.is_lower_bound(
            resource, self.outcome, self.record.censored_by
        )


def rows_of(study: Study) -> list[Row]:
    """Return the finished trials of a study, in the order of their numbers."""
    trials = study.get_trials(deepcopy=False)
    return [_row(trial) for trial in trials if trial.state.is_finished()]


def _row(trial: FrozenTrial) -> Row:
    record = _records.read_record(trial)
    return Row(
        trial, record, _records.outcome_of(trial, record) or "failed", _amounts(trial, record)
    )


def _amounts(trial: FrozenTrial, record: TrialRecord) -> dict[str, float]:
    amounts = record.usage.amounts()
    started, ended = trial.datetime_start, trial.datetime_complete
    if "wall_time" not in amounts and record.outcome != "rejected" and started and ended:
        amounts["wall_time"] = max(0.0, (ended - started).total_seconds())
    breach = record.breach
    if breach is not None and get_resource(breach.resource).peak and not breach.forecast:
        # Where the system refused memory over the limit, the peak measured is below it.
        reached = amounts.get(breach.resource, 0.0)
        amounts[breach.resource] = max(reached, breach.observed)
    return amounts


def limits_of(study: Study) -> dict[str, float]:
    """Return the limits in force, by resource, in SI base units."""
    return _records.read_amounts(study.user_attrs.get(_records.STUDY_LIMITS))


def quota_of(study: Study) -> dict[str, float]:
    """Return the quota in force, by resource, in SI base units."""
    return _records.read_amounts(study.user_attrs.get(_records.STUDY_QUOTA))


def prices_of(study: Study) -> dict[str, float]:
    """Return the prices per hour by which the cost is reckoned."""
    return _records.read_amounts(study.user_attrs.get(_records.STUDY_PRICES))


def measured(rows: Sequence[Row]) -> list[str]:
    """Return the resources that any trial has a positive amount of, the usual ones first."""
    found = {name for row in rows for name, value in row.amounts.items() if value > 0}
    usual = [name for name in USAGE_RESOURCES if name in found]
    return usual + sorted(found.difference(usual))


def by_outcome(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the trials by outcome, in the order of the outcomes, empty ones left out."""
    groups = {outcome: [r for r in rows if r.outcome == outcome] for outcome in OUTCOMES}
    return {outcome: group for outcome, group in groups.items() if group}


def hover_of(row: Row, resource: str) -> str:
    """Return what a person sees on pointing at a trial: a few lines."""
    amount = row.amounts.get(resource)
    shown = format_amount(resource, amount) if amount is not None else "not run"
    lines = [f"trial {row.number}, {row.outcome}", f"{at_least(row, resource)}{shown}"]
    lines += [f"{name} = {shown_param(value)}" for name, value in list(row.params.items())[:8]]
    if row.record.reason and row.outcome in ("terminated", "rejected", "failed"):
        lines.append(row.record.reason[:160])
    return "\n".join(lines)


def at_least(row: Row, resource: str) -> str:
    """Return the sign that says that usage is a lower bound."""
    return "≥ " if row.censored(resource) else ""


def shown_param(value: Any) -> str:
    """Return a hyperparameter's value for a person."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:60]


def check_target(study: Study, target: Callable[[FrozenTrial], float] | None) -> None:
    """Raise where a study of several objectives is given no target.

    Raises:
        ValueError: If ``target`` is None and the study has several objectives.
    """
    if target is None and len(study.directions) > 1:
        raise ValueError(
            "`target` must be given for a study of several objectives but got None: "
            "for example `target=lambda t: t.values[0]`."
        )


def finite(value: float | None) -> bool:
    """Return whether a value is a finite number."""
    return value is not None and math.isfinite(value)
