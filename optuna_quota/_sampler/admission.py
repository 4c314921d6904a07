"""Admits or refuses a point by its probability of a breach, and finds the nearest admitted one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
import itertools
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from optuna_quota._footprint import search_space
from optuna_quota._footprint.footprint import BaseFootprint, joint_breach
from optuna_quota._footprint.user_given import count_within
from optuna_quota._limits import Limits
from optuna_quota._resources import ceiling_title, format_amount


# Completions of a point while no trial has completed: corners of the space and points inside it;
# fewer if a user's function takes longer than these seconds.
_N_CORNERS = 16
_N_WITHIN = 16
_SECONDS = 1.0
# Of the search for the nearest admitted point.
_RADII = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
_POINTS_PER_RADIUS = 48
_LINE_STEPS = 16
# Limit on the search with a slow user's function.
_SEARCH_SECONDS = 2.0
# Share of the threshold that a replacement should stay under.
_MARGIN = 0.5


def is_audit_due(refusals: int, audits: int, share: float) -> bool:
    """Return whether to run this refused point as an audit, which detects wrong refusals."""
    return audits + 0.5 < share * refusals


@dataclass(frozen=True)
class PointVerdict:
    admitted: bool
    probability: float = 0.0  # that it breaches any limit
    reason: str = ""  # one sentence; empty when it is admitted
    resource: str | None = None  # that is most likely breached
    limit: float | None = None  # SI base units
    median: float | None = None  # projected usage, likewise
    by_quota: bool = False  # whether the limit is what is left of the study's quota


@dataclass(frozen=True)
class PointAdmission:
    """Decides which points one trial may run, by the probability of a breach.

    Comparing the upper bound with the limit instead would refuse half of the points that fit.
    """

    expected: BaseFootprint
    limits: Limits  # of the trial
    past: Sequence[Mapping[str, Any]]  # points of earlier trials, oldest first
    space: Mapping[str, BaseDistribution]  # of these trials
    threshold: float  # the probability of a breach above which a point is refused
    varying: frozenset[str] = frozenset()  # parameters whose range differed between these trials
    # Points of completed trials, where only complete points can be judged because a user's
    # function may need any parameter; None where any point can.
    complete: Sequence[Mapping[str, Any]] | None = None
    declared: frozenset[str] = frozenset()  # all parameters, where they are known beforehand
    # Distributions of all parameters, where the strategy states them.
    stated_space: Mapping[str, BaseDistribution] = field(default_factory=dict)
    # What is left of the study's totals, where that is less than the limits.
    left: Mapping[str, float] = field(default_factory=dict)

    def common_space(self) -> dict[str, BaseDistribution]:
        """Return the parameters that all earlier trials had in common, in order of suggestion."""
        if not self.past:
            return {}
        names = set(self.past[-1]).intersection(*self.past) - self.varying
        return {name: self.space[name] for name in self.past[-1] if name in names}

    def judge(self, known: Mapping[str, Any]) -> PointVerdict:
        """Return whether a point, complete or partial, may run.

        A partial point is refused only if its cheapest completion is. A point that can't be judged
        is admitted: a user's function is called with complete points only, and the first trials
        show which points are complete.
        """
        points = self.completions(known)
        probabilities = self._breach_probabilities(points)
        if not len(points) or np.isnan(probabilities).any():
            return PointVerdict(True)
        best = int(np.argmin(probabilities))
        point, probability = points[best], float(probabilities[best])
        if not self.admits(probability):
            point, probability = self._reduce_risk(point, known, probability)
        if self.admits(probability):
            return PointVerdict(True, probability)
        return self._refusal(point, probability)

    def admits(self, probability: float) -> bool:
        return probability <= self.threshold

    def breach_probabilities(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return the probability of a breach at each point, NaN where it is unknown."""
        if self.complete is None:
            return self._breach_probabilities(points)
        each = (self._breach_probabilities(self.completions(point)) for point in points)
        return np.array([min(found, default=np.nan) for found in each])

    def _breach_probabilities(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return :meth:`breach_probabilities` of complete points."""
        try:
            breaches = self.expected.breaches(points, self.limits) if points else {}
        except KeyError:
            return np.full(len(points), np.nan)
        each = ({name: float(p[i]) for name, p in breaches.items()} for i in range(len(points)))
        return np.array([joint_breach(one) for one in each])

    def completions(self, known: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return possible completions of a partial point, none if unknown."""
        if self.complete is None:
            return search_space.likely_completions(known, self.past)
        if self.declared and self.declared <= known.keys():
            return [known]
        found = search_space.certain_completions(known, self.complete)
        return found or self._stated_completions(known)

    def _stated_completions(self, known: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return completions spread over the stated space, including its corners.

        Several, as a value may fit only in combination with certain others.
        """
        missing = {name: each for name, each in self.stated_space.items() if name not in known}
        if not missing:
            return []
        n, generator = len(missing), np.random.default_rng(0)
        corners: Any = list(itertools.product((0, 1), repeat=n)) if n <= 4 else ()
        if not corners:
            corners = generator.integers(0, 2, (_N_CORNERS, n))
        places = np.vstack([corners, search_space.latin_hypercube(_N_WITHIN, n, generator)])
        affordable = count_within(self.expected, _SECONDS)
        places = places[: int(max(1, min(affordable, len(places))))]
        return [
            {**known, **point} for point in search_space.points_from_unit_cube(missing, places)
        ]

    def _reduce_risk(
        self, point: Mapping[str, Any], known: Mapping[str, Any], probability: float
    ) -> tuple[Mapping[str, Any], float]:
        """Minimize the probability of a breach over the missing parameters, one by one.

        The values that fit may be missing from earlier trials.
        """
        space = {**self.stated_space, **self.space}
        for name in point:
            if name in known or name not in space or self.admits(probability):
                continue
            tried = [{**point, name: value} for value in search_space.spaced_values(space[name])]
            found = np.nan_to_num(self.breach_probabilities(tried), nan=1.0)
            best = int(np.argmin(found))
            if found[best] < probability:
                point, probability = tried[best], float(found[best])
        return point, probability

    def _refusal(self, point: Mapping[str, Any], probability: float) -> PointVerdict:
        medians = {name: each.median for name, each in self.expected.intervals(point).items()}
        breaches = self.expected.breaches([point], self.limits)
        known = [name for name in breaches if name in medians]
        name = max(known, key=lambda each: float(breaches[each][0]))
        limit = self.limits.amounts()[name]
        by_quota = self.left.get(name) == limit
        # Not rounded to certainty.
        shown = "over 99%" if 0.995 <= probability < 1 else f"{probability:.0%}"
        reason = (
            f"{ceiling_title(name, quota=by_quota)} likely exceeded: "
            f"{format_amount(name, medians[name])} projected, {format_amount(name, limit)} "
            f"{'left' if by_quota else 'allowed'}, probability {shown}."
        )
        return PointVerdict(False, probability, reason, name, limit, medians[name], by_quota)


def nearest_admitted(
    admission: PointAdmission,
    point: Mapping[str, Any],
    space: Mapping[str, BaseDistribution],
    fixed: Mapping[str, Any],
    generator: np.random.Generator,
) -> dict[str, Any] | None:
    """Return the nearest admitted point that a random search finds, None if it finds none.

    Random points are tried at growing distances, each parameter on the scale of its distribution,
    then the line to the nearest admitted one. A point at the threshold would breach as often as
    that allows, so a point at half of it is preferred. Parameters of ``space`` may change, those
    with a ``fixed`` value may not.
    """
    free = {n: d for n, d in space.items() if n in point and n not in fixed and not d.single()}
    if not free:
        return None
    search = _Search(admission, point, free, fixed)
    at_threshold = None
    around = (search.around(radius, generator) for radius in _RADII)
    for places in itertools.chain(around, search.past()):
        probabilities = search.breach_probabilities(places)
        target = search.closest(places, probabilities, _MARGIN)
        if target is not None:
            line = search.line_to(target)
            # The line's last point is the target, so there is one.
            nearest = search.closest(line, search.breach_probabilities(line), _MARGIN)
            found = search.admitted_point(nearest)
            if found is not None:
                return found
        if at_threshold is None:
            near = search.closest(places, probabilities, 1.0)
            at_threshold = search.admitted_point(near)
    return at_threshold


class _Search:
    """Points around a refused one, in the unit cube of the free parameters."""

    def __init__(
        self,
        admission: PointAdmission,
        point: Mapping[str, Any],
        free: Mapping[str, BaseDistribution],
        fixed: Mapping[str, Any],
    ) -> None:
        self._admission, self._point, self._free, self._fixed = admission, point, free, fixed
        self._start = self._place_of(point)
        self._categorical = np.array(
            [isinstance(each, CategoricalDistribution) for each in free.values()]
        )
        affordable = count_within(admission.expected, _SEARCH_SECONDS)
        affordable /= max(1, len(admission.completions({**point, **fixed})))
        self._n_around = int(min(_POINTS_PER_RADIUS, max(2, affordable / len(_RADII))))
        self._n_steps = int(min(_LINE_STEPS, max(4, affordable / 3)))

    def past(self) -> Iterator[np.ndarray]:
        """Yield the places of earlier trials, whose usage is known, if there are any."""
        points = [each for each in self._admission.past if self._free.keys() <= each.keys()]
        if points:
            # They may have had other ranges.
            yield np.clip([self._place_of(each) for each in points], 0.0, 1.0 - 1e-9)

    def around(self, radius: float, generator: np.random.Generator) -> np.ndarray:
        """Return random places; a category changes or stays."""
        start, categorical = self._start, self._categorical
        shape = (self._n_around, len(start))
        places = np.clip(start + radius * generator.standard_normal(shape), 0.0, 1.0 - 1e-9)
        # Each place keeps some parameters: often a single one causes the breach.
        kept = generator.random(shape) < 0.5
        changed = np.where(categorical, generator.random(shape), places)
        kept |= categorical & (generator.random(shape) > radius / 2)
        return np.asarray(np.where(kept, start, changed))

    def line_to(self, place: np.ndarray) -> np.ndarray:
        """Return places from the start to another, which is the last, with its categories."""
        steps = np.arange(1, self._n_steps)[:, None] / self._n_steps
        between = self._start + steps * (place - self._start)
        return np.vstack([np.where(self._categorical, place, between), place])

    def closest(
        self, places: np.ndarray, probabilities: np.ndarray, margin: float
    ) -> np.ndarray | None:
        """Return the place closest to the start that is below a share of the threshold."""
        admitted = probabilities <= margin * self._admission.threshold
        if not admitted.any():
            return None
        distances = np.linalg.norm(places - self._start, axis=1)
        return np.asarray(places[int(np.argmin(np.where(admitted, distances, np.inf)))])

    def breach_probabilities(self, places: np.ndarray) -> np.ndarray:
        points = [{**self._at(each), **self._fixed} for each in places]
        return self._admission.breach_probabilities(points)

    def admitted_point(self, place: np.ndarray | None) -> dict[str, Any] | None:
        if place is None:
            return None
        point = self._at(place)
        return point if self._admission.judge({**point, **self._fixed}).admitted else None

    def _place_of(self, point: Mapping[str, Any]) -> np.ndarray:
        return np.array(
            [search_space.position_of(each, point[name]) for name, each in self._free.items()]
        )

    def _at(self, place: np.ndarray) -> dict[str, Any]:
        moved = dict(self._point)
        for i, (name, distribution) in enumerate(self._free.items()):
            if place[i] != self._start[i]:
                moved[name] = search_space.value_at(distribution, float(place[i]))
        return moved
