"""The result of a projection, and its text."""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import Any

from optuna_quota._html import element, table
from optuna_quota._limits import Strategy
from optuna_quota._resources import format_amount, get_resource
from optuna_quota._table import DataFrame, float_frame
from optuna_quota._units import counted


COLUMNS = ("resource", "at least", "median", "at most", "quota", "probability")
_FIGURES = ("used", "lower", "median", "upper", "quota", "probability")


@dataclass(frozen=True)
class ProjectedResource:
    """One row of a projection, in SI base units.

    Attributes:
        resource: The resource.
        used: What the study used so far.
        lower: Undercut with probability ``1 - confidence`` at the end of the strategy.
        median: Median at the end.
        upper: Exceeded with probability ``1 - confidence`` at the end.
        quota: None without a quota.
        probability: That it stays within its quota; None without a quota, or when the usage is
            unknown.
    """

    resource: str
    used: float
    lower: float
    median: float
    upper: float
    quota: float | None
    probability: float | None

    def __str__(self) -> str:
        title, *cells = describe_resource(self)
        lower, median, upper, quota, probability = cells
        text = f"{title}: {median} projected" if median else f"{title}: unknown usage"
        if median and self.upper > self.lower:
            text += f" ({lower} to {upper})"
        if self.used:
            text += f", {format_amount(self.resource, self.used)} of it used so far"
        text += f", quota {quota}" if quota else ""
        return text + (f", probability {probability}" if probability else "")


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
        resources: Projected usage, one row a resource.
        probability: The probability that every quota holds.
        confidence: The probability that is required.
        nearest: The strategy that keeps most of this one and fits; None when this one fits, and
            when no smaller one would.
    """

    strategy: Strategy
    resources: tuple[ProjectedResource, ...]
    probability: float
    confidence: float = 0.95
    nearest: Strategy | None = None

    @property
    def fits(self) -> bool:
        """Whether every quota holds with the required confidence."""
        return self.probability >= self.confidence

    @property
    def table(self) -> DataFrame:
        """A DataFrame indexed by resource: used, lower, median, upper, quota, probability.

        The interval covers the whole study, including what was used so far.
        """
        rows = {row.resource: vars(row) for row in self.resources}
        return float_frame(rows, _FIGURES, index="resource")

    @property
    def unfit(self) -> tuple[ProjectedResource, ...]:
        """The resources that do not fit, least probable first."""
        rows = [row for row in self.resources if probability_of(row) < self.confidence]
        if rows or self.fits:
            return tuple(sorted(rows, key=probability_of))
        # If each fits alone, but not all together, the least probable one counts.
        return (min(self.resources, key=probability_of),)

    @property
    def not_judged(self) -> tuple[ProjectedResource, ...]:
        """The resources with a quota whose usage is unknown."""
        return tuple(r for r in self.resources if r.quota and r.probability is None)

    def verdict(self, fits: str, unfit: str) -> str:
        """Return whether it fits as a word, qualified if some usage is unknown."""
        if not self.fits or not self.not_judged:
            return fits if self.fits else unfit
        return f"{fits} as far as known"

    def __str__(self) -> str:
        lines = [self._conclusion()]
        lines += [f"  {row}" for row in (self.resources if self.fits else self.unfit)]
        if not self.fits:
            lines.append(describe_nearest(self))
        return "\n".join(lines)

    def _conclusion(self) -> str:
        verdict = self.verdict("fits its quota", "does not fit its quota")
        trials = describe_strategy(self.strategy, _trial_noun(self))
        return (
            f"A strategy of {trials} {verdict}: probability {describe_probability(self)}, "
            f"{format_probability(self.confidence)} required."
        )

    def _repr_html_(self) -> str:
        rows = [describe_resource(row) for row in self.resources]
        parts = [element("p", self._conclusion()), table(COLUMNS, rows, right=range(1, 6))]
        if not self.fits:
            parts.append(element("p", describe_nearest(self)))
        return element("div", *parts)


def describe_resource(row: ProjectedResource) -> tuple[str, ...]:
    """Return a row as text by :data:`COLUMNS`; unknown cells are empty."""
    amounts = (row.lower, row.median, row.upper, row.quota)
    return (
        get_resource(row.resource).title,
        *("" if v is None or math.isnan(v) else format_amount(row.resource, v) for v in amounts),
        "" if row.probability is None else format_probability(row.probability),
    )


def _trial_noun(projection: Projection) -> str:
    have_run = any(row.resource == "n_trials" and row.used > 0 for row in projection.resources)
    return "further trial" if have_run else "trial"


def describe_strategy(strategy: Strategy, noun: str = "trial") -> str:
    trials = counted(strategy.n_trials, noun)
    return trials if strategy.n_jobs == 1 else f"{trials} with {strategy.n_jobs} at once"


def describe_nearest(projection: Projection) -> str:
    """Return how the nearest strategy that fits differs from the projected one."""
    nearest, asked = projection.nearest, projection.strategy
    if nearest is None:
        return "No smaller strategy would fit."
    parts = []
    if nearest.n_trials != asked.n_trials:
        trials = counted(nearest.n_trials, _trial_noun(projection))
        parts.append(f"{trials} instead of {asked.n_trials:,}")
    if nearest.n_jobs != asked.n_jobs:
        parts.append(f"{nearest.n_jobs} at once instead of {asked.n_jobs}")
    before: dict[str, Any] = dict(asked.search_space or {})
    after: dict[str, Any] = dict(nearest.search_space or {})
    parts += [
        f"{name} from {after[name].low:g} to {after[name].high:g}"
        for name in after
        if name in before and before[name] != after[name]
    ]
    return f"Nearest that would fit: {', '.join(parts)}."


def describe_probability(projection: Projection) -> str:
    """Return the probability that it fits, and resources that were not judged, as text."""
    unknown = [get_resource(row.resource).title for row in projection.not_judged]
    if not unknown:
        return format_probability(projection.probability)
    if all(row.probability is None for row in projection.resources):
        return "unknown"
    return f"{format_probability(projection.probability)} without {' and '.join(unknown)}"


def format_probability(probability: float) -> str:
    """Return a probability in percent, never rounded to certainty."""
    if 0 < probability < 0.01:
        return "under 1%"
    if 0.99 < probability < 1:
        return "over 99%"
    return f"{probability:.0%}"


def probability_of(row: ProjectedResource) -> float:
    """Return the probability that a resource stays within its quota, 1 where it is not judged."""
    return 1.0 if row.probability is None else row.probability
