"""The finished trials of a study as arrays, for models and correlations, and the best of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _optuna, _records
from optuna_quota._resources import USAGE_RESOURCES
from optuna_quota._table import DataFrame, table_of, usage_at_least
from optuna_quota._units import is_number


@dataclass(frozen=True)
class Parameter:
    """One hyperparameter, or user attribute, over all trials of a study."""

    name: str
    # Its value, or the code of its level; NaN where inactive; shape (n_trials,).
    values: NDArray[np.float64]
    levels: tuple[str, ...] = ()  # of a category, in the order of their codes
    branch: str = ""  # under which choices it is active, such as "clf=svm"; empty when always

    @property
    def active(self) -> NDArray[np.bool_]:
        return np.isfinite(self.values)


@dataclass(frozen=True)
class StudyData:
    """The finished trials of a study, as of one moment, and as arrays."""

    trials: Sequence[FrozenTrial]
    records: Sequence[_records.TrialRecord]
    table: DataFrame  # one row a trial
    parameters: tuple[Parameter, ...]  # and selected user attributes
    ended: NDArray[np.object_]  # how, by Optuna's state where this library did not see it
    resources: tuple[str, ...]  # whose usage is known of at least one trial
    # The resources whose peaks stopped trials had not reached, as the models found.
    partial_peaks: frozenset[str] = frozenset()

    @property
    def is_conditional(self) -> bool:
        """Whether any hyperparameter is active in some trials only."""
        return any(p.branch for p in self.parameters if f"params_{p.name}" in self.table)

    def amounts(self, resource: str) -> NDArray[np.float64]:
        """Return what each trial used, shape ``(n_trials,)``; NaN where unknown.

        A trial that was stopped before it reached a limit, because the allocation that would have
        exceeded it was refused or predicted, counts with the limit, which is a lower bound too.
        """
        return np.array([used.get(resource, math.nan) for used in self._used], dtype=float)

    @cached_property
    def _used(self) -> Sequence[dict[str, float]]:
        return [usage_at_least(t, r) for t, r in zip(self.trials, self.records, strict=True)]

    def censored(self, resource: str) -> NDArray[np.bool_]:
        """Return where the amount is only a lower bound, shape ``(n_trials,)``."""
        return np.asarray(self._evidence(resource) == "lower bound")

    def stopped_peaks(self, resource: str) -> NDArray[np.bool_]:
        """Return where the amount is a peak of a stopped trial, shape ``(n_trials,)``."""
        return np.asarray(self._evidence(resource) == "partial peak")

    def informative(self, resource: str) -> NDArray[np.bool_]:
        """Return where the amount is known and a value or a bound, shape ``(n_trials,)``."""
        found = self._evidence(resource) != "partial"
        if resource in self.partial_peaks:
            found &= ~self.stopped_peaks(resource)
        return np.asarray(found & np.isfinite(self.amounts(resource)))

    def _evidence(self, resource: str) -> NDArray[np.object_]:
        ends = list(zip(self.ended, self.table["censored_by"], strict=True))
        says = {end: _records.evidence(resource, *end) for end in set(ends)}
        return np.array([says[end] for end in ends], dtype=object)

    def ranked(self, resource: str) -> NDArray[np.bool_]:
        """Return which trials can be ranked by their usage, shape ``(n_trials,)``.

        A trial terminated for this resource used at least its limit, so it ranks above those that
        stayed below. One that ended early for another reason has no rank.
        """
        own = (self.table["censored_by"] == resource).to_numpy(dtype=bool)
        return self.informative(resource) & (own | ~self.censored(resource))


def study_data(study: Study, user_attrs: Sequence[str] = ()) -> StudyData:
    """Return a study's finished trials as arrays, with user attributes as further parameters.

    Raises:
        ValueError: If a user attribute has the name of a hyperparameter.
    """
    trials, records = _records.read_finished(study)
    table = table_of(trials, records, len(study.directions))
    own = dict.fromkeys(name for r in records for name in r.usage.custom)
    meters = [*USAGE_RESOURCES, *(name for name in own if table[name].dtype == float)]
    outcomes = [_records.outcome_of(t, r) for t, r in zip(trials, records, strict=True)]
    found = [*_parameters(trials), *_attributes(trials, user_attrs)]
    whole = _has_all_parameters(trials)
    return StudyData(
        trials=trials,
        records=records,
        table=table,
        parameters=tuple(replace(each, branch=_branch(each, found, whole)) for each in found),
        ended=np.array(outcomes, dtype=object),
        resources=tuple(name for name in meters if table[name].notna().any()),
    )


def _parameters(trials: Sequence[FrozenTrial]) -> Iterable[Parameter]:
    found: dict[str, list[BaseDistribution]] = {}
    for trial in trials:
        for name, distribution in trial.distributions.items():
            if distribution not in found.setdefault(name, []):
                found[name].append(distribution)
    for name, distributions in found.items():
        given = [[t.params[name]] if name in t.params else [] for t in trials]
        choices = [choice for d in distributions for choice in getattr(d, "choices", ())]
        yield _parameter(name, given, choices)


def _attributes(trials: Sequence[FrozenTrial], names: Sequence[str]) -> Iterable[Parameter]:
    for name in dict.fromkeys(names):
        if any(name in t.params for t in trials):
            raise ValueError(
                f"`user_attrs` must differ from the hyperparameters but has {name!r}, which is "
                "a hyperparameter."
            )
        values = (t.user_attrs.get(name) for t in trials)
        yield _parameter(name, [[v] if isinstance(v, (int, float, str)) else [] for v in values])


def _parameter(name: str, given: Sequence[list[Any]], choices: Sequence[Any] = ()) -> Parameter:
    """Return numbers, or else levels, from the value of each trial, an empty list without one."""
    found = [value for values in given for value in values]
    # An infinite choice is no number to a model, but the parameter is set.
    if all(map(is_number, found)) and all(is_number(c) and math.isfinite(c) for c in choices):
        numbers = np.array([float(*values) if values else math.nan for values in given])
        return Parameter(name, np.where(np.isfinite(numbers), numbers, math.nan))
    levels = tuple(dict.fromkeys(map(str, [*choices, *found])))
    code = {level: float(i) for i, level in enumerate(levels)}
    codes = [code[str(*values)] if values else math.nan for values in given]
    return Parameter(name, np.array(codes, dtype=float), levels)


def _has_all_parameters(trials: Sequence[FrozenTrial]) -> NDArray[np.bool_]:
    """Return which trials have each parameter of their branch, shape ``(n_trials,)``.

    A trial that was rejected, stopped or failed may have ended before it drew all parameters. A
    trial that was pruned after it had reported a value has all of them.
    """
    seen = {frozenset(trial.params) for trial in trials}
    return np.array(
        [
            t.state.name == "COMPLETE"
            or (t.state.name == "PRUNED" and bool(t.intermediate_values))
            or not any(t.params.keys() < names for names in seen)
            for t in trials
        ],
        dtype=bool,
    )


def _branch(parameter: Parameter, others: Sequence[Parameter], whole: NDArray[np.bool_]) -> str:
    """Return under which choices a parameter is active, if a category decides it."""
    active = parameter.active[whole]
    if active.all():
        return ""
    for other in others:
        codes = other.values[whole]
        if other.name == parameter.name or not other.levels or not other.active[whole].all():
            continue
        chosen = np.unique(codes[active])
        if np.array_equal(np.isin(codes, chosen), active):
            return f"{other.name}={'|'.join(other.levels[int(code)] for code in chosen)}"
    return "where set"


def best_numbers(study: Study, trials: Iterable[FrozenTrial]) -> list[int]:
    """Return the number of the best completed one of a study's trials, or the Pareto front's.

    Trials that violate a constraint or have a value that is not finite are left out.
    """
    completed = [t for t in trials if t.state.name == "COMPLETE" and is_feasible(t)]
    if not completed:
        return []
    losses = np.array([t.values for t in completed], dtype=float) * loss_signs(study)
    return [completed[i].number for i in pareto_front(losses)]


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether a trial violates no constraint and all its values are finite."""
    finite = all(math.isfinite(v) for v in trial.values or ())
    return finite and all(v <= 0 for v in _optuna.constraints_of(trial).values())


def loss_signs(study: Study) -> NDArray[np.float64]:
    """Return 1 for each objective to minimize and -1 for each to maximize."""
    return np.array([-1.0 if d.name == "MAXIMIZE" else 1.0 for d in study.directions])


def pareto_front(losses: NDArray[np.float64]) -> list[int]:
    """Return the rows of losses, shape ``(n, n_objectives)``, that no other row dominates.

    Of a single column, that is the first minimum.
    """
    if losses.shape[1] == 1:
        return [int(losses[:, 0].argmin())]
    kept: list[int] = []
    for i in np.lexsort(losses.T[::-1]):
        better = (losses[kept] <= losses[i]).all(axis=1) & (losses[kept] < losses[i]).any(axis=1)
        if not better.any():
            kept.append(int(i))
    return sorted(kept)


def cost_front(costs: NDArray[np.float64], losses: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of the Pareto front of cost and loss, cheapest first.

    Of equal points, the first is on the front.
    """
    order = np.lexsort([losses, costs])
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], losses[order]]))[:-1]
    return np.asarray(order[losses[order] < best_before])
