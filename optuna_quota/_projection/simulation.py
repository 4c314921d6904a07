"""Projects a strategy by simulating it, and finds the nearest one that fits."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
import math
from typing import Any

import numpy as np

from optuna_quota._footprint.footprint import BaseFootprint
from optuna_quota._footprint.search_space import latin_hypercube, narrow, points_from_unit_cube
from optuna_quota._footprint.user_given import as_footprint, count_within
from optuna_quota._limits import Limits, Quota, Strategy
from optuna_quota._metering.breach import quota_bound
from optuna_quota._projection.projection import probability_of, ProjectedResource, Projection
from optuna_quota._resources import get_resource, HELD_RESOURCES, RESOURCES, TOTAL_RESOURCES
from optuna_quota._units import check_confidence, check_mapping, NUMBER


_DRAWS = 400
_POOL_SIZE = 256
# Limit on computing the usage of a pool of points, and the least number of points.
_SECONDS = 2.0
_MIN_POINTS = 16
# Longer strategies are simulated with this many trials, and their totals scaled.
_MAX_TRIALS = 4000
_MAX_CELLS = 2_000_000
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
            points. If ``confidence`` is not above 0.5 and below 1.
    """
    quota = Quota() if quota is None else quota
    limits = Limits() if limits is None else limits
    given = ("strategy", strategy, Strategy), ("quota", quota, Quota), ("limits", limits, Limits)
    for name, value, kind in given:
        if not isinstance(value, kind):
            raise TypeError(f"`{name}` must be a {kind.__name__} but got {value!r}.")
    known = {} if used is None else used
    check_mapping(known, "used", "names of resources to amounts")
    for name, amount in known.items():
        if name not in RESOURCES:
            raise ValueError(f"`used` must be of {', '.join(RESOURCES)} but got {name!r}.")
        NUMBER.parse(amount, f"used[{name!r}]", zero=True)
    if points is not None and not all(isinstance(each, Mapping) for each in points):
        raise TypeError(f"`points` must be mappings of parameters to values but got {points!r}.")
    check_confidence(confidence)
    expected = as_footprint(footprint)
    plan = _Plan(strategy, expected, quota, limits, dict(known), points, seed)
    simulation = plan.simulate()
    final = {name: each[:, -1] for name, each in simulation.cumulative.items()}
    rows = _projected(final, plan.used, quota, confidence)
    projection = Projection(strategy, rows, simulation.probability, confidence)
    if projection.fits:
        return projection
    return replace(projection, nearest=_nearest_strategy(simulation, confidence))


def project_end(
    strategy: Strategy, used: Mapping[str, float], quota: Quota, confidence: float
) -> Projection:
    """Return the projection of a strategy whose trials have all run."""
    final = {name: np.array([used.get(name, 0.0)]) for name in [*used, *quota.amounts()]}
    rows = _projected(final, used, quota, confidence)
    return Projection(strategy, rows, min(map(probability_of, rows), default=1.0), confidence)


def _projected(
    final: Mapping[str, np.ndarray], used: Mapping[str, float], quota: Quota, confidence: float
) -> tuple[ProjectedResource, ...]:
    """Return a row for each resource from draws of its usage at the end, shape ``(draws,)``."""
    amounts, rows = quota.amounts(), []
    for name in dict.fromkeys([*final, *amounts]):
        most, fits = amounts.get(name), None
        low = middle = high = math.nan
        if name in final:
            ends = final[name]
            low, middle, high = np.quantile(ends, [1 - confidence, 0.5, confidence]).tolist()
            fits = None if most is None else float((ends <= quota_bound(most)).mean())
        before = used.get(name, 0.0)
        if fits is None and most is not None and before > quota_bound(most):
            # Even if the rest uses nothing.
            fits = 0.0
        rows.append(ProjectedResource(name, before, low, middle, high, most, fits))
    return tuple(rows)


@dataclass(frozen=True)
class _Plan:
    """What to project: the arguments of :func:`project`."""

    strategy: Strategy
    footprint: BaseFootprint
    quota: Quota
    limits: Limits
    used: dict[str, float]
    points: Sequence[Mapping[str, Any]] | None
    seed: int

    def unit_points(self) -> np.ndarray | None:
        """Return a Latin hypercube for the search space, shape ``(points, parameters)``."""
        space = self.strategy.search_space
        if space is None or self.points is not None:
            return None
        return latin_hypercube(_POOL_SIZE, len(space), np.random.default_rng([self.seed, 2]))

    def simulate(self) -> _Simulation:
        """Draw each trial's usage and schedule the trials on workers."""
        unit, pool = self.unit_points(), self.points
        if unit is not None:
            pool = points_from_unit_cube(self.strategy.search_space or {}, unit)
        elif pool is None:
            pool = self.footprint.points
        if len(pool) == 0:
            raise ValueError(
                "`strategy` must have a search_space when the footprint knows no points, "
                f"but got {self.strategy!r}."
            )
        affordable = count_within(self.footprint, _SECONDS, pool)
        # The pool is in random order.
        pool = pool if affordable >= len(pool) else pool[: max(_MIN_POINTS, int(affordable))]
        length = min(self.strategy.n_trials, _MAX_TRIALS)
        # Each trial searches all blocks of workers, and one block: see `_schedule`.
        looks = max(1, math.isqrt(self.strategy.n_jobs) // 8)
        count = int(min(_DRAWS, max(_MAX_CELLS // (length * looks), 50)))
        # At the machine's mean speed over the whole strategy: if the machine has become slower,
        # totals after the first few trials are too small.
        found = self.footprint.draw(pool, count, self.seed, self.strategy.n_trials)
        # Unknown usage counts as none: it breaches nothing and has no price.
        drawn = {name: np.where(np.isnan(each), 0.0, each) for name, each in found.items()}
        # Which points are drawn is random, which makes up half of the spread of a total, unless
        # each is drawn once.
        generator = np.random.default_rng([self.seed, 3])
        if len(self.points or ()) == len(pool) == length == self.strategy.n_trials:
            picks = generator.permuted(np.tile(np.arange(length), (count, 1)), axis=1)
        else:
            # Trial by trial, so that a strategy of fewer trials has the same first points.
            picks = generator.integers(len(pool), size=(length, count)).T
        usage = {name: np.take_along_axis(each, picks, axis=1) for name, each in drawn.items()}
        stopped = _terminate(usage, self.limits)
        return _Simulation(self, drawn, _cumulative_usage(self, stopped, (count, length)))


@dataclass(frozen=True)
class _Simulation:
    """Draws of what a strategy uses."""

    plan: _Plan
    drawn: dict[str, np.ndarray]  # at each point of the pool, shape (draws, points)
    cumulative: dict[str, np.ndarray]  # of the study after each trial, shape (draws, trials)

    def fits_after(self) -> np.ndarray:
        """Return the probability that every quota holds after each trial."""
        fits = np.ones(next(iter(self.cumulative.values())).shape, dtype=bool)
        for name, quota in self.plan.quota.amounts().items():
            at_least = self.cumulative.get(name, self.plan.used.get(name, 0.0))
            fits &= at_least <= quota_bound(quota)
        return np.asarray(fits.mean(axis=0))

    @property
    def probability(self) -> float:
        return float(self.fits_after()[-1])

    def max_trials(self, confidence: float) -> int:
        """Return how many trials of the strategy fit with a confidence."""
        enough = self.fits_after() >= confidence
        n, asked = int(np.sum(np.cumprod(enough))), self.plan.strategy
        found = math.floor(n * asked.n_trials / len(enough))
        if asked.n_trials > len(enough) >= found:
            # Few trials are not scaled: each simulated trial stood for several.
            fewer = replace(asked, n_trials=len(enough))
            return replace(self.plan, strategy=fewer).simulate().max_trials(confidence)
        return found

    def scarcest(self) -> str:
        """Return the resource that is furthest over its quota, as a ratio of medians."""
        ratios = {
            name: float(np.median(self.cumulative[name][:, -1])) / quota
            for name, quota in self.plan.quota.amounts().items()
            if name in self.cumulative and name != "n_trials"
        }
        return max(ratios, key=ratios.__getitem__, default="")


def _terminate(usage: Mapping[str, np.ndarray], limits: Limits) -> dict[str, np.ndarray]:
    """Return what trials use when each is terminated at the limit that it reaches first.

    As in a replay, all totals grow evenly over a trial, so they stop together. When a peak occurs
    is unknown, so a breach of a peak does not reduce other usage.
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


def _cumulative_usage(
    plan: _Plan, usage: dict[str, np.ndarray], shape: tuple[int, int]
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
            cores = np.divide(usage["cpu_time"], times, out=np.zeros(shape), where=times > 0)
            usage = {**usage, "cpu_cores": cores}
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
    """Schedule the trials on workers, each on the one that is free first.

    Returns when all trials so far have ended, and the largest sum held at one moment so far.
    """
    count, length = durations.shape
    n_workers = min(n_jobs, length)
    # In blocks, so that a trial does not search all of thousands of workers.
    size = math.isqrt(n_workers - 1) + 1
    n_blocks = -(-n_workers // size)
    free_at = np.zeros((count, n_blocks, size))
    free_at.reshape(count, -1)[:, n_workers:] = math.inf
    soonest = np.zeros((count, n_blocks))
    holding = {name: np.zeros(free_at.shape) for name in held}
    block_sums = {name: np.zeros(soonest.shape) for name in held}
    ends = np.zeros(durations.shape)
    sums = {name: np.zeros(durations.shape) for name in held}
    rows = np.arange(count)
    for trial in range(length):
        block = np.argmin(soonest, axis=1)
        worker = np.argmin(free_at[rows, block], axis=1)
        free_at[rows, block, worker] += durations[:, trial]
        ends[:, trial] = free_at[rows, block, worker]
        soonest[rows, block] = free_at[rows, block].min(axis=1)
        for name, amounts in held.items():
            holding[name][rows, block, worker] = amounts[:, trial]
            block_sums[name][rows, block] = holding[name][rows, block].sum(axis=1)
            sums[name][:, trial] = block_sums[name].sum(axis=1)
    latest = np.maximum.accumulate(ends, axis=1)
    return latest, {name: np.maximum.accumulate(each, axis=1) for name, each in sums.items()}


def _nearest_strategy(simulation: _Simulation, confidence: float) -> Strategy | None:
    """Return the nearest strategy: fewer jobs, else fewer trials or a smaller range."""
    plan, asked = simulation.plan, simulation.plan.strategy
    options: list[tuple[float, Strategy]] = []

    def max_trials(n_jobs: int) -> int:
        if n_jobs == asked.n_jobs:
            return simulation.max_trials(confidence)
        slower = replace(plan, strategy=replace(asked, n_jobs=n_jobs))
        return slower.simulate().max_trials(confidence)

    too_many = asked.n_jobs + 1
    tried = set(range(1, asked.n_jobs + 1))
    if len(tried) > 8:
        tried = {int(n) for n in np.geomspace(1, asked.n_jobs, 9).round()}
    for n_jobs in sorted(tried, reverse=True):
        n_trials = max_trials(n_jobs)
        if n_trials >= asked.n_trials:
            # The most that fit may lie between two of the counts tried.
            counts = range(n_jobs, too_many)
            n_fit = bisect(counts, False, lo=1, key=lambda n: max_trials(n) < asked.n_trials)
            return replace(asked, n_jobs=counts[n_fit - 1])
        if n_trials >= 1:
            # Fewer jobs take longer, but lose no trial.
            kept = n_trials / asked.n_trials - 0.02 * (1 - n_jobs / asked.n_jobs)
            options.append((kept, replace(asked, n_jobs=n_jobs, n_trials=n_trials)))
        too_many = n_jobs
    options += _smaller_range(simulation, confidence)
    return max(options, key=lambda option: option[0])[1] if options else None


def _smaller_range(simulation: _Simulation, confidence: float) -> list[tuple[float, Strategy]]:
    """Return the strategy with the range of its costliest parameter reduced until it fits."""
    found = _costliest_param(simulation)
    if found is None:
        return []
    name, upper = found
    plan, asked = simulation.plan, simulation.plan.strategy
    space = dict(asked.search_space or {})
    low, high, best = 0.0, 1.0, None
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        smaller = {**space, name: narrow(space[name], share, upper=upper)}
        strategy = replace(asked, search_space=smaller)
        if replace(plan, strategy=strategy).simulate().probability >= confidence:
            low, best = share, (share, strategy)
        else:
            high = share
    return [] if best is None else [best]


def _costliest_param(simulation: _Simulation) -> tuple[str, bool] | None:
    """Return the parameter that drives the scarcest resource, and whether its upper end does."""
    resource, unit = simulation.scarcest(), simulation.plan.unit_points()
    source = {"trial_time": "wall_time", "cost": "wall_time", "cpu_cores": "cpu_time"}
    amounts = simulation.drawn.get(source.get(resource, resource))
    if unit is None or amounts is None or amounts.shape[1] < len(unit):
        # No space, or slow to compute: there is no time for other ranges.
        return None
    medians = np.median(amounts, axis=0)
    effects = {}
    space = simulation.plan.strategy.search_space or {}
    for column, (name, distribution) in enumerate(space.items()):
        if narrow(distribution, 0.5, upper=True) != distribution:
            above = unit[:, column] > 0.5
            effects[name] = float(medians[above].mean() - medians[~above].mean())
    if not any(effects.values()):
        return None
    name = max(effects, key=lambda each: abs(effects[each]))
    return name, effects[name] > 0
