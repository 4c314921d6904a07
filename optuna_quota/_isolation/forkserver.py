"""The fork server: a fresh interpreter that loads modules and forks the trials' processes.

The standard library's fork server needs a ``__main__`` guard, does not detect modules after which
forks are unsafe, and leaves orphans behind. This one is a fresh Python interpreter, without the
study's threads, locks and GPU contexts, and never runs the study's script again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
from dataclasses import dataclass, replace
import faulthandler
import gc
import importlib
import itertools
from multiprocessing import resource_tracker
import os
from pathlib import Path
import select
import signal
import socket
import sys
import time
import traceback
import types
from typing import Any, NoReturn
import warnings

from optuna_quota._isolation import linux
from optuna_quota._isolation.channel import Channel, channel_pair, TrialConnections
from optuna_quota._isolation.child import become_child, run_child, set_preparing
from optuna_quota._isolation.main_module import MainModule, make_main_module
from optuna_quota._isolation.memory_limits import Cgroup
from optuna_quota._isolation.messages import InheritedObjective, ProcessStarted
from optuna_quota._isolation.output import prepare_logging
from optuna_quota._isolation.signals import (
    block_job_signals,
    handle_job_signals,
    ignore_job_signals,
)
from optuna_quota._isolation.supervisor import Supervisor


# Seconds without a request after which it exits, to free its memory; the next trial starts
# another one.
IDLE_TIME = 60.0
# Seconds that it waits for orphans before it exits.
ORPHANS_TIME = 2.0


@dataclass(frozen=True)
class SpawnRequest:
    """Start a trial, whose connections' descriptors follow, in the control group of a folder.

    ``is_last`` is True if no other request will follow.
    """

    cgroup: Path | None
    is_last: bool = False


@dataclass(frozen=True)
class Prepare:
    """Import modules with this ``sys.path``, and create the main module, if given."""

    path: Sequence[str]
    modules: Sequence[str]
    main: MainModule | None


@dataclass(frozen=True)
class Prepared:
    """The answer to :class:`Prepare`, after the name of each module as it was about to load it."""

    # Those of modules that could not be imported, by name; trials start without these
    errors: Mapping[str, str]
    main: MainModule | None  # The main module that was made, without statements if these failed
    # After this import, forks are unsafe because of its threads or the GPU: the last answer
    unsafe: str | None = None


class ForkServer:
    """Serves one study's process until that ends, as a pidfd shows."""

    def __init__(self, channel: Channel, parent: int) -> None:
        self._channel = channel
        self._parent = parent
        self._supervisors: set[int] = set()
        self._spare: TrialConnections | None = None
        self._child_ended, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        os.set_blocking(self._child_ended, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def serve(self) -> None:
        """Serve until the study's process hangs up or dies, or is idle for a minute."""
        poll = select.poll()
        for handle in (self._channel.fileno(), self._parent, self._child_ended):
            poll.register(handle, select.POLLIN)
        while True:
            ready = {handle for handle, _ in poll.poll(IDLE_TIME * 1000)}
            # Requests first: the sender is waiting.
            is_open = self._channel.fileno() not in ready or self._serve_requests()
            has_orphans = self._reap()
            if not is_open or self._parent in ready or (not ready and self._is_idle()):
                break
        # Supervisors continue without the fork server; their orphans are killed before.
        deadline = time.monotonic() + ORPHANS_TIME
        while has_orphans and time.monotonic() < deadline:
            time.sleep(0.001)
            has_orphans = self._reap()

    def _serve_requests(self) -> bool:
        """Serve the requests that have arrived; return whether more may come."""
        try:
            for message in self._channel.arrived():
                if isinstance(message, SpawnRequest):
                    self._spawn(message)
                else:
                    self._prepare(message)
        except (EOFError, ConnectionError):
            return False
        return True

    def _spawn(self, request: SpawnRequest) -> None:
        """Start the trial that was forked in advance, and fork the next: no trial waits for it."""
        trial, self._spare = self._spare or self._fork(request), None
        self._channel.send_descriptors([trial.channel.fileno(), trial.control.fileno()])
        trial.disconnect()
        if not request.is_last:
            self._spare = self._fork(request)

    def _fork(self, request: SpawnRequest) -> TrialConnections:
        trial = fork_trial(self._parent, cgroup=request.cgroup)
        assert trial.supervisor is not None
        self._supervisors.add(trial.supervisor)
        return trial

    def _prepare(self, request: Prepare) -> None:
        if self._spare is not None:  # forked before these imports
            self._spare.disconnect()
            self._spare = None
        sys.path[:] = request.path
        errors, main = {}, request.main
        # Lazily: most are imported by those before them.
        names = (name for name in request.modules if name not in sys.modules)
        with _modules_may_open_files():
            for name in itertools.chain(names, () if main is None else ("__main__",)):
                if linux.is_ready(self._channel.fileno(), 0.0, to_write=True):
                    self._channel.send(name)  # else the study reads nothing: it is stopped
                if name == "__main__" and main is not None:
                    main = _make_main_module(main)
                elif (error := _preload(name)) is not None:
                    errors[name] = error
                if not _can_fork():
                    self._channel.send(Prepared(errors, main, unsafe=name))
                    raise SystemExit
        _prepare_to_fork()
        self._channel.send(Prepared(errors, main))

    def _is_idle(self) -> bool:
        return len(self._supervisors) == (0 if self._spare is None else 1)

    def _reap(self) -> bool:
        """Reap supervisors that have ended, and kill processes that a killed one left behind.

        Returns whether such processes still exist: some hang in the kernel and can't be killed.
        """
        with contextlib.suppress(OSError):
            os.read(self._child_ended, 4096)
        self._supervisors -= set(linux.reap())
        # It removes semaphores and shared memory that the main module has made here.
        tracker: Any = resource_tracker._resource_tracker
        orphans = set(linux.children()) - self._supervisors - {tracker._pid}
        linux.send(signal.SIGKILL, orphans, ())
        return bool(orphans)


def _preload(name: str) -> str | None:
    """Import a module without output; return its error, whatever it raises."""
    try:
        importlib.import_module(name)
    except BaseException as error:  # noqa: BLE001 - a module may raise anything
        return f"{type(error).__name__}: {error}"
    return None


def _make_main_module(main: MainModule) -> MainModule:
    try:
        make_main_module(main)
    except BaseException:  # noqa: BLE001 - a script may raise anything
        main = main.without_statements()
        make_main_module(main)
    return replace(main, is_made=True)


def _can_fork() -> bool:
    # gevent and eventlet replace blocking functions. Their event loop does not survive in forks of
    # this process, which close unknown files.
    is_patched = not isinstance(select.select, types.BuiltinFunctionType)
    return (
        not is_patched
        and (_count_threads() == 1 or _threads_end_before_forks())
        and not linux.uses_cuda()
    )


def _threads_end_before_forks() -> bool:
    """Return whether all other threads end before a fork, by forking.

    OpenBLAS ends its threads and starts them again when needed; other libraries may not.
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


def _prepare_to_fork() -> None:
    """Keep memory shared with trials as long as none writes to it."""
    prepare_logging(reset=True)
    gc.collect()
    gc.freeze()


def main(handle: int) -> None:
    ignore_job_signals()
    set_preparing(True)
    linux.become_subreaper()
    channel = Channel(socket.socket(fileno=handle))
    try:
        parent = os.pidfd_open(os.getppid())
    except OSError:
        return
    # numpy loads its random generators on first use, which would take 10 ms in each trial.
    for name in ("numpy", "numpy.random", "cloudpickle", "optuna", "psutil"):
        _preload(name)
    _prepare_to_fork()
    try:
        ForkServer(channel, parent).serve()
    except Exception:  # noqa: BLE001 - the study's process reads the last line and reports it
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        # No exit handlers: those of preloaded modules belong to trials.
        os._exit(0)


# A trial's processes: forks of the fork server, or of the study's process.


def fork_trial(
    parent: int, *, cgroup: Path | None, inherited: InheritedObjective | None = None
) -> TrialConnections:
    """Fork a supervisor, which forks its trial.

    ``parent`` is a pidfd of the study's process, ``cgroup`` the folder for the trial's control
    group. Without ``inherited``, the trial receives its objective and messages.
    """
    channel, trial_channel = channel_pair()
    control, supervisor_control = channel_pair()
    closing = contextlib.closing
    with closing(trial_channel), closing(supervisor_control), block_job_signals():
        pid = fork()
        if pid == 0:
            try:
                _run_supervisor(trial_channel, supervisor_control, parent, cgroup, inherited)
            finally:
                # Never return into the parent's code.
                os._exit(1)
    return TrialConnections(channel, control, pid)


def fork() -> int:
    """Fork this process, without Python's warning about threads."""
    with warnings.catch_warnings():
        # Python 3.12 warns where it counts a second thread, such as an idle one of OpenBLAS.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _run_supervisor(
    channel: Channel,
    control: Channel,
    parent: int,
    cgroup_folder: Path | None,
    inherited: InheritedObjective | None,
) -> NoReturn:
    os.setsid()
    ignore_job_signals()
    linux.become_subreaper()
    # Keeps messages apart: a signal handler of the trial reads one without waiting.
    link, trial_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    trial_link.setblocking(False)
    crash_file = os.memfd_create("optuna-quota-crash")
    cgroup = None
    if cgroup_folder is not None:
        with contextlib.suppress(OSError):
            cgroup = Cgroup(cgroup_folder)
    supervisor = os.getpid()
    child = fork()
    if child == 0:
        link.close()
        # Its copy, and those of what it forks, would keep this open when the supervisor is killed.
        control.close()
        _leave_supervisor(supervisor, cgroup)
        if inherited is None:
            handles = (channel.fileno(), trial_link.fileno(), crash_file, parent)
            _close_all_but(*handles, *_opened_by_modules)
        else:
            # A garbage collection would copy the inherited pages.
            gc.freeze()
        become_child(f"Trial-{supervisor}", parent)
        os._exit(run_child(channel, link=trial_link, crash_file=crash_file, inherited=inherited))
    trial_link.close()
    _close_all_but(control.fileno(), parent, link.fileno(), crash_file)
    gc.disable()
    with contextlib.suppress(OSError):
        control.send(ProcessStarted(supervisor))
    report = Supervisor(
        control,
        child,
        link=link,
        parent=parent,
        crash_file=crash_file,
        cgroup=cgroup,
        monitoring=None if inherited is None else inherited.monitoring,
    ).run()
    with contextlib.suppress(OSError):
        control.send(report)
    os._exit(0)


def _leave_supervisor(supervisor: int, cgroup: Cgroup | None) -> None:
    # A session of its own: a trial that signals its process group must not hit its supervisor.
    os.setsid()
    linux.die_with_parent(supervisor)
    if cgroup is not None:
        with contextlib.suppress(OSError):
            cgroup.add(os.getpid())
    if faulthandler.is_enabled():
        linux.enlarge_signal_stack()
    handle_job_signals()


_opened_by_modules: set[int] = set()


@contextlib.contextmanager
def _modules_may_open_files() -> Iterator[None]:
    """Keep files open in trials that are opened within the block: logs, databases, shared memory.

    Modules would otherwise refer to closed files, or to other files with the same numbers.
    """
    before = _open_descriptors()
    try:
        yield
    finally:
        now = _open_descriptors()
        _opened_by_modules.intersection_update(now)
        _opened_by_modules.update(now - before)


def _open_descriptors() -> set[int]:
    found = {int(name) for name in os.listdir("/proc/self/fd")}
    # That of the listing itself is closed by now.
    return {handle for handle in found if os.path.exists(f"/proc/self/fd/{handle}")}


def _close_all_but(*handles: int) -> None:
    """Close inherited files except for these.

    A copy of the study's end of a connection would keep it open when the study's process dies.
    """
    kept = {0, 1, 2, *handles}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))
