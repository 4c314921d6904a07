"""The template: a fresh interpreter with modules loaded, of which each trial's process is a fork.

Started from the study's process by executing Python anew, so that it has none of its threads,
locks or GPU contexts, and the study's script is never run a second time. It does nothing but
import what it is told, fork, and wait.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
from dataclasses import dataclass
import gc
import importlib
import os
from pathlib import Path
import pickle
import select
import signal
import socket
import sys
import traceback

from optuna_quota._isolation import processes
from optuna_quota._isolation.job_signals import ignore_job_signals
from optuna_quota._isolation.main_module import MainModule
from optuna_quota._isolation.main_module import make_main_module
from optuna_quota._isolation.multiprocessing_child import begin_preparation
from optuna_quota._isolation.output import prepare_logging
from optuna_quota._isolation.trial_process import fork
from optuna_quota._isolation.trial_process import fork_trial
from optuna_quota._isolation.trial_process import Forked
from optuna_quota._isolation.trial_process import modules_may_open_files


# After so many idle seconds it ends, to give its memory back; the next trial starts a new one.
IDLE_TIME = 60.0
MESSAGE_SIZE = 1 << 17


@dataclass(frozen=True)
class Order:
    """Hand out a trial's processes.

    Attributes:
        cgroup: Where to make their control group, None for none.
        once: Whether no other order will follow.
    """

    cgroup: Path | None = None
    once: bool = False


@dataclass(frozen=True)
class Preload:
    """Import these modules; those that can't be are skipped."""

    path: Sequence[str]
    modules: Sequence[str]


@dataclass(frozen=True)
class MakeMain:
    """Make the study's main module; answered by :class:`MadeMain` or :class:`Unsafe`."""

    main: MainModule


@dataclass(frozen=True)
class MadeMain:
    """The study's main module was made.

    Attributes:
        error: What its statements raised, None where it is whole.
    """

    error: str | None


@dataclass(frozen=True)
class Unsafe:
    """A module starts threads or uses a GPU when it is imported: no fork can follow."""

    module: str


class Template:
    """Serves one process of the study's until it is gone.

    Args:
        sock: A connection that keeps messages apart and carries descriptors.
        parent: A pidfd of the study's process.
    """

    def __init__(self, sock: socket.socket, parent: int) -> None:
        self._sock = sock
        self._parent = parent
        self._supervisors: set[int] = set()
        self._spare: Forked | None = None
        self._alarm, alarm = os.pipe()
        os.set_blocking(alarm, False)
        os.set_blocking(self._alarm, False)
        signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def serve(self) -> None:
        """Serve until the other side hangs up, dies, or has been idle."""
        poll = select.poll()
        for handle in (self._sock.fileno(), self._parent, self._alarm):
            poll.register(handle, select.POLLIN)
        while True:
            ready = {handle for handle, _ in poll.poll(IDLE_TIME * 1000)}
            # First of all, what somebody waits for.
            goes_on = self._sock.fileno() not in ready or self._serve_one()
            self._bury()
            # Supervisors go on without their template; orphans of theirs are ended first.
            if not goes_on or self._parent in ready or (not ready and self._is_idle()):
                return

    def _serve_one(self) -> bool:
        data = self._sock.recv(MESSAGE_SIZE)
        if not data:
            return False
        message = pickle.loads(data)
        if isinstance(message, Order):
            self._hand_out(message)
        elif isinstance(message, Preload):
            self._discard_spare()
            self._preload(message)
        elif isinstance(message, MakeMain):
            self._discard_spare()
            self._make_main(message.main)
        return True

    def _hand_out(self, order: Order) -> None:
        """Hand out the processes that are ready, and get the next ones ready.

        The next trial then doesn't wait for two forks: they happen while this one runs.
        """
        ready, self._spare = self._spare or self._fork(order), None
        with ready.channel, ready.control:
            handles = [ready.channel.fileno(), ready.control.fileno()]
            socket.send_fds(self._sock, [b"F"], handles)
        if not order.once:
            self._spare = self._fork(order)

    def _fork(self, order: Order) -> Forked:
        forked = fork_trial(self._parent, cgroup=order.cgroup)
        self._supervisors.add(forked.supervisor)
        return forked

    def _discard_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.channel.close()
            spare.control.close()

    def _preload(self, message: Preload) -> None:
        sys.path[:] = message.path
        with modules_may_open_files():
            for name in message.modules:
                if name not in sys.modules and not preload_safely(name):
                    self._sock.send(pickle.dumps(Unsafe(name)))
                    raise SystemExit
        settle_down()

    def _make_main(self, main: MainModule) -> None:
        error = None
        try:
            with modules_may_open_files():
                make_main_module(main)
        except BaseException as raised:  # noqa: BLE001 - whatever a script does
            error = f"{type(raised).__name__}: {raised}"
            make_main_module(main.without_statements())
        if not can_fork():
            self._sock.send(pickle.dumps(Unsafe("__main__")))
            raise SystemExit
        settle_down()
        self._sock.send(pickle.dumps(MadeMain(error)))

    def _is_idle(self) -> bool:
        return len(self._supervisors) == (0 if self._spare is None else 1)

    def _bury(self) -> None:
        """Wait for supervisors that have ended, and end what a killed one has left behind."""
        with contextlib.suppress(OSError):
            os.read(self._alarm, 4096)
        codes = processes.reap()
        self._supervisors -= set(codes)
        while orphans := set(processes.children()) - self._supervisors:
            processes.kill(orphans, ())
            self._supervisors -= set(processes.reap())


def preload_safely(name: str) -> bool:
    """Import a module; return whether a fork can be made after it."""
    preload(name)
    return can_fork()


def can_fork() -> bool:
    """Return whether a fork can go on with what is loaded: neither threads nor a GPU in use."""
    return (_count_threads() == 1 or _threads_heed_forks()) and not processes.uses_cuda()


def _threads_heed_forks() -> bool:
    """Return whether every thread but this one ends before a fork, by making one.

    OpenBLAS (numpy's, and another one of scipy's that many of its modules bring along) ends its
    threads before a fork and starts them anew when it needs them. Which libraries do so can't be
    told by their names, but it can be seen.
    """
    pid = fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return _count_threads() == 1


def settle_down() -> None:
    """Get ready to be forked: what no trial touches stays shared with all of them."""
    prepare_logging(reset=True)
    gc.collect()
    gc.freeze()


def _count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def preload(name: str) -> None:
    """Import a module, whatever it does; what it prints is dropped."""
    with contextlib.suppress(BaseException):
        importlib.import_module(name)


def main(handle: int) -> None:
    """Run the template.

    Args:
        handle: The descriptor of the connection.
    """
    ignore_job_signals()
    begin_preparation()
    processes.become_subreaper()
    sock = socket.socket(fileno=handle)
    try:
        parent = os.pidfd_open(os.getppid())
    except OSError:
        return
    for name in ("numpy", "cloudpickle", "optuna", "psutil"):
        preload(name)
    settle_down()
    try:
        Template(sock, parent).serve()
    except Exception:  # noqa: BLE001 - the study's process reads the last line and says why
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        # No exit handlers: those of preloaded modules belong to trials.
        os._exit(0)
