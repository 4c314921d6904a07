"""What QuotaPruner records of trials that nobody else settles."""

from __future__ import annotations

import threading
import time
from typing import Any
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from optuna_quota._enforcement.settle import describe
from optuna_quota._enforcement.settle import write
from optuna_quota._records import TrialRecord


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from optuna_quota._metering import TrialMonitor


# Notes may take a twentieth of a trial's time: a storage on disk needs milliseconds for one.
_SHARE = 20
# A memory this much higher than noted is noted at once.
_GROWTH = 1.1


class PrunerNotes:
    """Notes what a pruner saw of trials, seldom enough not to slow them.

    A pruner never learns that a trial has ended: what it knows of trials whose metering is closed
    it forgets when it takes on another one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: dict[Any, _Page] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything behind: what is metered is metered in this process."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start anew."""
        self.__init__()  # type: ignore[misc]  # nothing of the state survives on purpose

    def __len__(self) -> int:
        return len(self._pages)

    def adopt(self, watch: TrialMonitor) -> None:
        """Take on a new trial, and forget those that are over."""
        with self._lock:
            self._pages = {k: page for k, page in self._pages.items() if not page.watch.closed}
            self._pages[watch.key] = _Page(watch)

    def take(self, study: Study, trial: FrozenTrial, watch: TrialMonitor, *, ends: bool) -> None:
        """Note what is known of a trial when that is due, or when it is told to end."""
        page = self._pages.get(watch.key)
        if page is None or watch.settled:
            return
        if ends:
            watch.settled = True
            self._write(study, trial, page, TrialState.PRUNED)
        elif page.is_due():
            self._write(study, trial, page, None)

    def _write(
        self, study: Study, trial: FrozenTrial, page: _Page, state: TrialState | None
    ) -> None:
        watch, started = page.watch, time.perf_counter()
        usage = watch.usage()
        if state is None:
            record = TrialRecord(usage=usage, isolation=watch.isolation)
        else:
            record = describe(watch, usage, state)
        write(study, trial, record, {})
        page.noted(usage.memory, time.perf_counter() - started)


class _Page:
    """What is known of the notes on one trial."""

    def __init__(self, watch: TrialMonitor) -> None:
        self.watch = watch
        self._memory = 0.0
        self._next = 0.0

    def is_due(self) -> bool:
        """Return whether to note something now."""
        grown = (self.watch.usage().memory or 0.0) > self._memory * _GROWTH
        return grown or time.perf_counter() >= self._next

    def noted(self, memory: float | None, cost: float) -> None:
        """Put down that something was noted, and how many seconds that took."""
        self._memory = memory or 0.0
        self._next = time.perf_counter() + _SHARE * cost
