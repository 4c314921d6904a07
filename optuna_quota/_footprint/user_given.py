"""Footprints that a user states, as a constant or a function, and their calibration on trials.

A formula knows the cost of regions without trials, but is often wrong by a factor: another
machine, a library's own memory. So ``log(used / stated)`` is learned as a footprint of its own; if
a resource is predicted better without the formula, the formula is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
import contextlib
from dataclasses import replace
import logging
import math
import pickle
from statistics import median
import time
import traceback
from typing import Any

import cloudpickle
import numpy as np

from optuna_quota._footprint.fit import leave_one_out_density
from optuna_quota._footprint.footprint import BaseFootprint, Footprint
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.predictive import Predictive
from optuna_quota._limits import Limits
from optuna_quota._metering.breach import is_breach
from optuna_quota._records import Interval
from optuna_quota._usage import Usage, usage_from_amounts


_logger = logging.getLogger("optuna.quota.footprint")
# As log density, in favour of the user's formula: few trials can hardly compare the two.
_FORMULA_MARGIN = 3.0
# Assumed for a call of a user's function before one was timed.
_UNKNOWN_SECONDS = 0.01
_PICKLE = "cloudpickle"
# Cached answers of a function; one takes about a kilobyte.
_MOST_KNOWN = 10_000
# Seconds after which a failed point is computed again: a service may have been down.
_FAILURE_LASTS = 10.0
# Number of latest calls that predict the next one's duration; the first may import a library.
_N_TIMED = 3


class AskedOnce:
    """A user's function from params to a usage, called once for each point.

    Failures are cached only for a short time.
    """

    def __init__(self, function: Callable[[Mapping[str, Any]], Usage]) -> None:
        self._function = function
        self._known: dict[Hashable, tuple[Any, float]] = {}
        self._times: list[float] = []
        # Where it failed last, for a message: cached failures have no traceback.
        self.failed_at = ""

    def __getstate__(self) -> dict[str, Any]:
        """Exclude cached answers from a copy, which may run on another machine."""
        return {"_function": self._function, "_known": {}, "_times": [], "failed_at": ""}

    def __call__(self, params: Mapping[str, Any]) -> Any:
        """Return what the function returns, or raise what it raised, for these parameters."""
        key = _key(params)
        found, since = self._known.get(key, (None, 0.0))
        is_failure = isinstance(found, Exception)
        if found is None or (is_failure and time.monotonic() - since > _FAILURE_LASTS):
            found = self._ask(params)
            if len(self._known) >= _MOST_KNOWN:
                self._known = {}
            self._known[key] = found, time.monotonic()
        if isinstance(found, Exception):
            raise found.with_traceback(None)
        return found

    def _ask(self, params: Mapping[str, Any]) -> Any:
        started = time.perf_counter()
        try:
            return self._function(dict(params))
        except Exception as error:  # noqa: BLE001 - the user's own, raised to who asks
            for frame in traceback.extract_tb(error.__traceback__)[1:2]:
                self.failed_at = f" in {frame.filename}, line {frame.lineno}"
            return error
        finally:
            self._times = [*self._times[1 - _N_TIMED :], time.perf_counter() - started]

    @property
    def seconds(self) -> float | None:
        """How long the next call is likely to take; None before the first calls."""
        return median(self._times) if len(self._times) == _N_TIMED else None


def _key(params: Mapping[str, Any]) -> Hashable:
    # True equals 1, but is another choice.
    items = tuple((name, isinstance(params[name], bool), params[name]) for name in sorted(params))
    try:
        hash(items)
    except TypeError:
        return repr(items)
    return items


class UnknownFootprintError(KeyError):
    """The user's function failed for a point."""

    def __str__(self) -> str:
        return str(self.args[0])


class UserFootprint(BaseFootprint):
    """A footprint without uncertainty: a constant, or a function called once for each point.

    Args:
        usage: A :class:`~optuna_quota.Usage`, or a function from params to one.
        lenient: Whether to raise :class:`UnknownFootprintError`, with one warning in the log,
            if the function fails for a point.
    """

    def __init__(
        self, usage: Usage | Callable[[Mapping[str, Any]], Usage], *, lenient: bool = False
    ) -> None:
        self.usage = usage
        self.function = None if isinstance(usage, Usage) else AskedOnce(usage)
        self._lenient = lenient
        self._warned = False

    @property
    def points(self) -> Sequence[Mapping[str, Any]]:
        """One arbitrary point for a constant, none for a function."""
        return ({},) if isinstance(self.usage, Usage) else ()

    def intervals(self, params: Mapping[str, Any]) -> dict[str, Interval]:
        """Return the usage as lower, median and upper of each resource."""
        return {name: Interval(v, v, v) for name, v in self._amounts(params).items()}

    def breaches(
        self, points: Sequence[Mapping[str, Any]], limits: Limits
    ) -> dict[str, np.ndarray]:
        """Return 1 at points whose usage breaches a limit, else 0, by resource."""
        amounts = [self._amounts(params) for params in points]
        return {
            name: np.array(
                [float(is_breach(name, each.get(name, 0.0), limit)) for each in amounts]
            )
            for name, limit in limits.amounts().items()
        }

    def draw(
        self, points: Sequence[Mapping[str, Any]], count: int, seed: int, ahead: int = 1
    ) -> dict[str, np.ndarray]:
        """Return the usage at points, the same in every draw; NaN where unknown."""
        amounts = [self._amounts(params) for params in points]
        names = sorted({name for each in amounts for name in each})
        return {
            name: np.tile([each.get(name, np.nan) for each in amounts], (count, 1))
            for name in names
        }

    def _amounts(self, params: Mapping[str, Any]) -> dict[str, float]:
        usage = self.usage if self.function is None else self._call(self.function, params)
        if not isinstance(usage, Usage):
            raise TypeError(f"`footprint` must return a Usage but returned {usage!r}.")
        return usage.amounts()

    def _call(self, function: AskedOnce, params: Mapping[str, Any]) -> Any:
        try:
            return function(params)
        except Exception as error:
            if not self._lenient:
                raise
            # A parameter may be missing, as it is not suggested yet; a model of this shape may be
            # impossible, which the objective prunes itself; a service may be down.
            warned, self._warned = self._warned, True
            message = f"`footprint` failed for the point {dict(params)!r}: {error!r}"
            message += f"{function.failed_at}."
            if not warned:
                _logger.warning(
                    f"{message} Points for which it fails run without being judged by it; further "
                    "failures are not reported."
                )
            raise UnknownFootprintError(message) from error

    def __repr__(self) -> str:
        return f"<UserFootprint of {self.usage!r}>"


def count_within(
    footprint: BaseFootprint, seconds: float, points: Sequence[Mapping[str, Any]] = ()
) -> float:
    """Return the number of points whose usage can be computed in a given time.

    Infinite unless the footprint is a user's function. The first of ``points`` are computed if no
    call was timed yet.
    """
    stated = footprint.stated if isinstance(footprint, CalibratedFootprint) else footprint
    if not isinstance(stated, UserFootprint) or stated.function is None:
        return math.inf
    for params in points:
        if stated.function.seconds is not None:
            break
        stated.intervals(params)
    return seconds / (stated.function.seconds or _UNKNOWN_SECONDS)


def as_footprint(footprint: Any, *, lenient: bool = False) -> BaseFootprint:
    """Return a user's ``footprint`` argument as a footprint, a ``TypeError`` if it is none.

    It is a :class:`~optuna_quota.Usage` (every trial costs this), a function ``params -> Usage``,
    or a :class:`~optuna_quota.Footprint`; ``lenient`` is that of :class:`UserFootprint`.
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


def by_value(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state whose user's function plain pickle can handle, as Ray Tune needs.

    The function goes by name if possible, and unchanged if nothing can pickle it: a copy within
    the process needs no pickle.
    """
    try:
        pickle.dumps(state["footprint"])
    except Exception:  # noqa: BLE001 - a user's object may raise anything
        with contextlib.suppress(Exception):
            return {_PICKLE: cloudpickle.dumps(state)}
    return state


def from_value(state: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`by_value`."""
    found: dict[str, Any] = cloudpickle.loads(state[_PICKLE]) if _PICKLE in state else state
    return found


class FootprintCalibrator:
    """Calibrates a user's footprint on the trials of a study."""

    def __init__(self, stated: UserFootprint) -> None:
        self._stated = stated
        self._learned: Footprint | None = None
        self._ratios: Footprint | None = None

    def calibrate(
        self, learned: Footprint, observations: Sequence[Observation]
    ) -> CalibratedFootprint:
        """Return the footprint calibrated on a study's trials.

        Fitted again only if ``learned``, the footprint learned without the user's, has changed.
        """
        if self._ratios is None or learned is not self._learned:
            # Other trials may lack parameters of the function.
            complete = {frozenset(each.params) for each in observations if each.is_complete}
            whole = (each for each in observations if frozenset(each.params) in complete)
            ratios = [found for each in whole if (found := _ratio(each, self._stated)) is not None]
            self._ratios = Footprint.fit(ratios, confidence=learned.confidence, start=self._ratios)
            self._learned = learned
        return CalibratedFootprint(self._stated, self._ratios, learned)


class CalibratedFootprint(BaseFootprint):
    """A user's footprint times ``ratios``, the learned multiples of it that trials used.

    Resources that are predicted better without it have the ``learned`` footprint instead.
    """

    def __init__(self, stated: UserFootprint, ratios: Footprint, learned: Footprint) -> None:
        self.stated, self._ratios, self._learned = stated, ratios, learned
        self._calibrated = _better_calibrated(ratios, learned)

    @property
    def points(self) -> Sequence[Mapping[str, Any]]:
        """The points of the study's trials."""
        return self._learned.points

    def intervals(self, params: Mapping[str, Any]) -> dict[str, Interval]:
        found = self.stated.intervals(params)
        for name, expected in self.expected([params]).items():
            found[name] = expected.intervals(self._learned.confidence)[0]
        return found

    def breaches(
        self, points: Sequence[Mapping[str, Any]], limits: Limits
    ) -> dict[str, np.ndarray]:
        found = self.stated.breaches(points, limits)
        for name, expected in self.expected(points).items():
            if name in found:
                found[name] = expected.above(limits.amounts()[name])
        return found

    def expected(self, points: Sequence[Mapping[str, Any]]) -> dict[str, Predictive]:
        """Return the predictive distribution of each resource that was measured, at points."""
        learned, ratios = self._learned.expected(points), self._ratios.expected(points)
        for name, amounts in self._stated_amounts(points).items():
            learned[name] = ratios[name].times(amounts)
        return learned

    def draw(
        self, points: Sequence[Mapping[str, Any]], count: int, seed: int, ahead: int = 1
    ) -> dict[str, np.ndarray]:
        found = self.stated.draw(points, count, seed)
        found.update(self._learned.draw(points, count, seed, ahead))
        ratios = self._ratios.draw(points, count, seed, ahead)
        for name, amounts in self._stated_amounts(points).items():
            found[name] = ratios[name] * amounts
        return found

    def _stated_amounts(self, points: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Return the stated usage of calibrated resources at points, if all are positive."""
        amounts = self.stated.draw(points, 1, 0)
        return {
            name: amounts[name][0]
            for name in self._calibrated
            if name in amounts and np.all(amounts[name][0] > 0)
        }

    def __repr__(self) -> str:
        return f"<CalibratedFootprint of {self.stated!r}>"


def _ratio(observation: Observation, stated: UserFootprint) -> Observation | None:
    """Return an observation with its usage as a multiple of the stated one, None if unknown."""
    try:
        amounts = stated.intervals(observation.params)
    except KeyError:
        return None
    ratios = {
        name: amount / amounts[name].median
        for name, amount in observation.usage.amounts().items()
        if name in amounts and amounts[name].median > 0
    }
    if not ratios:
        return None
    return replace(
        observation,
        usage=usage_from_amounts(ratios),
        censored=observation.censored & ratios.keys(),
        maybe_censored=observation.maybe_censored & ratios.keys(),
        partial=observation.partial & ratios.keys(),
        projected={},
        is_ratio=True,
    )


def _better_calibrated(ratios: Footprint, learned: Footprint) -> frozenset[str]:
    """Return the resources that are predicted at least as well with the user's footprint."""
    with_it, without = ratios.contents.models, learned.contents.models
    return frozenset(
        name
        for name, model in with_it.items()
        if name not in without
        or leave_one_out_density(model) >= leave_one_out_density(without[name]) - _FORMULA_MARGIN
    )
