"""Does ranking the sampler's points by value per predicted cost find more for the same budget?

A QuotaSampler has a quota of CPU time, of 10 or 30 times what a random point takes on average. For
each trial TPE or NSGA-II (populations of 20) draws one point ("first", the sampler as it is), or
eight, of which that with the greatest expected improvement runs ("value", the control without
cost), or that with the greatest improvement over the median of its predicted cost ("per cost";
"cooled": over its power of the share of the budget that is left). The improvement is that of a
Gaussian process of the objective's normal scores, as in the advice on the search space, from five
completed trials on; the cost is that of the study's footprint. Nothing is trained: values and CPU
seconds are those of the surfaces of ``point_admission.py``, without its limit on each trial. A
trial that takes more than is left gives no value.

    python benchmarks/value_for_budget.py [--seeds N] [--first-seed N] [--draws N] [--keep FILE]

The rule, stated before the fresh seeds (100 to 159) were run: an option is kept for a sampler if,
at one of the two budgets, "per cost" ends with significantly better values than both "first" and
"value", on both surfaces (Wilcoxon's signed-rank test over the seeds, p < 0.05 after Holm's
correction over all 16 comparisons). Eight points instead of three, and "per cost" instead of
"cooled", were chosen on seeds 1000 to 1007, by the mean rank of the best value over samplers,
surfaces and budgets: three points 2.63, cooled 2.76; eight points 2.30, cooled 2.31.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
import itertools
import json
from pathlib import Path
from typing import Any
import warnings

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata, wilcoxon
from surfaces import _table as forest_table, measure_forests, Surface, SURFACES

from optuna_quota import Quota, QuotaSampler, Usage
from optuna_quota._footprint import footprint as learning
from optuna_quota._footprint.observations import Observation, read_observation
from optuna_quota._footprint.resource_model import fit_resource, ResourceData, ResourceModel
from optuna_quota._sampler import study_footprint
from optuna_quota._utilization.model import holm


BUDGETS = (10, 30)
N_DRAWS = 8
CONTROLS = ("first", "value")
RANKED = "per cost"
# Completed trials before points are ranked, and at most so many trials of a study.
_MIN_COMPLETED = 5
_MAX_TRIALS = 400
_MAX_FITTED = 100


class Ranking(BaseSampler):
    """Draws several points from the sampler it is mixed into, and gives the best of them."""

    policy = "first"
    n_draws = 1
    outer: QuotaSampler
    _model: ResourceModel | None = None
    _n_searched = 0

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self.policy == "first":
            return super().sample_relative(study, trial, search_space)
        trials = study.get_trials(deepcopy=False)
        known = [t for t in trials if t.state == TrialState.COMPLETE][-_MAX_FITTED:]
        footprint = self.outer._session(study).candidates.footprint.learn(trials)
        if not search_space or len(known) < _MIN_COMPLETED or footprint is None:
            return super().sample_relative(study, trial, search_space)
        points = [self._draw(study, trial, search_space) for _ in range(self.n_draws)]
        features = footprint.contents.features
        columns = features.scale([t.params for t in known])
        gains = self._gains(columns, [t.value for t in known], features.scale(points))
        if self.policy != "value":
            costs = footprint.expected(points)["cpu_time"].quantile(0.5)
            quota = self.outer.quota.totals["cpu_time"]
            spent = sum(t.user_attrs.get("quota:cpu_time", 0.0) for t in trials)
            gains -= np.log(costs) * (1 - spent / quota if self.policy == "cooled" else 1.0)
        return points[int(np.argmax(gains))]

    def _draw(
        self, study: optuna.Study, trial: FrozenTrial, space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        own = super().infer_relative_search_space(study, trial)
        drawn = super().sample_relative(study, trial, own)
        for name, distribution in space.items():
            if name not in drawn:
                drawn[name] = self.sample_independent(study, trial, name, distribution)
        return drawn

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        if self.policy == "first":
            return super().infer_relative_search_space(study, trial)
        return optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False))

    def _gains(self, columns: np.ndarray, losses: Any, at: np.ndarray) -> np.ndarray:
        """Return the logarithm of the expected improvement of points."""
        scores = ndtri((rankdata(losses) - 0.5) / len(losses))
        data = ResourceData.exact(columns, np.exp(scores), floors=(0.0,))
        if self._model is None or len(losses) > 1.25 * self._n_searched:
            self._model, self._n_searched = fit_resource(data, self._model), len(losses)
        else:
            self._model = ResourceModel(data, 0.0, self._model.hyperparameters)
        mean, variance = self._model.process.predict(at)
        mean = self._model.location + self._model.scale * mean
        spread = self._model.scale * np.sqrt(variance)
        z = (scores.min() - mean) / spread
        gain = spread * (z * ndtr(z) + np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi))
        return np.log(np.maximum(gain, 1e-300))


class RankingTPE(Ranking, TPESampler):
    pass


class RankingNSGA(Ranking, NSGAIISampler):
    pass


SAMPLERS: dict[str, Any] = {
    "tpe": lambda seed: RankingTPE(seed=seed),
    "nsga": lambda seed: RankingNSGA(seed=seed, population_size=20),
}


@dataclass(frozen=True)
class Study:
    """Which study is run."""

    surface: str
    sampler: str
    budget: int
    policy: str
    n_draws: int
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


def once_a_trial(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return it computed anew for another model or number of points only, to save time."""
    last: list[Any] = [None, None, None]

    def remember(expected: Any, points: Any) -> Any:
        if last[0] is not expected or last[1] != len(points):
            last[:] = expected, len(points), function(expected, points)
        return last[2]

    return remember


@cache
def mean_cost(name: str) -> float:
    """Return the mean cost of random points."""
    surface, study = SURFACES[name](), optuna.create_study(sampler=RandomSampler(seed=0))
    return float(np.mean([surface.cost(surface.suggest(study.ask())) for _ in range(2_000)]))


def least_loss(name: str) -> float:
    """Return the least value of a surface, roughly."""
    grid = json.loads(forest_table().read_text()) if name == "forest" else [(None, None, 0.0)]
    return float(min(loss for *_, loss in grid))


def run(task: Study) -> tuple[float, int]:
    """Return the best value of a study and its number of trials."""
    surface = SURFACES[task.surface]()
    budget = task.budget * mean_cost(task.surface)
    base = SAMPLERS[task.sampler](task.seed)
    base.policy, base.n_draws = task.policy, task.n_draws
    base.outer = QuotaSampler(base, quota=Quota(cpu_time=budget), metering="reported")
    study = optuna.create_study(sampler=base.outer)
    objective = Objective(surface, budget)
    study.optimize(objective, n_trials=_MAX_TRIALS)
    return objective.best, len(study.trials)


def run_missing(tasks: Sequence[Study], keep: Path | None) -> dict[Study, tuple[float, int]]:
    """Run the studies that a file does not have yet, and return all."""
    found: dict[Study, tuple[float, int]] = {}
    if keep is not None and keep.exists():
        for line in keep.read_text().splitlines():
            task, *outcome = json.loads(line)
            found[Study(**task)] = tuple(outcome)
    for task in tasks:
        if task not in found:
            found[task] = run(task)
            if keep is not None:
                with keep.open("a") as file:
                    file.write(json.dumps([asdict(task), *found[task]]) + "\n")
    return found


def report(
    found: Mapping[Study, tuple[float, int]], seeds: Sequence[int], n_draws: int
) -> Iterator[str]:
    """Yield the lines of a table: ranked by value per cost against each control."""
    cells = list(itertools.product(SAMPLERS, SURFACES, BUDGETS))
    runs: dict[tuple[Any, ...], np.ndarray] = {}
    for sampler, surface, budget in cells:
        for policy, n in (("first", 1), ("value", n_draws), (RANKED, n_draws)):
            outcomes = [found[Study(surface, sampler, budget, policy, n, s)] for s in seeds]
            runs[sampler, surface, budget, policy] = np.array(outcomes).T
    tests = list(itertools.product(cells, CONTROLS))
    away = [runs[(*cell, RANKED)][0] - runs[(*cell, other)][0] for cell, other in tests]
    raw = np.array([wilcoxon(each).pvalue if each.any() else 1.0 for each in away])
    adjusted = dict(zip(tests, holm(raw), strict=True))
    better = {test: np.median(each) <= 0 for test, each in zip(tests, away, strict=True)}
    for cell in cells:
        names = (*CONTROLS, RANKED)
        above = {name: np.median(runs[(*cell, name)][0]) - least_loss(cell[1]) for name in names}
        shown = [*map(str, cell), *(f"{each:.4f}" for each in above.values())]
        shown.append(" / ".join(f"{np.median(runs[(*cell, name)][1]):.0f}" for name in names))
        for name in CONTROLS:
            sign = "+" if better[cell, name] else "-"
            shown.append(f"{above[RANKED] / above[name]:.2f} ({sign} {adjusted[cell, name]:.2g})")
        yield "| " + " | ".join(shown) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--draws", type=int, default=N_DRAWS, help="points ranked for a trial")
    parser.add_argument("--keep", type=Path, help="a file to store outcomes in and resume from")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    learning.read_observation = cpu_time_alone  # type: ignore[assignment]
    study_footprint._medians = once_a_trial(study_footprint._medians)
    study_footprint.margins_of = once_a_trial(study_footprint.margins_of)
    measure_forests()
    n_draws = arguments.draws
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    tasks = [
        Study(surface, sampler, budget, policy, 1 if policy == "first" else n_draws, seed)
        for seed in seeds
        for surface, sampler, budget in itertools.product(SURFACES, SAMPLERS, BUDGETS)
        for policy in (*CONTROLS, RANKED)
    ]
    found = run_missing(tasks, arguments.keep)
    print(f"Seeds {seeds[0]} to {seeds[-1]}; {n_draws} points a trial. Medians of the best value,")
    print(f"above the least; of {RANKED!r} over the controls, with Holm's p; + means better\n")
    heads = ("sampler", "surface", "budget", *CONTROLS, RANKED, "trials")
    print("| " + " | ".join([*heads, *(f"over {name!r}" for name in CONTROLS)]) + " |")
    print("|" + " --- |" * (len(heads) + len(CONTROLS)))
    print("\n".join(report(found, seeds, n_draws)))


if __name__ == "__main__":
    main()
