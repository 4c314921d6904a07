"""Interrupt a trial of the main thread that is over a limit and does not check: best effort.

A signal to the main thread ends sleeping, locking and reading within a millisecond, but has to
wait for a running call into C. SIGURG is used: a process that does not handle it ignores it, so
that a signal that comes too late is harmless.
"""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any, TYPE_CHECKING

from optuna_quota import _optuna
from optuna_quota._enforcement.check import raise_breached
from optuna_quota._metering import Verdict
from optuna_quota._resources import Breach


if TYPE_CHECKING:
    from optuna_quota._metering import TrialMonitor


_logger = logging.getLogger("optuna.quota.interrupt")

# Seconds until the next attempt when the signal came while Optuna's own code ran.
_RETRY_AFTER = 0.005


class Interrupter:
    """Raises :class:`~optuna_quota.LimitBreached` inside the objective at a breach.

    Args:
        monitor: The trial's monitor.
    """

    def __init__(self, monitor: TrialMonitor) -> None:
        self._monitor = monitor
        self._breach: Breach | None = None
        self._before: Any = None
        self._thread = threading.main_thread().ident

    @classmethod
    def arm(cls, monitor: TrialMonitor) -> Interrupter | None:
        """Return one that is active, None outside the main thread and without the signal."""
        if not hasattr(signal, "SIGURG"):
            _logger.warning("Trials can't be interrupted on this system: it has no SIGURG.")
            return None
        if threading.current_thread() is not threading.main_thread():
            return None
        interrupter = cls(monitor)
        interrupter._before = signal.signal(signal.SIGURG, interrupter._handle)
        monitor.on_breach(interrupter._send)
        return interrupter

    def disarm(self) -> None:
        """Restore the signal's handler, if this is the main thread."""
        if threading.current_thread() is threading.main_thread() and self._before is not None:
            signal.signal(signal.SIGURG, self._before)
            self._before = None

    def _send(self, breach: Breach) -> None:
        self._breach = breach
        if not self._monitor.closed and self._thread is not None:
            signal.pthread_kill(self._thread, signal.SIGURG)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        breach, monitor = self._breach, self._monitor
        if breach is None:
            if callable(self._before):
                self._before(signum, frame)
            return
        if monitor.closed or monitor.verdict is not None or monitor.isolation == "process":
            return
        if not _optuna.in_objective(frame):
            timer = threading.Timer(_RETRY_AFTER, self._send, (breach,))
            timer.daemon = True
            timer.start()
            return
        monitor.verdict = Verdict("terminated", breach.reason, breach)
        raise_breached(breach)
