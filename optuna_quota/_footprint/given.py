"""Footprints that a user states: a constant usage, or a function of the point."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import logging
from typing import Any
from typing import Protocol
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._footprint.footprint import Footprint
from optuna_quota._footprint.footprint import interval_table
from optuna_quota._records import Interval
from optuna_quota._resources import Limits
from optuna_quota._resources import Usage


if TYPE_CHECKING:
    from pandas import DataFrame


_logger = logging.getLogger("optuna.quota.footprint")


class Expectation(Protocol):
    """Whatever tells what a point is expected to use."""

    @property
    def points(self) -> Sequence[Mapping[str, Any]]:
        """Points that it knows of."""

    def predict(self, params: Mapping[str, Any]) -> DataFrame:
        """Return lower, median and upper by resource."""

    def intervals(self, params: Mapping[str, Any]) -> dict[str, Interval]:
        """Return the same as plain values."""

    def probability(self, params: Mapping[str, Any], limits: Limits) -> float:
        """Return the probability of a breach."""

    def breaches(
        self, points: Sequence[Mapping[str, Any]], limits: Limits
    ) -> dict[str, np.ndarray]:
        """Return the probability of each breach at points, by resource."""

    def draw(
        self, points: Sequence[Mapping[str, Any]], count: int, seed: int
    ) -> dict[str, np.ndarray]:
        """Return joint draws at points by resource, shape ``(count, n_points)``."""


class UnansweredError(KeyError):
    """A function could not tell the usage of a point."""

    def __str__(self) -> str:
        return str(self.args[0])


class GivenFootprint:
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

    def predict(self, params: Mapping[str, Any]) -> DataFrame:
        """Return the usage as lower, median and upper by resource."""
        return interval_table(self.intervals(params))

    def intervals(self, params: Mapping[str, Any]) -> dict[str, Interval]:
        """Return the same as plain values."""
        return {name: Interval(v, v, v) for name, v in self._amounts(params).items()}

    def probability(self, params: Mapping[str, Any], limits: Limits) -> float:
        """Return 1 when the usage is over any limit, else 0."""
        return float(any(each[0] for each in self.breaches([params], limits).values()))

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
            raise UnansweredError(message) from error

    def __repr__(self) -> str:
        return f"<GivenFootprint of {self.usage!r}>"


def as_footprint(footprint: Any, *, lenient: bool = False) -> Expectation:
    """Return a footprint from whatever a user may give for one.

    Args:
        footprint: A :class:`~optuna_quota.Usage` (every trial costs this), a function
            ``params -> Usage``, or a :class:`~optuna_quota.Footprint`.
        lenient: See :class:`GivenFootprint`.

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(footprint, (Footprint, GivenFootprint)):
        return footprint
    if isinstance(footprint, Usage) or callable(footprint):
        return GivenFootprint(footprint, lenient=lenient)
    if all(hasattr(footprint, name) for name in ("intervals", "probability", "draw", "points")):
        found: Expectation = footprint
        return found
    raise TypeError(
        "`footprint` must be a Usage, a function from params to a Usage, or a Footprint "
        f"but got {footprint!r}."
    )
