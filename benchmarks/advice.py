"""Advice on the search space, judged on fresh points, with and without its tests on other trials.

Each table is a study of a random search whose memory is a law of three of its five parameters, a
third of it over the limit. The objective is best where memory is about to reach the limit, as a
larger model is better, or does not depend on it. Shown are: in how many tables a rule is
suggested, how many of the breaches it is said to remove and how many it removes among 4,000 fresh
points, and in how many tables it removes over half of the best hundredth of the fresh points that
fit. "chosen only" is the same without held-out trials and without the model of the objective.

Last, the bounds that would halve a time that grows with memory, where the objective is best near
the limit or at a lower value of the first parameter: in how many tables there are any, the share
of the cost that they are said to leave and do leave of the fitting fresh points, the probability
with which one of the best hundredth is said to stay, and in how many tables one does. Four minutes
on a free core.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial, TrialState

from optuna_quota import analyze
from optuna_quota._analysis import search_space_advice


NAMES = ("rows", "width", "depth", "rate", "decay")
SPACE = {name: FloatDistribution(1.0, 100.0, log=True) for name in NAMES}


def draw(rng, n, better):
    """Return points, memory over the limit and losses."""
    u = rng.uniform(0, 1, (n, len(NAMES)))
    memory = 1.5 * u[:, 0] + u[:, 1] + 0.5 * u[:, 2] - 1.85
    loss = (u[:, 3] - 0.4) ** 2 + (0.5 * (memory + 0.05) ** 2 if better else 0.0)
    return u, memory + 0.05 * rng.standard_normal(n), loss


def study_of(u, memory, loss):
    trials = []
    for point, over, value in zip(u, memory, loss, strict=True):
        params = {name: float(100.0**x) for name, x in zip(NAMES, point, strict=True)}
        amounts = {
            "quota:memory": 1e9 * math.exp(min(over, 0.0)),
            "quota:cpu_time": math.exp(2 * over),
        }
        attrs = {**amounts, "quota:outcome": "completed"}
        if over > 0:
            breach = {"resource": "memory", "limit": 1e9, "observed": 1e9, "seconds": 1.0}
            attrs |= {"quota:outcome": "terminated", "quota:breach": breach}
        trials.append(
            create_trial(
                state=TrialState.PRUNED if over > 0 else TrialState.COMPLETE,
                value=None if over > 0 else float(value),
                params=params,
                distributions=SPACE,
                user_attrs=attrs,
            )
        )
    study = optuna.create_study()
    study.set_user_attr("quota:limits", {"memory": 1e9})
    study.add_trials(trials)
    return study


def judge_bounds(better, tables, trials):
    found, rng = [], np.random.default_rng(2)
    for _ in range(tables):
        (u, memory, loss), seen = draw(rng, 800, better), draw(rng, trials, better)
        if not better:
            loss += (u[:, 0] - 0.3) ** 2
            noise = 0.01 * rng.standard_normal(trials)
            seen = *seen[:2], seen[2] + (seen[0][:, 0] - 0.3) ** 2 + noise
        bounds = analyze(study_of(*seen)).cheaper_space
        if bounds is not None:
            fits, cost = memory <= 0, np.exp(2 * memory)
            kept = fits & np.all([_holds(text, u) for text in bounds.bounds], axis=0)
            best = kept[fits][np.argsort(loss[fits])[: fits.sum() // 100]].any()
            left = cost[kept].mean() / cost[fits].mean()
            found.append((bounds.cost, left, bounds.best_kept, best))
    print(
        f"best {'near the limit' if better else 'below it':<15}bounds in {len(found)} of {tables}"
    )
    if found:
        said, left, stated, kept = np.array(found, dtype=float).mean(axis=0)
        print(
            f"  said to leave {said:.0%} of the cost, leave {left:.0%}; one of the best stays "
            f"with {stated:.0%}, stayed in {kept:.0%}",
            flush=True,
        )


def removes(rule, u):
    """Return which points a rule removes: ``x <= a``, also with ``when y >= b``."""
    kept, _, condition = rule.partition(" when ")
    return ~_holds(kept, u) & (_holds(condition, u) if condition else True)


def _holds(text, u):
    name, sign, bound = text.split()
    x = 100.0 ** u[:, NAMES.index(name)]
    return x <= float(bound) if sign == "<=" else x >= float(bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=40)
    parser.add_argument("--trials", type=int, default=100)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    shipped = {name: getattr(search_space_advice, name) for name in ("_held_out", "_best_points")}
    for better in (True, False):
        for way in ("as shipped", "chosen only"):
            if way == "chosen only":
                search_space_advice._held_out = lambda *_: (1.0, 1.0)
                search_space_advice._best_points = lambda *_: []
            found, rng = [], np.random.default_rng(1)
            for _ in range(arguments.tables):
                study = study_of(*draw(rng, arguments.trials, better))
                u, memory, loss = draw(rng, 4000, better)
                for advice in analyze(study).advice:
                    if advice.topic == "search space":
                        figures = advice.figures
                        removed = removes(figures["rule"], u)
                        said = figures["breaches_removed"] / figures["breaches"]
                        if way == "as shipped":
                            said = figures["held_out_share_removed"]
                        fits = np.flatnonzero(memory <= 0)
                        best = fits[np.argsort(loss[fits])[: len(fits) // 100]]
                        found.append(
                            (said, removed[memory > 0].mean(), removed[best].mean() > 0.5)
                        )
            for name, function in shipped.items():
                setattr(search_space_advice, name, function)
            said, true, lost = np.array(found).T if found else np.full((3, 1), np.nan)
            print(
                f"best {'near the limit' if better else 'anywhere':<15}{way:<13}"
                f"suggested in {len(found)} of {arguments.tables}; said to remove "
                f"{100 * said.mean():.0f}%, removes {100 * true.mean():.0f}%; over half of the "
                f"best lost in {int(np.nansum(lost))}",
                flush=True,
            )
        judge_bounds(better, arguments.tables, arguments.trials)


if __name__ == "__main__":
    main()
