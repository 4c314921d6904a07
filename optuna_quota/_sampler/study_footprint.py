"""What the trials of a study are expected to use: stated by the user, learned, or both.

As totals run out, a point needs its median usage with a margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
from dataclasses import dataclass, field, replace
import logging
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from optuna_quota._footprint.footprint import BaseFootprint, Footprint, Learner
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.search_space import (
    certain_completions,
    latin_hypercube,
    likely_completions,
    points_from_unit_cube,
)
from optuna_quota._footprint.user_given import (
    as_footprint,
    CalibratedFootprint,
    count_within,
    FootprintCalibrator,
    UserFootprint,
)
from optuna_quota._limits import Limits
from optuna_quota._sampler.admission import PointAdmission
from optuna_quota._sampler.options import SamplerOptions
from optuna_quota._usage import Usage


_logger = logging.getLogger("optuna.quota.sampler")

# Trials with a measured usage, and uncensored ones among them, before the first point is refused.
MIN_TRIALS = 8
_MIN_UNCENSORED = 3
_RECENT = 200
# Points of recent trials whose largest upper bound a new trial's reservation covers.
_RECENT_BOUNDS = 30
# A learned bound is exceeded now and then: a reservation leaves room for that, in which a trial
# can ask for more.
_BOUND_MARGIN = 1.1
# The end of a quota is near when less is left for each running trial than this many of the
# largest: from then on, points are judged by what is left of the totals.
_NEAR = 4.0
# Points all over the space beside those of trials, to find the one that needs least, and the time
# for it where a user's function is slow.
_N_OTHER = 64
_SECONDS = 1.0
# What a point needs, in medians: at least, and at most for a footprint that is uncertain.
_MARGIN = 1.03
_MOST = 1.25
# Recent trials by which the margin is computed.
_N_RECENT = 8


@dataclass(frozen=True)
class Forecast:
    """What is known of a trial's usage when it starts."""

    expected: BaseFootprint | None = None  # None when nothing is known
    is_reliable: bool = False  # whether reservations may rely on it
    admission: PointAdmission | None = None  # decides which points may run; None when all may
    at_points: BaseFootprint | None = None  # what tells points apart: no constant that was stated

    def within(self, left: Mapping[str, float]) -> Forecast:
        """Return the forecast whose points are judged by what is left of totals too."""
        if self.admission is None or not left:
            return self
        limits = self.admission.limits.tightened(left)
        return replace(self, admission=replace(self.admission, limits=limits, left=left))


@dataclass(frozen=True)
class Margins:
    """What a point needs beyond its median, so that it is hardly ever terminated."""

    factors: Mapping[str, float] = field(default_factory=dict)  # of the median, by resource
    # To add, such as the time that each trial takes to start.
    extras: Mapping[str, float] = field(default_factory=dict)

    def need(self, name: str, median: float) -> float:
        return self.factors.get(name, _MARGIN) * median + self.extras.get(name, 0.0)

    def within(self, left: Mapping[str, float]) -> dict[str, float]:
        """Return the highest medians whose needs are within what is left; all positive."""
        rest = {name: amount - self.extras.get(name, 0.0) for name, amount in left.items()}
        return {n: max(each / self.factors.get(n, _MARGIN), 1e-9) for n, each in rest.items()}


class StudyFootprint:
    """The footprint of one study's trials, as this process knows it."""

    def __init__(self, options: SamplerOptions) -> None:
        stated = options.footprint
        self._earlier = stated if isinstance(stated, Footprint) else None
        # Learns from the study's trials.
        self.learner = Learner(self._earlier, confidence=options.confidence)
        # A usage or function that the user stated; None for neither.
        self.given = None if stated is None or self._earlier else as_footprint(stated)
        self._options = options
        self._declared = options.declared
        self._calibrator = None
        if isinstance(self.given, UserFootprint) and not isinstance(self.given.usage, Usage):
            self._calibrator = FootprintCalibrator(self.given)
        # What the newest trial started with, and its upper bounds over recent points.
        self._reliable: BaseFootprint | None = self._earlier or self.given
        self._recent_bounds: tuple[BaseFootprint, dict[str, float]] | None = None
        # The least medians by a footprint, after so many observations.
        self._least: tuple[BaseFootprint, int, dict[str, float]] | None = None

    def forecast(self, trials: Sequence[FrozenTrial], limits: Limits) -> Forecast:
        """Return what is known after all trials of the study, for one with these limits."""
        learned = self.learn(trials)
        expected = self.corrected(learned) or self.given or learned
        # A constant usage is the same at all points: only trials show where a limit is breached.
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
        )
        return Forecast(expected, reliable, admission, judge)

    def corrected(self, learned: Footprint | None) -> BaseFootprint | None:
        """Return the stated function corrected by the study's trials, None while it is not."""
        if self._calibrator is None or learned is None or not self._has_enough():
            return None
        try:
            return self._calibrator.calibrate(learned, self.learner.observations)
        except (ArithmeticError, ValueError, np.linalg.LinAlgError) as fault:
            _logger.warning(f"The stated footprint could not be corrected: {fault!r}.")
            return None

    def has_learned(self, trials: Sequence[FrozenTrial]) -> bool:
        """Return whether all trials of the study together show what the next ones will use."""
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
        """Return upper bounds of what a trial will hold whose point is not drawn yet.

        No bound is higher than what all trials may hold. The trial may have fixed parameters.
        """
        expected = self._reliable
        if expected is None or not held:
            return {}
        points = self._known_points(_RECENT_BOUNDS)
        if fixed and likely_completions(fixed, points) == [fixed]:
            found = _upper_bounds(expected, [fixed])
        elif self._recent_bounds is not None and self._recent_bounds[0] is expected:
            found = self._recent_bounds[1]
        else:
            if not points and not isinstance(expected, UserFootprint):
                points = list(expected.points[-_RECENT_BOUNDS:])
            found = _upper_bounds(expected, points)
            self._recent_bounds = expected, found
        return {name: min(found[name], most) for name, most in held.items() if name in found}

    def least_needs(self, left: Mapping[str, float], n_beside: int) -> dict[str, float]:
        """Return the least that any point needs; empty while much is left of totals."""
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
        """Return the least median usage of any point; asked several times in each trial."""
        last, count = self._least, self.learner.n_observations
        if last is None or last[0] is not expected or last[1] != count:
            n_others = int(min(_N_OTHER, count_within(expected, _SECONDS)))
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
        space = {name: self.learner.space[name] for name in points[-1]}
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
        expected, points = self._reliable, self._known_points(_RECENT_BOUNDS)
        if fixed and likely_completions(fixed, points) == [fixed]:
            points = [fixed]
        elif not points:
            points = list(getattr(expected, "points", ({},)))[-_RECENT_BOUNDS:]
        found: list[float] = []
        if expected is not None:
            with contextlib.suppress(KeyError):  # a function of a parameter that it lacks
                intervals = [expected.intervals(point) for point in points]
                found = [each["wall_time"].median for each in intervals if "wall_time" in each]
        if not found:
            completed = [t.duration for t in trials if t.state == TrialState.COMPLETE]
            found = [duration.total_seconds() for duration in completed if duration is not None]
        return float(np.median(found)) if found else None

    def bounds_at(self, forecast: Forecast, point: Mapping[str, Any]) -> dict[str, float]:
        """Return upper bounds of the usage at a point; empty while it is partial or unknown."""
        if forecast.expected is None or not forecast.is_reliable:
            return {}
        past = self._recent_points()
        if not point or (past and likely_completions(point, past) != [point]):
            return {}
        if not self.is_complete(point):
            return {}
        return _upper_bounds(forecast.expected, [point])

    def learn(self, trials: Sequence[FrozenTrial]) -> Footprint | None:
        """Return what is learned after all trials of the study, None while nothing is."""
        try:
            return self.learner.learn(trials)
        except (ArithmeticError, ValueError, TypeError, np.linalg.LinAlgError) as fault:
            # The study goes on without a projection.
            _logger.warning(f"The footprint could not be learned: {fault!r}.")
            return None

    def _has_enough(self) -> bool:
        # While nearly all trials were stopped, nothing shows that others would not be.
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

    def _completed_points(self) -> list[Mapping[str, Any]]:
        return [row.params for row in self.learner.observations[-_RECENT:] if row.is_complete]


def _upper_bounds(
    expected: BaseFootprint, points: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return the largest upper bound over points, by resource."""
    margin = 1.0 if isinstance(expected, UserFootprint) else _BOUND_MARGIN
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
    """Return the margins of a footprint by what trials that completed used, oldest first.

    A user's function does not say how uncertain it is: what trials used beyond it is added.
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


def medians_of(
    expected: BaseFootprint, points: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Return the median usage at points, by resource, shape ``(n_points,)``."""
    if isinstance(expected, (Footprint, CalibratedFootprint)):
        return {name: each.quantile(0.5) for name, each in expected.expected(points).items()}
    rows = [expected.intervals(point) for point in points]
    names = {name for row in rows for name in row}
    return {n: np.array([row[n].median if n in row else 0.0 for row in rows]) for n in names}
