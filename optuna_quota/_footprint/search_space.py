"""Points of a search space: values by quantile, smaller ranges, completions of partial points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any, TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


_MAX_COMPLETIONS = 16


def latin_hypercube(n_points: int, n_columns: int, generator: np.random.Generator) -> np.ndarray:
    """Return a Latin hypercube sample, shape ``(n_points, n_columns)``."""
    strata = generator.permuted(np.tile(np.arange(n_points), (n_columns, 1)), axis=1).T
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
    """Return the quantile ``u`` of a distribution."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        n = len(distribution.choices)
        return distribution.choices[min(int(u * n), n - 1)]
    if isinstance(distribution, IntDistribution):
        return _integer_at(distribution, u)
    if not isinstance(distribution, FloatDistribution):
        raise TypeError(f"`distribution` must be one of Optuna's but got {distribution!r}.")
    low, high = distribution.low, distribution.high
    if distribution.step is not None:
        n = round((high - low) / distribution.step) + 1
        return min(low + distribution.step * min(int(u * n), n - 1), high)
    if distribution.log:
        return min(max(low * (high / low) ** u, low), high)
    return low + u * (high - low)


def _integer_at(distribution: Any, u: float) -> int:
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log:
        start, end = math.log(low - 0.5), math.log(high + 0.5)
        return int(min(max(round(math.exp(start + u * (end - start))), low), high))
    n = (high - low) // step + 1
    return int(low + step * min(int(u * n), n - 1))


def narrow(distribution: BaseDistribution, share: float, *, upper: bool) -> BaseDistribution:
    """Return a distribution with ``share`` of its range, cut at the upper end or the lower.

    A categorical distribution and one of a single value are returned unchanged.
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
    """Return the quantile at which a value lies, the inverse of :func:`value_at`."""
    from optuna.distributions import CategoricalDistribution

    found: Any = distribution
    if isinstance(distribution, CategoricalDistribution):
        n = len(distribution.choices)
        return float((distribution.to_internal_repr(value) + 0.5) / n)
    if found.log:
        # Half a step around integers, as in `value_at`.
        half = 0.5 if isinstance(value, int) else 0.0
        low, high = math.log(found.low - half), math.log(found.high + half)
        return float((math.log(value) - low) / (high - low))
    if found.step is not None:
        n = round((found.high - found.low) / found.step) + 1
        return float((round((value - found.low) / found.step) + 0.5) / n)
    return float((value - found.low) / (found.high - found.low))


def spaced_values(distribution: BaseDistribution, count: int = 9) -> list[Any]:
    """Return evenly spaced values of a distribution, or all its choices."""
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [value_at(distribution, i / (count - 1)) for i in range(count)]


def likely_completions(
    known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return complete points that a partial one may become, itself if nothing is missing.

    A conditional parameter exists only with certain choices, so the missing parameters are those
    of earlier trials with the same choices.

    Args:
        known: Parameters drawn so far.
        past: Points of earlier trials, oldest first; the newest are used first.
    """
    found: list[Mapping[str, Any]] = []
    for params in reversed(past):
        if not _same_choices(known, params):
            continue
        missing = {name: value for name, value in params.items() if name not in known}
        if not missing:
            # A trial with the same choices had no other parameters.
            return [*found, known]
        found.append({**missing, **known})
        if len(found) >= _MAX_COMPLETIONS:
            break
    return found or [known]


def certain_completions(
    known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return complete points that a partial one may become, none if that is uncertain.

    Stricter than :func:`likely_completions`: a point is complete if a completed trial had the same
    parameters and choices. An integer counts as a choice if it always went with the same
    parameters, such as a number of layers that have a width each.

    Args:
        known: Parameters drawn so far.
        past: Points of completed trials, oldest first; the newest are used first.
    """
    choices = _integer_choices(known, past)
    found: list[Mapping[str, Any]] = []
    for params in reversed(past):
        if not known.keys() <= params.keys() or not _same_choices(known, params):
            continue
        if any(known[name] != params[name] for name in choices):
            continue
        if len(params) == len(known):
            return [*found, known]
        found.append({**params, **known})
        if len(found) >= _MAX_COMPLETIONS:
            break
    return found


def _integer_choices(known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the integers that may decide which parameters there are.

    One that had two values with the same parameters does not.
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


def _same_choices(known: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    return all(
        value == known[name]
        for name, value in params.items()
        if name in known and isinstance(value, (str, bool))
    )
