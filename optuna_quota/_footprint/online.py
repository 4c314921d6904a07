"""Learns the footprint of a running study, starting from an earlier study's if there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import threading
from typing import TYPE_CHECKING

from optuna_quota._footprint.footprint import Footprint
from optuna_quota._footprint.observations import (
    MAX_OBSERVATIONS,
    Observation,
    read_observation,
    select_observations,
)
from optuna_quota._footprint.resource_model import ResourceModel
from optuna_quota._records import ISOLATION


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial


# Refresh the model when the new trials come to this share of those in it, and search its
# hyperparameters again at the larger share: so the cost per trial falls as the study grows. While
# there are few trials, each one counts.
_REFRESH_SHARE = 0.1
_SEARCH_SHARE = 0.25
_FEW = 8
# A trial whose usage was outside of its projected interval counts as this many.
_SURPRISE_WEIGHT = 5.0
# The study's own trials take the place of an earlier study's.
_MAX_TRANSFERRED = 60
# A parameter that is 1 for trials of the earlier study and missing for all others: how much faster
# or larger the other machine was is learned as the effect of one more parameter.
_TRANSFERRED = "quota:earlier"


class Learner:
    """Fits a footprint to the trials of one study as they finish, reading each once.

    It starts from ``prior``, the footprint of an earlier study.

    Attributes:
        observations: This study's trials with known usage, oldest first.
        isolated: Whether the newest trial ran in a process of its own.
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
        self.isolated = False
        self.n_uncensored = 0

    @property
    def n_observations(self) -> int:
        """Number of this study's trials with known usage."""
        return len(self.observations)

    @property
    def space(self) -> Mapping[str, BaseDistribution]:
        """The newest distribution of each parameter that any of these trials had."""
        return dict(self._space)

    def learn(self, trials: Sequence[FrozenTrial], *, fresh: bool = False) -> Footprint | None:
        """Return the footprint after all trials, None while nothing is known.

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
            # Another thread may have come here first with newer rows.
            if index >= len(trials) or not trials[index].state.is_finished():
                self._unfinished.append(index)
                continue
            self.isolated = trials[index].user_attrs.get(ISOLATION) == "process"
            found = read_observation(trials[index])
            if found is not None:
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
        # Before the fit, so that one that fails is not tried again with every trial.
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

    Whether peaks of its stopped trials are lower bounds stays as its models decided.
    """
    from optuna.distributions import FloatDistribution

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
