"""Finds the admitted point nearest to a refused one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import itertools
from typing import Any, TYPE_CHECKING

import numpy as np

from optuna_quota._footprint.search_space import position_of, value_at
from optuna_quota._footprint.user_given import count_within
from optuna_quota._sampler.admission import PointAdmission


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


_RADII = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
_POINTS_PER_RADIUS = 48
_LINE_STEPS = 16
# For a search with a user's function that is slow: fewer points are tried then.
_SECONDS = 2.0
# Share of the threshold that a replacement should stay under.
_MARGIN = 0.5


def nearest_admitted(
    admission: PointAdmission,
    point: Mapping[str, Any],
    space: Mapping[str, BaseDistribution],
    fixed: Mapping[str, Any],
    generator: np.random.Generator,
) -> dict[str, Any] | None:
    """Return the nearest admitted point that a random search finds, None if it finds none.

    Random points are tried at growing distances, each parameter on the scale of its distribution,
    then the line to the nearest admitted one. The nearest points of all are at the threshold and
    would breach as often as it allows, so one at half of it is preferred.

    Args:
        admission: Decides which points may run.
        point: The refused point.
        space: The parameters that may change.
        fixed: Parameters with a given value.
        generator: For the random search.
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
    """Points around a refused one, as places in the unit cube of the free parameters."""

    def __init__(
        self,
        admission: PointAdmission,
        point: Mapping[str, Any],
        free: Mapping[str, BaseDistribution],
        fixed: Mapping[str, Any],
    ) -> None:
        from optuna.distributions import CategoricalDistribution

        self._admission, self._point, self._free, self._fixed = admission, point, free, fixed
        self._start = self._place_of(point)
        self._categorical = np.array(
            [isinstance(each, CategoricalDistribution) for each in free.values()]
        )
        affordable = count_within(admission.expected, _SECONDS)
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
        return np.array([position_of(each, point[name]) for name, each in self._free.items()])

    def _at(self, place: np.ndarray) -> dict[str, Any]:
        moved = dict(self._point)
        for i, (name, distribution) in enumerate(self._free.items()):
            if place[i] != self._start[i]:
                moved[name] = value_at(distribution, float(place[i]))
        return moved
