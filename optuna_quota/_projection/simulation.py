"""Draws of what a strategy uses, trial by trial, and when each would end."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any

import numpy as np

from optuna_quota._footprint.footprint import BaseFootprint
from optuna_quota._footprint.search_space import latin_hypercube
from optuna_quota._footprint.search_space import points_from_unit_cube
from optuna_quota._projection.projection import ProjectedResource
from optuna_quota._projection.projection import Projection
from optuna_quota._resources import get_resource
from optuna_quota._resources import HELD_RESOURCES
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota
from optuna_quota._resources import Strategy
from optuna_quota._resources import TOTAL_RESOURCES


_DRAWS = 400
_POOL = 256
# More trials than these are simulated as so many, and their totals scaled.
_LONGEST = 4000
_CELLS = 2_000_000
# Sums of floats: 200 times 0.1 s must fit into 20 s.
SLACK = 1 + 1e-9


@dataclass(frozen=True)
class Plan:
    """What is to be projected, before any draw.

    Attributes:
        strategy: What is about to run.
        footprint: What a trial is expected to use.
        quota: What it must stay within.
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
        """Return draws of the strategy, at these points or at those the unit points stand for."""
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
        length = min(self.strategy.n_trials, _LONGEST)
        count = int(min(_DRAWS, max(_CELLS // length, 50)))
        # What is unknown at a point adds nothing there, as it breaches nothing and has no price.
        drawn = {
            name: np.where(np.isnan(each), 0.0, each)
            for name, each in self.footprint.draw(pool, count, seed).items()
        }
        known = points is not None and len(points) == self.strategy.n_trials
        picks = _picks(count, length, len(pool), seed, known=known)
        usage = {name: np.take_along_axis(each, picks, axis=1) for name, each in drawn.items()}
        return Simulation(
            self, drawn, _growth(self, _stopped(usage, self.limits), (count, length))
        )


def unit_points(strategy: Strategy, seed: int) -> np.ndarray | None:
    """Return points of the unit cube, evenly spread, for a search space; None without one."""
    if strategy.search_space is None:
        return None
    generator = np.random.default_rng([seed, 2])
    return latin_hypercube(_POOL, len(strategy.search_space), generator)


def _stopped(usage: Mapping[str, np.ndarray], limits: Limits) -> dict[str, np.ndarray]:
    """Return what trials use when each is terminated at the limit that it reaches first.

    As in a replay, all totals grow evenly over a trial, so that they stop together; when it had
    its peaks, and with them a breach of one, nobody knows.
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


def _picks(count: int, length: int, size: int, seed: int, *, known: bool) -> np.ndarray:
    """Return which point of the pool each trial of each draw runs at.

    Which points come is chance, and half of what a total may turn out to be, unless they are the
    very ones to come, each once.
    """
    generator = np.random.default_rng([seed, 3])
    if not known or length != size:
        # Drawn trial by trial, so that a strategy of fewer trials starts with the very same ones.
        return np.asarray(generator.integers(size, size=(length, count)).T)
    order = np.tile(np.arange(size), (count, 1))
    return np.asarray(generator.permuted(order, axis=1))


def _growth(
    plan: Plan, usage: dict[str, np.ndarray], shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return what the study has used after each trial, by resource; shape (draws, trials)."""
    scale = plan.strategy.n_trials / shape[1]
    times = usage.get("wall_time")
    grown = {"n_trials": np.tile(np.arange(1.0, shape[1] + 1) * scale, (shape[0], 1))}
    for name, amounts in usage.items():
        if not get_resource(name).peak and name != "wall_time":
            grown[name] = np.cumsum(amounts, axis=1) * scale
    if times is not None:
        grown["trial_time"] = np.cumsum(times, axis=1) * scale
        if "cpu_time" in usage:
            with np.errstate(divide="ignore", invalid="ignore"):
                cores = usage["cpu_time"] / times
            usage = {**usage, "cpu_cores": np.where(times > 0, cores, 0.0)}
    held = {name: usage[name] for name in HELD_RESOURCES if name in usage}
    finish, peaks = _schedule(times, held, shape, plan.strategy.n_jobs)
    if finish is not None:
        grown["wall_time"] = finish * scale
    grown.update(peaks)
    if plan.quota.cost is not None and any(name in grown for name in plan.quota.prices):
        grown["cost"] = _cost(plan.quota, grown, shape)
    for name, amount in plan.used.items():
        if name in grown and name in TOTAL_RESOURCES:
            grown[name] = grown[name] + amount
    return grown


def _cost(quota: Quota, grown: Mapping[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    cost = np.zeros(shape)
    for name, price in quota.prices.items():
        cost += price / 3600 * grown.get(name, np.zeros(shape))
    return cost


def _schedule(
    times: np.ndarray | None,
    held: Mapping[str, np.ndarray],
    shape: tuple[int, int],
    n_jobs: int,
) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
    """Put the trials on ``n_jobs`` places, each where one becomes free first.

    Returns:
        When all trials so far have ended, and the largest sum held at one moment so far.
    """
    count, length = shape
    places = min(n_jobs, length)
    rows = np.arange(count)
    free = np.zeros((count, places))
    holding = {name: np.zeros((count, places)) for name in held}
    finish = np.zeros(shape)
    peaks = {name: np.zeros(shape) for name in held}
    for trial in range(length):
        place = np.argmin(free, axis=1) if times is not None else np.full(count, trial % places)
        if times is not None:
            free[rows, place] += times[:, trial]
            finish[:, trial] = free.max(axis=1)
        for name, amounts in held.items():
            holding[name][rows, place] = amounts[:, trial]
            together = holding[name].sum(axis=1)
            before = peaks[name][:, trial - 1] if trial else 0.0
            peaks[name][:, trial] = np.maximum(before, together)
    return (finish if times is not None else None), peaks


@dataclass(frozen=True)
class Simulation:
    """Draws of what a strategy uses.

    Attributes:
        plan: What was projected.
        drawn: Usage by resource at each point of the pool, shape ``(draws, points)``.
        grown: What the study has used after each trial, shape ``(draws, trials)``.
    """

    plan: Plan
    drawn: dict[str, np.ndarray]
    grown: dict[str, np.ndarray]

    def projection(self, confidence: float) -> Projection:
        """Return the verdict on the whole strategy."""
        amounts = self.plan.quota.amounts()
        names = [*self.grown, *(name for name in amounts if name not in self.grown)]
        rows = tuple(self._row(name, amounts.get(name), confidence) for name in names)
        probability = float(self.within()[:, -1].mean())
        return Projection(self.plan.strategy, rows, probability, confidence)

    def _row(self, name: str, quota: float | None, confidence: float) -> ProjectedResource:
        used = self.plan.used.get(name, 0.0)
        if name not in self.grown:
            return ProjectedResource(name, used, math.nan, math.nan, math.nan, quota, None)
        final = self.grown[name][:, -1]
        low, middle, high = np.quantile(final, [1 - confidence, 0.5, confidence])
        fits = None if quota is None else float((final <= quota * SLACK).mean())
        return ProjectedResource(name, used, float(low), float(middle), float(high), quota, fits)

    def within(self) -> np.ndarray:
        """Return whether every quota holds after each trial of each draw."""
        fits = np.ones(next(iter(self.grown.values())).shape, dtype=bool)
        for name, quota in self.plan.quota.amounts().items():
            if name in self.grown:
                fits &= self.grown[name] <= quota * SLACK
        return fits

    def longest(self, confidence: float) -> int:
        """Return how many trials of the strategy would fit, 0 when not even one does."""
        enough = self.within().mean(axis=0) >= confidence
        n, asked = int(np.sum(np.cumprod(enough))), self.plan.strategy.n_trials
        return n if len(enough) == asked else math.floor(n * asked / len(enough))

    def pressing(self) -> str | None:
        """Return the resource with a quota that is furthest over it."""
        ratios = {
            name: float(np.median(self.grown[name][:, -1])) / quota
            for name, quota in self.plan.quota.amounts().items()
            if name in self.grown and name != "n_trials"
        }
        return max(ratios, key=ratios.__getitem__) if ratios else None
