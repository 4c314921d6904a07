"""Finds and ends the rows of workers that are gone."""

from __future__ import annotations

from collections.abc import Callable
import threading
from weakref import WeakMethod

from optuna_quota._ledger.accounts import Accounts
from optuna_quota._ledger.accounts import Snapshot
from optuna_quota._ledger.burial import bury
from optuna_quota._ledger.leases import Death
from optuna_quota._ledger.leases import Leases
from optuna_quota._ledger.worker import is_alive


# Seconds between questions to a storage that has heartbeats: the answer costs a query.
_ASK_EVERY = 5.0


class Undertaker:
    """Finds and ends the rows of workers that are gone, whenever rows are read.

    Args:
        accounts: The study's accounts.
        lease: Seconds; see :class:`Leases`.
        on_failed: Called with the id of each trial that was ended.
    """

    def __init__(self, accounts: Accounts, lease: float, on_failed: Callable[[int], None]) -> None:
        self._accounts = accounts
        # A method of whom this belongs to: nothing is to wait for the garbage collector.
        self._on_failed = WeakMethod(on_failed)
        self._leases = Leases(lease, is_alive)
        self._lock = threading.Lock()
        self._asked: float | None = None

    def look(self) -> Snapshot:
        """Read the rows, end those whose workers are gone, and return what is left."""
        seen = self._accounts.read()
        return self._accounts.read() if self.tend(seen) else seen

    def tend(self, seen: Snapshot) -> bool:
        """End rows whose workers are gone among those read; return whether there were any."""
        now = self._accounts.clock.monotonic()
        with self._lock:
            deaths = self._leases.deaths(seen.open, now, self._stale(now))
        if deaths:
            self.bury(*deaths)
        return bool(deaths)

    def bury(self, *deaths: Death) -> None:
        """End rows."""
        on_failed = self._on_failed()
        for trial_id in bury(self._accounts.rows, deaths, self._accounts.clock.time()):
            if on_failed is not None:
                on_failed(trial_id)

    def _stale(self, now: float) -> list[int]:
        if self._asked is not None and now - self._asked < _ASK_EVERY:
            return []
        self._asked = now
        return self._accounts.rows.stale()
