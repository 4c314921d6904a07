"""Encodes hyperparameters as the columns of footprint models.

Every positive number enters by its logarithm, because resource use is close to a product of
powers of sizes, and each is scaled to [-1, 1] by the bounds of its distribution. A parameter that
a trial doesn't have (a conditional one) is 0, the middle, in all its columns.

Prior knowledge enters as the columns' weights: the larger a column, the more it is expected to
matter. Floats on a log scale are mostly rates and penalties, which hardly change what a trial
uses. All other positive numbers count as sizes. A column of their sum lets few trials learn what
their exponents have in common; weighting it by their ranges did not help. Times are expected to
rise with that sum; trials then correct the slope.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
import math
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)


# Values outside of the bounds (of a search space that changed) are clipped to this multiple.
_MAX_SCALED = 3.0
# Chosen with each of fourteen workloads left out in turn (benchmarks/footprint_constants.py). A
# weight of rates of 0.2 would be 1% likelier, but shares of rows or features are sometimes drawn
# on a log scale too.
_RATE_WEIGHT = 0.3
_SUM_WEIGHT = 1.0
# By how many deviations of its logarithm the sum of the sizes is expected to raise a time, chosen
# likewise. Least squares find 0.7 to 1.8 on all fourteen.
_SLOPE = 1.0
_MOST_EXACT = 2.0**53


@dataclass(frozen=True)
class NumericFeature:
    """One column: a number scaled to [-1, 1] by the widest bounds that it had.

    Its scale is ``"rate"`` for floats on a log scale, ``"log"`` for other positive numbers,
    ``"log1p"`` for counts from 0 on, else ``"linear"``.
    """

    name: str
    low: float
    high: float
    scale: str

    @property
    def width(self) -> int:
        return int(self.high > self.low)

    @property
    def is_size(self) -> bool:
        """Whether larger values are expected to use more resources."""
        return bool(self.width) and self.scale in ("log", "log1p")

    @property
    def weight(self) -> float:
        """How much the column is expected to matter, as a multiple of a typical one."""
        return _RATE_WEIGHT if self.scale == "rate" else 1.0

    def columns(self, value: Any) -> list[float]:
        """Return the scaled value, 0 if it is not a finite number."""
        if not self.width:
            return []
        number = _finite(value)
        if number is None:
            return [0.0]
        low, high = self._ends
        scaled = 2 * (self._transformed(number) - low) / (high - low) - 1
        return [min(max(scaled, -_MAX_SCALED), _MAX_SCALED)]

    @cached_property
    def _ends(self) -> tuple[float, float]:
        return self._transformed(self.low), self._transformed(self.high)

    def _transformed(self, value: float) -> float:
        if self.scale in ("log", "rate"):
            return math.log(max(value, self.low * 1e-3))
        return math.log1p(max(value, 0.0)) if self.scale == "log1p" else value

    def distribution(self) -> BaseDistribution:
        """Return a distribution of the same feature."""
        if self.scale == "log1p":
            return IntDistribution(int(self.low), int(self.high))
        whole = self.low.is_integer() and self.high.is_integer() and self.high < _MOST_EXACT
        if self.scale == "log" and whole:
            return IntDistribution(int(self.low), int(self.high), log=True)
        return FloatDistribution(self.low, self.high, log=self.scale == "rate")


@dataclass(frozen=True)
class CategoryFeature:
    """One column for two choices, else one for each choice: 1 where chosen, else -1."""

    name: str
    choices: tuple[Any, ...]
    is_size = False
    weight = 1.0

    @property
    def width(self) -> int:
        return {1: 0, 2: 1}.get(len(self.choices), len(self.choices))

    def columns(self, value: Any) -> list[float]:
        """Return the columns, all 0 for an unknown choice."""
        index = self._indices.get(_identity(value))
        if index is None:
            return [0.0] * self.width
        columns = [-1.0] * len(self.choices)
        columns[index] = 1.0
        return columns[: self.width]

    @cached_property
    def _indices(self) -> dict[Hashable, int]:
        return {_identity(choice): index for index, choice in enumerate(self.choices)}

    def distribution(self) -> BaseDistribution:
        """Return a distribution of the same feature."""
        return CategoricalDistribution(self.choices)


Feature = NumericFeature | CategoryFeature


@dataclass(frozen=True)
class Features:
    """All columns of a study: one feature per hyperparameter, sorted by name."""

    parts: tuple[Feature, ...]

    @classmethod
    def of(cls, spaces: Sequence[Mapping[str, BaseDistribution]]) -> Features:
        """Return the features that cover every distribution in any of the search spaces.

        Bounds and choices are merged, so a search space may change during a study. If a name was
        both a number and a category, the newest kind counts.
        """
        seen: dict[str, dict[Any, BaseDistribution]] = {}
        for space in spaces:
            for name, distribution in space.items():
                seen.setdefault(name, {})[id(distribution)] = distribution
        return cls(tuple(_feature(name, list(seen[name].values())) for name in sorted(seen)))

    @property
    def width(self) -> int:
        """Number of columns."""
        return sum(part.width for part in self.parts) + self._has_sum

    @property
    def _has_sum(self) -> bool:
        return sum(part.is_size for part in self.parts) > 1

    def encode(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return the weighted columns of points, shape ``(n_points, n_columns)``."""
        columns = self.scale(points)
        columns *= [part.weight for part in self.parts for _ in range(part.width)]
        if not self._has_sum:
            return columns
        is_size = np.array([part.is_size for part in self.parts for _ in range(part.width)])
        total = columns[:, is_size].sum(axis=1) / is_size.sum() ** 0.5
        return np.column_stack([columns, _SUM_WEIGHT * total])

    @property
    def slopes(self) -> np.ndarray:
        """By how many deviations each column is expected to raise the logarithm of a time."""
        sizes = [float(part.is_size) for part in self.parts for _ in range(part.width)]
        share = _SLOPE / max(sum(sizes), 1.0) ** 0.5
        return np.array([*(share * each for each in sizes), *[0.0] * self._has_sum])

    def scale(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return each parameter scaled to [-1, 1], without weights and sum."""
        columns = np.zeros((len(points), self.width - self._has_sum))
        for row, params in enumerate(points):
            values: list[float] = []
            for part in self.parts:
                if part.name in params:
                    values += part.columns(params[part.name])
                else:
                    values += [0.0] * part.width
            columns[row] = values
        return columns

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return a search space of the same features."""
        return {part.name: part.distribution() for part in self.parts}


def _feature(name: str, distributions: list[Any]) -> Feature:
    is_category = isinstance(distributions[-1], CategoricalDistribution)
    alike = [d for d in distributions if isinstance(d, CategoricalDistribution) == is_category]
    if not is_category:
        low, high = min(float(d.low) for d in alike), max(float(d.high) for d in alike)
        if low > 0 and isinstance(alike[-1], FloatDistribution) and alike[-1].log:
            return NumericFeature(name, low, high, "rate")
        return _numeric(name, low, high, is_int=isinstance(alike[-1], IntDistribution))
    by_identity: dict[Hashable, Any] = {}
    for choice in (choice for d in alike for choice in d.choices):
        by_identity.setdefault(_identity(choice), choice)
    choices = list(by_identity.values())
    # Sizes are often given as choices (batch size 16, 32, 64): their order is informative.
    if len(choices) > 2 and all(_finite(choice) is not None for choice in choices):
        numbers = [float(choice) for choice in choices]
        return _numeric(name, min(numbers), max(numbers), is_int=False)
    return CategoryFeature(name, tuple(choices))


def _numeric(name: str, low: float, high: float, *, is_int: bool) -> NumericFeature:
    if low > 0:
        return NumericFeature(name, low, high, "log")
    return NumericFeature(name, low, high, "log1p" if is_int and low == 0 else "linear")


def _finite(value: Any) -> float | None:
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _identity(choice: Any) -> Hashable:
    """Return a key that distinguishes a choice from others.

    True == 1 in Python, but they are two choices. JSON can't keep inf and NaN (which does not
    equal itself), so such choices are told apart by their text.
    """
    if isinstance(choice, str) or not is_scalar(choice):
        return str, _as_text(choice)
    return isinstance(choice, bool), choice


def is_scalar(value: Any) -> bool:
    if isinstance(value, (float, np.floating)):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str, np.generic))


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return repr(value.item() if isinstance(value, np.generic) else value)
