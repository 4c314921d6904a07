"""The trials that footprint models are fitted to: reading them, and selecting some of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TYPE_CHECKING

import numpy as np

from optuna_quota._records import (
    evidence,
    Interval,
    outcome_of,
    read_record,
    TrialRecord,
)
from optuna_quota._resources import Usage, usage_from_amounts, USAGE_RESOURCES


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial


# The cost of a fit grows with the cube of the points; beyond this many more bring little.
MAX_OBSERVATIONS = 100
_RECENT = 40


@dataclass(frozen=True)
class Observation:
    """One trial: its point and its measured usage.

    Args:
        params: Value of each hyperparameter.
        distributions: Distribution of each.
        usage: What was measured.
        censored: Resources whose usage is a lower bound, because their limit stopped the trial.
        maybe_censored: Resources whose peak a stopped trial may not have reached. Each step of a
            training mostly repeats the one before, but later steps may take more data or a larger
            model. The model's fit decides.
        projected: The footprint that was projected before it ran.
        is_complete: Whether the trial completed, so that no parameter is missing.
    """

    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    usage: Usage
    censored: frozenset[str] = frozenset()
    maybe_censored: frozenset[str] = frozenset()
    projected: Mapping[str, Interval] = field(default_factory=dict)
    is_complete: bool = True

    @property
    def is_surprise(self) -> bool:
        """Whether the usage of any resource was outside of its projected interval."""
        known = ((name, self.usage.get(name), each) for name, each in self.projected.items())
        return any(
            amount is not None
            and (amount > each.upper or (amount < each.lower and name not in self.censored))
            for name, amount, each in known
        )


def read_observation(trial: FrozenTrial) -> Observation | None:
    """Return a finished trial as an observation, None if its usage is unknown."""
    if not trial.state.is_finished():
        return None
    record = read_record(trial)
    usage = _with_wall_time(trial, record, _at_least_limit(record))
    end = outcome_of(trial, record), record.censored_by
    says = {name: evidence(name, *end) for name in usage.amounts()}
    known = {name: usage.amounts()[name] for name, what in says.items() if what != "partial"}
    if record.outcome == "rejected" or not known:
        return None
    return Observation(
        params=trial.params,
        distributions=trial.distributions,
        usage=usage_from_amounts(known),
        censored=frozenset(name for name in known if says[name] == "lower bound"),
        maybe_censored=frozenset(name for name in known if says[name] == "partial peak"),
        projected=record.footprint,
        is_complete=trial.state.name == "COMPLETE",
    )


def _with_wall_time(trial: FrozenTrial, record: TrialRecord, usage: Usage) -> Usage:
    """Return the usage of a trial of plain Optuna with the wall time between its datetimes.

    A row made by hand (``create_trial``) starts and completes at one moment and has none.
    """
    duration = trial.duration
    if record.outcome is not None or usage.wall_time is not None or duration is None:
        return usage
    seconds = duration.total_seconds()
    if trial.state.name == "FAIL" or seconds <= 0:
        return usage
    return replace(usage, wall_time=seconds)


def _at_least_limit(record: TrialRecord) -> Usage:
    """Return the usage, raised to the limit of a trial that was stopped on its way there."""
    breach, usage = record.breach, record.usage
    if breach is None or breach.quota or breach.resource not in USAGE_RESOURCES:
        return usage
    # Trials that shared a process have no measurement to raise.
    measured = usage.get(breach.resource)
    if measured is None or measured >= breach.limit:
        return usage
    raised: dict[str, Any] = {breach.resource: breach.limit}
    return replace(usage, **raised)


def select_observations(
    observations: Sequence[Observation], most: int = MAX_OBSERVATIONS
) -> list[Observation]:
    """Return at most ``most`` observations, oldest first.

    The newest show where the study is now; the others are spread evenly over the amounts of each
    resource, so that the least and the largest, those of stopped trials among them, are kept.
    """
    if len(observations) <= most:
        return list(observations)
    n_newest = min(_RECENT, most // 2)
    n_older = len(observations) - n_newest
    older = observations[:n_older]
    kept = set(range(n_older, len(observations)))
    names = sorted({name for each in older for name in each.usage.amounts()})
    for name in names:
        amounts = np.array([each.usage.get(name) for each in older], dtype=float)
        order = np.argsort(amounts, kind="stable")[: int(np.sum(np.isfinite(amounts)))]
        if len(order):
            ranks = np.linspace(0, len(order) - 1, (most - n_newest) // len(names))
            kept.update(order[ranks.round().astype(int)].tolist())
    return [observations[i] for i in sorted(kept)]
