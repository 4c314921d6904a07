"""The admitted point nearest to one that was refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._models.spaces import place_of
from optuna_quota._models.spaces import value_at
from optuna_quota._sampler.gate import Gate


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


_RADII = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
_TRIES = 48


def nearest_admitted(
    gate: Gate,
    point: Mapping[str, Any],
    space: Mapping[str, BaseDistribution],
    fixed: Mapping[str, Any],
    generator: np.random.Generator,
) -> dict[str, Any] | None:
    """Return the nearest point found that may run, None when there is none around.

    Points are tried at random in growing distance, each parameter on the scale of its
    distribution; one that breaches least likely within the smallest distance is not better than
    one that is closer, so distance alone decides among those that may run.

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
    start = np.array([place_of(each, point[name]) for name, each in free.items()])
    whole = np.array([_is_category(each) for each in free.values()])
    for radius in _RADII:
        places = _around(start, whole, radius, generator)
        tried = [_moved(point, free, start, each) for each in places]
        admitted = gate.chances([{**each, **fixed} for each in tried]) <= gate.threshold
        if admitted.any():
            away = np.linalg.norm(places - start, axis=1)
            best = int(np.argmin(np.where(admitted, away, np.inf)))
            if gate.judge({**tried[best], **fixed}).admitted:
                return tried[best]
    return None


def _around(
    start: np.ndarray, whole: np.ndarray, radius: float, generator: np.random.Generator
) -> np.ndarray:
    """Return places around a start in the unit cube; a category changes or stays."""
    shape = (_TRIES, len(start))
    places = np.clip(start + radius * generator.standard_normal(shape), 0.0, 1.0 - 1e-9)
    # Of each try, some parameters stay: what costs most is often one of them alone.
    stays = generator.random(shape) < 0.5
    other = generator.random(shape)
    changed = np.where(whole, other, places)
    stays |= whole & (generator.random(shape) > radius / 2)
    return np.asarray(np.where(stays, start, changed))


def _moved(
    point: Mapping[str, Any],
    free: Mapping[str, BaseDistribution],
    start: np.ndarray,
    place: np.ndarray,
) -> dict[str, Any]:
    moved = dict(point)
    for (name, distribution), before, after in zip(free.items(), start, place, strict=True):
        if before != after:
            moved[name] = value_at(distribution, float(after))
    return moved


def _is_category(distribution: BaseDistribution) -> bool:
    from optuna.distributions import CategoricalDistribution

    return isinstance(distribution, CategoricalDistribution)
