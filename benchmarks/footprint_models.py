"""Footprint models on tables of real trials, each workload by itself: nothing is learned across.

Each file is one workload, one JSON object a line: `params`, `distributions`, `wall_s`, `cpu_s`,
`peak_rss_bytes`. The trials are shuffled; a model is fitted on the first n, each fit starting from
the one before as in a study, and judged on the rest.

    python benchmarks/footprint_models.py --tables DIRECTORY [--quick] [--only WORKLOAD]
        [--parts bounds,admission,projections,costs] [--jobs N]

A figure is taken over the workloads in each shuffle; shown are its median over the shuffles and
its range. Baselines: the mean so far with its t interval, ordinary least squares on the same
columns, no admission at all, TPESampler's own ask. At the end stands which aim is met.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
import functools
import itertools
import json
import multiprocessing
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


RESOURCES = ("memory", "cpu_time", "wall_time")
SIZES = (8, 10, 14, 20, 28, 40)
PROJECTED = (5, 10, 20)
COVERAGE = (93.0, 97.0)
SHARPNESS = {"memory": 1.10, "cpu_time": 1.9, "wall_time": 2.6}
ADMISSION = {"memory": (90.0, 3.0), "wall_time": (80.0, 8.0)}
_LEVEL = 0.95
_REFUSED_ABOVE = 0.5


@dataclass(frozen=True)
class Workload:
    name: str
    rows: list[FootprintRow]

    def amounts(self, resource: str) -> np.ndarray:
        return np.array([row.usage.get(resource) for row in self.rows], dtype=float)

    def shuffled(self, shuffle: int) -> Workload:
        order = np.random.default_rng([shuffle, 7]).permutation(len(self.rows))
        return Workload(self.name, [self.rows[i] for i in order])


@functools.cache
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


def by_mean(train: Sequence[FootprintRow], test: Sequence[FootprintRow]) -> dict[str, Predictive]:
    found = {}
    for name in RESOURCES:
        logs = np.log([row.usage.get(name) or 0.0 for row in train])
        spread = logs.std(ddof=1) * (1 + 1 / len(logs)) ** 0.5
        ones = np.ones(len(test))
        found[name] = Predictive(0.0, logs.mean() * ones, spread * ones, len(logs) - 1.0)
    return found


def by_least_squares(
    train: Sequence[FootprintRow], test: Sequence[FootprintRow]
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
        median, upper = expected.quantile(0.5), expected.quantile(_LEVEL)
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
        "points not known": next_points(rows[:k], 128, adaptive=False),
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
        # What is left to chance where the points are not known: whoever knew all costs, but not
        # which of the points come, would say the mean of all times their number.
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
    return found


Judge = Callable[[Sequence[FootprintRow], FootprintRow, str], Predictive]


class _Learned:
    """The footprint, with every trial in it; hyperparameters are searched anew now and then."""

    def __init__(self, resource: str) -> None:
        self._footprint: Footprint | None = None
        self._searched = self._fitted = 0

    def __call__(self, rows: Sequence[FootprintRow], row: FootprintRow, name: str) -> Predictive:
        n = len(rows)
        if n > self._fitted:
            refit = n >= min(self._searched * 1.2, self._searched + 10)
            self._footprint = Footprint.fit(rows, start=self._footprint, refit=refit)
            self._searched, self._fitted = n if refit else self._searched, n
        assert self._footprint is not None
        return self._footprint.expected([row.params])[name]


def _least_squares(rows: Sequence[FootprintRow], row: FootprintRow, name: str) -> Predictive:
    return by_least_squares(rows, [row])[name]


def admit_in_turn(
    workload: Workload, resource: str, limit: float, judge: Judge
) -> tuple[int, int, int, int]:
    counts = np.zeros(4, dtype=int)
    rows: list[FootprintRow] = []
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
    """Return the counts of whoever has seen all other trials to their end, folds of ten."""
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


def costs() -> list[list[str]]:
    """Return what learning costs a trial, beside what TPESampler's ask does."""
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
        for _ in range(9):
            begin = time.process_time()
            asked = study.ask(space)
            asks.append((time.process_time() - begin) * 1e3)
            study.tell(asked, 0.0)
        ask = float(np.median(asks))
        lines.append([str(n), f"{fit:.1f}", f"{ask:.1f}", "met" if fit <= ask else "MISSED"])
    return lines


def spread_of(figures: Sequence[float], digits: int = 1) -> str:
    return (
        f"{np.median(figures):.{digits}f} "
        f"[{np.min(figures):.{digits}f}, {np.max(figures):.{digits}f}]"
    )


def over_workloads(
    found: Sequence[Any], take: Callable[[Any], float], join: Callable[[Any], Any] = np.mean
) -> list[float]:
    """Return one figure a shuffle, joined over its workloads."""
    shuffles: dict[int, list[float]] = {}
    for each in found:
        shuffles.setdefault(each.shuffle, []).append(take(each))
    return [float(join(values)) for values in shuffles.values()]


def table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    print(f"\n## {title}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |", flush=True)


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def report_bounds(found: Sequence[Bounded]) -> list[str]:
    cells: dict[tuple[str, str, int], list[Bounded]] = {}
    for each in found:
        cells.setdefault((each.resource, each.model, each.n), []).append(each)
    takes: dict[str, tuple[Callable[[Bounded], float], Callable[[Any], Any], int]] = {
        "median absolute error, %": (lambda b: 100 * float(np.median(b.errors)), np.median, 1),
        "coverage of the 95% upper bound, %": (_coverage, np.mean, 1),
        "upper bound / actual": (lambda b: float(np.median(b.ratios)), np.median, 2),
    }
    for title, (take, join, digits) in takes.items():
        lines = [
            [name, model]
            + [spread_of(over_workloads(cells[name, model, n], take, join), digits) for n in SIZES]
            for name in RESOURCES
            for model in MODELS
        ]
        how = "mean" if join is np.mean else "median"
        table(f"{title}: {how} over workloads", ["", "model", *map(str, SIZES)], lines)
    leave_one_workload_out(found)
    verdicts = []
    for name in RESOURCES:
        ours = {n: cells[name, "footprint", n] for n in SIZES}
        coverage = {n: float(np.mean([_coverage(b) for b in each])) for n, each in ours.items()}
        within = all(COVERAGE[0] <= each <= COVERAGE[1] for each in coverage.values())
        text = ", ".join(f"{n}: {each:.1f}" for n, each in coverage.items())
        verdicts.append(f"coverage of {name} 93 to 97% at every n: {verdict(within)} ({text})")
        middle = [b for n in SIZES if 20 <= n < 40 for b in ours[n]]
        sharp = float(np.median(over_workloads(middle, lambda b: np.median(b.ratios), np.median)))
        met = verdict(sharp <= SHARPNESS[name])
        verdicts.append(f"bound / actual of {name} <= {SHARPNESS[name]}: {met} ({sharp:.2f})")
    return verdicts


def _coverage(bounded: Bounded) -> float:
    return 100 * float(np.mean(bounded.needed <= 1))


def leave_one_workload_out(found: Sequence[Bounded]) -> None:
    """Print what a workload gets whose widening was chosen on all the others."""
    ours = [each for each in found if each.model == "footprint"]
    names = sorted({each.workload for each in ours})
    lines = []
    for name, left in itertools.product(RESOURCES, names):
        mine = [b for b in ours if b.resource == name and b.workload == left]
        others = [b for b in ours if b.resource == name and b.workload != left]
        if not others:
            continue
        factor = float(np.mean([np.quantile(b.needed, _LEVEL) for b in others]))
        shipped = np.mean([_coverage(b) for b in mine])
        chosen = np.mean([100 * np.mean(b.needed <= factor) for b in mine])
        lines.append([name, left, f"{shipped:.1f}", f"{factor:.2f}", f"{chosen:.1f}"])
    table(
        "coverage by workload over all n, %: as shipped, and with the spread times a factor that "
        "makes it 95% on the other workloads",
        ["", "workload", "as shipped", "factor", "left out"],
        lines,
    )


def report_admission(found: Sequence[Admitted]) -> list[str]:
    lines, verdicts = [], []
    for resource, (least, most) in ADMISSION.items():
        lines.append([resource, "no admission", "0", "0", "", ""])
        for model in ("OLS on logs", "footprint", "in hindsight"):
            those = [a for a in found if (a.resource, a.model) == (resource, model)]
            right = over_workloads(those, lambda a: 100 * a.over_refused / a.over)
            wrong = over_workloads(those, lambda a: 100 * a.fitting_refused / a.fitting)
            lines.append([resource, model, spread_of(right), spread_of(wrong)])
            lines[-1] += _by_workload(those)
            if model == "footprint":
                figures = float(np.mean(right)), float(np.mean(wrong))
                met = verdict(figures[0] >= least and figures[1] <= most)
                text = f"{figures[0]:.1f}% at {figures[1]:.1f}%"
                verdicts.append(
                    f"admission by {resource}, {least:.0f}% at {most:.0f}%: {met} ({text})"
                )
    head = ["limit", "", "over-limit refused %", "fitting refused %", "workloads", "workloads"]
    table("admission at a limit on the 70th percentile, no refusal before 8 trials", head, lines)
    return verdicts


def _by_workload(found: Sequence[Admitted]) -> list[str]:
    cells = []
    for some, whole in (("over_refused", "over"), ("fitting_refused", "fitting")):
        texts = []
        for name in sorted({a.workload for a in found}):
            those = [a for a in found if a.workload == name]
            total = sum(getattr(a, whole) for a in those)
            texts.append(f"{name} {100 * sum(getattr(a, some) for a in those) / total:.0f}")
        cells.append(", ".join(texts))
    return cells


def report_projections(found: Sequence[Projected]) -> list[str]:
    cells: dict[tuple[str, str, int], list[Projected]] = {}
    for each in found:
        cells.setdefault((each.resource, each.model, each.n), []).append(each)
    lines, verdicts = [], []
    for (name, model, n), those in sorted(cells.items()):
        error = over_workloads(those, lambda p: 100 * abs(p.error), np.median)
        held = over_workloads(those, lambda p: 100.0 * p.held)
        width = float(np.median([p.width for p in those]))
        lines.append(
            [name, model, str(n), spread_of(error, 0), spread_of(held, 0), f"{width:.1f}"]
        )
        if n == PROJECTED[-1] and model.startswith("footprint"):
            figures = float(np.median([100 * abs(p.error) for p in those])), float(np.mean(held))
            met = verdict(figures[0] < 15 and 88 <= figures[1] <= 95)
            text = f"{figures[0]:.0f}%, {figures[1]:.0f}%"
            verdicts.append(
                f"{name} to come after {n}, {model.split(', ')[1]}, error < 15% and coverage "
                f"88 to 95%: {met} ({text})"
            )
    head = ["", "model", "after", "error %", "coverage of 90% interval", "upper / lower"]
    table(
        "total of the remaining trials: median error and mean coverage over workloads", head, lines
    )
    return verdicts


PARTS = ("bounds", "admission", "projections", "costs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="2 shuffles instead of 20")
    parser.add_argument("--shuffles", type=int, default=20)
    parser.add_argument("--only", help="one workload")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    paths = sorted(arguments.tables.glob(f"{arguments.only or '*'}.jsonl"))
    shuffles = range(2 if arguments.quick else arguments.shuffles)
    parts = arguments.parts.split(",")
    print(f"{len(paths)} workloads, {len(shuffles)} shuffles; median over the shuffles [range]")
    tasks = list(itertools.product(paths, shuffles))
    verdicts: list[str] = []
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        if "bounds" in parts or "projections" in parts:
            each = functools.partial(bounds_and_projections, parts=parts)
            found = list(itertools.chain(*pool.map(each, *zip(*tasks, strict=True))))
            if "bounds" in parts:
                verdicts += report_bounds([f for f in found if isinstance(f, Bounded)])
            if "projections" in parts:
                verdicts += report_projections([f for f in found if isinstance(f, Projected)])
        if "admission" in parts:
            admitted = list(itertools.chain(*pool.map(admission, *zip(*tasks, strict=True))))
            verdicts += report_admission(admitted)
    if "costs" in parts:
        lines = costs()
        head = ["trials", "learning three resources, ms a trial", "TPESampler's ask, ms", ""]
        table("cost, milliseconds of CPU", head, lines)
        verdicts += [
            f"learning costs less than an ask at {n} trials: {met}" for n, _, _, met in lines
        ]
    print("\n## Aims\n")
    print("\n".join(f"- {each}" for each in verdicts))


if __name__ == "__main__":
    main()
