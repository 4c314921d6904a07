"""Does ranking the sampler's points by value per predicted cost find more for the same budget?

A QuotaSampler has a quota of CPU time, of 10 or 30 times what a random point takes on average. For
each trial TPE or NSGA-II (populations of 20) draws one point ("first", the sampler as it is), or
eight (``n_candidates=8``), of which that with the greatest expected improvement per predicted cost
runs ("per cost"), or with costs taken as equal that with the greatest improvement ("value", a
control). Nothing is trained: values and CPU seconds are those of the surfaces of
``point_admission.py``, without its limit on each trial. A trial that takes more than is left gives
no value.

    python benchmarks/value_for_budget.py [--seeds N] [--first-seed N] [--samplers tpe,nsga]
        [--budgets 10,30] [--keep FILE]

The rule for the option: significantly better values at the end than those of the same sampler
without it, on fresh seeds and both surfaces (Wilcoxon's signed-rank test over the seeds, p < 0.05
after Holm's correction over all comparisons). On seeds 100 to 159 it is met with 30 mean trials by
TPE, by NSGA-II on one of the surfaces; not with 10, where nothing is gained. Medians of the best
value above the least, ratio of "per cost" to each control and its corrected p, of a prototype:

    surface    sampler  budget   first    value    per cost   over first       over value
    synthetic  TPE      10       0.1918   0.2415   0.2026     1.06 (1)         0.84 (0.083)
    synthetic  TPE      30       0.0271   0.0061   0.0058     0.21 (0.049)     0.94 (1)
    synthetic  NSGA-II  10       0.2449   0.2430   0.2433     0.99 (1)         1.00 (0.9)
    synthetic  NSGA-II  30       0.1042   0.1132   0.0442     0.42 (0.16)      0.39 (0.12)
    forest     TPE      10       0.0997   0.0997   0.0997     1.00 (1)         1.00 (1)
    forest     TPE      30       0.0238   0.0172   0.0047     0.20 (7.7e-05)   0.27 (0.33)
    forest     NSGA-II  10       0.0997   0.0988   0.1013     1.02 (1)         1.02 (1)
    forest     NSGA-II  30       0.0518   0.0186   0.0172     0.33 (1.2e-05)   0.93 (0.33)

NSGA-II at 30 alone was run again with the prototype on seeds 200 to 259: against "first" 0.24
(0.00062) and 0.37 (5.1e-05), against "value" 0.54 (0.021) and 0.92 (0.95). Holm's correction over
these four comparisons does not correct for this second look.

A stricter rule of ours, stated before these seeds were run, also asked for better values than
"value", and is not met on both surfaces: most of the gain is that of the model of the objective.
Cost adds to it for NSGA-II on the synthetic surface, whose dearest points are bad. Eight points
instead of three, and the whole cost instead of its power of the share of the budget that is left,
were chosen on seeds 1000 to 1007.

The option as built ran 72 of 80 studies of seeds 300 to 319 at 30 to the same value as the
prototype; ratios over "first" 0.27 and 0.17 for TPE, 0.33 and 0.27 for NSGA-II. A quarter of an
hour of CPU in all.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch
import warnings

import numpy as np
import optuna
from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial
from scipy.stats import wilcoxon
from surfaces import measure_forests, Surface, SURFACES

from optuna_quota import Quota, QuotaSampler, Usage
from optuna_quota._footprint import footprint as learning
from optuna_quota._footprint.observations import Observation, read_observation
from optuna_quota._sampler import ranking
from optuna_quota._utilization.model import holm


# The least value of each surface.
LEAST = {"synthetic": 0.0, "forest": 0.2858}
N_DRAWS = 8
CONTROLS = ("first", "value")
RANKED = "per cost"
# At most so many trials of a study.
_MAX_TRIALS = 400


SAMPLERS: dict[str, Any] = {
    "tpe": TPESampler,
    "nsga": partial(NSGAIISampler, population_size=20),
}


Cell = tuple[str, str, int]


class Study(NamedTuple):
    """Which study is run."""

    surface: str
    sampler: str
    budget: int
    policy: str
    seed: int


class Objective:
    """Runs points while the budget lasts; a trial that takes more than is left gives nothing."""

    def __init__(self, surface: Surface, budget: float) -> None:
        self._surface, self._left, self.best = surface, budget, surface.worst

    def __call__(self, trial: optuna.Trial) -> float:
        params = self._surface.suggest(trial)
        cost = self._surface.cost(params)
        trial.set_user_attr("quota:cpu_time", min(cost, self._left))
        self._left -= cost
        if self._left < 0:
            trial.study.stop()
            raise optuna.TrialPruned
        loss = self._surface.loss(params)
        self.best = min(self.best, loss)
        return loss


def cpu_time_alone(trial: FrozenTrial) -> Observation | None:
    """Return the CPU time of a row only, to save the fits of clock time."""
    row = read_observation(trial)
    if row is None or row.usage.cpu_time is None:
        return None
    return replace(row, usage=Usage(cpu_time=row.usage.cpu_time))


def equal(points: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return the same cost for all points."""
    return {"cpu_time": np.ones(len(points))}


@cache
def mean_cost(name: str) -> float:
    """Return the mean cost of random points."""
    surface, study = SURFACES[name](), optuna.create_study(sampler=RandomSampler(seed=0))
    return float(np.mean([surface.cost(surface.suggest(study.ask())) for _ in range(2_000)]))


def run(task: Study) -> tuple[float, int]:
    """Return the best value of a study and its number of trials."""
    surface = SURFACES[task.surface]()
    budget = task.budget * mean_cost(task.surface)
    sampler = QuotaSampler(
        SAMPLERS[task.sampler](seed=task.seed),
        quota=Quota(cpu_time=budget),
        metering="reported",
        n_candidates=1 if task.policy == "first" else N_DRAWS,
    )
    study = optuna.create_study(sampler=sampler)
    objective = Objective(surface, budget)
    control = patch.object(ranking, "medians_of", lambda _, points: equal(points))
    with control if task.policy == "value" else nullcontext():
        study.optimize(objective, n_trials=_MAX_TRIALS)
    return objective.best, len(study.trials)


def report(
    found: Mapping[Study, tuple[float, int]], cells: Sequence[Cell], seeds: Sequence[int]
) -> Iterator[str]:
    """Yield the lines of a table: ranked by value per cost against each control."""
    policies = (*CONTROLS, RANKED)
    runs = {
        (*cell, policy): np.array([found[Study(*cell, policy, seed)] for seed in seeds]).T
        for cell, policy in itertools.product(cells, policies)
    }
    tests = list(itertools.product(cells, CONTROLS))
    away = [runs[(*cell, RANKED)][0] - runs[(*cell, other)][0] for cell, other in tests]
    p_values = np.array([wilcoxon(each).pvalue if each.any() else 1.0 for each in away])
    adjusted = dict(zip(tests, holm(p_values), strict=True))
    for cell in cells:
        best, numbers = np.median([runs[(*cell, policy)] for policy in policies], axis=2).T
        above = best - LEAST[cell[0]]
        shown = [*map(str, cell), *(f"{each:.4f}" for each in above)]
        shown.append(" / ".join(f"{each:.0f}" for each in numbers))
        for i, name in enumerate(CONTROLS):
            shown.append(f"{above[-1] / above[i]:.2f} (p {adjusted[cell, name]:.2g})")
        yield "| " + " | ".join(shown) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--budgets", default="10,30", help="in costs of a random point")
    parser.add_argument("--keep", type=Path, help="a file to store outcomes in and resume from")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    learning.read_observation = cpu_time_alone  # type: ignore[assignment]
    measure_forests()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    samplers, budgets = arguments.samplers.split(","), map(int, arguments.budgets.split(","))
    cells = list(itertools.product(SURFACES, samplers, budgets))
    kept, found = arguments.keep, {}
    if kept is not None and kept.exists():
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
        found = {Study(*study): (best, n_trials) for study, best, n_trials in lines}
    for seed, cell, policy in itertools.product(seeds, cells, (*CONTROLS, RANKED)):
        study = Study(*cell, policy, seed)
        if study not in found:
            found[study] = run(study)
            if kept is not None:
                with kept.open("a") as file:
                    file.write(json.dumps([study, *found[study]]) + "\n")
    print(f"Seeds {seeds[0]} to {seeds[-1]}. Medians of the best value above the least and of the")
    print(f"trials; ratio of {RANKED!r} to each control, with Holm's p\n")
    heads = ("surface", "sampler", "budget", *CONTROLS, RANKED, "trials", *CONTROLS)
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    print("\n".join(report(found, cells, seeds)))


if __name__ == "__main__":
    main()
