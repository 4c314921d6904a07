"""Starts a trial's processes by one of the start methods."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import ctypes
from dataclasses import dataclass
import gc
import os
from pathlib import Path
import socket
import subprocess
import sys
import threading
from typing import Any
from typing import IO
from typing import Literal
from typing import NoReturn
import warnings

from optuna_quota._isolation import linux
from optuna_quota._isolation import messages
from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.child import run_child
from optuna_quota._isolation.memory_limits import CgroupLeaf
from optuna_quota._isolation.multiprocessing_child import become_child
from optuna_quota._isolation.signals import block_job_signals
from optuna_quota._isolation.signals import hold_signals
from optuna_quota._isolation.signals import ignore_job_signals
from optuna_quota._isolation.supervisor import Supervisor


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
    parent: int, *, cgroup: Path | None, inherited: messages.InheritedObjective | None = None
) -> ForkedTrial:
    """Fork a supervisor with its trial.

    Args:
        parent: A pidfd of the study's process; stays open here.
        cgroup: Where to make the trial's control group, None for none.
        inherited: What the trial has from this process; without it, all is sent to the trial.
    """
    (ours, theirs), (command, obey) = socket.socketpair(), socket.socketpair()
    with theirs, obey, block_job_signals():
        pid = fork()
        if pid == 0:
            try:
                _supervise(theirs.fileno(), obey.fileno(), parent, cgroup, inherited)
            finally:
                # Never back into the code that this process is a copy of.
                os._exit(1)
    return ForkedTrial(pid, ours, command)


def fork() -> int:
    """Fork this process, whatever threads it has: the child starts from a known state."""
    with warnings.catch_warnings():
        # Python 3.12 warns where it counts a second thread, such as an idle one of OpenBLAS.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _supervise(
    channel: int,
    control: int,
    parent: int,
    cgroup: Path | None,
    inherited: messages.InheritedObjective | None,
) -> NoReturn:
    os.setsid()
    ignore_job_signals()
    linux.become_subreaper()
    # Keeps messages apart, of which a signal handler reads one without waiting.
    link, child_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child_link.setblocking(False)
    crash_file = os.memfd_create("optuna-quota-crash")
    leaf = _make_leaf(cgroup)
    supervisor = os.getpid()
    child = fork()
    if child == 0:
        code = 1
        link.close()
        try:
            _enter_child(supervisor, leaf)
            hold_signals()
            if inherited is None:
                kept = (channel, child_link.fileno(), crash_file, parent)
                _close_all_but(*kept, *_opened_by_modules)
            else:
                # To go through what is inherited would copy its pages.
                gc.freeze()
            become_child(f"Trial-{supervisor}", parent)
            code = run_child(
                Channel(socket.socket(fileno=channel)),
                link=child_link,
                crash_file=crash_file,
                inherited=inherited,
                streams=inherited is None,
            )
        finally:
            os._exit(code)
    child_link.close()
    _close_all_but(control, parent, link.fileno(), crash_file)
    commands = Channel(socket.socket(fileno=control))
    order = None if inherited is None else inherited.monitoring
    _mind(commands, child, link, parent, crash_file, leaf, order)


def _mind(
    control: Channel,
    child: int,
    link: socket.socket,
    parent: int,
    crash_file: int,
    leaf: CgroupLeaf | None,
    order: messages.BeginMonitoring | None,
) -> NoReturn:
    gc.disable()
    with contextlib.suppress(OSError):
        control.send(messages.ProcessStarted())
    supervisor = Supervisor(
        control,
        child,
        link=link,
        parent=parent,
        crash_file=crash_file,
        leaf=leaf,
        order=order,
    )
    ended = supervisor.run()
    with contextlib.suppress(OSError):
        control.send(ended)
    os._exit(0)


def _enter_child(supervisor: int, leaf: CgroupLeaf | None) -> None:
    # A session of its own: a trial that signals its process group must not hit its supervisor.
    os.setsid()
    linux.die_with_parent(supervisor)
    if leaf is not None:
        with contextlib.suppress(OSError):
            leaf.add(os.getpid())


def _make_leaf(folder: Path | None) -> CgroupLeaf | None:
    if folder is None:
        return None
    try:
        return CgroupLeaf(folder)
    except OSError:
        return None


@contextlib.contextmanager
def modules_may_open_files() -> Iterator[None]:
    """Leave open in trials what is opened in the block: logs, databases, shared memory.

    What a module holds would otherwise refer to closed files, or by their numbers to others'.
    """
    before = _open_descriptors()
    try:
        yield
    finally:
        now = _open_descriptors()
        _opened_by_modules.intersection_update(now)
        _opened_by_modules.update(now - before)


_opened_by_modules: set[int] = set()


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


StartMethod = Literal["forkserver", "spawn", "fork"]


class TrialConnections:
    """The study's side of a trial's processes.

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
        """Close the connections, which ends whatever is left; wait for the supervisor."""
        self.channel.close()
        self.control.close()
        pid, self._supervisor = self._supervisor, None
        if pid is not None:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def launch_fork(cgroup: Path | None, inherited: messages.InheritedObjective) -> TrialConnections:
    """Fork the trial from this process: nothing is pickled, and no GPU context may exist.

    Args:
        cgroup: Where to make its control group, None for none.
        inherited: What the trial needs.

    Raises:
        RuntimeError: If this process uses CUDA, which a fork can't go on with.
    """
    if linux.uses_cuda():
        raise RuntimeError(
            "`start_method` must not be 'fork' once this process uses CUDA, which a forked "
            "process can't go on with; use 'forkserver'."
        )
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    end_openmp_threads()
    parent = os.pidfd_open(os.getpid())
    try:
        forked = fork_trial(parent, cgroup=cgroup, inherited=inherited)
    finally:
        os.close(parent)
    return TrialConnections(Channel(forked.channel), Channel(forked.control), forked.supervisor)


def end_openmp_threads() -> None:
    """Let GNU's OpenMP end the threads that it keeps for this one; it starts them when needed.

    A forked process has none of them, which the library does not notice: it would wait for them
    for ever. LLVM's and Intel's notice.
    """
    for path in _gnu_openmp_libraries():
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW).omp_pause_resource_all(
                _OMP_PAUSE_HARD
            )


_OMP_PAUSE_HARD = 2


def _gnu_openmp_libraries() -> set[str]:
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as file:
        paths = {line.split(None, 5)[5].strip() for line in file if "libgomp" in line}
        return {path for path in paths if path.startswith("/")}
    return set()


def request_trial(
    template: socket.socket, data: bytes, descriptors: Sequence[int] = ()
) -> TrialConnections:
    """Ask a template for a trial's processes.

    Args:
        template: The connection.
        data: The order.
        descriptors: Open files for the trial, beside the standard streams.

    Raises:
        OSError: If the template is gone.
    """
    template.send(data)
    answer, handles, _, _ = socket.recv_fds(template, 1 << 16, 2)
    if len(handles) != 2:
        raise ForkServerExited(answer)
    channel, control = (Channel(socket.socket(fileno=handle)) for handle in handles)
    try:
        with contextlib.ExitStack() as stack:
            streams = [_stream(number, stack) for number in (1, 2)]
            channel.send_descriptors([*streams, *descriptors])
    except OSError:
        channel.close()
        control.close()
        raise
    return TrialConnections(channel, control)


class ForkServerExited(OSError):
    """A template has ended.

    Args:
        last_words: What it said at the end.
    """

    def __init__(self, last_words: bytes) -> None:
        super().__init__("The template has ended.")
        self.last_words = last_words


def _stream(number: int, stack: contextlib.ExitStack) -> int:
    """Return a standard stream's descriptor, that of a null device where it is closed."""
    try:
        # Where it was closed from the start, its number is another file's by now.
        if (sys.__stdout__, sys.__stderr__)[number - 1] is None:
            raise OSError
        os.fstat(number)
    except OSError:
        number = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, number)
    return number


_BOOT = (
    "import sys; sys.path[:] = {path!r}; "
    "from optuna_quota._isolation.{module} import main; main({argument})"
)


def interpreter(module: str, argument: Any) -> list[str]:
    """Return the command that runs ``main`` of one of these modules in a fresh interpreter.

    The study's script plays no part in it, so that no script needs a guard. It imports from where
    this process does: the working directory, which is first otherwise, may hold a file of the
    user's that bears the name of a module.
    """
    from multiprocessing.spawn import get_executable

    folder = str(Path(__file__).resolve().parents[2])
    path = [entry for entry in sys.path if isinstance(entry, str)]
    path += [] if folder in path else [folder]
    flags = [f"-X{name}" for name in ("utf8", "dev") if name in sys._xoptions]
    code = _BOOT.format(path=path, module=module, argument=repr(argument))
    return [os.fsdecode(get_executable()), *flags, "-c", code]


def can_supervise() -> bool:
    """Return whether this system has what supervisors need; asked once."""
    global _can_supervise
    with _lock:
        if _can_supervise is None:
            _can_supervise = linux.can_supervise()
        return _can_supervise


_can_supervise: bool | None = None
_lock = threading.Lock()


def popen(command: list[str], errors: IO[bytes], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, without a terminal and without noise.

    Args:
        command: The command.
        errors: What becomes its standard error.
        **options: As of :class:`subprocess.Popen`.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
        **options,
    )
