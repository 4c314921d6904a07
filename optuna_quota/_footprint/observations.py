"""The trials that footprint models are fitted to: reading them, and selecting some of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TYPE_CHECKING

import numpy as np

from optuna_quota._records import evidence, Interval, outcome_of, read_record, TrialRecord
from optuna_quota._table import usage_at_least
from optuna_quota._usage import Usage, usage_from_amounts


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
        partial: Resources whose usage is that at an unknown share of the trial's run, because
            something else stopped it.
        maybe_censored: Resources whose usage may be one: peaks of a stopped trial. Each step of a
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
    partial: frozenset[str] = frozenset()
    projected: Mapping[str, Interval] = field(default_factory=dict)
    is_complete: bool = True

    @property
    def is_surprise(self) -> bool:
        """Whether the usage of any resource was outside of its projected interval."""
        known = ((name, self.usage.get(name), each) for name, each in self.projected.items())
        return any(
            amount is not None
            and (
                amount > each.upper
                or (amount < each.lower and name not in self.censored | self.partial)
            )
            for name, amount, each in known
        )


def read_observation(trial: FrozenTrial) -> Observation | None:
    """Return a finished trial as an observation, None if its usage is unknown."""
    return observation_of(trial, read_record(trial)) if trial.state.is_finished() else None


def observation_of(trial: FrozenTrial, record: TrialRecord) -> Observation | None:
    """Return a finished trial given with its record, None if its usage is unknown."""
    end = outcome_of(trial, record), record.censored_by
    amounts = usage_at_least(trial, record)
    says = {name: evidence(name, *end) for name in amounts}
    if end[0] == "failed" and record.usage.wall_time is None:
        # Optuna dates the end of a trial whose worker died when that was noticed.
        amounts.pop("wall_time", None)
    if record.outcome == "rejected" or not amounts:
        return None
    return Observation(
        params=trial.params,
        distributions=trial.distributions,
        usage=usage_from_amounts(amounts),
        censored=frozenset(name for name in amounts if says[name] == "lower bound"),
        partial=frozenset(name for name in amounts if says[name] == "partial"),
        maybe_censored=frozenset(name for name in amounts if says[name] == "partial peak"),
        projected=record.footprint,
        is_complete=trial.state.name == "COMPLETE",
    )


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
