"""Admit a point or refuse it, with the reason: pure."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._footprint.footprint import BaseFootprint
from optuna_quota._footprint.footprint import joint_breach
from optuna_quota._footprint.search_space import certain_completions
from optuna_quota._footprint.search_space import likely_completions
from optuna_quota._footprint.search_space import spaced_values
from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import Limits


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class PointVerdict:
    """Whether a point may run.

    Attributes:
        admitted: Whether it may.
        probability: That it breaches any limit.
        reason: One sentence for a person; empty when it may run.
        resource: The likeliest to be breached.
        limit: Its limit, in SI base units.
        median: What is expected of it, in SI base units.
    """

    admitted: bool
    probability: float = 0.0
    reason: str = ""
    resource: str | None = None
    limit: float | None = None
    median: float | None = None


def admit_point(
    breaches: Mapping[str, float],
    medians: Mapping[str, float],
    limits: Mapping[str, float],
    threshold: float,
) -> PointVerdict:
    """Return whether a point may run.

    The gate is the probability of a breach and not the upper bound: that would refuse half of
    what fits.

    Args:
        breaches: Probability of a breach of each limit that something is known of.
        medians: What is expected of these resources.
        limits: The limits, in SI base units.
        threshold: The probability of any breach above which a point is refused.
    """
    probability = joint_breach(breaches)
    if probability <= threshold:
        return PointVerdict(True, probability)
    name = max(breaches, key=lambda each: breaches[each])
    title = get_resource(name).title
    reason = (
        f"{title[0].upper()}{title[1:]} of about {format_amount(name, medians[name])} projected, "
        f"limit {format_amount(name, limits[name])}: a breach has the probability "
        f"{format_chance(probability)}."
    )
    return PointVerdict(False, probability, reason, name, limits[name], medians[name])


def format_chance(probability: float) -> str:
    """Return a probability in percent, never rounded to a certainty that is none."""
    return "over 99%" if 0.995 <= probability < 1 else f"{probability:.0%}"


def audit_is_due(vetoes: int, audits: int, share: float) -> bool:
    """Return whether the veto at hand is to be tried, so that a wrong one is found.

    Args:
        vetoes: Points refused so far, this one included.
        audits: Of these, how many were run all the same.
        share: How many may be.
    """
    return audits + 0.5 < share * vetoes


@dataclass(frozen=True)
class Gate:
    """What decides about the points of one trial.

    Attributes:
        expected: What a point is expected to use.
        limits: The limits on the trial.
        past: Points of earlier trials, oldest first.
        space: Distribution of each parameter that any of them had.
        threshold: The probability of a breach above which a point is refused.
        whole: Points of trials that completed, where only whole points can be judged: a user's
            function may need any parameter. None where any point can.
        declared: All parameters, where the user said which they are.
    """

    expected: BaseFootprint
    limits: Limits
    past: Sequence[Mapping[str, Any]]
    space: Mapping[str, BaseDistribution]
    threshold: float
    whole: Sequence[Mapping[str, Any]] | None = None
    declared: frozenset[str] | None = None

    def common_space(self) -> dict[str, BaseDistribution]:
        """Return the parameters that all earlier trials had, in the order they were asked for."""
        if not self.past:
            return {}
        names = set(self.past[-1]).intersection(*self.past)
        return {name: self.space[name] for name in self.past[-1] if name in names}

    def judge(self, known: Mapping[str, Any]) -> PointVerdict:
        """Return whether a point may run, whatever its parameters not drawn yet will be.

        A half-drawn point is refused only when the cheapest it may become would be: a parameter
        that is not known yet blocks nothing. Nor does a point that can't be judged: a user's
        function is asked for whole points alone, and the first trials tell what is one.
        """
        points = self.may_become(known)
        chances = self._chances_at(points)
        if np.isnan(chances).any() or not len(chances):
            return PointVerdict(True)
        cheapest = int(np.argmin(chances))
        if chances[cheapest] <= self.threshold:
            return PointVerdict(True, float(chances[cheapest]))
        return self._verdict(self._cheapest(points[cheapest], known, float(chances[cheapest])))

    def may_become(self, known: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return points that can be judged and that a half-drawn one may become."""
        if self.whole is None:
            return likely_completions(known, self.past)
        if self.declared is not None and self.declared <= known.keys():
            return [known]
        return certain_completions(known, self.whole)

    def _verdict(self, point: Mapping[str, Any]) -> PointVerdict:
        medians = {n: each.median for n, each in self.expected.intervals(point).items()}
        single = {
            name: float(each[0])
            for name, each in self.expected.breaches([point], self.limits).items()
            if name in medians
        }
        return admit_point(single, medians, self.limits.amounts(), self.threshold)

    def _cheapest(
        self, point: Mapping[str, Any], known: Mapping[str, Any], chance: float
    ) -> Mapping[str, Any]:
        """Return the point with each parameter not drawn yet where it breaches least likely.

        One after the other: earlier trials may not have shown the value that would fit.
        """
        for name in point:
            if name in known or name not in self.space or chance <= self.threshold:
                continue
            tried = [{**point, name: value} for value in spaced_values(self.space[name])]
            # One that can't be judged is not known to be cheaper.
            chances = np.nan_to_num(self.chances(tried), nan=1.0)
            best = int(np.argmin(chances))
            if chances[best] < chance:
                point, chance = tried[best], float(chances[best])
        return point

    def chances(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return the probability of a breach at each of some points, NaN where it is unknown."""
        if self.whole is None:
            return _joint(self.expected.breaches(points, self.limits), len(points))
        least = (self._chances_at(self.may_become(point)) for point in points)
        return np.array([min(each) if len(each) else np.nan for each in least])

    def _chances_at(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return the probability of a breach at each point, NaN where a function fails."""
        try:
            breaches = self.expected.breaches(points, self.limits) if points else {}
        except KeyError:
            return np.full(len(points), np.nan)
        return _joint(breaches, len(points)) if breaches else np.zeros(0)


def _joint(breaches: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    return np.array(
        [
            joint_breach({name: float(each[i]) for name, each in breaches.items()})
            for i in range(count)
        ]
    )
