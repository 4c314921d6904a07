"""System calls that Python lacks, and signals to this process's descendants."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import contextlib
import ctypes
import functools
import os
import select
import signal
import sys
import time


_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29
_PR_SET_CHILD_SUBREAPER = 36
_PF_EXITING = 0x4

# Helpers that remove shared memory, semaphores and temporary files once their user is gone, and
# then end. If they are killed, these resources leak.
_CLEANERS = (b"resource_tracker", b"torch_shm_manager")

# Loaded once, in the fork server: loading it takes a third of a millisecond.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@functools.cache
def can_supervise() -> bool:
    """Return whether this system has what a supervisor needs: Linux with pidfds and /proc."""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


# This process.


def _prctl(option: int, value: int) -> None:
    assert _libc is not None
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def become_subreaper() -> None:
    """Inherit all orphans among this process's descendants; raises OSError if refused."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Be killed when the parent with this pid dies, at once if it has already died."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def raise_priority() -> None:
    """Let this process run as soon as it wakes up, where permitted.

    It sleeps nearly all of the time. By default its timers are 50 µs late, and a busy host delays
    it by milliseconds, in which a trial allocates many MiB. Its forks do not inherit this.
    """
    with contextlib.suppress(OSError):
        _prctl(_PR_SET_TIMERSLACK, 1)
    try:
        policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, policy, os.sched_param(os.sched_get_priority_min(policy)))
    except (OSError, AttributeError):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -10)


class _SignalStack(ctypes.Structure):
    _fields_ = (
        ("pointer", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    )


_SIGNAL_STACK_SIZE = 1 << 18
_signal_stack: ctypes.Array[ctypes.c_char] | None = None


def enlarge_signal_stack() -> None:
    """Give this thread's signal handlers room for many signals at once.

    The stack that :mod:`faulthandler` sets up holds the frame of one signal and 8 KiB. Python's
    handlers run on it too, and with the registers of AVX-512 or AMX a frame takes 4 to 11 KiB:
    signals that arrive together would end the process by SIGSEGV.
    """
    global _signal_stack
    assert _libc is not None
    # The previous stack is in use until it is replaced.
    new = ctypes.create_string_buffer(_SIGNAL_STACK_SIZE)
    stack = _SignalStack(ctypes.addressof(new), 0, _SIGNAL_STACK_SIZE)
    if _libc.sigaltstack(ctypes.byref(stack), None) == 0:
        _signal_stack = new


def caught_signals(numbers: Iterable[int]) -> list[int]:
    """Return those of these signals that this process or a library in it has handlers for."""
    text = _read(os.getpid(), "status").partition(b"\nSigCgt:")[2]
    mask = int(text.split(None, 1)[0], 16) if text else 0
    return [number for number in numbers if mask >> (number - 1) & 1]


# More than any system's `struct sigaction`, which begins with the handler's address.
_SIGACTION_SIZE = 512


def signal_handler(number: int) -> int | None:
    """Return the address of the handler of a signal, in the machine code of any library."""
    assert _libc is not None
    action = ctypes.create_string_buffer(_SIGACTION_SIZE)
    if _libc.sigaction(number, None, action) != 0:
        return None
    return ctypes.c_void_p.from_buffer(action).value


def uses_cuda() -> bool:
    """Return whether this process has a CUDA context; NVML alone opens none."""
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith("/dev/nvidia-uvm"):
                    return True
    return False


def is_ready(handle: int, seconds: float | None = None, *, to_write: bool = False) -> bool:
    """Wait for a descriptor, forever unless ``seconds`` are given; return whether it is ready."""
    poll = select.poll()
    poll.register(handle, select.POLLOUT if to_write else select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


# The tree of this process.


def children(pid: int | str = "self") -> list[int]:
    """Return the pids of a process's children, of all its threads."""
    pids: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
                pids += map(int, file.read().split())
    return pids


def descendants() -> list[int]:
    found = children()
    for pid in found:  # grows meanwhile
        found += children(pid)
    return found


def reap() -> dict[int, int]:
    """Wait for all children that have ended; return their exit codes, negative for signals."""
    codes = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes


def send(number: int, pids: Iterable[int], tree_pids: Iterable[int]) -> None:
    """Send a signal to processes whose parent is this process or one of the tree.

    A pid may belong to another process since it was read. A pidfd is bound to one process, whose
    parent is checked then: no process outside of the tree is ever signalled.
    """
    tree = {os.getpid(), *tree_pids}
    for pid in pids:
        _send_if(lambda fields: int(fields[1]) in tree, number, pid)


def _send_if(is_meant: Callable[[list[bytes]], bool], number: int, pid: int) -> None:
    """Send a signal to a process if the fields of its ``/proc/PID/stat`` say that it is meant."""
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(pid)
        try:
            fields = _stat_fields(pid)
            if fields and is_meant(fields):
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


class TrialSession:
    """The session that a trial's process leads, for when its supervisor was killed.

    Processes that have left it are not found. A fork server, as their subreaper, kills them too.
    """

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._begun = _start_time(leader)

    def kill(self) -> None:
        # While the session has members, no other process can get its leader's pid.
        if _start_time(self._leader) not in (None, self._begun):
            return
        for _ in range(_MOST_KILLS):
            pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
            members = [p for p in pids if self._has(_stat_fields(p)) and not is_exiting(p)]
            if not members:
                return
            for pid in members:
                _send_if(self._has, signal.SIGKILL, pid)
            time.sleep(0.001)

    def _has(self, fields: list[bytes]) -> bool:
        return bool(fields) and int(fields[3]) == self._leader


# A process that is being killed may start another one; one that hangs in the kernel remains.
_MOST_KILLS = 100


def _start_time(pid: int) -> bytes | None:
    fields = _stat_fields(pid)
    return fields[19] if fields else None


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _stat_fields(pid: int) -> list[bytes]:
    return _read(pid, "stat").rpartition(b")")[2].split()


def process_state(pid: int) -> str:
    """Return the letter of a process's state, "" when it is gone."""
    fields = _stat_fields(pid)
    return fields[0].decode() if fields else ""


def is_exiting(pid: int) -> bool:
    fields = _stat_fields(pid)
    return not fields or bool(int(fields[6]) & _PF_EXITING)


def describe_process(pid: int) -> str:
    command = _read(pid, "cmdline")
    if command == _read(os.getpid(), "cmdline"):
        # The command is this library's, or the script's, and says nothing of what the fork does.
        return f"a fork of the trial (pid {pid})"
    words = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return f"{words[:80] or 'a process'} (pid {pid})"


def is_cleaner(pid: int) -> bool:
    """Return whether a process cleans up after others, then ends by itself."""
    command = _read(pid, "cmdline")
    return any(name in command for name in _CLEANERS)


def count_oom_kills() -> int:
    with contextlib.suppress(OSError), open("/proc/vmstat", "rb") as file:
        for line in file:
            if line.startswith(b"oom_kill "):
                return int(line.split()[1])
    return 0


class StudySuspension:
    """Stops a trial while its study is stopped, by Ctrl-Z or SIGSTOP; runs in the supervisor.

    A trial's processes are in sessions of their own, so that what a terminal sends to its
    foreground process group does not reach them.
    """

    def __init__(self, study_pidfd: int) -> None:
        self._study = _pid_of(study_pidfd)
        self._stopped: list[int] = []

    def update(self) -> bool:
        """Stop or continue the tree along with the study; return whether it is stopped."""
        if self._study is not None and process_state(self._study) == "T":
            # Parents first, which start no further child then. Processes that were stopped before
            # stay out, as they are not to be continued.
            while running := [pid for pid in descendants() if self._is_running(pid)]:
                send(signal.SIGSTOP, running, descendants())
                self._stopped += running
            return True
        if self._stopped:
            # Children first: parents that wait for stopped ones, as shells do, see no change.
            send(signal.SIGCONT, reversed(self._stopped), descendants())
            self._stopped.clear()
        return False

    def _is_running(self, pid: int) -> bool:
        return pid not in self._stopped and process_state(pid) not in ("", *"TtZX")


def _pid_of(pidfd: int) -> int | None:
    """Return the pid that a pidfd is bound to, None when that process is gone."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
            pid = next(int(line.split()[1]) for line in file if line.startswith(b"Pid:"))
    except (OSError, StopIteration):
        return None
    return pid if pid > 0 else None
