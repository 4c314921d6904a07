"""Ray Tune's search ends with the quota, and waits where running trials hold what is left."""

from __future__ import annotations

from collections.abc import Callable
import functools
import logging
import sys
import time
from typing import Any
from weakref import WeakKeyDictionary

from optuna.trial import TrialState

from optuna_quota._ledger import no_waiting
from optuna_quota.exceptions import QuotaExhausted, TrialRejected


_logger = logging.getLogger("optuna.quota.sampler")

_MODULE = "ray.tune.search.optuna.optuna_search"
_FINISHED = "FINISHED"
# Seconds until another `ask`, if no trial of the search ends before: each leaves a row.
_PAUSE = 5.0
# Rejected points in a row after which a search ends.
_MOST_REJECTED = 20


def adapt_ray_tune() -> None:
    """Let ``OptunaSearch``, if it is loaded, take an exhausted quota for the end of the search.

    Ray asks and tells in one thread, which must not wait in ``ask``, and ends the whole run on an
    error. What ``suggest`` returns instead is Ray's protocol: None for "not now", or "FINISHED".
    """
    search = getattr(sys.modules.get(_MODULE), "OptunaSearch", None)
    if search is not None and not hasattr(search.suggest, "__wrapped__"):
        search.suggest = _within_quota(search.suggest)


def _within_quota(suggest: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    refused: WeakKeyDictionary[Any, tuple[int, float]] = WeakKeyDictionary()
    n_rejected: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    @functools.wraps(suggest)
    def suggest_within_quota(self: Any, trial_id: str) -> Any:
        n_told, last = len(self._completed_trials), refused.get(self)
        if last is not None and last[0] == n_told and time.monotonic() < last[1]:
            return None
        try:
            with no_waiting():
                point = suggest(self, trial_id)
        except QuotaExhausted as error:
            if error.temporary:
                refused[self] = n_told, time.monotonic() + _PAUSE
                return None
            _logger.warning(f"{error} The search ends here: no further trial is started.")
            return _FINISHED
        except TrialRejected as error:
            trial = self._ot_trials.pop(trial_id, None)
            if trial is not None:
                self._ot_study.tell(trial, state=TrialState.PRUNED)
            n_rejected[self] = n_rejected.get(self, 0) + 1
            if n_rejected[self] < _MOST_REJECTED:
                return None
            _logger.warning(f"The search ends after {n_rejected[self]} rejected points. {error}")
            return _FINISHED
        n_rejected.pop(self, None)
        return point

    return suggest_within_quota
