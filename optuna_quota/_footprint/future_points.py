"""Simulates the points of the next trials from those of the trials so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TYPE_CHECKING

import numpy as np

from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.search_space import latin_hypercube, position_of, value_at


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


# Share of an adaptive sampler's points that are still spread over the whole space.
_UNIFORM_SHARE = 0.3
_N_RECENT = 20
# Standard deviation around a recent point, as a share of each parameter's range.
_LOCAL_SD = 0.1
_N_POINTS = 128


def simulate_future_points(
    observations: Sequence[Observation], n_trials: int, *, adaptive: bool
) -> list[Mapping[str, Any]]:
    """Return a sample of the points of the next trials.

    Its size is never ``n_trials``: a projection would take it for the exact points.
    """
    count = _N_POINTS + (n_trials == _N_POINTS)
    return draw_future_points(observations, count, adaptive=adaptive)


def draw_future_points(
    observations: Sequence[Observation], count: int, *, adaptive: bool, seed: int = 0
) -> list[Mapping[str, Any]]:
    """Return points such as a sampler will draw.

    Each follows an earlier trial, so that conditional parameters come with the choices that they
    depend on: an adaptive sampler stays around its newest points, others draw from the whole
    range, the choices first.

    Args:
        observations: Earlier trials, oldest first.
        count: Number of points.
        adaptive: Whether the sampler learns from its trials.
        seed: Of the random draws.
    """
    generator = np.random.default_rng([seed, 5])
    recent = observations[-_N_RECENT:]
    names = sorted({name for row in observations for name in row.distributions})
    branches = _Branches(observations)
    # Evenly spread, so that the most expensive corner comes as often as it should.
    places = latin_hypercube(count, len(names) + 2, generator)
    points = []
    for place in places:
        by_name = dict(zip(names, place[2:].tolist(), strict=True))
        if adaptive and place[0] > _UNIFORM_SHARE:
            points.append(_around(recent[int(place[1] * len(recent))], generator))
        else:
            points.append(branches.draw(float(place[1]), by_name))
    return points


class _Branches:
    """A tree of the choices on which conditional parameters depend.

    Args:
        rows: Trials with the same choices ``decided``.
        decided: Names of the choices.
    """

    def __init__(self, rows: Sequence[Observation], decided: frozenset[str] = frozenset()) -> None:
        self._rows = rows
        self._decided = decided
        self._shapes = {frozenset(row.distributions) for row in rows}
        self._deciding, self._parts = self._split()

    def _split(self) -> tuple[str | None, dict[str, _Branches]]:
        """Return the choice that decides most parameters, and the branch of each of its values."""
        if len(self._shapes) == 1:
            return None, {}
        found: list[tuple[int, str, dict[str, list[Observation]]]] = []
        for name in sorted(frozenset.intersection(*self._shapes) - self._decided):
            if not _is_choice(self._rows[-1].distributions[name]):
                continue
            alike: dict[str, list[Observation]] = {}
            for row in self._rows:
                alike.setdefault(repr(row.params[name]), []).append(row)
            shapes = {(v, frozenset(row.distributions)) for v in alike for row in alike[v]}
            found.append((len(shapes), name, alike))
        if not found:
            return None, {}
        _, name, alike = min(found, key=lambda each: each[:2])
        decided = self._decided | {name}
        return name, {value: _Branches(rows, decided) for value, rows in alike.items()}

    def draw(self, pick: float, places: Mapping[str, float]) -> Mapping[str, Any]:
        """Return a point anywhere in the space.

        A choice on which other parameters depend is drawn from its distribution, not as often as
        it came, if any trial shows the parameters that go with it.

        Args:
            pick: Which of the trials with the same choices to follow, from 0 to 1.
            places: The quantile of each parameter, from 0 to 1.
        """
        if self._deciding is not None:
            distribution = self._rows[-1].distributions[self._deciding]
            part = self._parts.get(repr(value_at(distribution, places[self._deciding])))
            if part is not None:
                return part.draw(pick, places)
        row = self._rows[int(pick * len(self._rows))]
        point = dict(row.params)
        # If no parameter depends on another any more, the other choices are drawn too.
        free = len(self._shapes) == 1
        for name, distribution in row.distributions.items() if free else _numbers(row):
            if name not in self._decided:
                point[name] = value_at(distribution, places[name])
        return point


def _around(row: Observation, generator: np.random.Generator) -> Mapping[str, Any]:
    """Return a point with the choices of a trial and similar numbers."""
    point = dict(row.params)
    for name, distribution in _numbers(row):
        place = position_of(distribution, point[name]) + _LOCAL_SD * generator.standard_normal()
        point[name] = value_at(distribution, float(np.clip(place, 0.0, 1.0)))
    return point


def _numbers(row: Observation) -> Iterator[tuple[str, BaseDistribution]]:
    for name, distribution in row.distributions.items():
        if not _is_choice(distribution) and not distribution.single():
            yield name, distribution


def _is_choice(distribution: BaseDistribution) -> bool:
    from optuna.distributions import CategoricalDistribution

    return isinstance(distribution, CategoricalDistribution)
