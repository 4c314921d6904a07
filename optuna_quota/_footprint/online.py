"""What an earlier study teaches the next one."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import threading
from typing import Any
from typing import TYPE_CHECKING

from optuna_quota._footprint.features import Feature
from optuna_quota._footprint.features import NumericFeature
from optuna_quota._footprint.footprint import Footprint
from optuna_quota._footprint.observations import CAP
from optuna_quota._footprint.observations import chosen
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.observations import read_observation
from optuna_quota._records import ISOLATION


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial


# A column that is 1 for trials of the earlier study and 0, as what is missing, for all others: how
# much faster or larger the other machine was is learned as the effect of one more parameter.
_EARLIER = "quota:earlier"


def transferred_observations(footprint: Footprint) -> list[Observation]:
    """Return what a footprint was learned from, marked as of an earlier study."""
    from optuna.distributions import FloatDistribution

    contents = footprint.contents
    space = {part.name: distribution_of(part) for part in contents.features.parts}
    space[_EARLIER] = FloatDistribution(0.0, 1.0)
    return [
        Observation(
            params={**point.params, _EARLIER: 1.0},
            distributions=space,
            usage=point.usage,
            censored=point.censored,
        )
        for point in contents.points
    ]


def distribution_of(part: Feature) -> BaseDistribution:
    """Return a distribution that gives the same columns."""
    from optuna.distributions import CategoricalDistribution
    from optuna.distributions import FloatDistribution
    from optuna.distributions import IntDistribution

    found: Any
    if not isinstance(part, NumericFeature):
        found = CategoricalDistribution(part.choices)
    elif part.scale == "log1p":
        found = IntDistribution(int(part.low), int(part.high))
    else:
        found = FloatDistribution(part.low, part.high, log=part.scale == "log")
    return found  # type: ignore[no-any-return]  # one of Optuna's


# The model takes in new trials when they come to this share of those that it knows, and searches
# for its hyperparameters anew at this larger one: what is learned a trial costs the less the more
# is known. While there are few, each one counts.
_REFRESH = 0.1
_SEARCH = 0.25
_FEW = 8
# A trial whose usage was not in the interval that was projected for it says more than others.
_SURPRISE = 5.0
# What an earlier study says enters beside this study's own trials, in a column that tells them
# apart, and is crowded out by them.
_EARLIER_POINTS = 60


class Learner:
    """What the trials of one study, and maybe of an earlier one, teach of its footprint.

    Args:
        earlier: A footprint to start from.
        confidence: One-sided, of the bounds.

    Attributes:
        isolated: Whether the trial read last ran in a process of its own.
        n_uncensored: Number of this study's trials that were not stopped early.
    """

    def __init__(self, earlier: Footprint | None = None, *, confidence: float = 0.95) -> None:
        self._earlier = earlier
        self._confidence = confidence
        self._rows: list[Observation] = []
        self._next = 0
        self._open: list[int] = []
        self._footprint: Footprint | None = None
        self._news = 0.0
        self._news_since_search = 0.0
        self._fitted = 0
        self._searched = 0
        self._lock = threading.Lock()
        self._space: dict[str, BaseDistribution] = {}
        self.isolated = False
        self.n_uncensored = 0

    @property
    def n_observations(self) -> int:
        """Number of this study's trials that told something."""
        return len(self._rows)

    @property
    def observations(self) -> Sequence[Observation]:
        """What this study's trials told, oldest first."""
        return self._rows

    @property
    def space(self) -> Mapping[str, BaseDistribution]:
        """The newest distribution of each parameter that any of these trials had."""
        return dict(self._space)

    def learn(self, trials: Sequence[FrozenTrial], *, fresh: bool = False) -> Footprint | None:
        """Return the footprint after all trials, None while nothing is known.

        Args:
            trials: All trials of the study by number, as ``study.get_trials(deepcopy=False)``.
            fresh: Whether the newest trials must be in it, though they tell nothing new.
        """
        with self._lock:
            self._read(trials)
            if self._news > (0.0 if fresh else _REFRESH * self._fitted):
                self._footprint = self._fit()
            return self._footprint or self._earlier

    def _read(self, trials: Sequence[FrozenTrial]) -> None:
        waiting = [*self._open, *range(self._next, len(trials))]
        self._next, self._open = max(self._next, len(trials)), []
        for index in waiting:
            # Another thread may have read the rows later and come here first.
            if index >= len(trials) or not trials[index].state.is_finished():
                self._open.append(index)
                continue
            self.isolated = trials[index].user_attrs.get(ISOLATION) == "process"
            row = read_observation(trials[index])
            if row is not None:
                self._rows.append(row)
                self.n_uncensored += not row.censored
                self._space.update(row.distributions)
                weight = _SURPRISE if row.is_surprise else 1.0
                self._news += weight
                self._news_since_search += weight

    def _fit(self) -> Footprint:
        own, n = [self._rows[i] for i in chosen(self._rows)], len(self._rows)
        rows = [*self._earlier_rows(CAP - len(own)), *own]
        due = n < _FEW or self._news_since_search > _SEARCH * self._searched
        if due:
            self._searched, self._news_since_search = n, 0.0
        # Whatever comes of it: what can't be fitted is not tried again with every trial.
        self._fitted, self._news = n, 0.0
        return Footprint.fit(rows, confidence=self._confidence, start=self._footprint, refit=due)

    def _earlier_rows(self, room: int) -> list[Observation]:
        if self._earlier is None or room <= 0:
            return []
        rows = transferred_observations(self._earlier)
        return [rows[i] for i in chosen(rows, min(room, _EARLIER_POINTS))]
