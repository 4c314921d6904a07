"""Will a strategy fit its quota: footprints summed over it, with a stated probability."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._models.given import as_footprint
from optuna_quota._models.given import Expectation
from optuna_quota._models.spaces import latin_hypercube
from optuna_quota._models.spaces import narrowed
from optuna_quota._models.spaces import points_of
from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import HELD_RESOURCES
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota
from optuna_quota._resources import Strategy
from optuna_quota._resources import TOTAL_RESOURCES


if TYPE_CHECKING:
    from pandas import DataFrame


_DRAWS = 400
_POOL = 256
# More trials than these are simulated as so many, and their totals scaled.
_LONGEST = 4000
_CELLS = 2_000_000
_SEARCH_STEPS = 7
# Sums of floats: 200 times 0.1 s must fit into 20 s.
_SLACK = 1 + 1e-9


@dataclass(frozen=True)
class ProjectedResource:
    """One row of a projection, in SI base units.

    Attributes:
        resource: The resource.
        used: What the study used so far.
        lower: Undercut with probability ``1 - confidence`` at the end of the strategy.
        median: Expected at the end.
        upper: Exceeded with probability ``1 - confidence`` at the end.
        quota: None when there is no quota on it.
        probability: That it stays within its quota; None without a quota, or when nothing is
            known of the resource.
    """

    resource: str
    used: float
    lower: float
    median: float
    upper: float
    quota: float | None
    probability: float | None

    def __str__(self) -> str:
        def amount(value: float | None) -> str:
            return format_amount(self.resource, value)

        known = not math.isnan(self.median)
        text = f"{get_resource(self.resource).title}: "
        text += f"{amount(self.median)} projected" if known else "nothing is known of it"
        if known and self.upper > self.lower:
            text += f" ({amount(self.lower)} to {amount(self.upper)})"
        if self.used:
            text += f", {amount(self.used)} of it used"
        if self.quota is not None:
            text += f", quota {amount(self.quota)}"
        if self.probability is not None:
            text += f", probability {format_probability(self.probability)}"
        return text


@dataclass(frozen=True)
class Projection:
    """What a strategy will use, and whether that fits.

    Example:

        .. code-block:: python

            every_trial = Usage(wall_time="90s")
            projection = project(Strategy(200), every_trial, quota=Quota(wall_time="2h"))
            print(projection.fits, projection.probability, projection.nearest)

    Attributes:
        strategy: What was projected.
        resources: What it will use, one row a resource.
        probability: That every quota holds.
        confidence: What the probability must reach.
        nearest: The strategy that keeps most of this one and would fit; None when this one fits
            and when no smaller one would.
    """

    strategy: Strategy
    resources: tuple[ProjectedResource, ...]
    probability: float
    confidence: float = 0.95
    nearest: Strategy | None = None

    @property
    def fits(self) -> bool:
        """Whether the strategy is within the quota with the confidence asked for."""
        return self.probability >= self.confidence

    @property
    def table(self) -> DataFrame:
        """A DataFrame indexed by resource: used, lower, median, upper, quota, probability.

        The interval is that of the whole: what was used so far and what is to come.
        """
        from pandas import DataFrame
        from pandas import Index

        columns = ["used", "lower", "median", "upper", "quota", "probability"]
        rows = [[_number(getattr(r, name)) for name in columns] for r in self.resources]
        index = Index([r.resource for r in self.resources], name="resource", dtype="object")
        frame: DataFrame = DataFrame(rows, index=index, columns=columns, dtype=float)
        return frame

    @property
    def unfit(self) -> tuple[ProjectedResource, ...]:
        """The resources that do not fit, least probable first."""
        rows = [r for r in self.resources if _fits_with(r) < self.confidence]
        if rows or self.fits:
            return tuple(sorted(rows, key=_fits_with))
        # Each fits alone, not all together: the least probable one decided.
        return (min(self.resources, key=_fits_with),)

    def __str__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        lines = [
            f"A strategy of {describe_strategy(self.strategy)} {verdict} its quota: probability "
            f"{format_probability(self.probability)}, {format_probability(self.confidence)} asked "
            "for."
        ]
        lines += [f"  {row}" for row in (self.resources if self.fits else self.unfit)]
        if not self.fits:
            near = self.nearest
            lines.append(
                "No smaller strategy would fit."
                if near is None
                else f"Nearest that would fit: {describe_difference(near, self.strategy)}."
            )
        return "\n".join(lines)


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
    plan = _Plan(strategy, expected, quota or Quota(), limits or Limits(), dict(used or {}))
    simulation = plan.simulate(_unit_points(strategy, seed), points, seed)
    projection = simulation.projection(confidence)
    if projection.fits:
        return projection
    return replace(projection, nearest=_nearest(plan, simulation, points, confidence, seed))


def project_end(
    strategy: Strategy, used: Mapping[str, float], quota: Quota, confidence: float
) -> Projection:
    """Return the projection of a strategy of which nothing is left to run."""
    amounts = quota.amounts()
    rows = []
    for name in dict.fromkeys([*used, *amounts]):
        final, ceiling = used.get(name, 0.0), amounts.get(name)
        fits = None if ceiling is None else float(final <= ceiling * _SLACK)
        rows.append(ProjectedResource(name, final, final, final, final, ceiling, fits))
    probability = min((row.probability for row in rows if row.probability is not None), default=1)
    return Projection(strategy, tuple(rows), float(probability), confidence)


def describe_strategy(strategy: Strategy) -> str:
    """Return a strategy for a person."""
    trials = "1 trial" if strategy.n_trials == 1 else f"{strategy.n_trials} trials"
    return trials if strategy.n_jobs == 1 else f"{trials}, {strategy.n_jobs} at once,"


def describe_difference(nearest: Strategy, asked: Strategy) -> str:
    """Return for a person what is smaller in the nearest strategy."""
    parts = []
    if nearest.n_trials != asked.n_trials:
        parts.append(f"{nearest.n_trials} trials instead of {asked.n_trials}")
    if nearest.n_jobs != asked.n_jobs:
        parts.append(f"{nearest.n_jobs} at once instead of {asked.n_jobs}")
    for name, distribution in (nearest.search_space or {}).items():
        before: Any = (asked.search_space or {}).get(name)
        after: Any = distribution
        if before is not None and before != after:
            parts.append(f"{name} from {after.low:g} to {after.high:g}")
    return ", ".join(parts)


def format_probability(probability: float) -> str:
    """Return a probability in percent, never rounded to a certainty that is none."""
    if 0 < probability < 0.01:
        return "under 1%"
    if 0.99 < probability < 1:
        return "over 99%"
    return f"{probability:.0%}"


@dataclass(frozen=True)
class _Plan:
    """What is to be projected, before any draw."""

    strategy: Strategy
    footprint: Expectation
    quota: Quota
    limits: Limits
    used: dict[str, float]

    def simulate(
        self, unit: np.ndarray | None, points: Sequence[Mapping[str, Any]] | None, seed: int
    ) -> _Simulation:
        """Return draws of the strategy, at these points or at those the unit points stand for."""
        space = self.strategy.search_space
        pool = points
        if pool is None:
            pool = self.footprint.points if unit is None else points_of(space or {}, unit)
        if len(pool) == 0:
            raise ValueError(
                "`strategy` must have a search_space when the footprint knows no points, "
                f"but got {self.strategy!r}."
            )
        length = min(self.strategy.n_trials, _LONGEST)
        count = int(min(_DRAWS, max(_CELLS // length, 50)))
        drawn = self.footprint.draw(pool, count, seed)
        known = points is not None and len(points) == self.strategy.n_trials
        picks = _picks(count, length, len(pool), seed, known=known)
        usage = {name: np.take_along_axis(each, picks, axis=1) for name, each in drawn.items()}
        for name, limit in self.limits.amounts().items():
            if name in usage:
                usage[name] = np.minimum(usage[name], limit)
        return _Simulation(self, drawn, _growth(self, usage, (count, length)))


def _unit_points(strategy: Strategy, seed: int) -> np.ndarray | None:
    if strategy.search_space is None:
        return None
    generator = np.random.default_rng([seed, 2])
    return latin_hypercube(_POOL, len(strategy.search_space), generator)


def _picks(count: int, length: int, size: int, seed: int, *, known: bool) -> np.ndarray:
    """Return which point of the pool each trial of each draw runs at.

    Which points come is chance, and half of what a total may turn out to be, unless they are the
    very ones to come, each once.
    """
    generator = np.random.default_rng([seed, 3])
    if not known or length != size:
        return generator.integers(size, size=(count, length))
    order = np.tile(np.arange(size), (count, 1))
    return np.asarray(generator.permuted(order, axis=1))


def _growth(
    plan: _Plan, usage: dict[str, np.ndarray], shape: tuple[int, int]
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
    if plan.quota.cost is not None:
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
class _Simulation:
    """Draws of what a strategy uses."""

    plan: _Plan
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
        fits = None if quota is None else float((final <= quota * _SLACK).mean())
        return ProjectedResource(name, used, float(low), float(middle), float(high), quota, fits)

    def within(self) -> np.ndarray:
        """Return whether every quota holds after each trial of each draw."""
        fits = np.ones(next(iter(self.grown.values())).shape, dtype=bool)
        for name, quota in self.plan.quota.amounts().items():
            if name in self.grown:
                fits &= self.grown[name] <= quota * _SLACK
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


def _nearest(
    plan: _Plan,
    simulation: _Simulation,
    points: Sequence[Mapping[str, Any]] | None,
    confidence: float,
    seed: int,
) -> Strategy | None:
    """Return the strategy that keeps most: fewer at once, else fewer trials or a smaller range."""
    asked = plan.strategy
    unit = _unit_points(asked, seed)
    options: list[tuple[float, Strategy]] = []
    for n_jobs in _fewer_at_once(asked.n_jobs):
        slower = replace(asked, n_jobs=n_jobs)
        changed = simulation if n_jobs == asked.n_jobs else None
        changed = changed or replace(plan, strategy=slower).simulate(unit, points, seed)
        n_trials = changed.longest(confidence)
        # All trials with fewer at once lose nothing but time.
        slowness = 0.02 * (1 - n_jobs / asked.n_jobs)
        if n_trials >= 1:
            kept = n_trials / asked.n_trials - slowness
            options.append((kept, replace(slower, n_trials=n_trials)))
        if n_trials >= asked.n_trials:
            return options[-1][1]
    if unit is not None and points is None:
        options += _smaller_range(plan, simulation, unit, confidence, seed)
    return max(options, key=lambda option: option[0])[1] if options else None


def _fewer_at_once(n_jobs: int) -> list[int]:
    """Return counts of jobs to try, all when few, else spaced."""
    if n_jobs <= 8:
        return list(range(n_jobs, 0, -1))
    return sorted({int(n) for n in np.geomspace(1, n_jobs, 9).round()}, reverse=True)


def _smaller_range(
    plan: _Plan, simulation: _Simulation, unit: np.ndarray, confidence: float, seed: int
) -> list[tuple[float, Strategy]]:
    """Return the strategy with the range of its costliest parameter cut to what fits, if any."""
    found = _costliest(plan, simulation, unit)
    if found is None:
        return []
    name, upper = found
    space = dict(plan.strategy.search_space or {})
    low, high, best = 0.0, 1.0, None
    for _ in range(_SEARCH_STEPS):
        share = (low + high) / 2
        smaller = {**space, name: narrowed(space[name], share, upper=upper)}
        strategy = replace(plan.strategy, search_space=smaller)
        tried = replace(plan, strategy=strategy).simulate(unit, None, seed)
        if float(tried.within()[:, -1].mean()) >= confidence:
            low, best = share, (share, strategy)
        else:
            high = share
    return [] if best is None else [best]


def _costliest(plan: _Plan, simulation: _Simulation, unit: np.ndarray) -> tuple[str, bool] | None:
    """Return the parameter that drives the scarcest resource, and whether its upper end does."""
    resource = simulation.pressing()
    source = {"trial_time": "wall_time", "cost": "wall_time", "cpu_cores": "cpu_time"}
    amounts = simulation.drawn.get(source.get(resource or "", resource or ""))
    if amounts is None:
        return None
    typical = np.median(amounts, axis=0)
    effects = {}
    for column, (name, distribution) in enumerate((plan.strategy.search_space or {}).items()):
        if narrowed(distribution, 0.5, upper=True) != distribution:
            above = unit[:, column] > 0.5
            effects[name] = float(typical[above].mean() - typical[~above].mean())
    if not effects or not any(effects.values()):
        return None
    name = max(effects, key=lambda each: abs(effects[each]))
    return name, effects[name] > 0


def _fits_with(row: ProjectedResource) -> float:
    return 1.0 if row.probability is None else row.probability


def _number(value: float | None) -> float:
    return math.nan if value is None else value
