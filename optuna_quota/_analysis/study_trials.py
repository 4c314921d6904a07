"""The finished trials of a study as plots and reports show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import math
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _records
from optuna_quota._footprint.footprint import Footprint
from optuna_quota._records import Interval, TrialRecord
from optuna_quota._resources import format_amount, get_resource, OUTCOMES, USAGE_RESOURCES
from optuna_quota._table import measured_usage


# Outcomes of trials that are listed with their reasons.
ENDED = ("terminated", "rejected", "preempted", "failed")
_MAX_PARAMS = 8
_MAX_REASON = 160


@dataclass(frozen=True)
class FinishedTrial:
    """One finished trial.

    Attributes:
        trial: Optuna's trial.
        record: What this library recorded of it.
        outcome: How it ended.
        amounts: Usage by resource in SI base units. Of a breached peak at least what was observed:
            where the system refused memory over the limit, the peak measured is below it.
    """

    trial: FrozenTrial
    record: TrialRecord
    outcome: str
    amounts: Mapping[str, float]

    @property
    def number(self) -> int:
        return self.trial.number

    @property
    def reason(self) -> str:
        return self.record.reason or "No reason was recorded."

    def is_censored(self, resource: str) -> bool:
        """Return whether the trial would have used more, since it was stopped."""
        found = _records.evidence(resource, self.outcome, self.record.censored_by)
        return found in ("lower bound", "partial")

    def format_usage(self, resource: str) -> str:
        """Return the usage for a person, such as "≥ 1 GiB" where it is a lower bound."""
        if resource not in self.amounts:
            return "not run"
        sign = "≥ " if self.is_censored(resource) else ""
        return f"{sign}{format_amount(resource, self.amounts[resource])}"

    def main_usage(self) -> str:
        """Return memory, time and what a limit ended, as far as known."""
        ended_by = self.record.censored_by or "memory"
        names = dict.fromkeys(("memory", "wall_time", "gpu_memory", ended_by))
        known = [name for name in names if name in self.amounts]
        return ", ".join(f"{get_resource(n).title} {self.format_usage(n)}" for n in known)

    def hover(self, resource: str, *more: str, params: Sequence[str] | None = None) -> str:
        """Return the lines shown when the mouse points at the trial.

        Unless ``params`` names some, at most eight hyperparameters are shown.
        """
        names = list(self.trial.params)[:_MAX_PARAMS] if params is None else params
        lines = [f"trial {self.number}, {self.outcome}", self.format_usage(resource), *more]
        lines += [f"{name} = {_format_param(self.trial.params[name])}" for name in names]
        if self.record.reason and self.outcome in ENDED:
            lines.append(self.record.reason[:_MAX_REASON])
        return "\n".join(lines)


def _format_param(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:60]


class StudyTrials:
    """The finished trials that all plots of a study share.

    Args:
        study: The study.
        read: Its finished trials and their records; they are read now unless given.

    Attributes:
        study: The study.
        finished: Its finished trials, in the order of their numbers.
        limits: The limits in force, by resource, in SI base units.
    """

    def __init__(
        self, study: Study, read: tuple[Sequence[FrozenTrial], Sequence[TrialRecord]] | None = None
    ) -> None:
        self.study = study
        pairs = zip(*(read or _records.read_finished(study)), strict=True)
        self.finished = [_finished_trial(*pair) for pair in pairs]
        self.limits = _records.read_amounts(study.user_attrs.get(_records.STUDY_LIMITS))

    def with_usage(self, resource: str) -> list[FinishedTrial]:
        """Return the trials that ran and whose usage of a resource is known."""
        return [t for t in self.finished if resource in t.amounts and t.outcome != "rejected"]


def _finished_trial(trial: FrozenTrial, record: TrialRecord) -> FinishedTrial:
    amounts = measured_usage(trial, record)
    breach = record.breach
    if breach is not None and get_resource(breach.resource).peak and not breach.forecast:
        amounts[breach.resource] = max(amounts.get(breach.resource, 0.0), breach.observed)
    outcome = _records.outcome_of(trial, record) or "failed"
    return FinishedTrial(trial, record, outcome, amounts)


def measured_resources(trials: Sequence[FinishedTrial]) -> list[str]:
    """Return the resources with a positive usage of any trial, those of own meters last."""
    found = {name for trial in trials for name, value in trial.amounts.items() if value > 0}
    known = [name for name in USAGE_RESOURCES if name in found]
    return known + sorted(found.difference(known))


def main_resource(trials: Sequence[FinishedTrial]) -> str:
    """Return the measured resource that ended most trials, or else the first one."""
    measured = measured_resources(trials) or ["memory"]
    breaches = Counter(trial.record.breach.resource for trial in trials if trial.record.breach)
    return max(measured, key=lambda name: breaches[name])


def by_outcome(trials: Sequence[FinishedTrial]) -> dict[str, list[FinishedTrial]]:
    """Return the trials by outcome, in the order of the outcomes, without empty groups."""
    groups = {o: [t for t in trials if t.outcome == o] for o in OUTCOMES}
    return {outcome: group for outcome, group in groups.items() if group}


def predict_intervals(
    footprint: Footprint, points: Sequence[Mapping[str, Any]], resource: str
) -> list[Interval | None]:
    """Return a model's predictions for points, None where one is unknown or not finite."""
    expected = footprint.expected(points).get(resource)
    if expected is None:
        return [None] * len(points)
    found = expected.intervals(footprint.confidence)
    return [each if all(map(math.isfinite, vars(each).values())) else None for each in found]
