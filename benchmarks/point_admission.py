"""Budget wasted and values found by whole studies whose limit half of the space breaches.

A trial that breaches is stopped at the limit and has used that much of the budget. All policies
get the same budget and the same seeds.

    python benchmarks/point_admission.py [--quick] [--seeds N] [--first-seed N] [--jobs N]
        [--samplers random,tpe,nsga,gp] [--surfaces synthetic,forest] [--keep FILE]

Surfaces: ``synthetic``, smooth, its best points at 90% of the limit; ``forest``, the log loss and
the CPU seconds of scikit-learn's random forests on its handwritten digits, measured at 1,440
points before the studies start. Policies: the bare sampler, with breaches as failed trials, as
pruned ones, or as Optuna constraints; QuotaSampler with what it has learned; and QuotaSampler with
an oracle that knows the usage of each point. ``*`` marks the choice of ``on_veto="auto"``. p is
that of Wilcoxon's signed-rank test over the seeds against ``*``, two-sided; ``-`` means that the
policy of the line is worse (wastes more, finds less), ``+`` that it is better.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
import itertools
import json
import multiprocessing
from pathlib import Path
from typing import Any
import warnings

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import MaxTrialsCallback
from surfaces import measure_forests, Surface, SURFACES

from optuna_quota import LimitBreached, Limits, Quota, QuotaSampler, Usage
from optuna_quota._footprint import footprint as learning
from optuna_quota._footprint.observations import Observation, read_observation
from optuna_quota._sampler.candidates import replacement_for


BUDGET = 60
_MAX_TRIALS = 3_000


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "tpe": lambda seed: TPESampler(seed=seed),
    "nsga": lambda seed: NSGAIISampler(seed=seed, population_size=20),
    "gp": lambda seed: GPSampler(seed=seed),
}
ALL = ("failed", "pruned", "constraints", "redraw", "nearest", "oracle redraw", "oracle nearest")
# Random ignores results, NSGA-II and GP ignore failed and pruned trials; GP repeats itself.
NEEDLESS = {
    "random": ("pruned", "constraints"),
    "tpe": (),
    "nsga": ("pruned",),
    "gp": ("pruned", "redraw", "oracle redraw"),
}
BARE = ("failed", "pruned", "constraints")


class Meter:
    """Reads the usage that the objective reports."""

    name = "work"
    peak = False
    now = 0.0

    def read(self, pids: Sequence[int]) -> float:
        return self.now


@dataclass(frozen=True)
class Outcome:
    """The result of one study.

    Attributes:
        waste: Share of the budget spent on breaches.
        breaches: Their number.
        best: The best value at a quarter, half and all of the budget.
    """

    surface: str
    sampler: str
    policy: str
    seed: int
    waste: float
    breaches: int
    best: tuple[float, ...]


class Objective:
    """Runs points until the budget is spent."""

    def __init__(self, surface: Surface, policy: str, base: str, budget: float) -> None:
        self._surface, self._policy, self._base = surface, policy, base
        self._marks = [0.25 * budget, 0.5 * budget, budget]
        self._spent, self._best, self._worst = 0.0, surface.worst, 0.0
        self.meter = Meter()
        self.wasted, self.breaches = 0.0, 0
        self.found: list[float] = []

    def __call__(self, trial: optuna.Trial) -> float:
        surface = self._surface
        params = surface.suggest(trial)
        cost, over = surface.cost(params), surface.cost(params) > surface.limit
        cost = self.meter.now = 1.001 * surface.limit if over else cost
        while len(self.found) < 3 and self._spent + cost > self._marks[len(self.found)]:
            self.found.append(self._best)
        if len(self.found) == 3:
            # It would have cost more than was left.
            trial.study.stop()
            raise optuna.TrialPruned
        self._spent += cost
        if self._policy == "constraints":
            trial.set_constraint("work", cost / surface.limit - 1)
        if over:
            self.wasted, self.breaches = self.wasted + cost, self.breaches + 1
            return self._breach()
        loss = surface.loss(params)
        self._best, self._worst = min(self._best, loss), max(self._worst, loss)
        return loss

    def _breach(self) -> float:
        if self._policy == "failed":
            raise ValueError("over the limit")
        if self._policy not in BARE:
            raise LimitBreached("over the limit", resource="work")
        if self._policy == "constraints" and self._base in ("nsga", "gp"):
            # These take constraints from completed trials only; a value is needed for it.
            return self._worst
        raise optuna.TrialPruned


def work_alone(trial: optuna.trial.FrozenTrial) -> Observation | None:
    """Return the work of a row only, to save a fit for each of time and memory."""
    row = read_observation(trial)
    if row is None or row.usage.get("work") is None:
        return None
    return replace(row, usage=Usage(custom=row.usage.custom))


def wrapped(base: BaseSampler, policy: str, surface: Surface, meter: Meter) -> BaseSampler:
    if policy in BARE:
        return base
    arguments: dict[str, Any] = {"on_veto": policy.removeprefix("oracle ")}
    if policy.startswith("oracle"):
        arguments["footprint"] = lambda params: Usage(custom={"work": surface.cost(params)})
    limits = Limits(custom={"work": surface.limit})
    return QuotaSampler(
        base, quota=Quota(n_trials=10**6), limits=limits, meters=[meter], **arguments
    )


def run(task: tuple[str, str, str, int, float]) -> Outcome:
    name, sampler, policy, seed, budget = task
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    if sampler == "gp":
        import torch

        torch.set_num_threads(1)
    learning.read_observation = work_alone  # type: ignore[assignment]
    surface = SURFACES[name]()
    objective = Objective(surface, policy, sampler, budget * surface.limit)

    def reset(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        objective.meter.now = 0.0

    base = SAMPLERS[sampler](seed)
    study = optuna.create_study(sampler=wrapped(base, policy, surface, objective.meter))
    max_trials = MaxTrialsCallback(_MAX_TRIALS, states=None)
    study.optimize(objective, catch=ValueError, callbacks=[reset, max_trials])
    share = objective.wasted / (budget * surface.limit)
    found = (*objective.found, *[objective._best] * (3 - len(objective.found)))
    return Outcome(name, sampler, policy, seed, share, objective.breaches, found)


def policies(sampler: str) -> list[str]:
    return [policy for policy in ALL if policy not in NEEDLESS[sampler]]


def report(outcomes: Sequence[Outcome], name: str, sampler: str) -> Iterator[str]:
    """Yield the lines of a table."""
    default = str(replacement_for(SAMPLERS[sampler](0), "auto"))
    by_policy = {
        policy: sorted(
            (o for o in outcomes if (o.surface, o.sampler, o.policy) == (name, sampler, policy)),
            key=lambda outcome: outcome.seed,
        )
        for policy in policies(sampler)
    }
    ours = by_policy[default]
    for policy, found in by_policy.items():
        if not found:
            continue
        cells = [name, sampler, policy + (" *" if policy == default else "")]
        waste = _column(found, lambda o: 100 * o.waste)
        cells.append(_quartiles(waste, 1) + _paired(waste, _column(ours, lambda o: 100 * o.waste)))
        cells.append(f"{np.median([o.breaches for o in found]):.0f}")
        for mark in range(3):
            best = _column(found, lambda o: o.best[mark])  # noqa: B023 - used at once
            mine = _column(ours, lambda o: o.best[mark])  # noqa: B023 - used at once
            cells.append(_quartiles(best, 3) + _paired(best, mine))
        yield "| " + " | ".join(cells) + " |"


def aims(outcomes: Sequence[Outcome], name: str, sampler: str) -> str:
    """Return whether waste and values meet the aims."""
    default = str(replacement_for(SAMPLERS[sampler](0), "auto"))

    def of(policy: str) -> list[Outcome]:
        found = [
            o for o in outcomes if (o.surface, o.sampler, o.policy) == (name, sampler, policy)
        ]
        return sorted(found, key=lambda outcome: outcome.seed)

    def median(policy: str, take: Callable[[Outcome], float]) -> float:
        return float(np.median(_column(of(policy), take)))

    if not all(of(policy) for policy in policies(sampler)):
        return f"{name}, {sampler}: not every policy was run"
    rivals = [policy for policy in policies(sampler) if policy in BARE]
    least = min(rivals, key=lambda policy: median(policy, lambda o: o.waste))
    ratio = median(default, lambda o: o.waste) / median(least, lambda o: o.waste)
    verdicts = [f"waste {ratio:.2f} of that of {least!r}: {'met' if ratio <= 0.5 else 'MISSED'}"]
    for mark, when in ((0, "at a quarter"), (2, "at the end")):
        # One aim is to be better, the other not to be worse beyond the noise of the seeds.
        worse = [
            rival
            for rival in rivals
            if _paired(
                _column(of(rival), lambda o: o.best[mark]),  # noqa: B023 - used at once
                _column(of(default), lambda o: o.best[mark]),  # noqa: B023 - used at once
            ).startswith(" (+")
            and _significant(of(rival), of(default), mark)
        ]
        behind = [
            rival
            for rival in rivals
            if median(rival, lambda o: o.best[mark])  # noqa: B023 - used at once
            < median(default, lambda o: o.best[mark])  # noqa: B023 - used at once
        ]
        missed = behind if mark == 0 else worse
        verdicts.append(f"{when}: {'MISSED against ' + ', '.join(missed) if missed else 'met'}")
    return f"{name}, {sampler}: " + "; ".join(verdicts)


def _significant(left: Sequence[Outcome], right: Sequence[Outcome], mark: int) -> bool:
    a, b = (_column(each, lambda o: o.best[mark]) for each in (left, right))
    return _p_value(a, b) < 0.05


def _column(found: Sequence[Outcome], take: Callable[[Outcome], float]) -> np.ndarray:
    return np.array([take(each) for each in found])


def _quartiles(values: np.ndarray, digits: int) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _p_value(values: np.ndarray, ours: np.ndarray) -> float:
    from scipy.stats import wilcoxon

    away = values - ours
    return float(wilcoxon(away).pvalue) if away.any() else 1.0


def _paired(values: np.ndarray, ours: np.ndarray) -> str:
    if len(values) != len(ours):  # the policy to compare with was not run
        return ""
    away = values - ours
    if not away.any():
        return ""
    sign = "-" if np.sum(np.sign(away)) > 0 else "+"
    return f" ({sign} p={_p_value(values, ours):.2g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 seeds, a third of the budget")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--samplers", default="random,tpe,nsga,gp")
    parser.add_argument("--surfaces", default="synthetic,forest")
    parser.add_argument("--policies", default=",".join(ALL))
    parser.add_argument("--keep", type=Path, help="a file to store outcomes in and resume from")
    arguments = parser.parse_args()
    names, samplers = arguments.surfaces.split(","), arguments.samplers.split(",")
    count = 3 if arguments.quick else arguments.seeds
    seeds = range(arguments.first_seed, arguments.first_seed + count)
    budget = BUDGET / 3 if arguments.quick else BUDGET
    if "forest" in names:
        measure_forests()
    kept = arguments.keep.read_text().splitlines() if _exists(arguments.keep) else []
    read = [Outcome(**json.loads(line)) for line in kept]
    outcomes = [each for each in read if each.seed in seeds]
    done = {(o.surface, o.sampler, o.policy, o.seed) for o in outcomes}
    tasks = [
        (name, sampler, policy, seed, budget)
        for seed in seeds
        for name in names
        for sampler in samplers
        for policy in policies(sampler)
        if policy in arguments.policies.split(",") and (name, sampler, policy, seed) not in done
    ]
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        for outcome in pool.map(run, tasks):
            outcomes.append(outcome)
            if arguments.keep is not None:
                with arguments.keep.open("a") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
    print(f"Seeds {seeds[0]} to {seeds[-1]}, a budget of {budget:.0f} times the limit; medians")
    print("[quartiles]\n")
    print("| surface | sampler | policy | wasted % | breaches | at 1/4 | at 1/2 | at the end |")
    print("|" + " --- |" * 8)
    for name, sampler in itertools.product(names, samplers):
        print("\n".join(report(outcomes, name, sampler)))
    print("\nAims: half of the waste of the best rival or less; the better value at a quarter of")
    print("the budget; at its end none worse beyond the noise of the seeds (p < 0.05).\n")
    for name, sampler in itertools.product(names, samplers):
        print("- " + aims(outcomes, name, sampler))


def _exists(path: Path | None) -> bool:
    return path is not None and path.exists()


if __name__ == "__main__":
    main()
