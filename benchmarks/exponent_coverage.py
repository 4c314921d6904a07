"""How often the 95% intervals of exponents cover the truth, on simulated trial tables.

Each table is a study whose memory is ``300 MB + a · rows^2 · width^1.1 · 1.5 [adam]`` or whose
time is ``0.5 s + b · rows^1.2 · width^0.6 · 1.5 [adam]``, times log-normal noise; one parameter
does nothing. A share of the trials is ended at a limit on the resource itself, and counts as lower
bounds. The baselines on the same tables are the same model on the completed trials alone, and with
the lower bounds treated as values.

Then trials that something else ended at a share of their run: wall time under a memory limit
(ended late, at 80 to 100% of it, or anywhere) and of trials pruned anywhere or early (before 2% of
it); memory that grows with the run under a limit on wall time. The library leaves them out of the
formula and has the footprint model the share; beside it stands that they are left out of both, or
taken for lower bounds. The last columns are the median prediction over the truth, of the formula
at a large point and of the footprint in mid-range and at the large point, how often the
footprint's 95% bound holds there, and admission: over fresh points and a limit that two fifths of
them exceed, the mean probability of a breach where it is 0.3 to 0.7, and how many do exceed it.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution

from optuna_quota import Footprint, Usage
from optuna_quota._footprint.observations import Observation
from optuna_quota._utilization.data import Parameter
from optuna_quota._utilization.design import build_design, select, values_of
from optuna_quota._utilization.fit import mean_and_jacobian
from optuna_quota._utilization.model import UtilizationModel


TRUTH = {
    "memory": {"rows": 2.0, "width": 1.1, "lr": 0.0, "optimizer[adam]": np.log(1.5)},
    "wall_time": {"rows": 1.2, "width": 0.6, "lr": 0.0, "optimizer[adam]": np.log(1.5)},
}


def simulate(rng, resource, n, share, noise):
    """Return parameters, log usage and which of it is a lower bound."""
    rows = np.exp(rng.uniform(np.log(200), np.log(10_000), n))
    width = np.exp(rng.uniform(np.log(16), np.log(512), n))
    lr = np.exp(rng.uniform(np.log(1e-5), np.log(1e-1), n))
    adam = rng.integers(0, 2, n).astype(float)
    b = TRUTH[resource]
    power = rows ** b["rows"] * width ** b["width"] * 1.5**adam
    mean = 300e6 + 0.8 * power if resource == "memory" else 0.5 + 1e-5 * power
    y = np.log(mean) + noise * rng.standard_normal(n)
    censored = np.zeros(n, dtype=bool)
    if share:  # a limit that this share of the trials would be over
        limit = np.quantile(y, 1 - share)
        censored = y > limit
        y = np.minimum(y, limit)
    parameters = (
        Parameter("rows", rows),
        Parameter("width", width),
        Parameter("lr", lr),
        Parameter("optimizer", adam, ("sgd", "adam")),
    )
    return parameters, y, censored


def fitted(resource, parameters, y, censored, kept):
    """Return a model fitted to the trials ``kept``."""
    design = build_design(parameters, kept)
    selected = select(design, values_of(parameters, kept), y[kept], censored[kept])
    return UtilizationModel(resource, selected, np.flatnonzero(kept))


def covers(coefficients, truth):
    """Return for each term whether its interval holds the truth, and its error."""
    found = {}
    for term, value in truth.items():
        sign = 1.0
        if term not in coefficients.index:  # the other level was the reference
            term, sign = term.replace("adam", "sgd"), -1.0
        if term not in coefficients.index:
            continue
        row = coefficients.loc[term]
        held = row["lower"] <= sign * value <= row["upper"]
        found[term.replace("sgd", "adam")] = (held, sign * row["estimate"] - value)
    return found


STOPPED = {
    "wall time, memory limit, late": ("wall_time", 0.8, 1.0),
    "wall time, memory limit, anywhere": ("wall_time", 0.02, 1.0),
    "wall time, pruned anywhere": ("wall_time", 0.02, 1.0),
    "wall time, pruned early": ("wall_time", 0.002, 0.02),
    "memory, wall time limit": ("memory", None, None),
}
MIDDLE = {"rows": 1400.0, "width": 90.0, "lr": 1e-3, "optimizer": "adam"}
LARGE = {"rows": 9000.0, "width": 450.0, "lr": 1e-3, "optimizer": "adam"}
SPACE = {
    "rows": FloatDistribution(200, 10_000, log=True),
    "width": FloatDistribution(16, 512, log=True),
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "optimizer": CategoricalDistribution(["sgd", "adam"]),
}


def simulate_stopped(rng, case, n, noise):
    """Return parameters, log usage and which half of the trials something else stopped."""
    parameters, wall, _ = simulate(rng, "wall_time", n, 0.0, noise)
    rows, width, _, adam = (p.values for p in parameters)
    memory = np.log(300e6 + 0.8 * rows**2.0 * width**1.1 * 1.5**adam)
    memory += 0.5 * noise * rng.standard_normal(n)
    resource, earliest, latest = STOPPED[case]
    if resource == "memory":
        limit = np.median(wall)
        return parameters, memory + np.minimum(limit - wall, 0.0), wall > limit
    over = memory > np.median(memory) if "limit" in case else rng.permutation(n) < n // 2
    return parameters, wall + over * np.log(rng.uniform(earliest, latest, n)), over


def footprint_of(resource, parameters, y, stopped, way):
    """Return a footprint of the trials."""
    rows, held = [], frozenset({resource})
    for i in np.flatnonzero(~stopped if way == "left out" else np.ones(len(y), dtype=bool)):
        point = {p.name: p.values[i] for p in parameters[:3]}
        point["optimizer"] = parameters[3].levels[int(parameters[3].values[i])]
        library = "maybe_censored" if resource == "memory" else "partial"
        kind = library if way == "as the library" else "censored"
        kinds = {kind: held} if stopped[i] else {}
        rows.append(Observation(point, SPACE, Usage(**{resource: np.exp(y[i])}), **kinds))
    return Footprint.fit(rows)


def admission_of(footprint, resource, fresh, y):
    """Return the stated probabilities of a breach in mid-range, and which points do breach."""
    points = [
        {p.name: (p.levels[int(p.values[i])] if p.levels else p.values[i]) for p in fresh}
        for i in range(len(y))
    ]
    limit = np.quantile(y, 0.6)
    stated = footprint.expected(points)[resource].above(np.exp(limit))
    middle = (stated > 0.3) & (stated < 0.7)
    return np.column_stack([stated, y > limit])[middle]


def compare_stopped(case, n, tables, noise) -> None:
    resource, b = STOPPED[case][0], TRUTH[STOPPED[case][0]]
    middle, truth = (_truth(resource, point) for point in (MIDDLE, LARGE))
    found = {"as the library": [], "left out": [], "lower bounds": []}
    admissions = {name: [] for name in found}
    rng = np.random.default_rng(20261124)
    for _ in range(tables):
        parameters, y, stopped = simulate_stopped(rng, case, n, noise)
        nothing, everything = np.zeros(n, dtype=bool), np.ones(n, dtype=bool)
        scatter = noise * (0.5 if resource == "memory" else 1.0)
        amount = truth * np.exp(scatter * rng.standard_normal())
        fresh, usage, _ = simulate(rng, resource, 100, 0.0, scatter)
        for name in found:
            bounds = name == "lower bounds"
            cut, kept = (stopped, everything) if bounds else (nothing, ~stopped)
            model = fitted(resource, parameters, y, cut, kept)
            held = [each[0] for each in covers(model.coefficients, b).values()]
            footprint = footprint_of(resource, parameters, y, stopped, name)
            near, far = (footprint.intervals(point)[resource] for point in (MIDDLE, LARGE))
            admissions[name].append(admission_of(footprint, resource, fresh, usage))
            ratios = _formula_at_large(model) / truth, near.median / middle, far.median / truth
            found[name].append((np.mean(held), *ratios, amount <= far.upper))
    for name, each in found.items():
        covered, *ratios, holds = np.array(each, dtype=float).T
        stated, seen = np.concatenate(admissions[name]).mean(axis=0)
        print(
            f"{case:<34}{n:>5}  {name:<14}{100 * covered.mean():>8.0f}"
            + "".join(f"{np.median(ratio):>12.2f}" for ratio in ratios)
            + f"{100 * holds.mean():>10.0f}{stated:>8.2f} {seen:.2f}",
            flush=True,
        )


def _truth(resource, point):
    b = TRUTH[resource]
    power = point["rows"] ** b["rows"] * point["width"] ** b["width"] * 1.5
    return 300e6 + 0.8 * power if resource == "memory" else 0.5 + 1e-5 * power


def _formula_at_large(model):
    design, fit = model.selected.design, model.selected.fit
    values = {name: np.array([LARGE[name]]) for name in ("rows", "width", "lr")}
    x = design.matrix({**values, "optimizer": np.array([1.0])}, 1)
    mean, _ = mean_and_jacobian(fit.theta, x, fit.has_floor)
    return float(np.exp(min(mean[0], 100.0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=500)
    parser.add_argument("--trials", type=int, nargs="+", default=[60])
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--quick", action="store_true", help="40 tables only")
    arguments = parser.parse_args()
    tables = 40 if arguments.quick else arguments.tables
    print(
        f"{tables} tables each, noise {arguments.noise}; coverage of 95% intervals, % (aim 93-97)"
    )
    print(
        f"{'resource':<10}{'n':>5}{'cut':>6}  {'method':<22}{'rows':>7}{'width':>7}{'lr':>7}"
        f"{'adam':>7}{'all':>7}{'bias of rows':>14}{'ms/fit':>8}"
    )
    for resource in TRUTH:
        for n in arguments.trials:
            for share in (0.0, 0.2, 0.5):
                compare(resource, n, share, tables, arguments.noise)
    print(
        f"\n{'half of the trials stopped':<34}{'n':>5}  {'their usage':<14}{'covered':>8}"
        f"{'formula':>12}{'mid-range':>12}{'footprint':>12}{'holds':>10}{'admission':>10}"
    )
    for case in STOPPED:
        for n in arguments.trials:
            compare_stopped(case, n, tables, 3 * arguments.noise)


def compare(resource, n, share, tables, noise) -> None:
    methods = {"lower bounds": [], "completed trials only": [], "bounds as values": []}
    spent = dict.fromkeys(methods, 0.0)
    rng = np.random.default_rng(20261123)
    for _ in range(tables):
        parameters, y, censored = simulate(rng, resource, n, share, noise)
        everything, nothing = np.ones(n, dtype=bool), np.zeros(n, dtype=bool)
        cases = {"lower bounds": (censored, everything)}
        if share:
            cases["completed trials only"] = (nothing, ~censored)
            cases["bounds as values"] = (nothing, everything)
        for name, (cut, kept) in cases.items():
            start = time.process_time()
            model = fitted(resource, parameters, y, cut, kept)
            methods[name].append(covers(model.coefficients, TRUTH[resource]))
            spent[name] += time.process_time() - start
    for name, found in methods.items():
        if found:
            show(resource, n, share, name, found, spent[name])


def show(resource, n, share, name, found, seconds) -> None:
    shares = [100 * np.mean([f[term][0] for f in found if term in f]) for term in TRUTH[resource]]
    bias = np.median([f["rows"][1] for f in found if "rows" in f])
    print(
        f"{resource:<10}{n:>5}{share:>6.0%}  {name:<22}"
        + "".join(f"{s:>7.1f}" for s in [*shares, np.mean(shares)])
        + f"{bias:>+14.3f}{1e3 * seconds / len(found):>8.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
