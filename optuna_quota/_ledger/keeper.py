"""One thread that asks for more, and shows that this worker lives, while its trials run."""

from __future__ import annotations

from collections.abc import Callable
import logging
import threading
import time
from weakref import finalize
from weakref import WeakMethod


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
