"""Where a study is going next, from where it has been."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._models.rows import FootprintRow
from optuna_quota._models.spaces import latin_hypercube
from optuna_quota._models.spaces import place_of
from optuna_quota._models.spaces import value_at


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


# Of an adaptive sampler's points, this share is still spread over the whole space.
_SPREAD = 0.3
_RECENT = 20
# Deviation around a recent point, as a share of each parameter's range.
_AROUND = 0.1


def next_points(
    rows: Sequence[FootprintRow], count: int, *, adaptive: bool, seed: int = 0
) -> list[Mapping[str, Any]]:
    """Return points like those that a sampler will draw.

    Each follows an earlier trial, so that conditional parameters come with the choices that they
    hang on: an adaptive sampler stays around its newest points, others draw anew over the whole
    range.

    Args:
        rows: Earlier trials, oldest first.
        count: How many.
        adaptive: Whether the sampler learns where to go.
        seed: Of the random draws.
    """
    generator = np.random.default_rng([seed, 5])
    recent = rows[-_RECENT:]
    names = sorted({name for row in rows for name in row.distributions})
    # Where no parameter hangs on another, choices are drawn anew too.
    free = all(len(row.distributions) == len(names) for row in rows)
    # Evenly spread, so that the dearest corner is there as often as it should be.
    places = latin_hypercube(count, len(names) + 2, generator)
    points = []
    for place in places:
        stays = adaptive and place[0] > _SPREAD
        among = recent if stays else rows
        row = among[int(place[1] * len(among))]
        by_name = dict(zip(names, place[2:].tolist(), strict=True))
        points.append(_around(row, generator) if stays else _anew(row, by_name, free=free))
    return points


def _anew(row: FootprintRow, places: Mapping[str, float], *, free: bool) -> Mapping[str, Any]:
    """Return a point anywhere, with the choices of a row unless they are free too."""
    point = dict(row.params)
    for name, distribution in row.distributions.items() if free else _numbers(row):
        point[name] = value_at(distribution, places[name])
    return point


def _around(row: FootprintRow, generator: np.random.Generator) -> Mapping[str, Any]:
    """Return a point with the choices of a row and its numbers close by."""
    point = dict(row.params)
    for name, distribution in _numbers(row):
        place = place_of(distribution, point[name]) + _AROUND * generator.standard_normal()
        point[name] = value_at(distribution, float(np.clip(place, 0.0, 1.0)))
    return point


def _numbers(row: FootprintRow) -> Iterator[tuple[str, BaseDistribution]]:
    from optuna.distributions import CategoricalDistribution

    for name, distribution in row.distributions.items():
        if not isinstance(distribution, CategoricalDistribution) and not distribution.single():
            yield name, distribution
