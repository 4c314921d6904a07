"""What a projection says: a value, and its text for a person."""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import Any
from typing import TYPE_CHECKING

from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import Strategy


if TYPE_CHECKING:
    from pandas import DataFrame


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


def _fits_with(row: ProjectedResource) -> float:
    return 1.0 if row.probability is None else row.probability


def _number(value: float | None) -> float:
    return math.nan if value is None else value
