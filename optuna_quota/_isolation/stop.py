"""The polite stop, as it reaches the objective: an exception in its main thread."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
from typing import Any
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from optuna_quota._resources import Breach


# A real-time signal has no meaning of its own: SIGTERM, SIGINT and SIGUSR1 stay what they are to
# any process, and a handler that a library installs for them is not in the way.
STOP_SIGNAL: int = signal.SIGRTMAX - 5 if hasattr(signal, "SIGRTMAX") else signal.SIGTERM


class PoliteStop:
    """Raises :class:`~optuna_quota.LimitBreached` when the supervisor says so, by a signal.

    The supervisor sends the breach before it sends the signal. While a message is
    being exchanged, the exception waits: an exchange that was cut off would leave the connection
    out of step. For that, exchange within ``with stop:``.

    Args:
        link: The connection to the supervisor, non-blocking; None where there is none, so that
            every SIGTERM is taken for a stop.

    Attributes:
        told: Whether the objective was told to stop.
    """

    def __init__(self, link: socket.socket | None) -> None:
        self.told = False
        self._over = False
        self._link = link
        self._held = 0
        self._pending: Breach | KeyboardInterrupt | None = None
        self._signalled = False
        self._pid = os.getpid()
        self._main = threading.main_thread().ident

    def install(self) -> None:
        """Listen for the signal."""
        self._numbers = [signal.SIGTERM if self._link is None else STOP_SIGNAL]
        signal.signal(self._numbers[0], self._on_signal)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._uninstall)

    def listen_for_cpu_time(self) -> None:
        """Listen for the kernel's signal that the CPU time is used up, where it limits that."""
        if hasattr(signal, "SIGXCPU"):
            self._numbers.append(signal.SIGXCPU)
            signal.signal(signal.SIGXCPU, self._on_cpu)

    def _uninstall(self) -> None:
        """Leave a process that the objective forks the signals of an ordinary one."""
        for number in self._numbers:
            if signal.getsignal(number) in (self._on_signal, self._on_cpu):
                signal.signal(number, signal.SIG_DFL)

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

    def end(self) -> None:
        """Raise nothing any more: the objective has ended."""
        self._over = True

    def _on_signal(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            return
        if self._link is not None:
            try:
                self._pending = pickle.loads(self._link.recv(1 << 16))
            except (OSError, EOFError):
                # Somebody else's, or the second of two that came as one.
                return
        self._tell()

    def _on_cpu(self, signum: int, frame: Any) -> None:
        # The backstop has fired once; the kernel's hard limit follows if this is not heeded.
        self._tell()

    def _tell(self) -> None:
        if self._over:
            return
        self.told = True
        if self._held:
            self._signalled = True
        else:
            self._raise()

    def _raise(self) -> None:
        from optuna_quota.exceptions import LimitBreached

        breach = self._pending
        if isinstance(breach, KeyboardInterrupt):
            # A signal to all processes of a job has reached it already, and it is at its cleanup.
            if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                raise breach
            return
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
