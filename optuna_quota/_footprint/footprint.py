"""The public footprint: the expected usage of a point, learned from trials as they finish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import math
import threading
from typing import Any, Protocol

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from optuna_quota._footprint.features import Features
from optuna_quota._footprint.fit import ChainedModel, fit_resource_models, Model
from optuna_quota._footprint.observations import (
    dump_json,
    load_json,
    MAX_OBSERVATIONS,
    Observation,
    read_observation,
    select_observations,
)
from optuna_quota._footprint.predictive import Predictive
from optuna_quota._footprint.resource_model import ResourceModel
from optuna_quota._limits import Limits
from optuna_quota._records import Interval, ISOLATION
from optuna_quota._resources import get_resource
from optuna_quota._table import DataFrame, float_frame
from optuna_quota._units import check_confidence


# The model is refreshed when the number of trials has grown by this share, and its hyperparameters
# are fitted again at the larger share, so that the cost per trial falls as the study grows. With
# few trials, each one refreshes it.
_REFRESH_SHARE = 0.1
_SEARCH_SHARE = 0.25
_FEW = 8
# A trial whose usage was outside of its projected interval counts as this many.
_SURPRISE_WEIGHT = 5.0
# The study's own trials replace those of an earlier study.
_MAX_TRANSFERRED = 60
# A parameter that is 1 for trials of the earlier study and missing for all others: the difference
# between the machines is learned as the effect of this parameter.
_TRANSFERRED = "quota:earlier"


class BaseFootprint(Protocol):
    """The expected usage of each resource at a point."""

    @property
    def points(self) -> Sequence[Mapping[str, Any]]:
        """Known points, which a projection without a search space draws from."""

    def intervals(self, params: Mapping[str, Any]) -> dict[str, Interval]:
        """Return lower, median and upper of each resource at a point, in SI base units."""

    def breaches(
        self, points: Sequence[Mapping[str, Any]], limits: Limits
    ) -> dict[str, np.ndarray]:
        """Return the probability of each breach at points, by resource, ``(n_points,)``."""

    def draw(
        self, points: Sequence[Mapping[str, Any]], count: int, seed: int, ahead: int = 1
    ) -> dict[str, np.ndarray]:
        """Return joint draws of each resource at points, shape ``(count, n_points)``."""

    def predict(self, params: Mapping[str, Any]) -> DataFrame:
        """Return what a point is expected to use.

        Args:
            params: Value of each hyperparameter; a missing one counts as unknown.

        Returns:
            A DataFrame indexed by resource with columns ``lower``, ``median`` and ``upper``, in SI
            base units.
        """
        rows = {name: vars(each) for name, each in self.intervals(params).items()}
        return float_frame(rows, ("lower", "median", "upper"), index="resource")

    def probability(self, params: Mapping[str, Any], limits: Limits) -> float:
        """Return the probability that a point breaches any of the limits.

        Times rise and fall together, so the likeliest breach among them counts; memory is taken
        as independent of them. A resource without any data is not expected to be breached.
        """
        breaches = self.breaches([params], limits)
        return joint_breach({name: float(each[0]) for name, each in breaches.items()})


@dataclass(frozen=True)
class Contents:
    """The parts of a footprint: the features, the trials, and the model of each resource."""

    features: Features
    observations: tuple[Observation, ...]
    models: Mapping[str, Model]
    confidence: float


class Footprint(BaseFootprint):
    """The expected usage of each resource at a point, learned from earlier trials.

    Built by :meth:`fit`, by ``analyze(study).footprint`` or by :meth:`from_json`; pass it to
    :class:`~optuna_quota.QuotaSampler` or :func:`~optuna_quota.project`.

    Example:

        .. code-block:: python

            footprint = analyze(earlier_study).footprint
            print(footprint.predict({"layers": 4, "width": 512}))
            footprint.probability({"layers": 4, "width": 512}, Limits(memory="2GiB"))

    Each resource is a Gaussian process over the logarithms of the hyperparameters, see
    ``_footprint/resource_model.py``; trials ended by their limits enter as lower bounds, those
    that something else stopped as a part of unknown size.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self.confidence = contents.confidence
        self._last: tuple[dict[str, Any], dict[str, Predictive]] | None = None

    @classmethod
    def fit(
        cls,
        rows: Sequence[Observation],
        *,
        confidence: float = 0.95,
        start: Footprint | None = None,
        refit: bool = True,
    ) -> Footprint:
        """Return a footprint fitted to trials.

        Args:
            rows: One observation a trial, oldest first. Of many, about a hundred are selected.
            confidence: One-sided: ``upper`` is exceeded with probability ``1 - confidence``.
            start: A footprint of fewer of these trials, to start the numerical search from.
            refit: False to keep the hyperparameters of ``start`` where possible, which is much
                cheaper.

        Raises:
            ValueError: If ``confidence`` is not above 0.5 and below 1.
        """
        check_confidence(confidence)
        rows = select_observations(rows)
        features = Features.of([row.distributions for row in rows])
        columns = features.encode([row.params for row in rows])
        known = start.contents if start is not None else None
        models = known.models if known is not None and known.features == features else {}
        models = fit_resource_models(columns, rows, models, refit, features.slopes)
        return cls(Contents(features, tuple(rows), models, confidence))

    @classmethod
    def from_json(cls, text: str) -> Footprint:
        """Return the footprint that :meth:`to_json` wrote, fitted again to the same trials.

        Raises:
            ValueError: If the text is no footprint, of an unknown version, or damaged.
        """
        rows, confidence = load_json(text)
        return cls.fit(rows, confidence=confidence)

    def to_json(self) -> str:
        """Return the trials that the footprint was fitted to as versioned JSON text."""
        found = self._contents
        return dump_json(found.features, found.observations, found.confidence)

    @property
    def resources(self) -> tuple[str, ...]:
        """The resources that were measured in any trial."""
        return tuple(self._contents.models)

    @property
    def points(self) -> tuple[Mapping[str, Any], ...]:
        """The points that the footprint was fitted to."""
        return tuple(each.params for each in self._contents.observations)

    @property
    def contents(self) -> Contents:
        """The parts of the footprint."""
        return self._contents

    def intervals(self, params: Mapping[str, Any]) -> dict[str, Interval]:
        """Return what :meth:`predict` returns, as plain values by resource."""
        expected = self.expected([params])
        return {name: each.intervals(self.confidence)[0] for name, each in expected.items()}

    def breaches(
        self, points: Sequence[Mapping[str, Any]], limits: Limits
    ) -> dict[str, np.ndarray]:
        """Return the probability of each breach at points, by resource, ``(n_points,)``."""
        expected = self.expected(points)
        return {
            name: expected[name].above(limit)
            for name, limit in limits.amounts().items()
            if name in expected
        }

    def expected(self, points: Sequence[Mapping[str, Any]]) -> dict[str, Predictive]:
        """Return the predictive distribution of each resource at points."""
        last = self._last
        if len(points) == 1 and last is not None and last[0] == points[0]:
            return last[1]
        columns, models = self._contents.features.encode(points), self._contents.models
        found: dict[str, Predictive] = {}
        for name, model in models.items():
            if isinstance(model, ChainedModel):
                found[name] = model.predict(columns, found[model.on])
            else:
                found[name] = model.predict(columns)
        if len(points) == 1:
            # The same point is predicted when it is admitted and when its row is written.
            self._last = (dict(points[0]), found)
        return found

    def draw(
        self, points: Sequence[Mapping[str, Any]], count: int, seed: int, ahead: int = 1
    ) -> dict[str, np.ndarray]:
        """Return joint draws of each resource at points, shape ``(count, n_points)``.

        The models' uncertainty is drawn once for all points of a draw, so that it does not cancel
        out in sums. A drift of the machine's speed affects the next trials and fades later: the
        speed is the mean over the next ``ahead`` trials.
        """
        columns = self._contents.features.encode(points)
        # Times share their random numbers, since they rise and fall together.
        return {
            name: model.draw(
                columns, count, np.random.default_rng([seed, int(get_resource(name).peak)]), ahead
            )
            for name, model in self._contents.models.items()
        }

    def __repr__(self) -> str:
        names = ", ".join(self.resources) or "nothing yet"
        return f"<Footprint of {names} from {len(self.points)} points>"


def joint_breach(breaches: Mapping[str, float]) -> float:
    """Return the probability of any breach at one point from those of each resource."""
    times = [p for name, p in breaches.items() if not get_resource(name).peak]
    peaks = [p for name, p in breaches.items() if get_resource(name).peak]
    return 1 - math.prod((1 - p for p in peaks), start=1 - max(times, default=0.0))


class Learner:
    """Fits a footprint to the trials of one study as they finish.

    Starts from ``prior``, the footprint of an earlier study, if given.

    Attributes:
        observations: This study's trials with known usage, oldest first.
        isolated: Whether the newest trial that ran did so in a process of its own.
        n_uncensored: Number of this study's trials that completed without any lower bound.
    """

    def __init__(self, prior: Footprint | None = None, *, confidence: float = 0.95) -> None:
        self._prior = prior
        self._confidence = confidence
        self.observations: list[Observation] = []
        self._n_read = 0
        self._unfinished: list[int] = []
        self._footprint: Footprint | None = None
        # Weights of the trials since the last fit, and since the last search.
        self._new_since_fit = 0.0
        self._new_since_search = 0.0
        self._n_fitted = 0
        self._n_searched = 0
        self._lock = threading.Lock()
        self._space: dict[str, BaseDistribution] = {}
        # By parameter, which observation was the last to change its distribution.
        self._changed: dict[str, int] = {}
        self.isolated = False
        self.n_uncensored = 0

    @property
    def n_observations(self) -> int:
        """Number of this study's trials with known usage."""
        return len(self.observations)

    @property
    def space(self) -> Mapping[str, BaseDistribution]:
        """The newest distribution of each parameter."""
        return dict(self._space)

    def varying(self, count: int) -> frozenset[str]:
        """Return the parameters whose distribution differs among the newest observations."""
        first = max(self.n_observations - count, 0)
        return frozenset(name for name, index in dict(self._changed).items() if index > first)

    def learn(self, trials: Sequence[FrozenTrial], *, fresh: bool = False) -> Footprint | None:
        """Return the footprint learned from all trials, None without any.

        Args:
            trials: All trials of the study by number, as ``study.get_trials(deepcopy=False)``.
            fresh: Whether to fit the newest trials even if they are few.
        """
        with self._lock:
            self._read(trials)
            if self._new_since_fit > (0.0 if fresh else _REFRESH_SHARE * self._n_fitted):
                self._footprint = self._fit()
            return self._footprint or self._prior

    def _read(self, trials: Sequence[FrozenTrial]) -> None:
        unread = [*self._unfinished, *range(self._n_read, len(trials))]
        self._n_read, self._unfinished = max(self._n_read, len(trials)), []
        for index in unread:
            # Another thread may have been faster, with newer rows.
            if index >= len(trials) or not trials[index].state.is_finished():
                self._unfinished.append(index)
                continue
            isolation = trials[index].user_attrs.get(ISOLATION)
            if isolation is not None:
                # Rejected trials did not run.
                self.isolated = isolation == "process"
            found = read_observation(trials[index])
            if found is not None:
                for name, each in found.distributions.items():
                    if self._space.get(name, each) != each:
                        self._changed[name] = self.n_observations
                self.observations.append(found)
                self.n_uncensored += found.is_complete and not found.censored
                self._space.update(found.distributions)
                weight = _SURPRISE_WEIGHT if found.is_surprise else 1.0
                self._new_since_fit += weight
                self._new_since_search += weight

    def _fit(self) -> Footprint:
        own, n = select_observations(self.observations), len(self.observations)
        rows = [*self._transferred(MAX_OBSERVATIONS - len(own)), *own]
        search = n < _FEW or self._new_since_search > _SEARCH_SHARE * self._n_searched
        if search:
            self._n_searched, self._new_since_search = n, 0.0
        # Before the fit, so that a failing fit is not repeated with each trial.
        self._n_fitted, self._new_since_fit = n, 0.0
        return Footprint.fit(
            rows, confidence=self._confidence, start=self._footprint, refit=search
        )

    def _transferred(self, room: int) -> list[Observation]:
        if self._prior is None or room <= 0:
            return []
        return select_observations(
            transferred_observations(self._prior), min(room, _MAX_TRANSFERRED)
        )


def transferred_observations(footprint: Footprint) -> list[Observation]:
    """Return the trials of an earlier study's footprint, marked as such.

    Peaks of its stopped trials are values or lower bounds as its models decided.
    """
    contents = footprint.contents
    space = {**contents.features.distributions(), _TRANSFERRED: FloatDistribution(0.0, 1.0)}
    settled = {
        name
        for name, model in contents.models.items()
        if isinstance(model, ResourceModel) and model.data.bounded_peaks
    }
    return [
        Observation(
            params={**each.params, _TRANSFERRED: 1.0},
            distributions=space,
            usage=each.usage,
            censored=each.censored | (each.maybe_censored & settled),
            partial=each.partial,
        )
        for each in contents.observations
    ]
