"""The kernel's own limits on a process: a backstop that needs no sampling.

``RLIMIT_DATA`` makes an allocation fail that would pass the limit. It counts private writable
memory whether touched or not (stacks of threads, arenas, ``np.zeros``, private mappings of files),
and no shared memory. So it judges no trial, unless that is asked for (``strict_memory``): by
default there is room beside the limit for as much as the host has, which no allocation needs that
the kernel would grant without us, and what stays untouched is given back from time to time.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys


# Added to the kernel's own score of a process by the out-of-memory killer, in thousandths of all
# memory: a trial goes before the study that started it.
OOM_SCORE = 800


# Room below which RLIMIT_DATA does more harm than good: native libraries that are refused their
# first buffers (OpenBLAS: 32 MiB a thread) end or hang where Python would raise. The sampler
# alone holds such a trial.
LEAST_BUDGET = 64 * 2**20
_BUFFER = 40 * 2**20


def has_room(memory: float, used: int, cores: int) -> bool:
    """Return whether a trial has enough room under its limit for the kernel's to be set there.

    Args:
        memory: The limit, in bytes.
        used: The memory in use now, in bytes.
        cores: The threads that a native library may start.
    """
    return memory - used >= max(LEAST_BUDGET, min(cores * _BUFFER, memory / 2))


def has_data_limit() -> bool:
    """Return whether the kernel counts and limits a process's private memory (Linux)."""
    return sys.platform == "linux" and os.path.exists("/proc/self/status")


def raise_oom_score() -> None:
    """Let the kernel's out-of-memory killer prefer this process; always permitted."""
    with contextlib.suppress(OSError, ValueError):
        handle = os.open("/proc/self/oom_score_adj", os.O_RDWR)
        try:
            if int(os.read(handle, 16)) < OOM_SCORE:
                os.pwrite(handle, str(OOM_SCORE).encode(), 0)
        finally:
            os.close(handle)


def data_size(pid: int | str = "self") -> int | None:
    """Return the bytes that ``RLIMIT_DATA`` counts, None when unknown."""
    return _field(f"/proc/{pid}/status", b"VmData:")


def _field(path: str, name: bytes) -> int | None:
    """Return the bytes of one line such as ``VmData:  123 kB``, None without it."""
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.startswith(name):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def room_for_untouched() -> int | None:
    """Return the bytes that a trial may have reserved beside its limit; None for any number.

    By default the kernel grants no single request beyond all memory and swap of the host. Where it
    is told to grant anything (vm.overcommit_memory is 1), programs reserve more than there is.
    """
    with contextlib.suppress(OSError), open("/proc/sys/vm/overcommit_memory", "rb") as file:
        if file.read().strip() == b"1":
            return None
    total, swap = (_field("/proc/meminfo", name) for name in (b"MemTotal:", b"SwapTotal:"))
    return None if total is None else total + (swap or 0)


def data_limit(data: int, used: float, memory: float) -> int:
    """Return the ``RLIMIT_DATA`` under which the memory in use can't pass a limit.

    Args:
        data: What ``RLIMIT_DATA`` counts now, in bytes.
        used: The memory in use now, in bytes.
        memory: The limit on it, in bytes.
    """
    return min(data + max(0, math.floor(memory - used)), sys.maxsize)


def limit_memory(memory: float, *, strict: bool) -> int | None:
    """Limit this process's memory; return the ``RLIMIT_DATA`` set, None where there is none.

    Args:
        memory: The limit, in bytes.
        strict: Whether the kernel is to refuse what would pass it, touched or not.
    """
    if not has_data_limit():
        return None
    import resource

    from optuna_quota._metering.linux_process import LinuxProcess

    room = 0 if strict else room_for_untouched()
    data = data_size()
    if data is None or room is None:
        return None
    used = 0
    if strict:
        with contextlib.closing(LinuxProcess(os.getpid())) as process:
            used = process.proportional_memory().proportional
        if not has_room(memory, used, os.cpu_count() or 1):
            return None
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = data_limit(data, used, memory + room)
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    # Soft, so that the handling of the error itself, and the supervisor, can raise it again.
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return soft


def reset_peak() -> None:
    """Let this process's peak start anew: it needed memory to receive the objective."""
    with contextlib.suppress(OSError):
        handle = os.open("/proc/self/clear_refs", os.O_WRONLY)
        try:
            os.write(handle, b"5")
        finally:
            os.close(handle)


def lift_memory_limit() -> None:
    """Raise the soft limit as far as it goes: an error at the limit must be able to get out."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def limit_cpu_time(cpu_time: float, grace_period: float) -> None:
    """Let the kernel stop this process when its own CPU time is used up.

    The kernel counts whole seconds and one process; the sampler counts the tree and comes first.

    Args:
        cpu_time: The limit in CPU-seconds.
        grace_period: Seconds between SIGXCPU and SIGKILL.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        times = os.times()
        soft = min(math.ceil(cpu_time + times.user + times.system) + 1, sys.maxsize)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        last = min(soft + math.ceil(grace_period) + 1, sys.maxsize)
        if hard != resource.RLIM_INFINITY:
            soft, last = min(soft, hard), min(last, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, last))


class DataLimit:
    """Keeps a child's ``RLIMIT_DATA`` at what its memory may still grow by.

    What is mapped and stays untouched (stacks of threads, arenas, a sparse array) counts for the
    kernel but not for the limit, so it is given back. In strict mode only what has stayed so for a
    while: an array that is just being filled is untouched only for a moment.

    Args:
        pid: A child of this process.
        memory: The limit, in bytes.
        soft: The ``RLIMIT_DATA`` that the child has set itself.
        strict: Whether the limit itself is to hold for what is reserved.
    """

    PERIOD = 0.1
    # While there is something to give back: a library's threads and their buffers come within a
    # moment, and what the trial needs next would be refused for their sake.
    HASTE = 0.02
    WORTH = 4 * 2**20
    WINDOW = 5

    def __init__(self, pid: int, memory: float, soft: int, *, strict: bool) -> None:
        self._pid = pid
        self._memory = memory + (0 if strict else room_for_untouched() or 0)
        self._window = self.WINDOW if strict else 1
        self._soft = soft
        self._wanted: list[int] = []

    def update(self, used: float) -> float:
        """Look again; return the seconds until the next look is due.

        Args:
            used: The memory of the trial now, in bytes.
        """
        data = data_size(self._pid)
        if data is None:
            return self.PERIOD
        wanted = data_limit(data, used, self._memory)
        self._wanted = [*self._wanted, wanted][-self._window :]
        if len(self._wanted) == self._window and not self._set(min(self._wanted)):
            return self.PERIOD
        return self.HASTE if wanted > self._soft + self.WORTH else self.PERIOD

    def _set(self, soft: int) -> bool:
        """Set the soft limit; return whether it is as it was to be."""
        import resource

        with contextlib.suppress(OSError, ValueError):
            now, hard = resource.prlimit(self._pid, resource.RLIMIT_DATA)
            # One that the trial has changed itself, or that was lifted at its end, is left alone.
            if now == self._soft != soft and (hard == resource.RLIM_INFINITY or soft <= hard):
                resource.prlimit(self._pid, resource.RLIMIT_DATA, (soft, hard))
                self._soft = soft
        return soft == self._soft
