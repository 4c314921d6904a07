"""Simulates a strategy: draws each trial's usage and schedules trials on workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import math
from typing import Any

import numpy as np

from optuna_quota._footprint.footprint import BaseFootprint
from optuna_quota._footprint.search_space import latin_hypercube, points_from_unit_cube
from optuna_quota._footprint.user_given import count_within
from optuna_quota._metering.breach import quota_bound
from optuna_quota._projection.projection import ProjectedResource, Projection
from optuna_quota._resources import (
    get_resource,
    HELD_RESOURCES,
    Limits,
    Quota,
    Strategy,
    TOTAL_RESOURCES,
)


_DRAWS = 400
_POOL_SIZE = 256
# Of a pool whose usage takes longer to compute, so many points are drawn from, but at least these.
_SECONDS = 2.0
_MIN_POINTS = 16
# Longer strategies are simulated with this many trials, and their totals scaled.
_MAX_TRIALS = 4000
_MAX_CELLS = 2_000_000


@dataclass(frozen=True)
class Plan:
    """What to project.

    Attributes:
        strategy: What is about to run.
        footprint: Expected usage of a trial.
        quota: The quota on the whole study.
        limits: A trial over one of them counts as terminated there.
        used: What the study used so far, by resource, in SI base units.
    """

    strategy: Strategy
    footprint: BaseFootprint
    quota: Quota
    limits: Limits
    used: dict[str, float]

    def simulate(
        self, unit: np.ndarray | None, points: Sequence[Mapping[str, Any]] | None, seed: int
    ) -> Simulation:
        """Return draws of the strategy, at ``points`` or else at the unit points in its space."""
        space = self.strategy.search_space
        pool = points
        if pool is None:
            pool = (
                self.footprint.points if unit is None else points_from_unit_cube(space or {}, unit)
            )
        if len(pool) == 0:
            raise ValueError(
                "`strategy` must have a search_space when the footprint knows no points, "
                f"but got {self.strategy!r}."
            )
        affordable = count_within(self.footprint, _SECONDS, pool)
        # The pool is in random order.
        pool = pool if affordable >= len(pool) else pool[: max(_MIN_POINTS, int(affordable))]
        length = min(self.strategy.n_trials, _MAX_TRIALS)
        count = int(min(_DRAWS, max(_MAX_CELLS // length, 50)))
        # Unknown usage counts as none: it breaches nothing and has no price.
        drawn = {
            name: np.where(np.isnan(each), 0.0, each)
            for name, each in self.footprint.draw(pool, count, seed).items()
        }
        once_each = points is not None and len(points) == self.strategy.n_trials
        picks = _draw_order(count, length, len(pool), seed, once_each=once_each)
        usage = {name: np.take_along_axis(each, picks, axis=1) for name, each in drawn.items()}
        stopped = _terminate(usage, self.limits)
        return Simulation(self, drawn, _cumulative_usage(self, stopped, (count, length)))


def unit_points(strategy: Strategy, seed: int) -> np.ndarray | None:
    """Return a Latin hypercube for the search space, shape ``(points, parameters)``."""
    if strategy.search_space is None:
        return None
    generator = np.random.default_rng([seed, 2])
    return latin_hypercube(_POOL_SIZE, len(strategy.search_space), generator)


def _terminate(usage: Mapping[str, np.ndarray], limits: Limits) -> dict[str, np.ndarray]:
    """Return what trials use when each is terminated at the limit that it reaches first.

    As in a replay, all totals grow evenly over a trial, so that they stop together. When a trial
    had its peaks is unknown, so a breach of one stops nothing else.
    """
    found = dict(usage)
    totals = [name for name in found if not get_resource(name).peak]
    share = np.ones(1)
    for name, limit in limits.amounts().items():
        if name in totals:
            share = np.minimum(share, limit / np.maximum(found[name], limit))
        elif name in found:
            found[name] = np.minimum(found[name], limit)
    return {name: each * share if name in totals else each for name, each in found.items()}


def _draw_order(count: int, length: int, size: int, seed: int, *, once_each: bool) -> np.ndarray:
    """Return the index of the point that each trial runs at, shape ``(count, length)``.

    Which points come is random, and makes up half of the spread of a total, unless each of them
    comes once.
    """
    generator = np.random.default_rng([seed, 3])
    if not once_each or length != size:
        # Trial by trial, so that a strategy of fewer trials starts with the very same points.
        return np.asarray(generator.integers(size, size=(length, count)).T)
    order = np.tile(np.arange(size), (count, 1))
    return np.asarray(generator.permuted(order, axis=1))


def _cumulative_usage(
    plan: Plan, usage: dict[str, np.ndarray], shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return what the study has used after each trial, by resource, shape (draws, trials)."""
    scale = plan.strategy.n_trials / shape[1]
    times = usage.get("wall_time")
    cumulative = {"n_trials": np.tile(np.arange(1.0, shape[1] + 1) * scale, (shape[0], 1))}
    for name, amounts in usage.items():
        if not get_resource(name).peak and name != "wall_time":
            cumulative[name] = np.cumsum(amounts, axis=1) * scale
    if times is not None:
        cumulative["trial_time"] = np.cumsum(times, axis=1) * scale
        if "cpu_time" in usage:
            with np.errstate(divide="ignore", invalid="ignore"):
                cores = usage["cpu_time"] / times
            usage = {**usage, "cpu_cores": np.where(times > 0, cores, 0.0)}
    # Trials of unknown length take turns.
    durations = np.ones(shape) if times is None else times
    held = {name: usage[name] for name in HELD_RESOURCES if name in usage}
    ends, peaks = _schedule(durations, held, plan.strategy.n_jobs)
    if times is not None:
        cumulative["wall_time"] = ends * scale
    cumulative.update(peaks)
    prices = plan.quota.prices
    if plan.quota.cost is not None and any(name in cumulative for name in prices):
        cumulative["cost"] = np.zeros(shape)
        for name, price in prices.items():
            cumulative["cost"] += price / 3600 * cumulative.get(name, 0.0)
    for name, amount in plan.used.items():
        if name in cumulative and name in TOTAL_RESOURCES:
            cumulative[name] = cumulative[name] + amount
    return cumulative


def _schedule(
    durations: np.ndarray, held: Mapping[str, np.ndarray], n_jobs: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Schedule the trials on ``n_jobs`` workers, each on the one that is free first.

    Returns:
        When all trials so far have ended, and the largest sum held at one moment so far.
    """
    count, length = durations.shape
    rows = np.arange(count)
    free_at = np.zeros((count, min(n_jobs, length)))
    holding = {name: np.zeros(free_at.shape) for name in held}
    ends = np.zeros(durations.shape)
    sums = {name: np.zeros(durations.shape) for name in held}
    for trial in range(length):
        worker = np.argmin(free_at, axis=1)
        free_at[rows, worker] += durations[:, trial]
        ends[:, trial] = free_at.max(axis=1)
        for name, amounts in held.items():
            holding[name][rows, worker] = amounts[:, trial]
            sums[name][:, trial] = holding[name].sum(axis=1)
    return ends, {name: np.maximum.accumulate(each, axis=1) for name, each in sums.items()}


@dataclass(frozen=True)
class Simulation:
    """Draws of what a strategy uses.

    Attributes:
        plan: What is projected.
        drawn: Usage by resource at each point of the pool, shape ``(draws, points)``.
        cumulative: What the study has used after each trial, shape ``(draws, trials)``.
    """

    plan: Plan
    drawn: dict[str, np.ndarray]
    cumulative: dict[str, np.ndarray]

    def projection(self, confidence: float) -> Projection:
        """Return the projection of the whole strategy."""
        amounts = self.plan.quota.amounts()
        names = [*self.cumulative, *(name for name in amounts if name not in self.cumulative)]
        rows = tuple(self._row(name, amounts.get(name), confidence) for name in names)
        probability = float(self.fits_after()[:, -1].mean())
        return Projection(self.plan.strategy, rows, probability, confidence)

    def _row(self, name: str, quota: float | None, confidence: float) -> ProjectedResource:
        used = self.plan.used.get(name, 0.0)
        if name not in self.cumulative:
            return ProjectedResource(name, used, math.nan, math.nan, math.nan, quota, None)
        final = self.cumulative[name][:, -1]
        low, middle, high = np.quantile(final, [1 - confidence, 0.5, confidence])
        fits = None if quota is None else float((final <= quota_bound(quota)).mean())
        return ProjectedResource(name, used, float(low), float(middle), float(high), quota, fits)

    def fits_after(self) -> np.ndarray:
        """Return whether every quota holds after each trial, shape ``(draws, trials)``."""
        fits = np.ones(next(iter(self.cumulative.values())).shape, dtype=bool)
        for name, quota in self.plan.quota.amounts().items():
            if name in self.cumulative:
                fits &= self.cumulative[name] <= quota_bound(quota)
        return fits

    def max_trials(self, confidence: float) -> int:
        """Return how many trials of the strategy fit with a confidence."""
        enough = self.fits_after().mean(axis=0) >= confidence
        n, asked = int(np.sum(np.cumprod(enough))), self.plan.strategy.n_trials
        return n if len(enough) == asked else math.floor(n * asked / len(enough))

    def scarcest(self) -> str | None:
        """Return the resource that is furthest over its quota, as a ratio of medians."""
        ratios = {
            name: float(np.median(self.cumulative[name][:, -1])) / quota
            for name, quota in self.plan.quota.amounts().items()
            if name in self.cumulative and name != "n_trials"
        }
        return max(ratios, key=ratios.__getitem__) if ratios else None
