"""The kernel's own limits on a process: a backstop that needs no sampling.

``RLIMIT_DATA`` makes an allocation fail that would pass the limit: nothing is ever over it. It
counts private writable memory whether touched or not, and no shared memory, so a sampler is
still needed, and what is mapped but untouched must be given back from time to time.
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


def has_room(memory: float, resident: int, cores: int) -> bool:
    """Return whether a trial has enough room under its limit for the kernel's to be set.

    Args:
        memory: The limit on resident memory, in bytes.
        resident: The resident memory now, in bytes.
        cores: The threads that a native library may start.
    """
    return memory - resident >= max(LEAST_BUDGET, min(cores * _BUFFER, memory / 2))


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
    return _status_bytes(pid, b"VmData:")


def resident_size(pid: int | str = "self") -> int | None:
    """Return the resident bytes, None when unknown."""
    return _status_bytes(pid, b"VmRSS:")


def peak_size(pid: int | str = "self") -> int | None:
    """Return the highest resident bytes so far, None when unknown."""
    return _status_bytes(pid, b"VmHWM:")


def _status_bytes(pid: int | str, name: bytes) -> int | None:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(name):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def data_limit(data: int, resident: int, memory: float) -> int:
    """Return the ``RLIMIT_DATA`` under which resident memory can't pass a limit.

    Args:
        data: What ``RLIMIT_DATA`` counts now, in bytes.
        resident: The resident memory now, in bytes.
        memory: The limit on resident memory, in bytes.
    """
    return min(data + max(0, math.floor(memory) - resident), sys.maxsize)


def limit_memory(memory: float) -> int | None:
    """Limit this process's memory; return the ``RLIMIT_DATA`` set, None where there is none."""
    if not has_data_limit():
        return None
    import resource

    data, resident = data_size(), resident_size()
    if data is None or resident is None or not has_room(memory, resident, os.cpu_count() or 1):
        return None
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = data_limit(data, resident, memory)
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
    """Keeps a child's ``RLIMIT_DATA`` at what its resident memory may still grow by.

    What is mapped and stays untouched (stacks of threads, arenas, a sparse array) counts for the
    kernel but not for the limit, so it is given back. Only what has stayed so for a while: an
    array that is just being filled is untouched only for a moment.

    Args:
        pid: A child of this process.
        memory: The limit on resident memory, in bytes.
        soft: The ``RLIMIT_DATA`` that the child has set itself.
    """

    PERIOD = 0.1
    # While there is something to give back: a library's threads and their buffers come within a
    # moment, and what the trial needs next would be refused for their sake.
    HASTE = 0.02
    WORTH = 4 * 2**20
    WINDOW = 5

    def __init__(self, pid: int, memory: float, soft: int) -> None:
        self._pid = pid
        self._memory = memory
        self._soft = soft
        self._wanted: list[int] = []

    def update(self) -> float:
        """Look again; return the seconds until the next look is due."""
        data, resident = data_size(self._pid), resident_size(self._pid)
        if data is None or resident is None:
            return self.PERIOD
        wanted = data_limit(data, resident, self._memory)
        self._wanted = [*self._wanted, wanted][-self.WINDOW :]
        if len(self._wanted) == self.WINDOW and not self._set(min(self._wanted)):
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
