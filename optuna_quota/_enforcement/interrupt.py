"""Interrupts a trial of the main thread that is over a limit and does not ask: best effort.

A signal to the main thread ends sleeping, locking and reading within a millisecond; a running call
into C it has to wait for. SIGURG is used: a process that does not handle it ignores it, so that a
signal that comes too late does no harm.
"""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any
from typing import TYPE_CHECKING

from optuna_quota import _optuna
from optuna_quota._enforcement.check import raise_breached
from optuna_quota._metering import Verdict
from optuna_quota._resources import Breach


if TYPE_CHECKING:
    from optuna_quota._metering import TrialMonitor


_logger = logging.getLogger("optuna.quota.interrupt")

# Seconds until the next attempt when the signal came while Optuna itself was at work.
_PATIENCE = 0.005


class Interrupter:
    """Raises :class:`~optuna_quota.LimitBreached` inside the objective at a breach.

    Made in the main thread; elsewhere, and where the system has no such signal, it does nothing.

    Args:
        watch: The trial's metering.
    """

    def __init__(self, watch: TrialMonitor) -> None:
        self._watch = watch
        self._breach: Breach | None = None
        self._before: Any = None
        self._thread = threading.main_thread().ident

    @classmethod
    def arm(cls, watch: TrialMonitor) -> Interrupter | None:
        """Return one that is ready, None where trials can't be interrupted."""
        if not hasattr(signal, "SIGURG"):
            _logger.warning("This system has no signal to interrupt trials with.")
            return None
        if threading.current_thread() is not threading.main_thread():
            return None
        interrupter = cls(watch)
        interrupter._before = signal.signal(signal.SIGURG, interrupter._handle)
        watch.on_breach(interrupter._send)
        return interrupter

    def disarm(self) -> None:
        """Give the signal back; from the main thread."""
        if threading.current_thread() is threading.main_thread() and self._before is not None:
            signal.signal(signal.SIGURG, self._before)
            self._before = None

    def _send(self, breach: Breach) -> None:
        self._breach = breach
        if not self._watch.closed and self._thread is not None:
            signal.pthread_kill(self._thread, signal.SIGURG)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        breach = self._breach
        if breach is None:
            if callable(self._before):
                self._before(signum, frame)
            return
        watch = self._watch
        if watch.closed or watch.verdict is not None or watch.isolation == "process":
            return
        if not _optuna.in_objective(frame):
            timer = threading.Timer(_PATIENCE, self._send, (breach,))
            timer.daemon = True
            timer.start()
            return
        self._watch.verdict = Verdict("terminated", breach.reason, breach)
        raise_breached(breach)
