"""Points of a search space, drawn as its distributions say, and smaller ranges of it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def latin_hypercube(n_points: int, n_columns: int, generator: np.random.Generator) -> np.ndarray:
    """Return points of the unit cube with each column's strata hit once."""
    places = np.tile(np.arange(n_points), (n_columns, 1))
    strata = generator.permuted(places, axis=1).T
    return np.asarray((strata + generator.random((n_points, n_columns))) / max(n_points, 1))


def points_from_unit_cube(
    space: Mapping[str, BaseDistribution], unit: np.ndarray
) -> Sequence[Mapping[str, Any]]:
    """Return points of a search space from points of the unit cube, one column a parameter."""
    names = list(space)
    return [
        {name: value_at(space[name], float(u)) for name, u in zip(names, row, strict=True)}
        for row in unit
    ]


def value_at(distribution: BaseDistribution, u: float) -> Any:
    """Return the value below which a share ``u`` of a distribution lies."""
    from optuna.distributions import CategoricalDistribution
    from optuna.distributions import FloatDistribution
    from optuna.distributions import IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        n = len(distribution.choices)
        return distribution.choices[min(int(u * n), n - 1)]
    if isinstance(distribution, IntDistribution):
        return _whole(distribution, u)
    if not isinstance(distribution, FloatDistribution):
        raise TypeError(f"Distribution {distribution!r} is not known.")
    low, high = distribution.low, distribution.high
    if distribution.step is not None:
        n = round((high - low) / distribution.step) + 1
        return min(low + distribution.step * min(int(u * n), n - 1), high)
    if distribution.log:
        return min(max(low * (high / low) ** u, low), high)
    return low + u * (high - low)


def _whole(distribution: Any, u: float) -> int:
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log:
        start, end = math.log(low - 0.5), math.log(high + 0.5)
        return int(min(max(round(math.exp(start + u * (end - start))), low), high))
    n = (high - low) // step + 1
    return int(low + step * min(int(u * n), n - 1))


def narrow(distribution: BaseDistribution, share: float, *, upper: bool) -> BaseDistribution:
    """Return a distribution with ``share`` of its range kept, the upper end cut off or the lower.

    A categorical distribution and one of a single value are returned as they are.
    """
    import copy

    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution) or distribution.single():
        return distribution
    smaller: Any = copy.copy(distribution)
    if upper:
        smaller.high = value_at(distribution, share)
    else:
        smaller.low = value_at(distribution, 1 - share)
    return smaller  # type: ignore[no-any-return]  # a copy is of the same class


def position_of(distribution: BaseDistribution, value: Any) -> float:
    """Return the share of a distribution that lies below a value: :func:`value_at` undone."""
    from optuna.distributions import CategoricalDistribution

    found: Any = distribution
    if isinstance(distribution, CategoricalDistribution):
        n = len(distribution.choices)
        return float((distribution.to_internal_repr(value) + 0.5) / n)
    if found.log:
        # Half a step around whole numbers, as in `value_at`.
        half = 0.5 if isinstance(value, int) else 0.0
        low, high = math.log(found.low - half), math.log(found.high + half)
        return float((math.log(value) - low) / (high - low))
    if found.step is not None:
        n = round((found.high - found.low) / found.step) + 1
        return float((round((value - found.low) / found.step) + 0.5) / n)
    return float((value - found.low) / (found.high - found.low))


def spaced_values(distribution: BaseDistribution, count: int = 9) -> list[Any]:
    """Return some values from one end of a distribution to the other, or all its choices."""
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [value_at(distribution, i / (count - 1)) for i in range(count)]


_MOST = 16


def likely_completions(
    known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return points that a half-drawn one may become, itself when nothing is missing.

    A conditional parameter exists only beside certain choices, so that only earlier trials that
    made the same choices tell what is still to be drawn.

    Args:
        known: Parameters drawn so far.
        past: Points of earlier trials; the newest are asked first.
    """
    found: list[Mapping[str, Any]] = []
    for params in reversed(past):
        if not _agrees(known, params):
            continue
        missing = {name: value for name, value in params.items() if name not in known}
        if not missing:
            # One that made the same choices had no more parameters than these.
            return [known] if not found else [*found, known]
        found.append({**missing, **known})
        if len(found) >= _MOST:
            break
    return found or [known]


def certain_completions(
    known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return whole points that a half-drawn one may become; none where that is unknown.

    Stricter than :func:`likely_completions`: a point is whole when a completed trial had the same
    parameters and made the same choices. A whole number counts as a choice where it always went
    with the same parameters, such as a number of layers that have a width each.

    Args:
        known: Parameters drawn so far.
        past: Points of trials that completed; the newest are asked first.
    """
    choices = _whole_number_choices(known, past)
    found: list[Mapping[str, Any]] = []
    for params in reversed(past):
        if not known.keys() <= params.keys() or not _agrees(known, params):
            continue
        if any(known[name] != params[name] for name in choices):
            continue
        if len(params) == len(known):
            return [*found, known]
        found.append({**params, **known})
        if len(found) >= _MOST:
            break
    return found


def _whole_number_choices(
    known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return the whole numbers that may decide which parameters there are.

    That one does not is known once it had two values beside the same parameters.
    """
    values: dict[tuple[str, frozenset[str]], set[Any]] = {}
    for params in past:
        names = frozenset(params)
        for name in known.keys() & names:
            values.setdefault((name, names), set()).add(params[name])
    free = {name for (name, _), seen in values.items() if len(seen) > 1}
    return [
        name
        for name, value in known.items()
        if isinstance(value, int) and not isinstance(value, bool) and name not in free
    ]


def _agrees(known: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    return all(
        value == known[name]
        for name, value in params.items()
        if name in known and isinstance(value, (str, bool))
    )
