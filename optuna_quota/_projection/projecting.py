"""Will it fit? No study is run."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from optuna_quota._footprint.given import as_footprint
from optuna_quota._projection.nearest import nearest_strategy
from optuna_quota._projection.projection import ProjectedResource
from optuna_quota._projection.projection import Projection
from optuna_quota._projection.simulation import Plan
from optuna_quota._projection.simulation import SLACK
from optuna_quota._projection.simulation import unit_points
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota
from optuna_quota._resources import Strategy


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

    Trials are drawn from the search space as its distributions say, and without one from the
    points that the footprint knows; each is given a usage drawn from the footprint, and they are
    put one after another on ``strategy.n_jobs`` places. Resources that trials hold (memory) count
    by the largest sum at one moment, all others by their totals.

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
        quota: What it must stay within.
        limits: A trial over one of them counts as terminated there.
        used: What the study used so far, by resource, in SI base units.
        points: Where the study is going, instead of the search space; as many as there are trials
            are taken for the very points to come, others for a sample of them.
        confidence: The probability that is enough.
        seed: Of the random draws; the same gives the same projection.

    Raises:
        TypeError: If ``footprint`` is none of these.
        ValueError: If there is no point to project: neither a search space nor a footprint that
            knows points.
    """
    expected = as_footprint(footprint)
    plan = Plan(strategy, expected, quota or Quota(), limits or Limits(), dict(used or {}))
    simulation = plan.simulate(unit_points(strategy, seed), points, seed)
    projection = simulation.projection(confidence)
    if projection.fits:
        return projection
    return replace(
        projection, nearest=nearest_strategy(plan, simulation, points, confidence, seed)
    )


def project_end(
    strategy: Strategy, used: Mapping[str, float], quota: Quota, confidence: float
) -> Projection:
    """Return the projection of a strategy of which nothing is left to run."""
    amounts = quota.amounts()
    rows = []
    for name in dict.fromkeys([*used, *amounts]):
        final, ceiling = used.get(name, 0.0), amounts.get(name)
        fits = None if ceiling is None else float(final <= ceiling * SLACK)
        rows.append(ProjectedResource(name, final, final, final, final, ceiling, fits))
    probability = min((row.probability for row in rows if row.probability is not None), default=1)
    return Projection(strategy, tuple(rows), float(probability), confidence)
