"""Points of a search space: by quantile, completions of partial points, and future points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import copy
import math
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from optuna_quota._footprint.observations import Observation


_MAX_COMPLETIONS = 16
# Share of an adaptive sampler's points that are spread over the whole space.
_UNIFORM_SHARE = 0.3
_N_RECENT = 20
# Standard deviation around a recent point, as a share of each parameter's range.
_LOCAL_SD = 0.1
_N_POINTS = 128


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
    found: Any = distribution
    if isinstance(distribution, CategoricalDistribution):
        return float((distribution.to_internal_repr(value) + 0.5) / len(found.choices))
    if found.log:
        # Half a step around integers, as in `value_at`.
        half = 0.5 if isinstance(value, int) else 0.0
        low, high = math.log(found.low - half), math.log(found.high + half)
        return float((math.log(value) - low) / (high - low))
    if found.step is not None:
        n = round((found.high - found.low) / found.step) + 1
        return float((round((value - found.low) / found.step) + 0.5) / n)
    return float((value - found.low) / (found.high - found.low))


def spaced_values(distribution: BaseDistribution) -> list[Any]:
    """Return nine evenly spaced values of a distribution, or all its choices."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [value_at(distribution, i / 8) for i in range(9)]


def likely_completions(
    known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return likely completions of a partial point; the point itself if it is complete.

    A conditional parameter exists only with certain choices, so the missing parameters are those
    of earlier trials with the same choices, the newest (last of ``past``) first.
    """
    alike = (params for params in reversed(past) if _same_choices(known, params))
    return _completions(known, alike) or [known]


def certain_completions(
    known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return all completions of a partial point, none if uncertain.

    Stricter than :func:`likely_completions`: a point is complete if a completed trial had the same
    parameters and choices. An integer counts as a choice if it always went with the same
    parameters, such as a number of layers that have a width each.
    """
    choices = _integer_choices(known, past)
    return _completions(
        known,
        (
            params
            for params in reversed(past)
            if known.keys() <= params.keys()
            and _same_choices(known, params)
            and all(known[name] == params[name] for name in choices)
        ),
    )


def _completions(
    known: Mapping[str, Any], alike: Iterable[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for params in alike:
        point = {**params, **known}
        found.append(point)
        # Later parameters don't matter if this trial had no others.
        if len(point) == len(known) or len(found) >= _MAX_COMPLETIONS:
            break
    return found


def _integer_choices(known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the integers that may decide which other parameters exist.

    An integer with two values for the same parameters does not.
    """
    integers = [n for n, v in known.items() if isinstance(v, int) and not isinstance(v, bool)]
    values: dict[tuple[str, frozenset[str]], set[str]] = {}
    for params in past:
        names = frozenset(params)
        for name in names.intersection(integers):
            # A choice may not be hashable.
            values.setdefault((name, names), set()).add(repr(params[name]))
    free = {name for (name, _), seen in values.items() if len(seen) > 1}
    return [name for name in integers if name not in free]


def _same_choices(known: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    return all(
        value == known[name]
        for name, value in params.items()
        if name in known and isinstance(value, (str, bool))
    )


def simulate_future_points(
    observations: Sequence[Observation], n_trials: int, *, adaptive: bool
) -> list[Mapping[str, Any]]:
    """Return a sample of the points of the next trials.

    Its size is never ``n_trials``, as a projection would run each point exactly once.
    """
    count = _N_POINTS + (n_trials == _N_POINTS)
    return draw_future_points(observations, count, adaptive=adaptive)


def draw_future_points(
    observations: Sequence[Observation], count: int, *, adaptive: bool
) -> list[Mapping[str, Any]]:
    """Return points such as a sampler will draw.

    Each follows an earlier trial, so that conditional parameters come with the choices that they
    depend on: an ``adaptive`` sampler stays around its newest points (last of the observations),
    others draw from the whole range, the choices first.
    """
    generator = np.random.default_rng([0, 5])
    recent = observations[-_N_RECENT:]
    names = sorted({name for row in observations for name in row.distributions})
    branches = _Branches(observations)
    # Evenly spread, so that the most expensive corner is drawn as often as expected.
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
    """A tree of the choices that conditional parameters depend on."""

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
            if not isinstance(self._rows[-1].distributions[name], CategoricalDistribution):
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
        it came, if any trial shows the parameters that go with it. ``pick`` is the quantile of the
        trial to follow, ``places`` those of the parameters.
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
    point = dict(row.params)
    for name, distribution in _numbers(row):
        place = position_of(distribution, point[name]) + _LOCAL_SD * generator.standard_normal()
        point[name] = value_at(distribution, float(np.clip(place, 0.0, 1.0)))
    return point


def _numbers(row: Observation) -> Iterator[tuple[str, BaseDistribution]]:
    for name, distribution in row.distributions.items():
        if not isinstance(distribution, CategoricalDistribution) and not distribution.single():
            yield name, distribution
