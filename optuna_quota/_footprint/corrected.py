"""A footprint that a user states as a function, corrected by what the study's trials showed.

A formula knows what trials will cost in regions where none has been, and is often off by a factor:
another machine, a library's own memory. So what is learned is ``log(used / stated)``, a footprint
of its own; where a resource is foretold better without the statement, it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._footprint.chained_model import chain_density
from optuna_quota._footprint.chained_model import ChainedModel
from optuna_quota._footprint.chained_model import direct_density
from optuna_quota._footprint.footprint import Footprint
from optuna_quota._footprint.footprint import interval_table
from optuna_quota._footprint.footprint import joint_breach
from optuna_quota._footprint.given import GivenFootprint
from optuna_quota._footprint.predictive import Predictive
from optuna_quota._footprint.rows import FootprintRow
from optuna_quota._records import Interval
from optuna_quota._resources import Limits
from optuna_quota._resources import Usage
from optuna_quota._resources import USAGE_RESOURCES


if TYPE_CHECKING:
    from pandas import DataFrame

    from optuna_quota._footprint.fitting import Model


# As log density: few trials tell the two apart badly, and a statement deserves some trust.
_BENEFIT = 3.0


class Correction:
    """Corrects a stated footprint as a study goes on.

    Args:
        given: What the user stated.
    """

    def __init__(self, given: GivenFootprint) -> None:
        self._given = given
        self._learned: Footprint | None = None
        self._ratios: Footprint | None = None

    def after(self, learned: Footprint, rows: Sequence[FootprintRow]) -> CorrectedFootprint:
        """Return the footprint after all trials; it is fitted anew when ``learned`` was.

        Args:
            learned: What the trials show without the statement.
            rows: What was measured, oldest first.
        """
        if self._ratios is None or learned is not self._learned:
            # Others may have ended before all that the function needs was drawn.
            names = {frozenset(row.params) for row in rows if row.whole}
            whole = (row for row in rows if frozenset(row.params) in names)
            ratios = [found for row in whole if (found := _over(row, self._given)) is not None]
            self._ratios = Footprint.fit(ratios, confidence=learned.confidence, start=self._ratios)
            self._learned = learned
        return CorrectedFootprint(self._given, self._ratios, learned)


class CorrectedFootprint:
    """What a user states of a point, times what trials used more or less than was stated.

    Args:
        given: What the user stated.
        ratios: What trials used as a multiple of it.
        learned: What trials used, by itself.
    """

    def __init__(self, given: GivenFootprint, ratios: Footprint, learned: Footprint) -> None:
        self._given, self._ratios, self._learned = given, ratios, learned
        self._times = _better(ratios, learned)

    @property
    def points(self) -> Sequence[Mapping[str, Any]]:
        """The points that trials ran at."""
        return self._learned.points

    def predict(self, params: Mapping[str, Any]) -> DataFrame:
        """Return lower, median and upper by resource."""
        return interval_table(self.intervals(params))

    def intervals(self, params: Mapping[str, Any]) -> dict[str, Interval]:
        """Return the same as plain values."""
        high = self._learned.confidence
        found = self._given.intervals(params)
        for name, expected in self.expected([params]).items():
            quantiles = (expected.quantile(p) for p in (1 - high, 0.5, high))
            found[name] = Interval(*(float(each[0]) for each in quantiles))
        return found

    def probability(self, params: Mapping[str, Any], limits: Limits) -> float:
        """Return the probability of a breach."""
        breaches = self.breaches([params], limits)
        return joint_breach({name: float(each[0]) for name, each in breaches.items()})

    def breaches(
        self, points: Sequence[Mapping[str, Any]], limits: Limits
    ) -> dict[str, np.ndarray]:
        """Return the probability of each breach at points, by resource."""
        found = self._given.breaches(points, limits)
        for name, expected in self.expected(points).items():
            if name in found:
                found[name] = expected.above(limits.amounts()[name])
        return found

    def expected(self, points: Sequence[Mapping[str, Any]]) -> dict[str, Predictive]:
        """Return the distribution of each resource that trials told of, at points."""
        learned, ratios = self._learned.expected(points), self._ratios.expected(points)
        for name, stated in self._stated(points).items():
            learned[name] = ratios[name].times(stated)
        return learned

    def draw(
        self, points: Sequence[Mapping[str, Any]], count: int, seed: int
    ) -> dict[str, np.ndarray]:
        """Return joint draws at points by resource, shape ``(count, n_points)``."""
        found = self._given.draw(points, 1, seed)
        found = {name: np.tile(each, (count, 1)) for name, each in found.items()}
        found.update(self._learned.draw(points, count, seed))
        ratios = self._ratios.draw(points, count, seed)
        for name, stated in self._stated(points).items():
            found[name] = ratios[name] * stated
        return found

    def _stated(self, points: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Return what is stated of the resources that it helps to foretell, at all points."""
        amounts = self._given.draw(points, 1, 0)
        return {
            name: amounts[name][0]
            for name in self._times
            if name in amounts and np.all(amounts[name][0] > 0)
        }

    def __repr__(self) -> str:
        return f"<CorrectedFootprint of {self._given!r}>"


def _over(row: FootprintRow, given: GivenFootprint) -> FootprintRow | None:
    """Return a row with its usage as a multiple of what was stated, None where nothing was."""
    try:
        stated = given.intervals(row.params)
    except KeyError:
        return None
    ratios = {
        name: amount / stated[name].median
        for name, amount in row.usage.amounts().items()
        if name in stated and stated[name].median > 0
    }
    if not ratios:
        return None
    known = {name: ratios.pop(name) for name in USAGE_RESOURCES if name in ratios}
    names = {*known, *ratios}
    return replace(
        row,
        usage=Usage(**known, custom=ratios),
        censored=row.censored & names,
        unsure=row.unsure & names,
        projected={},
    )


def _better(ratios: Footprint, learned: Footprint) -> frozenset[str]:
    """Return the resources that are foretold at least as well with the statement."""
    ours, theirs = ratios.contents.models, learned.contents.models
    return frozenset(
        name
        for name, model in ours.items()
        if name not in theirs or _density(model) >= _density(theirs[name]) - _BENEFIT
    )


def _density(model: Model) -> float:
    """Return the leave-one-out log density of a model's trials."""
    if isinstance(model, ChainedModel):
        return chain_density(model.base, model.ratio, ~model.base.censored)
    return direct_density(model, ~model.censored)
