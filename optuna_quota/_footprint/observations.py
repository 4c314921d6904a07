"""What a footprint model learns from one trial."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._records import Interval
from optuna_quota._records import is_lower_bound
from optuna_quota._records import may_be_lower_bound
from optuna_quota._records import outcome_of
from optuna_quota._records import read_record
from optuna_quota._records import TrialRecord
from optuna_quota._resources import Usage
from optuna_quota._resources import USAGE_RESOURCES


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Observation:
    """One trial: its point and what was measured of it.

    Args:
        params: Value of each hyperparameter.
        distributions: Distribution of each.
        usage: What was measured.
        censored: Resources of which the trial would have used more, had it not been stopped.
        maybe_censored: Resources of which it may have: the peaks of a pruned trial. Each step of a
            training mostly repeats the one before, but where later steps take more data or a
            larger model, what was seen is a lower bound. The model's fit decides.
        projected: What was expected of it before it ran.
        is_complete: Whether the trial completed, so that no parameter is missing.
    """

    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    usage: Usage
    censored: frozenset[str] = field(default=frozenset())
    maybe_censored: frozenset[str] = field(default=frozenset())
    projected: Mapping[str, Interval] = field(default_factory=dict)
    is_complete: bool = True

    @property
    def is_surprise(self) -> bool:
        """Whether anything that was projected of the trial turned out wrong."""
        known = ((name, self.usage.get(name), each) for name, each in self.projected.items())
        return any(
            amount is not None
            and (amount > each.upper or (amount < each.lower and name not in self.censored))
            for name, amount, each in known
        )


def read_observation(trial: FrozenTrial) -> Observation | None:
    """Return what a finished row teaches, None when it says nothing of usage."""
    if not trial.state.is_finished():
        return None
    record = read_record(trial)
    usage = _with_clock_time(trial, record, _lower_bounds(record))
    if record.outcome == "rejected" or not usage.amounts():
        return None
    end, names = (outcome_of(trial, record), record.censored_by), usage.amounts()
    return Observation(
        params=trial.params,
        distributions=trial.distributions,
        usage=usage,
        censored=frozenset(name for name in names if is_lower_bound(name, *end)),
        maybe_censored=frozenset(name for name in names if may_be_lower_bound(name, *end)),
        projected=record.footprint,
        is_complete=trial.state.name == "COMPLETE",
    )


def _with_clock_time(trial: FrozenTrial, record: TrialRecord, usage: Usage) -> Usage:
    """Return the usage with what Optuna itself says of the time, where nothing was metered.

    So a study of plain Optuna can be projected too. A row that was written by hand
    (``create_trial``) began and ended at one moment and says nothing.
    """
    unmetered = record.outcome is None and usage.wall_time is None
    duration = trial.duration
    if not unmetered or trial.state.name == "FAIL" or duration is None:
        return usage
    seconds = duration.total_seconds()
    return replace(usage, wall_time=seconds) if seconds > 0 else usage


def _lower_bounds(record: TrialRecord) -> Usage:
    """Return the usage, raised to the limit where a trial was stopped on its way there."""
    breach, usage = record.breach, record.usage
    if breach is None or breach.quota or breach.resource not in USAGE_RESOURCES:
        return usage
    # Without a measurement (trials that shared a process) there is nothing to raise.
    measured = usage.get(breach.resource)
    if measured is None or measured >= breach.limit:
        return usage
    raised: dict[str, Any] = {breach.resource: breach.limit}
    return replace(usage, **raised)


# The cost of a fit grows with the cube of the points; beyond this many more bring little.
CAP = 100
_RECENT = 40


def chosen(rows: Sequence[Observation], cap: int = CAP) -> list[int]:
    """Return the indices of at most ``cap`` rows, oldest first.

    The newest say where the study is now; the others are spread evenly over the amounts of each
    resource, so that the cheapest and the dearest, stopped ones among them, are kept.
    """
    if len(rows) <= cap:
        return list(range(len(rows)))
    newest = min(_RECENT, cap // 2)
    recent, older = range(len(rows) - newest, len(rows)), rows[: len(rows) - newest]
    names = sorted({name for row in older for name in row.usage.amounts()})
    kept = set(recent)
    for name in names:
        amounts = np.array([_amount(row, name) for row in older])
        order = np.argsort(amounts, kind="stable")[: int(np.sum(np.isfinite(amounts)))]
        share = (cap - newest) // len(names)
        if len(order):
            ranks = np.linspace(0, len(order) - 1, share).round().astype(int)
            kept.update(order[ranks].tolist())
    return sorted(kept)


def _amount(row: Observation, name: str) -> float:
    amount = row.usage.get(name)
    return np.inf if amount is None else amount
