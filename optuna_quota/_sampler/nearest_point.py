"""The admitted point nearest to one that was refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._footprint.search_space import position_of
from optuna_quota._footprint.search_space import value_at
from optuna_quota._sampler.admission import Gate


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


_RADII = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
_TRIES = 48
_STEPS = 16
# Of the threshold: what a point that stands in for another may breach with.
_SURE = 0.5


def nearest_admitted(
    gate: Gate,
    point: Mapping[str, Any],
    space: Mapping[str, BaseDistribution],
    fixed: Mapping[str, Any],
    generator: np.random.Generator,
) -> dict[str, Any] | None:
    """Return the nearest point found that may run, None when there is none around.

    Points are tried at random in growing distance, each parameter on the scale of its
    distribution, and then on the way to the nearest of them that may run. The nearest of all lie
    at the threshold and would breach as often as it allows; so one that breaches half as likely
    is taken where there is any.

    Args:
        gate: What decides.
        point: The point that was refused.
        space: The parameters that may be changed.
        fixed: Parameters that are given.
        generator: Of the random tries.
    """
    free = {n: d for n, d in space.items() if n in point and n not in fixed and not d.single()}
    if not free:
        return None
    search = _Search(gate, point, free, fixed)
    edge = None
    for radius in _RADII:
        places = search.around(radius, generator)
        chances = search.chances(places)
        sure = search.closest(places, chances <= _SURE * gate.threshold)
        if sure is not None:
            way = search.way_to(sure)
            first = int(np.argmax(search.chances(way) <= _SURE * gate.threshold))
            found = search.admitted(way[first])
            if found is not None:
                return found
        if edge is None:
            near = search.closest(places, chances <= gate.threshold)
            edge = None if near is None else search.admitted(near)
    return edge


class _Search:
    """Points around a refused one, by their places in the unit cube of what may be changed."""

    def __init__(
        self,
        gate: Gate,
        point: Mapping[str, Any],
        free: Mapping[str, BaseDistribution],
        fixed: Mapping[str, Any],
    ) -> None:
        self._gate, self._point, self._free, self._fixed = gate, point, free, fixed
        self._start = np.array([position_of(each, point[name]) for name, each in free.items()])
        self._whole = np.array([_is_category(each) for each in free.values()])

    def around(self, radius: float, generator: np.random.Generator) -> np.ndarray:
        """Return places around the start; a category changes or stays."""
        start, whole = self._start, self._whole
        shape = (_TRIES, len(start))
        places = np.clip(start + radius * generator.standard_normal(shape), 0.0, 1.0 - 1e-9)
        # Of each try, some parameters stay: what costs most is often one of them alone.
        stays = generator.random(shape) < 0.5
        other = generator.random(shape)
        changed = np.where(whole, other, places)
        stays |= whole & (generator.random(shape) > radius / 2)
        return np.asarray(np.where(stays, start, changed))

    def way_to(self, place: np.ndarray) -> np.ndarray:
        """Return places from the start to another, which is the last, with its categories."""
        steps = np.arange(1, _STEPS)[:, None] / _STEPS
        between = np.where(self._whole, place, self._start + steps * (place - self._start))
        return np.vstack([between, place])

    def closest(self, places: np.ndarray, among: np.ndarray) -> np.ndarray | None:
        """Return the place closest to the start of those that are marked."""
        if not among.any():
            return None
        away = np.linalg.norm(places - self._start, axis=1)
        return np.asarray(places[int(np.argmin(np.where(among, away, np.inf)))])

    def chances(self, places: np.ndarray) -> np.ndarray:
        """Return the probability of a breach at each place."""
        return self._gate.chances([{**self._at(each), **self._fixed} for each in places])

    def admitted(self, place: np.ndarray) -> dict[str, Any] | None:
        """Return the point at a place, None where it may not run."""
        point = self._at(place)
        return point if self._gate.judge({**point, **self._fixed}).admitted else None

    def _at(self, place: np.ndarray) -> dict[str, Any]:
        moved = dict(self._point)
        for i, (name, distribution) in enumerate(self._free.items()):
            if place[i] != self._start[i]:
                moved[name] = value_at(distribution, float(place[i]))
        return moved


def _is_category(distribution: BaseDistribution) -> bool:
    from optuna.distributions import CategoricalDistribution

    return isinstance(distribution, CategoricalDistribution)
