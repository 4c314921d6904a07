"""The expected usage of a study's trials: stated by the user, learned, or both.

As totals run out, a point needs its median usage plus a margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
from dataclasses import dataclass, field
import logging
from types import MappingProxyType
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from optuna_quota._footprint import user_given
from optuna_quota._footprint.footprint import BaseFootprint, Footprint, Learner
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.search_space import (
    certain_completions,
    latin_hypercube,
    likely_completions,
    points_from_unit_cube,
)
from optuna_quota._limits import Limits
from optuna_quota._sampler.admission import PointAdmission
from optuna_quota._sampler.options import SamplerOptions
from optuna_quota._usage import Usage


_logger = logging.getLogger("optuna.quota.sampler")

# Points are refused from this many measured and this many uncensored trials on.
MIN_TRIALS = 8
_MIN_UNCENSORED = 3
_RECENT = 200
# A new trial's reservation covers the upper bounds of this many recent points.
_RECENT_BOUNDS = 30
# Learned bounds are sometimes exceeded: with this margin, a trial has time to request more.
_BOUND_MARGIN = 1.1
# Near the end of a quota, when less than this many of the largest trials is left for each running
# trial, points are judged by what is left of the totals.
_NEAR = 4.0
# Points spread over the space, to find the smallest need, and seconds for a slow user's function.
_N_OTHER = 64
_SECONDS = 1.0
# Bounds of what a point needs, in medians; the larger one for an uncertain footprint.
_MARGIN = 1.03
_MOST = 1.25
# Recent trials from which the margin is computed.
_N_RECENT = 8


@dataclass(frozen=True)
class Forecast:
    """The expected usage of a trial, as known at its start."""

    expected: BaseFootprint | None = None  # None when nothing is known
    is_reliable: bool = False  # whether reservations may rely on it
    admission: PointAdmission | None = None  # decides which points may run; None when all may
    at_points: BaseFootprint | None = None  # what tells points apart: no constant that was stated


@dataclass(frozen=True)
class Margins:
    """What a point needs beyond its median, so that it is rarely terminated."""

    factors: Mapping[str, float] = field(default_factory=dict)  # of the median, by resource
    # Added amounts, such as the time that each trial takes to start.
    extras: Mapping[str, float] = field(default_factory=dict)

    def need(self, name: str, median: float) -> float:
        return self.factors.get(name, _MARGIN) * median + self.extras.get(name, 0.0)

    def within(self, left: Mapping[str, float]) -> dict[str, float]:
        """Return the highest medians whose needs fit what is left; all positive."""
        rest = {name: amount - self.extras.get(name, 0.0) for name, amount in left.items()}
        return {n: max(each / self.factors.get(n, _MARGIN), 1e-9) for n, each in rest.items()}


class StudyFootprint:
    """The footprint of one study's trials."""

    def __init__(self, options: SamplerOptions) -> None:
        stated = options.footprint
        self._earlier = stated if isinstance(stated, Footprint) else None
        # Learns from the study's trials.
        self.learner = Learner(self._earlier, confidence=options.confidence)
        # A usage or function that the user stated; else None.
        self.given = None if stated is None or self._earlier else user_given.as_footprint(stated)
        self._options = options
        self._declared = options.declared
        self._calibrator = None
        if isinstance(self.given, user_given.UserFootprint) and self.given.function is not None:
            self._calibrator = user_given.FootprintCalibrator(self.given)
        # The forecast of the newest trial, and its upper bounds over recent points.
        self._reliable: BaseFootprint | None = self._earlier or self.given
        self._recent_bounds: tuple[BaseFootprint, dict[str, float]] | None = None
        # Points that running trials have drawn completely, until a trial has completed.
        self._drawn: list[Mapping[str, Any]] = []
        # The smallest medians of a footprint, and its number of observations.
        self._least: tuple[BaseFootprint, int, dict[str, float]] | None = None

    def forecast(
        self,
        trials: Sequence[FrozenTrial],
        limits: Limits,
        left: Mapping[str, float] = MappingProxyType({}),
    ) -> Forecast:
        """Return the forecast for a trial with these limits, after all trials of the study.

        ``left`` is what is left of totals, where points are judged by it.
        """
        limits = limits.tightened(left)
        learned = self.learn(trials)
        expected = self.corrected(learned) or self.given or learned
        # A constant is the same at all points: only trials show where a limit is breached.
        judge = learned if isinstance(self._options.footprint, Usage) else expected
        reliable = bool(
            self._calibrator or judge is self.given or self._earlier or self._has_enough()
        )
        self._reliable = expected if reliable else None
        threshold = self._options.breach_probability
        if judge is None or not reliable or not limits or threshold == 1:
            return Forecast(expected, reliable, at_points=judge)
        admission = PointAdmission(
            judge,
            limits,
            self._recent_points(),
            self.learner.space,
            threshold,
            self.learner.varying(_RECENT),
            complete=None if self._calibrator is None else self._completed_points(),
            declared=frozenset(self._declared),
            stated_space=self._declared,
            left=left,
        )
        return Forecast(expected, reliable, admission, judge)

    def corrected(self, learned: Footprint | None) -> BaseFootprint | None:
        """Return the stated function as corrected by the study's trials, None if it is not."""
        if self._calibrator is None or learned is None or not self._has_enough():
            return None
        try:
            return self._calibrator.calibrate(learned, self.learner.observations)
        except (ArithmeticError, ValueError, np.linalg.LinAlgError) as fault:
            _logger.warning(
                f"`footprint` could not be corrected by the study's trials: {fault!r}. It is used "
                "as it was given."
            )
            return None

    def has_learned(self, trials: Sequence[FrozenTrial]) -> bool:
        """Return whether the study has enough trials to learn the footprint from."""
        return self.learn(trials) is not None and self._has_enough()

    def is_complete(self, params: Mapping[str, Any]) -> bool:
        """Return whether the stated footprint can be computed from these parameters."""
        if self._calibrator is None:
            return True
        if self._declared and self._declared.keys() <= params.keys():
            return True
        return certain_completions(params, self._completed_points())[-1:] == [params]

    def bounds_before_start(
        self, held: Mapping[str, float], fixed: Mapping[str, Any]
    ) -> dict[str, float]:
        """Return upper bounds of what a trial will hold, before its point is drawn.

        At most what all trials together may hold. The trial may have fixed parameters.
        """
        expected = self._reliable
        if expected is None or not held:
            return {}
        points = self._possible_points(expected, fixed)
        if points == [fixed]:
            found = _upper_bounds(expected, points)
        elif self._recent_bounds is not None and self._recent_bounds[0] is expected:
            found = self._recent_bounds[1]
        else:
            found = _upper_bounds(expected, points)
            self._recent_bounds = expected, found
        return {name: min(found[name], most) for name, most in held.items() if name in found}

    def least_needs(self, left: Mapping[str, float], n_beside: int) -> dict[str, float]:
        """Return the smallest needs of any point; empty while much is left of totals."""
        expected, points = self._reliable, self._known_points()
        if expected is None or not points or not left:
            return {}
        try:
            if isinstance(expected, Footprint):
                # As measured: a prediction would cost each trial as much as its admission.
                recent = self.learner.observations[-_RECENT_BOUNDS:]
                most = {name: max(r.usage.get(name) or 0.0 for r in recent) for name in left}
            else:
                stated = medians_of(expected, points[-_RECENT_BOUNDS:])
                most = {name: float(np.max(each)) for name, each in stated.items()}
            if all(most.get(n, 0.0) * _NEAR * (n_beside + 1) < left[n] for n in left):
                return {}
            least = self._least_medians(expected, points)
            margins = self.margins()
        except KeyError:
            # A function of a parameter that a point does not have.
            return {}
        return {n: margins.need(n, least[n]) for n in left if n in least}

    def _least_medians(
        self, expected: BaseFootprint, points: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Return the smallest median usage of any point; called several times per trial."""
        last, count = self._least, self.learner.n_observations
        if last is None or last[0] is not expected or last[1] != count:
            n_others = int(min(_N_OTHER, user_given.count_within(expected, _SECONDS)))
            found = medians_of(expected, [*points, *self._other_points(points)[:n_others]])
            last = expected, count, {name: float(np.min(each)) for name, each in found.items()}
            self._least = last
        return last[2]

    def margins(self) -> Margins:
        if self._reliable is None:
            return Margins()
        complete = [row for row in self.learner.observations if row.is_complete]
        return margins_of(self._reliable, complete)

    def _other_points(self, points: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return points all over the search space where its parameters are known."""
        known = {**self._declared, **self.learner.space}
        space = {name: known[name] for name in points[-1] if name in known}
        if any(point.keys() != space.keys() for point in points):
            return []
        unit = latin_hypercube(_N_OTHER, len(space), np.random.default_rng(0))
        return points_from_unit_cube(space, unit)

    def needs_at(self, forecast: Forecast, point: Mapping[str, Any]) -> dict[str, float]:
        """Return what to reserve of totals at a complete point; see :meth:`bounds_at`."""
        if forecast.expected is None:
            return {}
        margins, found = self.margins(), forecast.expected.intervals(point)
        return {name: margins.need(name, each.median) for name, each in found.items()}

    def likely_seconds(
        self, trials: Sequence[FrozenTrial], fixed: Mapping[str, Any]
    ) -> float | None:
        """Return the median of the seconds that a trial takes, None while nothing is known."""
        expected = self._reliable or self.given
        found: list[float] = []
        if expected is not None:
            points = self._possible_points(expected, fixed)
            with contextlib.suppress(KeyError):  # a function of a parameter that it lacks
                intervals = [expected.intervals(point) for point in points]
                found = [each["wall_time"].median for each in intervals if "wall_time" in each]
        if not found:
            completed = [t.duration for t in trials if t.state == TrialState.COMPLETE]
            found = [duration.total_seconds() for duration in completed if duration is not None]
        return float(np.median(found)) if found else None

    def bounds_at(
        self, forecast: Forecast, point: Mapping[str, Any], *, is_complete: bool = False
    ) -> dict[str, float]:
        """Return upper bounds of the usage at a point; empty while it is partial or unknown."""
        if forecast.expected is None or not forecast.is_reliable:
            return {}
        past = self._recent_points()
        if not point or (past and likely_completions(point, past) != [point]):
            return {}
        if not (is_complete or self.is_complete(point)):
            return {}
        found = _upper_bounds(forecast.expected, [point])
        if found and len(self._drawn) < _RECENT:
            self._drawn.append(point)
        return found

    def learn(self, trials: Sequence[FrozenTrial]) -> Footprint | None:
        """Return the footprint learned from all trials of the study, None without one."""
        try:
            return self.learner.learn(trials)
        except (ArithmeticError, ValueError, TypeError, np.linalg.LinAlgError) as fault:
            # The study continues without a projection.
            _logger.warning(
                f"The footprint could not be learned from the study's trials: {fault!r}. Points "
                "are not judged by it."
            )
            return None

    def _has_enough(self) -> bool:
        # If nearly all trials were stopped, nothing shows that others would not be.
        return (
            self.learner.n_observations >= MIN_TRIALS
            and self.learner.n_uncensored >= _MIN_UNCENSORED
        )

    def _recent_points(self) -> list[Mapping[str, Any]]:
        return [row.params for row in self.learner.observations[-_RECENT:]]

    def _known_points(self, count: int = _RECENT) -> list[Mapping[str, Any]]:
        """Return recent points; for a user's function, which may need all, complete ones."""
        points = self._recent_points if self._calibrator is None else self._completed_points
        return points()[-count:]

    def _possible_points(
        self, expected: BaseFootprint, fixed: Mapping[str, Any]
    ) -> list[Mapping[str, Any]]:
        """Return the point of a trial with fixed parameters if that is known, else recent ones."""
        points = self._known_points(_RECENT_BOUNDS)
        if fixed and likely_completions(fixed, points) == [fixed]:
            return [fixed]
        return points or list(expected.points[-_RECENT_BOUNDS:])

    def _completed_points(self) -> list[Mapping[str, Any]]:
        recent = self.learner.observations[-_RECENT:]
        return [row.params for row in recent if row.is_complete] or list(self._drawn)


def _upper_bounds(
    expected: BaseFootprint, points: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return the largest upper bound over points, by resource."""
    margin = 1.0 if isinstance(expected, user_given.UserFootprint) else _BOUND_MARGIN
    found: dict[str, float] = {}
    try:
        for point in points:
            for name, each in expected.intervals(point).items():
                found[name] = max(found.get(name, 0.0), margin * each.upper)
    except KeyError:
        # A function of a parameter that the point does not have.
        return {}
    return found


def margins_of(expected: BaseFootprint, rows: Sequence[Observation]) -> Margins:
    """Return the margins of a footprint, given completed trials, oldest first.

    For a user's function, whose uncertainty is unknown, the usage beyond its value is added.
    """
    recent = []
    for row in rows[-_N_RECENT:]:
        with contextlib.suppress(KeyError):  # a function that fails for this point
            recent.append((row.usage.amounts(), expected.intervals(row.params)))
    if isinstance(expected, user_given.UserFootprint):
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


def medians_of(
    expected: BaseFootprint, points: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Return the median usage at points, by resource, shape ``(n_points,)``."""
    if isinstance(expected, (Footprint, user_given.CalibratedFootprint)):
        return {name: each.quantile(0.5) for name, each in expected.expected(points).items()}
    rows = [expected.intervals(point) for point in points]
    names = {name for row in rows for name in row}
    return {n: np.array([row[n].median if n in row else 0.0 for row in rows]) for n in names}
