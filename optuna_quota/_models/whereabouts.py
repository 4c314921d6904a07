"""Where a study is going next, from where it has been."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from optuna_quota._models.rows import FootprintRow
from optuna_quota._models.spaces import place_of
from optuna_quota._models.spaces import value_at


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
    points = []
    for _ in range(count):
        stays = adaptive and generator.random() > _SPREAD
        among = recent if stays else rows
        row = among[int(generator.integers(len(among)))]
        points.append(_like(row, _AROUND if stays else None, generator))
    return points


def _like(
    row: FootprintRow, around: float | None, generator: np.random.Generator
) -> Mapping[str, Any]:
    from optuna.distributions import CategoricalDistribution

    point = dict(row.params)
    for name, distribution in row.distributions.items():
        if isinstance(distribution, CategoricalDistribution) or distribution.single():
            continue
        place = float(generator.random())
        if around is not None:
            place = place_of(distribution, point[name]) + around * generator.standard_normal()
        point[name] = value_at(distribution, float(np.clip(place, 0.0, 1.0)))
    return point
