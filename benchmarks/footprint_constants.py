"""The constants of the footprint models, chosen with each workload left out in turn.

    python benchmarks/footprint_constants.py [--tables DIRECTORY ...] [--shuffles N]

For the tables see ``footprint_models.py``. Two choices: the prior mean of the noise, the weights
of the columns and the closest floors, each scored by the mean pinball loss of the logarithm over
five quantiles relative to the first candidate's; and the calibration of the spread, scored by the
squared distance of the 95% bounds' coverage from 95%, summed over resources and numbers of trials.
Each line shows the choice of the other workloads, its score on the one left out, and the score of
the shipped constants.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

from footprint_tables import (
    find_tables,
    LEFT,
    read_workload,
    RESOURCES,
    SIZES,
    TABLES,
    Workload,
)
import numpy as np

from optuna_quota import Footprint
from optuna_quota._footprint import features, fit, gaussian_process, resource_model
from optuna_quota._footprint.fit import ChainedModel
from optuna_quota._footprint.predictive import Predictive
from optuna_quota._footprint.resource_model import FLOORS


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Module, constant, the resources that it bears on, candidates.
PRIORS: tuple[tuple[ModuleType, str, tuple[str, ...], tuple[Any, ...]], ...] = (
    (fit, "_PEAK_NOISE", ("memory",), (-2.5, -3.5, -4.5)),
    (fit, "_RATIO_NOISE", ("wall_time",), (-2.5, -1.75, -1.0, -0.5)),
    (gaussian_process, "_MATERN", RESOURCES, (-0.7, 0.3)),
    (gaussian_process, "_LENGTH", RESOURCES, (0.9, 0.7, 0.5)),
    (gaussian_process, "_LENGTH_SD", RESOURCES, (0.8, 0.65, 0.5)),
    (features, "_RATE_WEIGHT", RESOURCES, (1.0, 0.5, 0.3, 0.2)),
    (features, "_SUM_WEIGHT", RESOURCES, (0.0, 0.5, 1.0, 2.0)),
    (features, "_SLOPE", ("cpu_time", "wall_time"), (0.0, 0.5, 1.0, 1.5)),
    (
        fit,
        "FLOORS",
        ("memory", "cpu_time"),
        tuple((*FLOORS[:5], *more) for more in ((0.98, 0.99, 0.995, 0.998), (0.98, 0.99), ())),
    ),
)
CALIBRATIONS = {
    "_LEAVE_ONE_OUT_BIAS": (1.0, 1.05, 1.1, 1.17),
    "_FEW_TRIALS_WIDENING": (4.0, 8.0, 12.0),
    "_COMMON_SHARE": (0.1, 0.2, 0.4),
}


@contextmanager
def constants(module: ModuleType, values: Mapping[str, float]) -> Iterator[None]:
    """Set constants of a module temporarily."""
    shipped = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(shipped)


def fits(
    workloads: Sequence[Workload], shuffles: int
) -> Iterator[tuple[Workload, int, Footprint]]:
    """Yield a footprint of the first trials of each shuffle, by number of trials."""
    for workload, shuffle in itertools.product(workloads, range(shuffles)):
        shuffled, footprint = workload.shuffled(shuffle), None
        for n in SIZES:
            if len(shuffled.rows) < n + LEFT:
                break
            footprint = Footprint.fit(shuffled.rows[:n], start=footprint)
            yield shuffled, n, footprint


def ahead(workload: Workload, n: int, footprint: Footprint) -> dict[str, Predictive]:
    return footprint.expected([row.params for row in workload.rows[n:]])


def pinball(expected: Predictive, actual: np.ndarray) -> float:
    losses = []
    for p in QUANTILES:
        away = np.log(actual) - np.log(np.maximum(expected.quantile(p), 1e-300))
        losses.append(np.mean(np.maximum(p * away, (p - 1) * away)))
    return float(np.mean(losses))


def choose_priors(workloads: Sequence[Workload], shuffles: int) -> None:
    for module, constant, resources, candidates in PRIORS:
        cells: dict[tuple[Any, str, str, int], list[float]] = {}
        for value in candidates:
            with constants(module, {constant: value}):
                for workload, n, footprint in fits(workloads, shuffles):
                    expected = ahead(workload, n, footprint)
                    for name in resources:
                        loss = pinball(expected[name], workload.amounts(name)[n:])
                        cells.setdefault((value, workload.name, name, n), []).append(loss)
        losses = {key: float(np.log(np.mean(found))) for key, found in cells.items()}
        scores = {
            (value, w.name): float(
                np.mean(
                    [
                        found - losses[(candidates[0], *key[1:])]
                        for key, found in losses.items()
                        if key[:2] == (value, w.name)
                    ]
                )
            )
            for value in candidates
            for w in workloads
        }
        shipped = getattr(module, constant)
        print(f"\n## {constant} (shipped {shipped}), loss relative to {candidates[0]}\n")
        for name, chosen in left_out(workloads, scores, candidates):
            print(
                f"| {name} | {chosen} | {scores[chosen, name]:+.1%} | "
                f"{scores.get((shipped, name), float('nan')):+.1%} |",
                flush=True,
            )


def choose_calibration(workloads: Sequence[Workload], shuffles: int) -> None:
    known = list(fits(workloads, shuffles))
    sizes = [n for n in SIZES if all(len(w.rows) >= n + LEFT for w in workloads)]
    candidates = list(itertools.product(*CALIBRATIONS.values()))
    shipped = tuple(float(getattr(resource_model, name)) for name in CALIBRATIONS)
    coverage = {}
    for values in dict.fromkeys([*candidates, shipped]):
        cells: dict[tuple[str, str, int], list[float]] = {}
        with constants(resource_model, dict(zip(CALIBRATIONS, values, strict=True))):
            for workload, n, footprint in known:
                forget(footprint)
                for name, expected in ahead(workload, n, footprint).items():
                    held = workload.amounts(name)[n:] <= expected.quantile(0.95)
                    cells.setdefault((workload.name, name, n), []).append(float(np.mean(held)))
        coverage[values] = {key: 100 * float(np.mean(held)) for key, held in cells.items()}
    print(f"\n## {', '.join(CALIBRATIONS)} (shipped {shipped}), coverage of the 95% bounds, %\n")
    for left in workloads:
        others = [w.name for w in workloads if w.name != left.name]
        chosen = min(candidates, key=lambda values: distance(coverage[values], others, sizes))
        cells_of = [
            ", ".join(
                f"{np.mean([coverage[values][left.name, r, n] for n in sizes]):.1f}"
                for r in RESOURCES
            )
            for values in (chosen, shipped)
        ]
        print(f"| {left.name} | {chosen} | {cells_of[0]} | {cells_of[1]} |", flush=True)


def distance(
    coverage: Mapping[tuple[str, str, int], float], names: Sequence[str], sizes: Sequence[int]
) -> float:
    return float(
        sum(
            (np.mean([coverage[w, r, n] for w in names]) - 95) ** 2
            for r, n in itertools.product(RESOURCES, sizes)
        )
    )


def left_out(
    workloads: Sequence[Workload], scores: Mapping[Any, float], candidates: Sequence[Any]
) -> Iterator[tuple[str, Any]]:
    for left in workloads:
        others = [w.name for w in workloads if w.name != left.name]
        yield (
            left.name,
            min(candidates, key=lambda value: sum(scores[value, name] for name in others)),
        )


def forget(footprint: Footprint) -> None:
    """Make a footprint's models be calibrated again."""
    for model in footprint.contents.models.values():
        for each in (model.base, model.ratio) if isinstance(model, ChainedModel) else (model,):
            vars(each).pop("_calibration", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=Path, nargs="+", default=[TABLES])
    parser.add_argument("--shuffles", type=int, default=6)
    arguments = parser.parse_args()
    workloads = [read_workload(path) for path in find_tables(arguments.tables)]
    print("| left out | chosen by the others | score | as shipped |")
    choose_calibration(workloads, arguments.shuffles)
    choose_priors(workloads, arguments.shuffles)


if __name__ == "__main__":
    main()
