"""Admission at a limit, one trial after another, by models of tables of real trials.

Used by ``footprint_models.py``, which describes the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from footprint_tables import by_least_squares, read_workload, Workload
import numpy as np

from optuna_quota import Footprint, Usage
from optuna_quota._footprint.features import Features
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.predictive import Predictive
from optuna_quota._footprint.resource_model import fit_resource, ResourceData
from optuna_quota._records import evidence


# The aims: percent of what is over the limit that is refused, at most of what fits.
ADMISSION = {"memory": (90.0, 3.0), "wall_time": (80.0, 8.0)}
_REFUSED_ABOVE = 0.5
# What the machine's noise leaves to be refused by clock time.
ORACLE = "oracle that knows CPU time"


def stopped(row: Observation, resource: str, limit: float) -> Observation:
    """Return the observation of a trial that is stopped at a limit, as the library reads it."""
    amounts: dict[str, Any] = row.usage.amounts()
    # When a trial reaches its memory is not in the tables: half-way.
    share = 0.5 if resource == "memory" else limit / amounts[resource]
    for name in ("wall_time", "cpu_time"):
        amounts[name] *= share
    amounts[resource] = limit * 1.001
    says = {name: evidence(name, "terminated", resource) for name in amounts}
    return Observation(
        row.params,
        row.distributions,
        Usage(**amounts),
        censored=frozenset(name for name in amounts if says[name] == "lower bound"),
        partial=frozenset(name for name in amounts if says[name] == "partial"),
        maybe_censored=frozenset(name for name in amounts if says[name] == "partial peak"),
    )


@dataclass(frozen=True)
class Admitted:
    """How many points of a study over and under a limit were refused."""

    workload: str
    shuffle: int
    resource: str
    model: str
    over: int
    over_refused: int
    fitting: int
    fitting_refused: int


def admission(path: Path, shuffle: int) -> list[Admitted]:
    workload = read_workload(path).shuffled(shuffle)
    found = []
    for resource in ADMISSION:
        limit = float(np.percentile(workload.amounts(resource), 70))
        for model, judge in (("footprint", _Learned(resource)), ("OLS on logs", _least_squares)):
            counts = admit_in_turn(workload, resource, limit, judge)
            found.append(Admitted(workload.name, shuffle, resource, model, *counts))
        if shuffle == 0:
            counts = in_hindsight(workload, resource, limit)
            found.append(Admitted(workload.name, shuffle, resource, "in hindsight", *counts))
            if resource == "wall_time":
                counts = by_known_cpu_time(workload, limit)
                found.append(Admitted(workload.name, shuffle, resource, ORACLE, *counts))
    return found


Judge = Callable[[Sequence[Observation], Observation, str], Predictive]


class _Learned:
    """The footprint, with every trial in it; hyperparameters are fitted again now and then."""

    def __init__(self, resource: str) -> None:
        self._footprint: Footprint | None = None
        self._searched = self._fitted = 0

    def __call__(self, rows: Sequence[Observation], row: Observation, name: str) -> Predictive:
        n = len(rows)
        if n > self._fitted:
            refit = n >= min(self._searched * 1.2, self._searched + 10)
            self._footprint = Footprint.fit(rows, start=self._footprint, refit=refit)
            self._searched, self._fitted = n if refit else self._searched, n
        assert self._footprint is not None
        return self._footprint.expected([row.params])[name]


def _least_squares(rows: Sequence[Observation], row: Observation, name: str) -> Predictive:
    return by_least_squares(rows, [row])[name]


def admit_in_turn(
    workload: Workload, resource: str, limit: float, judge: Judge
) -> tuple[int, int, int, int]:
    counts = np.zeros(4, dtype=int)
    rows: list[Observation] = []
    for row in workload.rows:
        over = (row.usage.get(resource) or 0.0) > limit
        if len(rows) >= 8:
            refused = judge(rows, row, resource).above(limit)[0] > _REFUSED_ABOVE
            counts += np.array([over, over and refused, not over, not over and refused])
            if refused:
                continue
        rows.append(stopped(row, resource, limit) if over else row)
    over, over_refused, fitting, fitting_refused = counts.tolist()
    return over, over_refused, fitting, fitting_refused


def in_hindsight(workload: Workload, resource: str, limit: float) -> tuple[int, int, int, int]:
    """Return the counts of a model fitted to all other trials, in ten folds."""
    rows, counts = workload.rows, np.zeros(4, dtype=int)
    for fold in range(10):
        test = rows[fold::10]
        seen = [row for i, row in enumerate(rows) if i % 10 != fold]
        chance = Footprint.fit(seen).expected([row.params for row in test])[resource].above(limit)
        for row, each in zip(test, chance, strict=True):
            over, refused = (row.usage.get(resource) or 0.0) > limit, each > _REFUSED_ABOVE
            counts += np.array([over, over and refused, not over, not over and refused])
    over, over_refused, fitting, fitting_refused = counts.tolist()
    return over, over_refused, fitting, fitting_refused


def by_known_cpu_time(workload: Workload, limit: float) -> tuple[int, int, int, int]:
    """Return the counts of an oracle that knows each trial's CPU time but not the machine's load.

    The ratio of clock time to CPU time comes from a model of all other trials.
    """
    features = Features.of([row.distributions for row in workload.rows])
    columns = features.encode([row.params for row in workload.rows])
    wall_time, cpu_time = workload.amounts("wall_time"), workload.amounts("cpu_time")
    data = ResourceData.exact(columns, wall_time / cpu_time, floors=(0.0,), noise=-1.0)
    ratio = fit_resource(data)
    refused = wall_time * np.exp(-ratio.log_leave_one_out()[0]) > limit
    over = wall_time > limit
    counts = over, over & refused, ~over, ~over & refused
    some, right, fitting, wrong = (int(each.sum()) for each in counts)
    return some, right, fitting, wrong
