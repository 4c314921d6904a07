"""Tables of real trials, and how bounds and projections of models of them turn out.

Used by ``footprint_models.py``, which describes the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, json_to_distribution

from optuna_quota import Footprint, project, Strategy, Usage
from optuna_quota._footprint.features import Features
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.predictive import Predictive
from optuna_quota._footprint.search_space import draw_future_points


RESOURCES = ("memory", "cpu_time", "wall_time")
SIZES = (8, 10, 14, 20, 28, 40)
PROJECTED = (5, 10, 20)
# Trials that are left to judge a model by, at least.
LEFT = 15
LEVEL = 0.95
TABLES = Path(__file__).parent / "tables"
_VERBOSE = ("peak_rss_bytes", "cpu_s", "wall_s")


@dataclass(frozen=True)
class Workload:
    name: str
    rows: list[Observation]

    def amounts(self, resource: str) -> np.ndarray:
        return np.array([row.usage.get(resource) for row in self.rows], dtype=float)

    def shuffled(self, shuffle: int) -> Workload:
        order = np.random.default_rng([shuffle, 7]).permutation(len(self.rows))
        return Workload(self.name, [self.rows[i] for i in order])


def find_tables(folders: Sequence[Path], name: str = "*") -> list[Path]:
    return sorted(path for folder in folders for path in folder.glob(f"{name}.jsonl"))


@functools.cache
def read_workload(path: Path) -> Workload:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if "params" in lines[0]:
        lines = [[each, *(each[key] for key in _VERBOSE)] for each in lines]
    else:
        head = {name: json.dumps(each) for name, each in lines[0].items()}
        lines = [
            [{"params": params, "distributions": {name: head[name] for name in params}}, *amounts]
            for params, *amounts in lines[1:]
        ]
    known: dict[str, BaseDistribution] = {}
    rows = []
    for trial, memory, cpu_time, wall_time in lines:
        space = {
            name: known.setdefault(text, json_to_distribution(text))
            for name, text in trial["distributions"].items()
        }
        usage = Usage(memory=memory, cpu_time=cpu_time, wall_time=wall_time)
        rows.append(Observation(trial["params"], space, usage))
    return Workload(path.stem, rows)


def by_mean(train: Sequence[Observation], test: Sequence[Observation]) -> dict[str, Predictive]:
    found = {}
    for name in RESOURCES:
        logs = np.log([row.usage.get(name) or 0.0 for row in train])
        spread = logs.std(ddof=1) * (1 + 1 / len(logs)) ** 0.5
        ones = np.ones(len(test))
        found[name] = Predictive(0.0, logs.mean() * ones, spread * ones, len(logs) - 1.0)
    return found


def by_least_squares(
    train: Sequence[Observation], test: Sequence[Observation]
) -> dict[str, Predictive]:
    features = Features.of([row.distributions for row in train])
    columns, others = (
        np.column_stack([np.ones(len(rows)), features.encode([row.params for row in rows])])
        for rows in (train, test)
    )
    gram = columns.T @ columns + 1e-3 * np.eye(columns.shape[1])
    df = float(max(len(train) - columns.shape[1], 2))
    lever = np.einsum("ij,jk,ik->i", others, np.linalg.inv(gram), others)
    found = {}
    for name in RESOURCES:
        logs = np.log([row.usage.get(name) or 0.0 for row in train])
        weights = np.linalg.solve(gram, columns.T @ logs)
        scale = np.sqrt(np.sum((logs - columns @ weights) ** 2) / df)
        found[name] = Predictive(0.0, others @ weights, scale * np.sqrt(1 + lever), df)
    return found


MODELS = ("mean so far", "OLS on logs", "footprint")


@dataclass(frozen=True)
class Bounded:
    """How one model's bounds held on the trials that it had not seen."""

    workload: str
    shuffle: int
    resource: str
    model: str
    n: int
    errors: np.ndarray
    ratios: np.ndarray
    # By how much the spread would have to be multiplied for the bound to hold, each trial.
    needed: np.ndarray

    @classmethod
    def of(cls, expected: Predictive, actual: np.ndarray, **labels: Any) -> Bounded:
        median, upper = expected.quantile(0.5), expected.quantile(LEVEL)
        away = np.log(np.maximum(actual - expected.floor, 1e-12)) - expected.center
        reach = np.log(upper - expected.floor) - expected.center
        needed = away / np.maximum(reach, 1e-12)
        return cls(
            errors=np.abs(median / actual - 1), ratios=upper / actual, needed=needed, **labels
        )


@dataclass(frozen=True)
class Projected:
    """How one projection of the remaining trials' total turned out."""

    workload: str
    shuffle: int
    resource: str
    model: str
    n: int
    error: float
    held: bool
    width: float


def bounds_and_projections(
    path: Path, shuffle: int, parts: Sequence[str]
) -> list[Bounded | Projected]:
    workload = read_workload(path).shuffled(shuffle)
    rows = workload.rows
    found: list[Bounded | Projected] = []
    footprint = None
    for n in sorted({*SIZES, *PROJECTED}):
        if len(rows) < n + LEFT:
            break
        footprint = Footprint.fit(rows[:n], start=footprint)
        labels = {"workload": workload.name, "shuffle": shuffle, "n": n}
        if n in SIZES and "bounds" in parts:
            points = [row.params for row in rows[n:]]
            models = (
                by_mean(rows[:n], rows[n:]),
                by_least_squares(rows[:n], rows[n:]),
                footprint.expected(points),
            )
            found += [
                Bounded.of(
                    expected[name],
                    workload.amounts(name)[n:],
                    resource=name,
                    model=model,
                    **labels,
                )
                for model, expected in zip(MODELS, models, strict=True)
                for name in RESOURCES
            ]
        if n in PROJECTED and "projections" in parts:
            found += _projected(workload, footprint, labels)
    return found


def _projected(
    workload: Workload, footprint: Footprint, labels: Mapping[str, Any]
) -> list[Projected]:
    found = []
    k, rows = labels["n"], workload.rows
    ahead = {
        "points not known": draw_future_points(rows[:k], 128, adaptive=False),
        "points known": [row.params for row in rows[k:]],
    }
    for model, points in ahead.items():
        projection = project(Strategy(len(rows) - k), footprint, points=points)
        by_name = {row.resource: row for row in projection.resources}
        for name, source in (("cpu_time", "cpu_time"), ("wall_time", "trial_time")):
            row, total = by_name[source], workload.amounts(name)[k:].sum()
            found.append(
                Projected(
                    resource=name,
                    model=f"footprint, {model}",
                    error=row.median / total - 1,
                    held=row.lower <= total <= row.upper,
                    width=row.upper / row.lower,
                    **labels,
                )
            )
    generator = np.random.default_rng([labels["shuffle"], 13])
    for name in ("cpu_time", "wall_time"):
        known, actual = np.split(workload.amounts(name), [k])
        total, m = actual.sum(), len(actual)
        mean = known.mean() * m
        half = 1.7 * known.std(ddof=1) * (m + m**2 / k) ** 0.5
        lower, upper = max(mean - half, known.sum() / k), mean + half
        found.append(
            Projected(
                resource=name,
                model="mean so far",
                error=mean / total - 1,
                held=lower <= total <= upper,
                width=upper / lower,
                **labels,
            )
        )
        # The error that is left to chance if the points are not known: an oracle that knows all
        # costs, but not which points come, predicts their mean times their number.
        drawn = generator.choice(workload.amounts(name), m).sum()
        certain = workload.amounts(name).mean() * m
        found.append(
            Projected(
                resource=name,
                model="an oracle, points not known",
                error=certain / drawn - 1,
                held=True,
                width=np.nan,
                **labels,
            )
        )
    return found
