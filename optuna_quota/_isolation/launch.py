"""Starts a trial's processes by one of the start methods."""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import ctypes
import os
from pathlib import Path
import socket
import subprocess
import sys
import threading
from typing import Any
from typing import IO
from typing import Literal

from optuna_quota._isolation import processes
from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.child import Inherited
from optuna_quota._isolation.trial_process import fork_trial


StartMethod = Literal["forkserver", "spawn", "fork"]
START_METHODS: tuple[StartMethod, ...] = ("forkserver", "spawn", "fork")


class Launched:
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


def launch_fork(cgroup: Path | None, inherited: Inherited) -> Launched:
    """Fork the trial from this process: nothing is pickled, and no GPU context may exist.

    Args:
        cgroup: Where to make its control group, None for none.
        inherited: What the trial needs.

    Raises:
        RuntimeError: If this process uses CUDA, which a fork can't go on with.
    """
    if processes.uses_cuda():
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
    return Launched(Channel(forked.channel), Channel(forked.control), forked.supervisor)


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


def order_trial(template: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> Launched:
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
        raise TemplateGone(answer)
    channel, control = (Channel(socket.socket(fileno=handle)) for handle in handles)
    try:
        with contextlib.ExitStack() as stack:
            streams = [_stream(number, stack) for number in (1, 2)]
            channel.send_descriptors([*streams, *descriptors])
    except OSError:
        channel.close()
        control.close()
        raise
    return Launched(channel, control)


class TemplateGone(OSError):
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
            _can_supervise = processes.can_supervise()
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
