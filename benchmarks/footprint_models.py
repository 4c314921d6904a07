"""Footprint models on tables of real trials, each workload by itself: nothing is learned across.

Each file is one workload, one JSON object a line: `params`, `distributions`, `wall_s`, `cpu_s`,
`peak_rss_bytes`. The trials are shuffled; a model is fitted on the first n and judged on the rest.

    python benchmarks/footprint_models.py --tables DIRECTORY [--quick] [--only WORKLOAD]

Figures are medians over workloads, with the worst workload beside them. Baselines: the mean so
far with its t interval, ordinary least squares on the same columns, no admission at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
import json
from pathlib import Path
import time
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import json_to_distribution

from optuna_quota import Footprint
from optuna_quota import project
from optuna_quota import Strategy
from optuna_quota import Usage
from optuna_quota._models.features import Features
from optuna_quota._models.learner import Learner
from optuna_quota._models.predictive import Predictive
from optuna_quota._models.rows import FootprintRow
from optuna_quota._models.whereabouts import next_points


RESOURCES = ("memory", "wall_time", "cpu_time")
SIZES = (8, 10, 14, 20, 28, 40)


@dataclass(frozen=True)
class Workload:
    name: str
    rows: list[FootprintRow]

    def amounts(self, resource: str) -> np.ndarray:
        return np.array([row.usage.get(resource) for row in self.rows], dtype=float)


def read_workload(path: Path) -> Workload:
    rows = []
    known: dict[str, BaseDistribution] = {}
    for line in path.read_text().splitlines():
        trial = json.loads(line)
        space = {
            name: known.setdefault(text, json_to_distribution(text))
            for name, text in trial["distributions"].items()
        }
        usage = Usage(
            memory=trial["peak_rss_bytes"], wall_time=trial["wall_s"], cpu_time=trial["cpu_s"]
        )
        rows.append(FootprintRow(trial["params"], space, usage))
    return Workload(path.stem, rows)


Predict = Callable[[list[FootprintRow], list[FootprintRow]], Mapping[str, Predictive]]


def by_footprint(train: list[FootprintRow], test: list[FootprintRow]) -> Mapping[str, Predictive]:
    return Footprint.fit(train).expected([row.params for row in test])


def by_mean(train: list[FootprintRow], test: list[FootprintRow]) -> Mapping[str, Predictive]:
    found = {}
    for name in RESOURCES:
        logs = np.log([row.usage.get(name) or 0.0 for row in train])
        spread = logs.std(ddof=1) * (1 + 1 / len(logs)) ** 0.5
        ones = np.ones(len(test))
        found[name] = Predictive(0.0, logs.mean() * ones, spread * ones, len(logs) - 1.0)
    return found


def by_least_squares(
    train: list[FootprintRow], test: list[FootprintRow]
) -> Mapping[str, Predictive]:
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


MODELS: dict[str, Predict] = {
    "mean so far": by_mean,
    "OLS on logs": by_least_squares,
    "footprint": by_footprint,
}


def table(title: str, head: list[str], lines: list[list[str]]) -> None:
    print(f"\n## {title}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |")


def accuracy(workloads: list[Workload], shuffles: int) -> None:
    figures: dict[tuple[str, str, int], dict[str, list[tuple[float, float, float]]]] = {}
    for workload in workloads:
        for shuffle in range(shuffles):
            order = np.random.default_rng([shuffle, 7]).permutation(len(workload.rows))
            rows = [workload.rows[i] for i in order]
            for n in SIZES:
                for model, predict in MODELS.items():
                    expected = predict(rows[:n], rows[n:])
                    for name in RESOURCES:
                        actual = workload.amounts(name)[order[n:]]
                        median = expected[name].quantile(0.5)
                        upper = expected[name].quantile(0.95)
                        figures.setdefault((name, model, n), {}).setdefault(
                            workload.name, []
                        ).append(
                            (
                                float(np.median(np.abs(median / actual - 1))) * 100,
                                float(np.mean(actual <= upper)) * 100,
                                float(np.median(upper / actual)),
                            )
                        )
    for index, (what, worst) in enumerate(
        [
            ("median absolute error, %", np.max),
            ("coverage of the 95% upper bound, % (mean over workloads)", np.min),
            ("upper bound / actual", np.max),
        ]
    ):
        lines = []
        for name in RESOURCES:
            for model in MODELS:
                cells = []
                for n in SIZES:
                    each = [
                        float(np.mean([f[index] for f in found]))
                        if index == 1
                        else float(np.median([f[index] for f in found]))
                        for found in figures[name, model, n].values()
                    ]
                    middle = np.mean(each) if index == 1 else np.median(each)
                    cells.append(f"{middle:.3g} ({worst(each):.3g})")
                lines.append([name, model, *cells])
        table(f"{what}; worst workload in brackets", ["", "model", *map(str, SIZES)], lines)


def stopped(row: FootprintRow, resource: str, limit: float) -> FootprintRow:
    """Return what is seen of a trial that is stopped at a limit."""
    amounts: dict[str, Any] = row.usage.amounts()
    # When a trial reaches its memory is not in the tables: half-way.
    share = 0.5 if resource == "memory" else limit / amounts[resource]
    for name in ("wall_time", "cpu_time"):
        amounts[name] *= share
    amounts[resource] = limit * 1.001
    held = {"wall_time", "cpu_time", resource}
    return FootprintRow(row.params, row.distributions, Usage(**amounts), frozenset(held))


def admission(workloads: list[Workload], shuffles: int) -> None:
    lines = []
    for resource in ("memory", "wall_time"):
        rates = []
        for workload in workloads:
            counts = np.zeros(4)
            limit = float(np.percentile(workload.amounts(resource), 70))
            for shuffle in range(shuffles):
                counts += admit_in_turn(workload, resource, limit, shuffle)
            rates.append((100 * counts[1] / counts[0], 100 * counts[3] / counts[2], workload.name))
        over, wrong = np.array([r[0] for r in rates]), np.array([r[1] for r in rates])
        lines.append([resource, "no admission", "0", "0", "", ""])
        lines.append(
            [
                resource,
                "footprint",
                f"{np.mean(over):.1f}",
                f"{np.mean(wrong):.1f}",
                f"{over.min():.1f} to {over.max():.1f}",
                f"{wrong.min():.1f} to {wrong.max():.1f}",
            ]
        )
    table(
        "admission at a limit on the 70th percentile, no refusal before 8 trials",
        ["limit", "", "over-limit refused %", "fitting refused %", "workloads", "workloads"],
        lines,
    )


def admit_in_turn(workload: Workload, resource: str, limit: float, shuffle: int) -> np.ndarray:
    """Return counts: over the limit, refused of them; fitting, refused of them."""
    counts = np.zeros(4)
    rows: list[FootprintRow] = []
    footprint, searched, fitted = None, 0, 0
    for i in np.random.default_rng([shuffle, 3]).permutation(len(workload.rows)):
        row = workload.rows[i]
        over = (row.usage.get(resource) or 0.0) > limit
        if len(rows) >= 8:
            if len(rows) > fitted:
                refit = len(rows) >= min(searched * 1.2, searched + 10)
                footprint = Footprint.fit(rows, start=footprint, refit=refit)
                searched, fitted = len(rows) if refit else searched, len(rows)
            assert footprint is not None
            refused = footprint.expected([row.params])[resource].above(limit)[0] > 0.5
            counts += np.array([over, over and refused, not over, not over and refused])
            if refused:
                continue
        rows.append(stopped(row, resource, limit) if over else row)
    return counts


def projections(workloads: list[Workload], shuffles: int) -> None:
    figures: dict[tuple[str, str, int], list[tuple[float, bool, float]]] = {}
    for workload in workloads:
        for shuffle in range(shuffles):
            order = np.random.default_rng([shuffle, 11]).permutation(len(workload.rows))
            rows = [workload.rows[i] for i in order]
            for k in (5, 10, 20):
                footprint = Footprint.fit(rows[:k])
                points = next_points(rows[:k], 128, adaptive=False)
                projection = project(Strategy(len(rows) - k), footprint, points=points)
                by_name = {row.resource: row for row in projection.resources}
                for name, source in (("cpu_time", "cpu_time"), ("trial_time", "wall_time")):
                    known, actual = np.split(workload.amounts(source)[order], [k])
                    row = by_name[name]
                    total = actual.sum()
                    figures.setdefault((name, "footprint", k), []).append(
                        (
                            row.median / total - 1,
                            row.lower <= total <= row.upper,
                            row.upper / row.lower,
                        )
                    )
                    mean = known.mean() * len(actual)
                    half = 1.7 * known.std(ddof=1) * (len(actual) + len(actual) ** 2 / k) ** 0.5
                    lower, upper = max(mean - half, known.sum() / k), mean + half
                    figures.setdefault((name, "mean so far", k), []).append(
                        (mean / total - 1, lower <= total <= upper, upper / lower)
                    )
    lines = [
        [
            name,
            model,
            str(k),
            f"{100 * np.median([abs(f[0]) for f in found]):.0f}",
            f"{np.mean([f[1] for f in found]):.2f}",
            f"{np.median([f[2] for f in found]):.1f}",
        ]
        for (name, model, k), found in sorted(figures.items())
    ]
    head = ["", "model", "after", "median error %", "coverage of 90% interval", "upper / lower"]
    table("total of the remaining trials", head, lines)


def costs() -> None:
    """Print what learning costs a trial, beside what TPESampler's ask does."""
    generator = np.random.default_rng(0)
    space: dict[str, BaseDistribution] = {
        "width": optuna.distributions.IntDistribution(8, 1024, log=True),
        "depth": optuna.distributions.IntDistribution(1, 8),
        "rate": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True),
        "kind": optuna.distributions.CategoricalDistribution(["a", "b", "c"]),
    }
    trials = []
    for _ in range(1_050):
        params = {
            "width": int(np.exp(generator.uniform(2.1, 6.9))),
            "depth": int(generator.integers(1, 9)),
            "rate": float(np.exp(generator.uniform(-9, 0))),
            "kind": str(generator.choice(["a", "b", "c"])),
        }
        work = params["width"] ** 1.5 * params["depth"]
        usage = {
            "quota:memory": 2e8 + 4e3 * work,
            "quota:cpu_time": (0.1 + work / 1e4) * float(np.exp(0.04 * generator.normal())),
            "quota:wall_time": (0.1 + work / 1e4) * float(np.exp(0.3 * generator.normal())),
        }
        value = float(generator.normal())
        trials.append(
            optuna.create_trial(params=params, distributions=space, value=value, user_attrs=usage)
        )
    learner, lines, start = Learner(), [], 8
    learner.learn(trials[:start])
    for n in (20, 50, 100, 1_000):
        start = max(start, n - 50)
        learner.learn(trials[:start])
        begin = time.process_time()
        for size in range(start + 1, n + 1):
            learner.learn(trials[:size])
        fit = (time.process_time() - begin) / (n - start) * 1e3
        start = n
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        study.add_trials(trials[:n])
        asks = []
        for _ in range(5):
            begin = time.process_time()
            asked = study.ask(space)
            asks.append((time.process_time() - begin) * 1e3)
            study.tell(asked, 0.0)
        lines.append([str(n), f"{fit:.1f}", f"{np.median(asks):.1f}"])
    head = ["trials", "learning three resources, ms a trial", "TPESampler's ask, ms"]
    table("cost, milliseconds of CPU", head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="2 shuffles instead of 20")
    parser.add_argument("--only", help="one workload")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    paths = sorted(arguments.tables.glob(f"{arguments.only or '*'}.jsonl"))
    workloads = [read_workload(path) for path in paths]
    shuffles = 2 if arguments.quick else 20
    print(f"{len(workloads)} workloads, {shuffles} shuffles")
    accuracy(workloads, shuffles)
    admission(workloads, max(shuffles // 4, 1))
    projections(workloads, shuffles)
    costs()


if __name__ == "__main__":
    main()
