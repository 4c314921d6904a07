"""Footprints that a user states: a constant usage, or a function of the point."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
import logging
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._footprint.fit import chain_density
from optuna_quota._footprint.fit import ChainedModel
from optuna_quota._footprint.fit import direct_density
from optuna_quota._footprint.footprint import BaseFootprint
from optuna_quota._footprint.footprint import Footprint
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.resource_model import Predictive
from optuna_quota._records import Interval
from optuna_quota._resources import Limits
from optuna_quota._resources import Usage
from optuna_quota._resources import USAGE_RESOURCES


if TYPE_CHECKING:
    from optuna_quota._footprint.fit import Model


_logger = logging.getLogger("optuna.quota.footprint")


class UnknownFootprintError(KeyError):
    """A function could not tell the usage of a point."""

    def __str__(self) -> str:
        return str(self.args[0])


class UserFootprint(BaseFootprint):
    """A footprint that is certain: the same usage always, or what a function says of a point.

    Args:
        usage: A :class:`~optuna_quota.Usage`, or a function from params to one.
        lenient: Whether a function that fails as it does for a missing parameter has no answer,
            said once in the log, instead of raising what it raises.
    """

    def __init__(
        self, usage: Usage | Callable[[Mapping[str, Any]], Usage], *, lenient: bool = False
    ) -> None:
        self.usage = usage
        self._lenient = lenient
        self._told = False

    @property
    def points(self) -> Sequence[Mapping[str, Any]]:
        """No point is known; a constant is the same at any."""
        return ({},) if isinstance(self.usage, Usage) else ()

    def intervals(self, params: Mapping[str, Any]) -> dict[str, Interval]:
        """Return the same as plain values."""
        return {name: Interval(v, v, v) for name, v in self._amounts(params).items()}

    def breaches(
        self, points: Sequence[Mapping[str, Any]], limits: Limits
    ) -> dict[str, np.ndarray]:
        """Return 1 at points whose usage is over a limit, else 0, by resource."""
        amounts = [self._amounts(params) for params in points]
        return {
            name: np.array([float(each.get(name, 0.0) > limit) for each in amounts])
            for name, limit in limits.amounts().items()
        }

    def draw(
        self, points: Sequence[Mapping[str, Any]], count: int, seed: int
    ) -> dict[str, np.ndarray]:
        """Return the usage at points, the same in every draw; NaN where it is not known."""
        amounts = [self._amounts(params) for params in points]
        names = sorted({name for each in amounts for name in each})
        return {
            name: np.tile([each.get(name, np.nan) for each in amounts], (count, 1))
            for name in names
        }

    def _amounts(self, params: Mapping[str, Any]) -> dict[str, float]:
        usage = self.usage if isinstance(self.usage, Usage) else self._ask(self.usage, params)
        if not isinstance(usage, Usage):
            raise TypeError(f"`footprint` must return a Usage but returned {usage!r}.")
        return usage.amounts()

    def _ask(
        self, function: Callable[[Mapping[str, Any]], Usage], params: Mapping[str, Any]
    ) -> Usage:
        if not self._lenient:
            return function(dict(params))
        try:
            return function(dict(params))
        except (AttributeError, LookupError, TypeError) as error:
            # Whatever a function does with a parameter that is not there.
            told, self._told = self._told, True
            message = f"`footprint` failed for the point {dict(params)!r}: {error!r}."
            if not told:
                _logger.warning(
                    f"{message} Points for which it fails run without being judged by it; "
                    "further failures are not reported."
                )
            raise UnknownFootprintError(message) from error

    def __repr__(self) -> str:
        return f"<UserFootprint of {self.usage!r}>"


def as_footprint(footprint: Any, *, lenient: bool = False) -> BaseFootprint:
    """Return a footprint from whatever a user may give for one.

    Args:
        footprint: A :class:`~optuna_quota.Usage` (every trial costs this), a function
            ``params -> Usage``, or a :class:`~optuna_quota.Footprint`.
        lenient: See :class:`UserFootprint`.

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(footprint, (Footprint, UserFootprint)):
        return footprint
    if isinstance(footprint, Usage) or callable(footprint):
        return UserFootprint(footprint, lenient=lenient)
    if all(hasattr(footprint, name) for name in ("intervals", "probability", "draw", "points")):
        found: BaseFootprint = footprint
        return found
    raise TypeError(
        "`footprint` must be a Usage, a function from params to a Usage, or a Footprint "
        f"but got {footprint!r}."
    )


# As log density: few trials tell the two apart badly, and a statement deserves some trust.
_BENEFIT = 3.0


class FootprintCalibrator:
    """Corrects a stated footprint as a study goes on.

    Args:
        given: What the user stated.
    """

    def __init__(self, given: UserFootprint) -> None:
        self._given = given
        self._learned: Footprint | None = None
        self._ratios: Footprint | None = None

    def calibrate(self, learned: Footprint, rows: Sequence[Observation]) -> CalibratedFootprint:
        """Return the footprint after all trials; it is fitted anew when ``learned`` was.

        Args:
            learned: What the trials show without the statement.
            rows: What was measured, oldest first.
        """
        if self._ratios is None or learned is not self._learned:
            # Others may have ended before all that the function needs was drawn.
            names = {frozenset(row.params) for row in rows if row.is_complete}
            whole = (row for row in rows if frozenset(row.params) in names)
            ratios = [found for row in whole if (found := _over(row, self._given)) is not None]
            self._ratios = Footprint.fit(ratios, confidence=learned.confidence, start=self._ratios)
            self._learned = learned
        return CalibratedFootprint(self._given, self._ratios, learned)


class CalibratedFootprint(BaseFootprint):
    """What a user states of a point, times what trials used more or less than was stated.

    Args:
        given: What the user stated.
        ratios: What trials used as a multiple of it.
        learned: What trials used, by itself.
    """

    def __init__(self, given: UserFootprint, ratios: Footprint, learned: Footprint) -> None:
        self._given, self._ratios, self._learned = given, ratios, learned
        self._times = _better(ratios, learned)

    @property
    def points(self) -> Sequence[Mapping[str, Any]]:
        """The points that trials ran at."""
        return self._learned.points

    def intervals(self, params: Mapping[str, Any]) -> dict[str, Interval]:
        """Return the same as plain values."""
        high = self._learned.confidence
        found = self._given.intervals(params)
        for name, expected in self.expected([params]).items():
            quantiles = (expected.quantile(p) for p in (1 - high, 0.5, high))
            found[name] = Interval(*(float(each[0]) for each in quantiles))
        return found

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
        return f"<CalibratedFootprint of {self._given!r}>"


def _over(row: Observation, given: UserFootprint) -> Observation | None:
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
        maybe_censored=row.maybe_censored & names,
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
