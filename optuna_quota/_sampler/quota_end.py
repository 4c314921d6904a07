"""What points need of totals as these run out: their median usage with a margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from optuna_quota._footprint.footprint import BaseFootprint, Footprint
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.user_given import CalibratedFootprint, UserFootprint


# Of the median: at least, and at most for a footprint that is uncertain.
_MARGIN = 1.03
_MOST = 1.25
# Recent trials by which the margin is computed.
_N_RECENT = 8


@dataclass(frozen=True)
class Margins:
    """What a point needs beyond its median, so that it is hardly ever terminated.

    Attributes:
        factors: Multiples of the median, by resource.
        extras: Amounts to add, by resource, such as the time that each trial takes to start.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    extras: Mapping[str, float] = field(default_factory=dict)

    def need(self, name: str, median: float) -> float:
        """Return what a point needs of a resource."""
        return self.factors.get(name, _MARGIN) * median + self.extras.get(name, 0.0)

    def within(self, left: Mapping[str, float]) -> dict[str, float]:
        """Return the highest medians whose needs are within what is left; all positive."""
        rest = {name: amount - self.extras.get(name, 0.0) for name, amount in left.items()}
        return {n: max(each / self.factors.get(n, _MARGIN), 1e-9) for n, each in rest.items()}


def margins_of(expected: BaseFootprint, rows: Sequence[Observation]) -> Margins:
    """Return the margins of a footprint by what recent trials used.

    A user's function does not say how uncertain it is: what trials used beyond it is added.

    Args:
        expected: The footprint.
        rows: Trials of the study that completed, oldest first.
    """
    recent = []
    for row in rows[-_N_RECENT:]:
        with contextlib.suppress(KeyError):  # a function that fails for this point
            recent.append((row.usage.amounts(), expected.intervals(row.params)))
    if isinstance(expected, UserFootprint):
        extras: dict[str, float] = {}
        for used, stated in recent:
            for name in used.keys() & stated.keys():
                extras[name] = max(extras.get(name, 0.0), used[name] - stated[name].median)
        return Margins(extras=extras)
    ratios: dict[str, list[float]] = {}
    for _, intervals in recent:
        for name, each in intervals.items():
            ratios.setdefault(name, []).append(each.upper / max(each.median, 1e-9))
    return Margins({n: float(np.clip(np.median(r), _MARGIN, _MOST)) for n, r in ratios.items()})


def medians(expected: BaseFootprint, points: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return the median usage at points, by resource, shape ``(n_points,)``."""
    if isinstance(expected, (Footprint, CalibratedFootprint)):
        return {name: each.quantile(0.5) for name, each in expected.expected(points).items()}
    rows = [expected.intervals(point) for point in points]
    names = {name for row in rows for name in row}
    return {n: np.array([row[n].median if n in row else 0.0 for row in rows]) for n in names}
