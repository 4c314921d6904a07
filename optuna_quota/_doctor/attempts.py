"""Tries in a process of its own what an isolated trial will ask of the kernel.

Some of it can't be undone (a limit, a namespace) and some can kill, so it never runs in the
process that asks. The file runs as a script, without the package and without site-packages.
"""

from __future__ import annotations

from collections.abc import Callable
import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys


_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_RESET_PEAK = "5"  # proc(5), /proc/PID/clear_refs: resets VmHWM to the present resident size


def run_attempts(timeout: float = 20.0) -> dict[str, str | None]:
    """Return for each attempt None when the kernel did it, else why it did not.

    Args:
        timeout: Seconds until the kernel's answer is given up.
    """
    command = [sys.executable, "-I", "-S", __file__]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False
        )
        answers = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return dict.fromkeys(ATTEMPTS, f"the trying process did not answer: {error}")
    return {name: answers.get(name, "not tried") for name in ATTEMPTS}


def _limit_memory() -> str | None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    budget = 64 * 2**20
    if hard != resource.RLIM_INFINITY and hard < budget:
        return f"the hard limit is already down to {hard} bytes"
    resource.setrlimit(resource.RLIMIT_DATA, (budget, hard))
    try:
        mmap.mmap(-1, 4 * budget, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    return "private memory beyond it is handed out all the same (kernel before 4.7, or gVisor)"


def _limit_cpu_time() -> str | None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (3600, hard))
    return None


def _adopt_orphans() -> str | None:
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _die_with_parent() -> str | None:
    return _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _open_pidfd() -> str | None:
    if not hasattr(os, "pidfd_open"):
        return "this Python has no os.pidfd_open"
    os.close(os.pidfd_open(os.getpid()))
    return None


def _volunteer_for_oom_killer() -> str | None:
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
    return None


def _reset_peak() -> str | None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write(_RESET_PEAK)
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return None if "VmHWM" in file.read() else "/proc/PID/status has no VmHWM"


def _list_children() -> str | None:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii"):
        return None


def _make_pid_namespace() -> str | None:
    # The user namespace makes it possible without root, where the host allows that at all.
    flags = _CLONE_NEWPID if os.geteuid() == 0 else _CLONE_NEWPID | _CLONE_NEWUSER
    libc = ctypes.CDLL(None, use_errno=True)
    return None if libc.unshare(flags) == 0 else os.strerror(ctypes.get_errno())


def _prctl(option: int, value: int) -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    return None if libc.prctl(option, value, 0, 0, 0) == 0 else os.strerror(ctypes.get_errno())


# The namespace comes last: a process that has asked for one can start no more threads.
ATTEMPTS: dict[str, Callable[[], str | None]] = {
    "limit_memory": _limit_memory,
    "limit_cpu_time": _limit_cpu_time,
    "adopt_orphans": _adopt_orphans,
    "die_with_parent": _die_with_parent,
    "open_pidfd": _open_pidfd,
    "volunteer_for_oom_killer": _volunteer_for_oom_killer,
    "reset_peak": _reset_peak,
    "list_children": _list_children,
    "make_pid_namespace": _make_pid_namespace,
}


def _attempt(action: Callable[[], str | None]) -> str | None:
    try:
        return action()
    except (OSError, ValueError, AttributeError, ImportError) as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: _attempt(action) for name, action in ATTEMPTS.items()}))
