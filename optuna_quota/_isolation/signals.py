"""Signals of an isolated trial: the polite stop, signals to a whole job, and Ctrl-C."""

from __future__ import annotations

from collections.abc import Collection, Iterator
import contextlib
from dataclasses import dataclass
import faulthandler
import os
import pickle
import signal
import socket
import sys
import threading
from typing import Any

from optuna.exceptions import TrialPruned

from optuna_quota._isolation import linux
from optuna_quota._usage import Breach, breach_error
from optuna_quota.exceptions import LimitBreached


# A real-time signal, so that SIGTERM, SIGINT and SIGUSR1 keep their meaning, and handlers that a
# library installs for them don't interfere.
STOP_SIGNAL: int = signal.SIGRTMAX - 5 if hasattr(signal, "SIGRTMAX") else signal.SIGTERM
# Sent by the supervisor to a trial that waits to begin.
BEGIN = b"begin"
# The trial's last message to its supervisor, before a pickle: an objective may write to any file.
ENDED = b"ended"


class PoliteStop:
    """Raises :class:`~optuna_quota.LimitBreached` in the objective when the supervisor asks to.

    The supervisor sends the reason before the signal. Without a supervisor, every SIGTERM is a
    stop. Within ``with stop:`` the exception waits until the end of the block: an incomplete
    message would make a connection unusable.
    """

    def __init__(self, link: socket.socket | None) -> None:
        self.requested = False
        self._over = False
        self._link = link
        self._held = 0
        self._reason: Breach | KeyboardInterrupt | LimitBreached | None = None
        self._deferred = False
        self._pid = os.getpid()
        self._main = threading.main_thread().ident
        self._numbers = [signal.SIGTERM if self._link is None else STOP_SIGNAL]
        signal.signal(self._numbers[0], self._on_signal)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._uninstall)

    def listen_for_cpu_time(self) -> None:
        if hasattr(signal, "SIGXCPU"):
            self._numbers.append(signal.SIGXCPU)
            signal.signal(signal.SIGXCPU, self._on_signal)

    def end(self) -> None:
        """Raise nothing from now on: the objective has ended."""
        self._over = True

    def __enter__(self) -> None:
        if threading.get_ident() == self._main:
            self._held += 1

    def __exit__(self, *_: object) -> None:
        if threading.get_ident() != self._main:
            return
        self._held -= 1
        if self._deferred and not self._held:
            self._deferred = False
            self._raise()

    def _uninstall(self) -> None:
        """Restore the default handlers in a process that the objective forked."""
        for number in self._numbers:
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL)

    def _on_signal(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            return
        if self._link is not None and signum == STOP_SIGNAL:
            try:
                message = self._link.recv(1 << 16)
                if message == BEGIN:  # it waits to begin, and is to end already
                    message = self._link.recv(1 << 16)
                self._reason = pickle.loads(message)
            except (OSError, EOFError):
                # Not from the supervisor, or the second of two signals that were merged.
                return
        # Else SIGXCPU: the kernel kills at its hard limit if this is ignored.
        if self._over:
            return
        self.requested = True
        if self._held:
            self._deferred = True
        else:
            self._raise()

    def wait_to_begin(self) -> None:
        """Wait until the supervisor lets the objective begin; it kills a trial over its limit."""
        assert self._link is not None
        linux.is_ready(self._link.fileno())
        with contextlib.suppress(OSError):
            if self._link.recv(len(BEGIN), socket.MSG_PEEK) == BEGIN:
                self._link.recv(len(BEGIN))
            else:
                signal.pause()  # for the signal that comes with a stop

    def _raise(self) -> None:
        # A signal to the whole job, a check or `should_prune` has ended it already: it cleans up.
        error = sys.exc_info()[1]
        while error is not None:
            if isinstance(error, (KeyboardInterrupt, TrialPruned)):
                return
            error = error.__context__
        reason = self._reason
        if isinstance(reason, (KeyboardInterrupt, LimitBreached)):
            raise reason
        if reason is None:
            # The kernel gives no figures; the study's process adds them.
            raise LimitBreached("The trial used up its CPU time.", resource="cpu_time")
        raise breach_error(reason)


# A workload manager (``sbatch --signal``, ``scancel``) signals each process of a job step. The
# processes between the study and the objective ignore these signals, and so does the trial's own
# process while it waits or imports. When its objective begins, it gets the dispositions of an
# ordinary child of multiprocessing.

# Errors of a process itself, signals that can't be ignored, and those that its runtime or its
# parent needs.
_OF_FAULTS = {"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP"}
_OF_RUNTIME = {"SIGCHLD", "SIGCONT", "SIGKILL", "SIGPIPE", "SIGRTMAX", "SIGRTMIN", "SIGSTOP"}
_NOT_FOR_JOBS = _OF_FAULTS | _OF_RUNTIME

JOB_SIGNALS = tuple(number for number in signal.Signals if number.name not in _NOT_FOR_JOBS)

# Dispositions for the objective, by signal, in a process that ignores signals for now.
_dispositions: dict[int, Any] = {}


@contextlib.contextmanager
def block_job_signals() -> Iterator[None]:
    """Block these signals in a process that is started within the block.

    Before it ignores them, they would otherwise run this process's handlers there, or kill it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_job_signals() -> None:
    """Ignore these signals from now on, in a helper process and its forks."""
    for number in JOB_SIGNALS:
        _dispositions.setdefault(number, _disposition_of_child(number))
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGCHLD, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def handle_job_signals() -> None:
    """Drop these signals until :func:`restore_signals`; in a fork of a helper process.

    By a handler instead of ignoring them, so that dispositions set meanwhile by a script's imports
    are recognized and kept.
    """
    for number, disposition in _dispositions.items():
        if disposition != signal.SIG_IGN:
            signal.signal(number, _pass)


@dataclass(frozen=True)
class SignalState:
    """Signal settings of the thread that starts a trial, for the trial."""

    # Those that continue to have no effect in the trial, as the study's process stops it for them.
    # Processes that the objective forks, such as a pool's, end on them
    kept: Collection[int]
    blocked: Collection[int]
    traced: Collection[int]  # Those at which :mod:`faulthandler` prints the stacks of all threads


def read_signal_state(kept: Collection[int]) -> SignalState:
    if not hasattr(signal, "pthread_sigmask"):
        return SignalState(kept, (), ())
    blocked = set(signal.pthread_sigmask(signal.SIG_BLOCK, ())) - _NEVER_BLOCKED
    # A handler that Python does not know of is a library's.
    of_libraries = [
        n for n in linux.caught_signals(JOB_SIGNALS) if not callable(signal.getsignal(n))
    ]
    return SignalState(kept, blocked, _traced_among(of_libraries) if of_libraries else ())


# A trial is stopped by these.
_NEVER_BLOCKED = {STOP_SIGNAL, getattr(signal, "SIGXCPU", STOP_SIGNAL)}


def _traced_among(numbers: Collection[int]) -> tuple[int, ...]:
    # All signals registered with faulthandler have the same handler, which has no name.
    faulthandler.register(STOP_SIGNAL, file=2)
    handler = linux.signal_handler(STOP_SIGNAL)
    faulthandler.unregister(STOP_SIGNAL)
    return tuple(n for n in numbers if linux.signal_handler(n) == handler)


def restore_signals(state: SignalState) -> None:
    """Set the dispositions of an ordinary child, except those that were set meanwhile."""
    kept = state.kept
    for number, disposition in _dispositions.items():
        if signal.getsignal(number) is _pass and number not in kept:
            signal.signal(number, disposition)
    dispositions = dict(_dispositions)
    _dispositions.clear()

    def restore_rest() -> None:
        for number in kept:
            if signal.getsignal(number) is _pass:
                signal.signal(number, dispositions[number])

    if kept and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=restore_rest)
    for number in state.traced:
        # It takes one for registered that it was in the fork server.
        faulthandler.unregister(number)
        faulthandler.register(number, file=2)
    if state.blocked:
        signal.pthread_sigmask(signal.SIG_BLOCK, state.blocked)


def _disposition_of_child(number: int) -> Any:
    """Return the disposition of a child process, given this process's.

    An ignored signal stays ignored, such as SIGHUP under nohup. Handlers are not inherited.
    """
    handler = signal.getsignal(number)
    if handler == signal.SIG_IGN:
        return handler
    if number == signal.SIGINT and callable(handler):
        return signal.default_int_handler
    return signal.SIG_DFL


def _pass(signum: int, frame: Any) -> None:
    """Do nothing."""


class Interrupts:
    """Handles Ctrl-C in the study's process while it serves a trial, within ``with interrupts:``.

    Python raises KeyboardInterrupt between any two instructions: inside a message to the trial,
    which then waits for the rest of it, or inside a callback of a weak reference or a ``__del__``,
    where it is printed and lost. Here it is raised only in :meth:`allowed` blocks; if it is lost
    in one, the next one raises it. A second Ctrl-C is raised at once, as the first may wait for a
    message that never ends.
    """

    def __init__(self) -> None:
        self._pending = False
        self._is_allowed = False
        self._is_installed = False

    def __enter__(self) -> Interrupts:
        """Handle SIGINT in the main thread, if it has Python's own handler."""
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._on_signal)
            self._is_installed = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._pending and (kind is None or issubclass(kind, Exception)):
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Within the block, raise KeyboardInterrupt on Ctrl-C, at once if it came earlier."""
        self._is_allowed = True
        try:
            if self._pending:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_allowed = False

    def _on_signal(self, signum: int, frame: Any) -> None:
        is_second, self._pending = self._pending, True
        if self._is_allowed or is_second:
            raise KeyboardInterrupt
