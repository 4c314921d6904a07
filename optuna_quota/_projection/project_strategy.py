"""Projects a strategy without running it, and finds the nearest one that fits."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from optuna_quota._footprint.search_space import narrow
from optuna_quota._footprint.user_given import as_footprint
from optuna_quota._metering.breach import quota_bound
from optuna_quota._projection.projection import ProjectedResource, Projection
from optuna_quota._projection.simulation import Plan, Simulation, unit_points
from optuna_quota._resources import Limits, Quota, Strategy


_BISECTIONS = 7


def project(
    strategy: Strategy,
    footprint: Any,
    *,
    quota: Quota | None = None,
    limits: Limits | None = None,
    used: Mapping[str, float] | None = None,
    points: Sequence[Mapping[str, Any]] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Projection:
    """Return what a strategy will use and whether that fits a quota; no study is run.

    Points are drawn from the search space as its distributions say, and without one from the
    points of the footprint. The usage of each is drawn from the footprint, and the trials are
    scheduled one after another on ``strategy.n_jobs`` workers. Resources that trials hold
    (memory) count by the largest sum at one moment, all others by their totals.

    Example:

        .. code-block:: python

            strategy = Strategy(n_trials=200, n_jobs=2)
            every_trial = Usage(memory="2GiB", wall_time="90s")
            projection = project(strategy, every_trial, quota=Quota(wall_time="2h"))
            print(projection)

    Args:
        strategy: What is about to run.
        footprint: A :class:`~optuna_quota.Usage`, a function ``params -> Usage``, or a
            :class:`~optuna_quota.Footprint`.
        quota: The quota on the whole study.
        limits: A trial over one of them counts as terminated there.
        used: What the study used so far, by resource, in SI base units.
        points: Points to draw from instead of the search space. As many as there are trials run
            once each; any other number is sampled with replacement.
        confidence: The probability with which every quota has to hold.
        seed: Of the random draws; the same seed gives the same projection.

    Raises:
        TypeError: If ``footprint`` is none of these.
        ValueError: If there is no point to project: neither a search space nor a footprint with
            points.
    """
    expected = as_footprint(footprint)
    plan = Plan(strategy, expected, quota or Quota(), limits or Limits(), dict(used or {}))
    simulation = plan.simulate(unit_points(strategy, seed), points, seed)
    projection = simulation.projection(confidence)
    if projection.fits:
        return projection
    return replace(
        projection, nearest=_nearest_strategy(plan, simulation, points, confidence, seed)
    )


def project_end(
    strategy: Strategy, used: Mapping[str, float], quota: Quota, confidence: float
) -> Projection:
    """Return the projection of a strategy whose trials have all run."""
    amounts = quota.amounts()
    rows = []
    for name in dict.fromkeys([*used, *amounts]):
        final, ceiling = used.get(name, 0.0), amounts.get(name)
        fits = None if ceiling is None else float(final <= quota_bound(ceiling))
        rows.append(ProjectedResource(name, final, final, final, final, ceiling, fits))
    probability = min((row.probability for row in rows if row.probability is not None), default=1)
    return Projection(strategy, tuple(rows), float(probability), confidence)


def _nearest_strategy(
    plan: Plan,
    simulation: Simulation,
    points: Sequence[Mapping[str, Any]] | None,
    confidence: float,
    seed: int,
) -> Strategy | None:
    """Return the strategy that keeps most: fewer at once, else fewer trials or a smaller range."""
    asked = plan.strategy
    unit = unit_points(asked, seed)
    options: list[tuple[float, Strategy]] = []

    def max_trials(n_jobs: int) -> int:
        if n_jobs == asked.n_jobs:
            return simulation.max_trials(confidence)
        slower = replace(plan, strategy=replace(asked, n_jobs=n_jobs))
        return slower.simulate(unit, points, seed).max_trials(confidence)

    too_many = asked.n_jobs + 1
    for n_jobs in _fewer_jobs(asked.n_jobs):
        n_trials = max_trials(n_jobs)
        if n_trials >= asked.n_trials:
            # The most that fit may lie between two of the counts tried.
            counts = range(n_jobs, too_many)
            n_fit = bisect(counts, False, lo=1, key=lambda n: max_trials(n) < asked.n_trials)
            return replace(asked, n_jobs=counts[n_fit - 1])
        if n_trials >= 1:
            # Fewer at once cost some time, but lose no trial.
            kept = n_trials / asked.n_trials - 0.02 * (1 - n_jobs / asked.n_jobs)
            options.append((kept, replace(asked, n_jobs=n_jobs, n_trials=n_trials)))
        too_many = n_jobs
    if unit is not None and points is None:
        options += _smaller_range(plan, simulation, unit, confidence, seed)
    return max(options, key=lambda option: option[0])[1] if options else None


def _fewer_jobs(n_jobs: int) -> list[int]:
    """Return counts of jobs to try, all when few, else spaced."""
    if n_jobs <= 8:
        return list(range(n_jobs, 0, -1))
    return sorted({int(n) for n in np.geomspace(1, n_jobs, 9).round()}, reverse=True)


def _smaller_range(
    plan: Plan, simulation: Simulation, unit: np.ndarray, confidence: float, seed: int
) -> list[tuple[float, Strategy]]:
    """Return the strategy with the range of its costliest parameter reduced until it fits."""
    found = _costliest_param(plan, simulation, unit)
    if found is None:
        return []
    name, upper = found
    space = dict(plan.strategy.search_space or {})
    low, high, best = 0.0, 1.0, None
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        smaller = {**space, name: narrow(space[name], share, upper=upper)}
        strategy = replace(plan.strategy, search_space=smaller)
        tried = replace(plan, strategy=strategy).simulate(unit, None, seed)
        if float(tried.fits_after()[:, -1].mean()) >= confidence:
            low, best = share, (share, strategy)
        else:
            high = share
    return [] if best is None else [best]


def _costliest_param(
    plan: Plan, simulation: Simulation, unit: np.ndarray
) -> tuple[str, bool] | None:
    """Return the parameter that drives the scarcest resource, and whether its upper end does."""
    resource = simulation.scarcest() or ""
    source = {"trial_time": "wall_time", "cost": "wall_time", "cpu_cores": "cpu_time"}
    amounts = simulation.drawn.get(source.get(resource, resource))
    if amounts is None or amounts.shape[1] < len(unit):
        # Slow to compute: there is no time for other ranges.
        return None
    medians = np.median(amounts, axis=0)
    effects = {}
    for column, (name, distribution) in enumerate((plan.strategy.search_space or {}).items()):
        if narrow(distribution, 0.5, upper=True) != distribution:
            above = unit[:, column] > 0.5
            effects[name] = float(medians[above].mean() - medians[~above].mean())
    if not effects or not any(effects.values()):
        return None
    name = max(effects, key=lambda each: abs(effects[each]))
    return name, effects[name] > 0
