"""Start the processes of a trial: a fork of a fork server or of the study's process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import ctypes
from dataclasses import dataclass
import faulthandler
import gc
import os
from pathlib import Path
import socket
import subprocess
import sys
from typing import Any, IO, Literal, NoReturn
import warnings

from optuna_quota._isolation import linux
from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.child import run_child
from optuna_quota._isolation.memory_limits import Cgroup
from optuna_quota._isolation.messages import InheritedObjective, ProcessStarted
from optuna_quota._isolation.multiprocessing_child import become_child
from optuna_quota._isolation.signals import (
    block_job_signals,
    handle_job_signals,
    ignore_job_signals,
)
from optuna_quota._isolation.supervisor import Supervisor


StartMethod = Literal["forkserver", "spawn", "fork"]


# The study's side.


class TrialConnections:
    """The connections of the study's process to a trial.

    Args:
        channel: The connection to the trial.
        control: The connection to its supervisor.
        supervisor: The supervisor's pid when it is this process's own child, else None.
    """

    def __init__(self, channel: Channel, control: Channel, supervisor: int | None = None) -> None:
        self.channel = channel
        self.control = control
        self._supervisor = supervisor

    def close(self) -> None:
        """Close the connections, which kills whatever is left; wait for the supervisor."""
        self.channel.close()
        self.control.close()
        pid, self._supervisor = self._supervisor, None
        if pid is not None:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def launch_fork(cgroup: Path | None, inherited: InheritedObjective) -> TrialConnections:
    """Fork a trial from this process: nothing is pickled, and no GPU context may exist.

    Args:
        cgroup: Where to make its control group, None for none.
        inherited: What the trial needs.

    Raises:
        RuntimeError: If this process uses CUDA, which does not survive a fork.
    """
    if linux.uses_cuda():
        raise RuntimeError(
            "`start_method` must not be 'fork' once this process uses CUDA, which a forked "
            "process can't use; choose 'forkserver'."
        )
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    _end_openmp_threads()
    parent = os.pidfd_open(os.getpid())
    try:
        forked = fork_trial(parent, cgroup=cgroup, inherited=inherited)
    finally:
        os.close(parent)
    return TrialConnections(Channel(forked.channel), Channel(forked.control), forked.supervisor)


_OMP_PAUSE_HARD = 2


def _end_openmp_threads() -> None:
    """Let GNU's OpenMP end the threads that it keeps for this one; it starts them when needed.

    A forked process has none of them, which the library does not notice: it would wait for them
    without end. LLVM's and Intel's notice.
    """
    paths: set[str] = set()
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as file:
        paths = {line.split(None, 5)[5].strip() for line in file if "libgomp" in line}
    for path in paths:
        if path.startswith("/"):
            with contextlib.suppress(OSError, AttributeError):
                library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
                library.omp_pause_resource_all(_OMP_PAUSE_HARD)


_BOOT = (
    "import sys; sys.path[:] = {path!r}; "
    "from optuna_quota._isolation.{module} import main; main({argument})"
)


def interpreter(module: str, argument: Any) -> list[str]:
    """Return the command that runs ``main`` of one of these modules in a fresh interpreter.

    The study's script is not run, so that it needs no guard. It imports from where this process
    does: the working directory, which is first otherwise, may have a file of a module's name.
    """
    from multiprocessing.spawn import get_executable

    folder = str(Path(__file__).resolve().parents[2])
    path = [entry for entry in sys.path if isinstance(entry, str)]
    path += [] if folder in path else [folder]
    flags = [f"-X{name}" for name in ("utf8", "dev") if name in sys._xoptions]
    code = _BOOT.format(path=path, module=module, argument=repr(argument))
    return [os.fsdecode(get_executable()), *flags, "-c", code]


def popen(command: list[str], errors: IO[bytes], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, with ``errors`` as its standard error."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
        **options,
    )


def send_streams(channel: Channel, descriptors: Sequence[int] = ()) -> None:
    """Send this process's standard output and error, and other open files, to a trial."""
    with contextlib.ExitStack() as stack:
        streams = [_stream(number, stack) for number in (1, 2)]
        channel.send_descriptors([*streams, *descriptors])


def _stream(number: int, stack: contextlib.ExitStack) -> int:
    """Return a standard stream's descriptor, that of a null device where it is closed."""
    try:
        # Where it was closed from the start, another file may have its number.
        if (sys.__stdout__, sys.__stderr__)[number - 1] is None:
            raise OSError
        os.fstat(number)
    except OSError:
        number = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, number)
    return number


# In the forking process and its children.


@dataclass(frozen=True)
class ForkedTrial:
    """A trial's processes, waiting for their first messages.

    Attributes:
        supervisor: The supervisor's pid.
        channel: The study's end of the connection to the trial.
        control: The study's end of the connection to the supervisor.
    """

    supervisor: int
    channel: socket.socket
    control: socket.socket


def fork_trial(
    parent: int, *, cgroup: Path | None, inherited: InheritedObjective | None = None
) -> ForkedTrial:
    """Fork a supervisor, which forks its trial.

    Args:
        parent: A pidfd of the study's process; stays open here.
        cgroup: Where to make the trial's control group, None for none.
        inherited: What the trial has from this process; without it, all is sent to the trial.
    """
    channel, trial_channel = socket.socketpair()
    control, supervisor_control = socket.socketpair()
    with trial_channel, supervisor_control, block_job_signals():
        pid = fork()
        if pid == 0:
            try:
                _run_supervisor(
                    trial_channel.fileno(), supervisor_control.fileno(), parent, cgroup, inherited
                )
            finally:
                # Never return into the parent's code.
                os._exit(1)
    return ForkedTrial(pid, channel, control)


def fork() -> int:
    """Fork this process, whatever threads it has: the child starts from a known state."""
    with warnings.catch_warnings():
        # Python 3.12 warns where it counts a second thread, such as an idle one of OpenBLAS.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _run_supervisor(
    channel: int,
    control: int,
    parent: int,
    cgroup_folder: Path | None,
    inherited: InheritedObjective | None,
) -> NoReturn:
    os.setsid()
    ignore_job_signals()
    linux.become_subreaper()
    # Keeps messages apart, of which a signal handler of the trial reads one without waiting.
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
        _run_trial(channel, trial_link, crash_file, parent, supervisor, cgroup, inherited)
    trial_link.close()
    _close_all_but(control, parent, link.fileno(), crash_file)
    gc.disable()
    connection = Channel(socket.socket(fileno=control))
    with contextlib.suppress(OSError):
        connection.send(ProcessStarted())
    report = Supervisor(
        connection,
        child,
        link=link,
        parent=parent,
        crash_file=crash_file,
        cgroup=cgroup,
        monitoring=None if inherited is None else inherited.monitoring,
    ).run()
    with contextlib.suppress(OSError):
        connection.send(report)
    os._exit(0)


def _run_trial(
    channel: int,
    link: socket.socket,
    crash_file: int,
    parent: int,
    supervisor: int,
    cgroup: Cgroup | None,
    inherited: InheritedObjective | None,
) -> NoReturn:
    code = 1
    try:
        # A session of its own: a trial that signals its process group must not hit its supervisor.
        os.setsid()
        linux.die_with_parent(supervisor)
        if cgroup is not None:
            with contextlib.suppress(OSError):
                cgroup.add(os.getpid())
        if faulthandler.is_enabled():
            linux.enlarge_signal_stack()
        handle_job_signals()
        if inherited is None:
            _close_all_but(channel, link.fileno(), crash_file, parent, *_opened_by_modules)
        else:
            # A garbage collection would copy the inherited pages.
            gc.freeze()
        become_child(f"Trial-{supervisor}", parent)
        code = run_child(
            Channel(socket.socket(fileno=channel)),
            link=link,
            crash_file=crash_file,
            inherited=inherited,
            streams=inherited is None,
        )
    finally:
        os._exit(code)


_opened_by_modules: set[int] = set()


@contextlib.contextmanager
def modules_may_open_files() -> Iterator[None]:
    """Keep open in trials what is opened within the block: logs, databases, shared memory.

    What a module holds would otherwise refer to closed files, or to others of the same numbers.
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
    return {handle for handle in found if _is_open(handle)}


def _is_open(handle: int) -> bool:
    try:
        os.fstat(handle)
    except OSError:
        return False
    return True


def _close_all_but(*handles: int) -> None:
    """Close what this process has inherited and does not need.

    A copy of the study's end of a connection would keep it open when the study's process dies.
    """
    kept = {0, 1, 2, *handles}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))
