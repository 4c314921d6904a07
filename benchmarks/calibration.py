"""Whether points breach as often as was projected for them, over whole studies.

A trial takes the time of its surface times the machine's slowness at that moment; nothing is run,
the clock and the process tree are fakes. The machine is quiet, slows down to half its speed after
a third of the study, is slow in bursts, follows a random walk, or becomes slower gradually; clock
time has 10% of noise in every case. The CPU time follows the root of the clock time's factor. Half
of the space is over the limit, which is on one of the two.

    python benchmarks/calibration.py [--quick] [--seeds N] [--first-seed N] [--trials N]
        [--samplers random,tpe] [--surfaces synthetic,forest]

Prints the mean probability of a breach as projected and the share of trials that breached: of the
points that replaced refused ones, of those that ran as drawn, and of both by what was projected (a
reliability diagram). ``forest`` is measured before the studies start, in a few minutes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
import itertools
import warnings

import numpy as np
import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from surfaces import measure_forests, SURFACES

from optuna_quota import Limits, QuotaPruner, QuotaSampler
from optuna_quota._analysis.study_trials import StudyTrials
from optuna_quota.testing import fake_metering
from optuna_quota.visualization._footprint import judged_trials, JudgedTrial


MACHINES = ("quiet", "slows down", "bursts", "walk", "trend")
RESOURCES = ("cpu_time", "wall_time")
BINS = (0.0, 0.05, 0.15, 0.3, 0.5, 1.0)
# Of a limit: the unit of a surface's cost differs.
LIMIT = 10.0


def slowness(machine: str, n: int, seed: int) -> np.ndarray:
    """Return how many times longer than on the quiet machine each trial takes."""
    rng = np.random.default_rng([seed, MACHINES.index(machine)])
    level = np.zeros(n)
    if machine == "slows down":
        level[n // 3 :] = np.log(2)
    elif machine == "bursts":
        # Of ten trials, one after another.
        level = np.repeat(np.log(2) * (rng.random(n // 10 + 1) < 0.4), 10)[:n]
    elif machine == "walk":
        level = np.cumsum(rng.normal(0, 0.1, n))
    elif machine == "trend":
        level = np.linspace(0, np.log(2), n)
    return np.exp(level + rng.normal(0, 0.1, n))


def judge(
    surface_name: str, sampler: str, resource: str, machine: str, seed: int, n: int
) -> list[JudgedTrial]:
    surface = SURFACES[surface_name]()
    times = slowness(machine, n, seed)
    base: BaseSampler = RandomSampler(seed) if sampler == "random" else TPESampler(seed=seed)
    limits = Limits(**{resource: LIMIT})
    with fake_metering() as metering:

        def objective(trial: optuna.Trial) -> float:
            params = surface.suggest(trial)
            slow = times[trial.number]
            amount = LIMIT * surface.cost(params) / surface.limit
            amounts = {"cpu_time": amount * np.sqrt(slow), "wall_time": amount * slow}
            # Up to a little more than the limit, where it is stopped.
            done = min(1.0, 1.001 * LIMIT / amounts[resource])
            assert metering.tree.cpu_time is not None
            metering.tree.cpu_time += done * amounts["cpu_time"]
            metering.advance(done * amounts["wall_time"])
            if trial.should_prune():
                raise optuna.TrialPruned
            return surface.loss(params)

        study = optuna.create_study(
            sampler=QuotaSampler(base, limits=limits), pruner=QuotaPruner(limits=limits)
        )
        study.optimize(objective, n_trials=n)
        return judged_trials(StudyTrials(study))


def promised_and_seen(judged: Sequence[JudgedTrial]) -> str:
    if not judged:
        return "-"
    promised = np.mean([each.probability for each in judged])
    seen = np.mean([each.breached for each in judged])
    return f"{promised:.2f} / {seen:.2f} ({len(judged)})"


def diagram(judged: Sequence[JudgedTrial]) -> list[str]:
    """Return a cell for each bin of the projected probability."""
    return [
        promised_and_seen([j for j in judged if low <= j.probability < high + (high == 1)])
        for low, high in itertools.pairwise(BINS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seeds of the synthetic surface")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--samplers", default="random,tpe")
    parser.add_argument("--surfaces", default="synthetic,forest")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    surfaces = ["synthetic"] if arguments.quick else arguments.surfaces.split(",")
    if "forest" in surfaces:
        measure_forests()
    count = 2 if arguments.quick else arguments.seeds
    seeds = range(arguments.first_seed, arguments.first_seed + count)
    found: defaultdict[tuple[str, str, str], list[JudgedTrial]] = defaultdict(list)
    for surface, sampler, resource, machine, seed in itertools.product(
        surfaces, arguments.samplers.split(","), RESOURCES, MACHINES, seeds
    ):
        judged = judge(surface, sampler, resource, machine, seed, arguments.trials)
        found[surface, resource, machine].extend(judged)
    print(f"Seeds {seeds[0]} to {seeds[-1]}; {arguments.trials} trials of each of the samplers")
    print("Probability of a breach as projected / share that breached (trials)\n")
    bins = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(BINS)]
    print("| surface | limit on | machine | replaced | as drawn | " + " | ".join(bins) + " |")
    print("|" + " --- |" * (5 + len(bins)))
    for surface, resource in itertools.product(surfaces, RESOURCES):
        rows = {machine: found[surface, resource, machine] for machine in MACHINES}
        rows["all but quiet"] = [j for name in MACHINES[1:] for j in rows[name]]
        for machine, judged in rows.items():
            replaced = [j for j in judged if j.group == "in place of a refused point"]
            drawn = [j for j in judged if j.group == "as drawn"]
            cells = [surface, resource, machine]
            cells += map(promised_and_seen, (replaced, drawn))
            print("| " + " | ".join([*cells, *diagram(judged)]) + " |")


if __name__ == "__main__":
    main()
