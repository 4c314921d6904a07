"""The polite stop, as it reaches the objective: an exception in its main thread."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from typing import Any
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from optuna_quota._resources import Breach


class PoliteStop:
    """Raises :class:`~optuna_quota.LimitBreached` when the supervisor says so, by SIGTERM.

    The supervisor writes the breach into a pipe before it sends the signal; a SIGTERM without one
    is somebody else's and does what it always does. While a message is being exchanged, the
    exception waits: an exchange that was cut off would leave the connection out of step. For
    that, exchange within ``with stop:``.

    Args:
        notice: The pipe's descriptor, non-blocking; None where there is none, so that every
            SIGTERM is taken for the supervisor's.
    """

    def __init__(self, notice: int | None) -> None:
        self._notice = notice
        self._held = 0
        self._pending: Breach | None = None
        self._signalled = False
        self._main = threading.main_thread().ident

    def install(self) -> None:
        """Listen for the signal, and for the kernel's own on CPU time."""
        signal.signal(signal.SIGTERM, self._on_signal)
        if hasattr(signal, "SIGXCPU"):
            signal.signal(signal.SIGXCPU, self._on_cpu)

    def __enter__(self) -> None:
        """Keep the exception back within the block."""
        if threading.get_ident() == self._main:
            self._held += 1

    def __exit__(self, *_: object) -> None:
        """Raise what was kept back."""
        if threading.get_ident() != self._main:
            return
        self._held -= 1
        if self._signalled and not self._held:
            self._signalled = False
            self._raise()

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self._notice is not None:
            try:
                self._pending = pickle.loads(os.read(self._notice, 1 << 16))
            except (OSError, EOFError):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
                return
        if self._held:
            self._signalled = True
        else:
            self._raise()

    def _on_cpu(self, signum: int, frame: Any) -> None:
        # The backstop has fired once; the kernel's hard limit follows if this is not heeded.
        if self._held:
            self._signalled = True
        else:
            self._raise()

    def _raise(self) -> None:
        from optuna_quota.exceptions import LimitBreached

        breach = self._pending
        if breach is None:
            # The kernel knows no figures; the study's process adds them.
            raise LimitBreached("The trial used up its CPU time.", resource="cpu_time")
        raise LimitBreached(
            breach.reason,
            resource=breach.resource,
            limit=breach.limit,
            observed=breach.observed,
            seconds=breach.seconds,
        )
