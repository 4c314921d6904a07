"""Signals that are sent to all processes of a job: they are for the objective alone.

A workload manager (``sbatch --signal``, ``scancel``) signals each process of a job step. The
processes between the study and the objective must not die of it. The trial's own process gets the
dispositions of an ordinary child of :mod:`multiprocessing` when its objective begins, and until
then, while it waits or imports, such a signal passes without effect.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import signal
from typing import Any


# What a process does to itself, what can't be ignored, and what its runtime or its parent needs.
_OWN = {
    "SIGABRT",
    "SIGBUS",
    "SIGCHLD",
    "SIGCONT",
    "SIGFPE",
    "SIGILL",
    "SIGKILL",
    "SIGPIPE",
    "SIGRTMAX",
    "SIGRTMIN",
    "SIGSEGV",
    "SIGSTOP",
    "SIGSYS",
    "SIGTRAP",
}

JOB_SIGNALS = tuple(number for number in signal.Signals if number.name not in _OWN)

# What the objective is to find, by signal, in a process that ignores signals for now.
_dispositions: dict[int, Any] = {}


@contextlib.contextmanager
def job_signals_blocked() -> Iterator[None]:
    """Let no such signal reach a process that is started within the block, as long as it likes.

    It would otherwise run this process's handlers, or die, before it ignores signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_job_signals() -> None:
    """Ignore signals that are sent to all processes of a job, from now on.

    To be called in the main thread of a helper process; its forks ignore them as well.
    """
    for number in JOB_SIGNALS:
        _dispositions.setdefault(number, _disposition_of_child(number))
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGCHLD, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def hold_signals() -> None:
    """Let signals pass without effect until :func:`restore_signals`; in a fork of a helper.

    By a handler and not by ignoring them: what is set until then, by the imports of a script, say,
    can be told apart and stays.
    """
    for number, disposition in _dispositions.items():
        if disposition != signal.SIG_IGN:
            signal.signal(number, _pass)


def restore_signals() -> None:
    """Set the dispositions of an ordinary child, where nobody has set another one meanwhile."""
    for number, disposition in _dispositions.items():
        if signal.getsignal(number) is _pass:
            signal.signal(number, disposition)
    _dispositions.clear()


def _disposition_of_child(number: int) -> Any:
    """Return what is in force in a child where this is in force in its parent.

    What is ignored stays so, such as SIGHUP under nohup. Handlers are the parent's own.
    """
    handler = signal.getsignal(number)
    if handler == signal.SIG_IGN:
        return handler
    if number == signal.SIGINT and callable(handler):
        return signal.default_int_handler
    return signal.SIG_DFL


def _pass(signum: int, frame: Any) -> None:
    """Do nothing."""
