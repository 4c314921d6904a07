"""The fork server: a fresh interpreter that loads modules and forks the trials' processes.

The standard library's fork server needs a ``__main__`` guard, can't tell which modules are safe to
fork after, and leaves its orphans. This one is started by executing Python anew, so that it has
none of the study's threads, locks or GPU contexts, and never runs the study's script again.
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

from optuna_quota._isolation import linux
from optuna_quota._isolation.launch import fork, fork_trial, ForkedTrial, modules_may_open_files
from optuna_quota._isolation.main_module import MainModule, make_main_module
from optuna_quota._isolation.multiprocessing_child import begin_preparation, resource_tracker_pid
from optuna_quota._isolation.output import prepare_logging
from optuna_quota._isolation.signals import ignore_job_signals


# Seconds without a request after which it exits, to free its memory; the next trial starts
# another one.
IDLE_TIME = 60.0
MESSAGE_SIZE = 1 << 17


@dataclass(frozen=True)
class SpawnRequest:
    """Send the descriptors of a trial's connections.

    Attributes:
        cgroup: Where to make its control group, None for none.
        once: Whether no other request will follow.
    """

    cgroup: Path | None = None
    once: bool = False


@dataclass(frozen=True)
class PreloadModules:
    """Import these modules, with this ``sys.path``; those that fail are skipped."""

    path: Sequence[str]
    modules: Sequence[str]


@dataclass(frozen=True)
class MakeMainModule:
    """Make the main module; the answer is :class:`MainModuleMade` or :class:`UnsafeModule`."""

    main: MainModule


@dataclass(frozen=True)
class MainModuleMade:
    """The main module was made, without its statements if these have failed."""

    with_statements: bool


@dataclass(frozen=True)
class UnsafeModule:
    """A module starts threads or uses a GPU when it is imported: forks are unsafe from then on."""

    module: str


class ForkServer:
    """Serves one study's process until that is gone.

    Args:
        sock: A connection that keeps messages apart and carries descriptors.
        parent: A pidfd of the study's process.
    """

    def __init__(self, sock: socket.socket, parent: int) -> None:
        self._sock = sock
        self._parent = parent
        self._supervisors: set[int] = set()
        self._spare: ForkedTrial | None = None
        self._child_ended, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        os.set_blocking(self._child_ended, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def serve(self) -> None:
        """Serve until the study's process hangs up, dies, or sends no request for long."""
        poll = select.poll()
        for handle in (self._sock.fileno(), self._parent, self._child_ended):
            poll.register(handle, select.POLLIN)
        while True:
            ready = {handle for handle, _ in poll.poll(IDLE_TIME * 1000)}
            # Requests first: the sender is waiting.
            is_open = self._sock.fileno() not in ready or self._serve_request()
            self._reap()
            # Supervisors continue without the fork server; their orphans are killed before.
            if not is_open or self._parent in ready or (not ready and self._is_idle()):
                return

    def _serve_request(self) -> bool:
        data = self._sock.recv(MESSAGE_SIZE)
        if not data:
            return False
        message = pickle.loads(data)
        if isinstance(message, SpawnRequest):
            self._spawn(message)
        elif isinstance(message, PreloadModules):
            self._discard_spare()
            self._preload(message)
        elif isinstance(message, MakeMainModule):
            self._discard_spare()
            self._make_main_module(message.main)
        return True

    def _spawn(self, request: SpawnRequest) -> None:
        """Send the connections of the spare trial, and fork the next spare one.

        So the next trial does not wait for two forks, which are made while this one runs.
        """
        trial, self._spare = self._spare or self._fork(request), None
        with trial.channel, trial.control:
            handles = [trial.channel.fileno(), trial.control.fileno()]
            socket.send_fds(self._sock, [b"F"], handles)
        if not request.once:
            self._spare = self._fork(request)

    def _fork(self, request: SpawnRequest) -> ForkedTrial:
        forked = fork_trial(self._parent, cgroup=request.cgroup)
        self._supervisors.add(forked.supervisor)
        return forked

    def _discard_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.channel.close()
            spare.control.close()

    def _preload(self, message: PreloadModules) -> None:
        sys.path[:] = message.path
        with modules_may_open_files():
            for name in message.modules:
                if name not in sys.modules:
                    preload(name)
                    self._require_safe_forks(name)
        prepare_to_fork()

    def _make_main_module(self, main: MainModule) -> None:
        with_statements = True
        try:
            with modules_may_open_files():
                make_main_module(main)
        except BaseException:  # noqa: BLE001 - a script may raise anything
            with_statements = False
            make_main_module(main.without_statements())
        self._require_safe_forks("__main__")
        prepare_to_fork()
        self._sock.send(pickle.dumps(MainModuleMade(with_statements)))

    def _require_safe_forks(self, module: str) -> None:
        if not can_fork():
            self._sock.send(pickle.dumps(UnsafeModule(module)))
            raise SystemExit

    def _is_idle(self) -> bool:
        return len(self._supervisors) == (0 if self._spare is None else 1)

    def _reap(self) -> None:
        """Wait for supervisors that have ended, and kill what a killed one has left behind."""
        with contextlib.suppress(OSError):
            os.read(self._child_ended, 4096)
        self._supervisors -= set(linux.reap())
        # It removes semaphores and shared memory that the main module has made here.
        tracker = {resource_tracker_pid()}
        while orphans := set(linux.children()) - self._supervisors - tracker:
            linux.send(signal.SIGKILL, orphans, ())
            self._supervisors -= set(linux.reap())


def preload(name: str) -> None:
    """Import a module, whatever it raises; its output is dropped."""
    with contextlib.suppress(BaseException):
        importlib.import_module(name)


def can_fork() -> bool:
    """Return whether forks are safe with what is loaded: no threads, no GPU context."""
    return (_count_threads() == 1 or _threads_end_before_forks()) and not linux.uses_cuda()


def _threads_end_before_forks() -> bool:
    """Return whether all other threads end before a fork, by making one.

    OpenBLAS (numpy's, and another one of scipy's that many of its modules load) ends its threads
    before a fork and starts them again when needed. Which libraries do so has to be tried.
    """
    pid = fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return _count_threads() == 1


# jemalloc (pyarrow's) stops its thread around a fork; the child does without it.
_FORK_SAFE_THREADS = {"jemalloc_bg_thd"}


def _count_threads() -> int:
    count = 0
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            name = Path(f"/proc/self/task/{task}/comm").read_text().strip()
            count += name not in _FORK_SAFE_THREADS
    return count


def prepare_to_fork() -> None:
    """Keep memory that no trial writes to shared with all of them."""
    prepare_logging(reset=True)
    gc.collect()
    gc.freeze()


def main(handle: int) -> None:
    """Run the fork server on the connection of this descriptor."""
    ignore_job_signals()
    begin_preparation()
    linux.become_subreaper()
    sock = socket.socket(fileno=handle)
    try:
        parent = os.pidfd_open(os.getppid())
    except OSError:
        return
    # numpy loads its random generators when they are first used, which each trial would do anew:
    # 10 ms of a trial's start.
    for name in ("numpy", "numpy.random", "cloudpickle", "optuna", "psutil"):
        preload(name)
    prepare_to_fork()
    try:
        ForkServer(sock, parent).serve()
    except Exception:  # noqa: BLE001 - the study's process reads the last line and reports it
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        # No exit handlers: those of preloaded modules belong to trials.
        os._exit(0)
