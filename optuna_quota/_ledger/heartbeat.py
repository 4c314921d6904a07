"""One trial of this process that runs under the ledger."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
import logging
import threading
import time
from typing import TYPE_CHECKING
from weakref import finalize
from weakref import WeakMethod

from optuna_quota._ledger.protocol import DEVICE
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._metering import extension_threshold
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota
from optuna_quota._resources import Usage


if TYPE_CHECKING:
    from optuna_quota._metering import TrialMonitor


@dataclass
class Running:
    """One trial of this process that runs under the ledger.

    Attributes:
        trial_id: Its id in the storage.
        number: Its number.
        reservation: What its row says.
        limits: Its limits.
        deadline: Seconds from its start to the end of the study's clock time.
        thread: The thread whose ``optimize`` runs it; None when it was asked for by hand.
        asker: The thread that asked for it by hand; None under ``optimize``.
        watch: Its metering.
        start: When it began, pauses of this process counted.
    """

    trial_id: int
    number: int
    reservation: Reservation
    limits: Limits
    deadline: float | None = None
    thread: int | None = None
    asker: int | None = None
    watch: TrialMonitor | None = None
    start: float | None = None

    @property
    def began(self) -> float | None:
        """When it would have begun, had this process not been stopped since then."""
        if self.start is None or self.watch is None:
            return self.start
        return self.start + self.watch.paused

    @property
    def left(self) -> Mapping[str, float]:
        """What it may use in all, by resource."""
        granted = self.reservation.granted
        left = {k: v for k, v in granted.items() if k != "n_trials" and not k.startswith(DEVICE)}
        if self.deadline is not None:
            left["wall_time"] = self.deadline
        return left

    def low(self, usage: Usage | None, quota: Quota) -> dict[str, float]:
        """Return what it used of the resources that run low; of all, 0, if that is unknown."""
        granted = self.reservation.granted
        if usage is None:
            return dict.fromkeys(sorted(self.left.keys() & granted.keys()), 0.0)
        amounts = {name: usage.get(name) for name in granted}
        if "cost" in granted:
            amounts["cost"] = quota.price({name: usage.get(name) for name in quota.prices})
        known = ((name, amount) for name, amount in amounts.items() if amount is not None)
        return {n: amount for n, amount in known if amount >= extension_threshold(n) * granted[n]}


_logger = logging.getLogger("optuna.quota.ledger")

# Seconds that the thread outlives the last trial: starting one for each costs more than a trial's
# whole admission.
_LINGER = 2.0


class Keeper:
    """Calls for each kept trial what is due, from one daemon thread that ends with the last one.

    It does not hold on to whom it calls, and ends with it.

    Args:
        extend: Asks for more for a trial that runs low; a method.
        beat: Shows that a trial's worker lives; a method of the same object.
        interval: Seconds between beats.
    """

    def __init__(
        self, extend: Callable[[int], None], beat: Callable[[int], None], interval: float
    ) -> None:
        self._extend, self._beat = WeakMethod(extend), WeakMethod(beat)
        # Whoever it calls for may be freed by any thread, at any moment.
        finalize(extend.__self__, self._let_go_of_all).atexit = False  # type: ignore[attr-defined]
        self._interval = interval
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._beats: dict[int, float] = {}
        self._short: dict[int, None] = {}
        self._is_over = False

    def keep(self, trial_id: int) -> None:
        """Begin to care for a trial."""
        with self._wake:
            self._beats[trial_id] = time.monotonic() + self._interval
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._run, name="optuna-quota-ledger", daemon=True
                )
                self._thread.start()
            elif len(self._beats) == 1:
                self._wake.notify()

    def let_go(self, trial_id: int) -> None:
        """Care no longer for a trial."""
        with self._wake:
            self._beats.pop(trial_id, None)
            self._short.pop(trial_id, None)

    def _let_go_of_all(self) -> None:
        with self._wake:
            self._beats.clear()
            self._short.clear()
            self._is_over = True
            self._wake.notify()

    def call_for_more(self, trial_id: int) -> None:
        """Have more asked for, soon; returns at once."""
        with self._wake:
            if trial_id in self._beats:
                self._short[trial_id] = None
                self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._beats and not self._wake.wait_for(self._has_to_do, _LINGER):
                    self._thread = None
                    return
                if not self._short and self._beats:
                    self._wake.wait(max(0.0, min(self._beats.values()) - time.monotonic()))
                if self._is_over:
                    self._thread = None
                    return
                short, self._short = list(self._short), {}
                now = time.monotonic()
                due = [k for k, at in self._beats.items() if at <= now]
                self._beats.update(dict.fromkeys(due, now + self._interval))
            for trial_id in short:
                _call(self._extend(), trial_id)
            for trial_id in due:
                _call(self._beat(), trial_id)

    def _has_to_do(self) -> bool:
        return bool(self._beats) or self._is_over


def _call(action: Callable[[int], None] | None, trial_id: int) -> None:
    if action is None:
        return
    try:
        action(trial_id)
    except Exception as fault:  # noqa: BLE001 - any backend's own; other trials go on
        _logger.warning(
            f"The reservation of the trial with id {trial_id} could not be renewed: {fault!r}."
        )
