"""Whole studies with a limit that half of the space breaches: what is wasted, what is found.

The best points use 80 to 100% of the limit. A trial that breaches is stopped at the limit and has
cost that much of the budget. All policies get the same budget of work and the same seeds.

    python benchmarks/point_admission.py [--quick] [--seeds N] [--samplers tpe,random,nsga,gp]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import warnings

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.samplers import GPSampler
from optuna.samplers import NSGAIISampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler

from optuna_quota import LimitBreached
from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaSampler
from optuna_quota import Usage


LIMIT = 2_000.0
SPACE = {
    "width": optuna.distributions.IntDistribution(8, 1024, log=True),
    "depth": optuna.distributions.IntDistribution(1, 8),
    "rate": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True),
    "kind": optuna.distributions.CategoricalDistribution(["a", "b"]),
}


def work_of(params: dict[str, float]) -> float:
    factor = 1.6 if params["kind"] == "b" else 1.0
    return float(100 + 1.2 * params["width"] ** 1.2 * params["depth"] * factor)


def loss_of(params: dict[str, float]) -> float:
    # More work helps up to 90% of the limit; the rate and the kind matter by themselves.
    effort = np.log(work_of(params) / (0.9 * LIMIT))
    rate = np.log10(params["rate"]) + 2.0
    return float(0.5 * effort**2 + 0.3 * rate**2 + 0.1 * (params["kind"] == "a"))


class Work:
    """A meter that reads what the objective says it uses."""

    name = "work"
    peak = True
    now = 0.0

    def read(self, pids: Sequence[int]) -> float:
        return self.now


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "tpe": lambda seed: TPESampler(seed=seed),
    "nsga": lambda seed: NSGAIISampler(seed=seed, population_size=20),
    "gp": lambda seed: GPSampler(seed=seed),
}
POLICIES = ("failed", "pruned", "constraints", "redraw", "nearest", "skip", "oracle redraw")


def wrapped(base: BaseSampler, policy: str, meter: Work) -> BaseSampler:
    if policy in ("failed", "pruned"):
        return base
    arguments: dict[str, object] = {"breach_probability": 1.0}
    if policy != "constraints":
        arguments = {"on_veto": policy.removeprefix("oracle ")}
    if policy.startswith("oracle"):
        arguments["footprint"] = lambda params: Usage(custom={"work": work_of(params)})
    quota, limits = Quota(n_trials=10**6), Limits(custom={"work": LIMIT})
    return QuotaSampler(base, quota=quota, limits=limits, meters=[meter], **arguments)  # type: ignore[arg-type]


def run(sampler: str, policy: str, seed: int, budget: float) -> tuple[float, int, list[float]]:
    """Return the share of the budget wasted, breaches, and the best at 1/4, 1/2 and all of it."""
    meter = Work()
    spent, wasted, breaches, best = 0.0, 0.0, 0, np.inf
    marks = [0.25 * budget, 0.5 * budget, budget]
    found: list[float] = []

    def objective(trial: optuna.Trial) -> float:
        nonlocal spent, wasted, breaches, best
        params = {
            "width": trial.suggest_int("width", 8, 1024, log=True),
            "depth": trial.suggest_int("depth", 1, 8),
            "rate": trial.suggest_float("rate", 1e-4, 1.0, log=True),
            "kind": trial.suggest_categorical("kind", ["a", "b"]),
        }
        meter.now = work_of(params)
        over = meter.now > LIMIT
        cost = min(meter.now, LIMIT)
        while len(found) < 3 and spent + cost > marks[len(found)]:
            found.append(best)
        spent += cost
        if over:
            wasted, breaches = wasted + cost, breaches + 1
            if policy == "failed":
                raise ValueError("over the limit")
            raise LimitBreached("over the limit", resource="work")
        best = min(best, loss_of(params))
        return loss_of(params)

    def after(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        meter.now = 0.0
        if len(found) >= 3:
            study.stop()

    study = optuna.create_study(sampler=wrapped(SAMPLERS[sampler](seed), policy, meter))
    study.optimize(objective, n_trials=5_000, catch=ValueError, callbacks=[after])
    return wasted / budget, breaches, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 seeds, a third of the budget")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--samplers", default="random,tpe,nsga,gp")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    seeds = 3 if arguments.quick else arguments.seeds
    budget = (20 if arguments.quick else 60) * LIMIT
    print(
        f"{seeds} seeds, a budget of {budget / LIMIT:.0f} times the limit; median, and quartiles"
    )
    print("| sampler | policy | wasted % | breaches | best at 1/4 | at 1/2 | at the end |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for sampler in arguments.samplers.split(","):
        for policy in POLICIES:
            runs = [run(sampler, policy, seed, budget) for seed in range(seeds)]
            waste = np.percentile([100 * each[0] for each in runs], [25, 50, 75])
            cells = [
                sampler,
                policy,
                f"{waste[1]:.1f} ({waste[0]:.1f} to {waste[2]:.1f})",
                f"{np.median([each[1] for each in runs]):.0f}",
            ]
            for mark in range(3):
                low, middle, high = np.percentile([each[2][mark] for each in runs], [25, 50, 75])
                cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
