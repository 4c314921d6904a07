"""Limits that the kernel keeps: RLIMIT_DATA, RLIMIT_CPU and a control group for each trial.

By default the supervisor judges memory and no ``RLIMIT_DATA`` is set: it counts private writable
memory whether touched or not (stacks of threads, arenas, ``np.zeros``, private mappings of files),
and no shared memory. It makes an allocation fail that would pass the limit, and is what
``strict_memory=True`` asks for.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from pathlib import Path
import sys


# Added to the kernel's own score of a process for the out-of-memory killer, in thousandths of all
# memory: a trial is killed before the study that started it.
OOM_SCORE = 800

# Room below which RLIMIT_DATA does more harm than good: native libraries that are refused their
# first buffers (OpenBLAS: 32 MiB a thread) end or hang where Python would raise. The supervisor
# alone enforces the limit of such a trial.
MIN_ROOM = 64 * 2**20
_BUFFER = 40 * 2**20


def has_room(memory: float, used: int, cores: int) -> bool:
    """Return whether RLIMIT_DATA leaves enough room for native libraries.

    Args:
        memory: The memory limit, in bytes.
        used: The memory in use, in bytes.
        cores: The threads that a native library may start.
    """
    return memory - used >= max(MIN_ROOM, min(cores * _BUFFER, memory / 2))


def data_limit(data: int, used: float, memory: float) -> int:
    """Return the RLIMIT_DATA under which the memory in use can't pass a limit.

    Args:
        data: What RLIMIT_DATA counts now, in bytes.
        used: The memory in use now, in bytes.
        memory: The memory limit, in bytes.
    """
    return min(data + max(0, math.floor(memory - used)), sys.maxsize)


def _data_size(pid: int | str = "self") -> int | None:
    """Return the bytes that RLIMIT_DATA counts of a process, None when unknown."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"VmData:"):
                return int(line.split()[1]) * 1024
    return None


def limit_memory(memory: float) -> int | None:
    """Limit this process's memory; return the RLIMIT_DATA set, None if none was."""
    data = _data_size() if sys.platform == "linux" else None
    if data is None:
        return None
    import resource

    from optuna_quota._metering.linux_process import LinuxProcess

    with contextlib.closing(LinuxProcess(os.getpid())) as process:
        used = process.proportional_memory().proportional
    if not has_room(memory, used, os.cpu_count() or 1):
        return None
    soft, (_, hard) = data_limit(data, used, memory), resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    # Soft, so that the handling of the error itself, and the supervisor, can raise it again.
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return soft


def may_exceed(memory: float | None) -> bool:
    """Return whether this process may be over a memory limit already; cheap and not exact.

    Memory that it shares with others counts in full here.
    """
    if memory is None or sys.platform != "linux":
        return False
    names = (b"RssAnon:", b"RssShmem:", b"VmSwap:")
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(names)) * 1024 > memory
    return False


def lift_memory_limit() -> None:
    """Raise the soft limit as far as it goes: the handling of an error needs memory."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


class DataLimit:
    """Keeps a child's RLIMIT_DATA at what its memory may still grow by.

    Memory that is mapped and stays untouched for a while (stacks of threads, arenas, a sparse
    array) does not count toward the limit, so the same amount is added. Not at once: an array that
    is just being filled is untouched for a moment.

    Args:
        pid: A child of this process.
        memory: The memory limit, in bytes.
        soft: The RLIMIT_DATA that the child has set itself.
    """

    PERIOD = 0.1
    # While there is something to add: a library's threads and their buffers come within a moment,
    # and what the trial needs next would be refused because of them.
    FAST_PERIOD = 0.02
    MIN_CHANGE = 4 * 2**20
    WINDOW = 5

    def __init__(self, pid: int, memory: float, soft: int) -> None:
        self._pid = pid
        self._memory = memory
        self._soft = soft
        self._wanted: list[int] = []

    def update(self, used: float) -> float:
        """Adapt the limit to the memory in use, in bytes; return seconds until the next time."""
        data = _data_size(self._pid)
        if data is None:
            return self.PERIOD
        wanted = data_limit(data, used, self._memory)
        self._wanted = [*self._wanted, wanted][-self.WINDOW :]
        if len(self._wanted) == self.WINDOW and not self._set(min(self._wanted)):
            return self.PERIOD
        return self.FAST_PERIOD if wanted > self._soft + self.MIN_CHANGE else self.PERIOD

    def _set(self, soft: int) -> bool:
        """Set the soft limit; return whether it is in force."""
        import resource

        with contextlib.suppress(OSError, ValueError):
            now, hard = resource.prlimit(self._pid, resource.RLIMIT_DATA)
            # One that the trial has changed itself, or that was lifted at its end, is left alone.
            if now == self._soft != soft and (hard == resource.RLIM_INFINITY or soft <= hard):
                resource.prlimit(self._pid, resource.RLIMIT_DATA, (soft, hard))
                self._soft = soft
        return soft == self._soft


def limit_cpu_time(cpu_time: float, grace_period: float) -> None:
    """Let the kernel stop this process when its own CPU time is used up.

    A backstop: the kernel counts whole seconds of one process, the metering the tree's, and is
    first.

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


def raise_oom_score() -> None:
    """Let the kernel's out-of-memory killer prefer this process; always permitted."""
    with contextlib.suppress(OSError, ValueError):
        handle = os.open("/proc/self/oom_score_adj", os.O_RDWR)
        try:
            if int(os.read(handle, 16)) < OOM_SCORE:
                os.pwrite(handle, str(OOM_SCORE).encode(), 0)
        finally:
            os.close(handle)


def reset_peak() -> None:
    """Restart this process's peak, which includes what it needed to receive the objective."""
    with contextlib.suppress(OSError):
        _write("/proc/self/clear_refs", "5")


def _write(path: Path | str, text: str) -> None:
    handle = os.open(path, os.O_WRONLY)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)


_MOUNT = Path("/sys/fs/cgroup")


def own_cgroup(mount: Path = _MOUNT) -> Path | None:
    """Return the folder of this process's control group (cgroup v2), None without one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                folder = mount / line[3:].lstrip("/")
                if (folder / "cgroup.procs").exists():
                    return folder
    return None


def find_delegated(start: Path | None, mount: Path = _MOUNT) -> Path | None:
    """Return the nearest group in which groups with a memory limit may be made, None without.

    Args:
        start: The group to begin at; those above it are tried in turn.
        mount: Where the hierarchy is mounted.
    """
    while start is not None and (start == mount or mount in start.parents):
        if _is_delegated(start):
            return start
        start = start.parent
    return None


def _is_delegated(folder: Path) -> bool:
    try:
        controllers = (folder / "cgroup.subtree_control").read_text(encoding="utf-8").split()
    except OSError:
        return False
    # To move a process, the common ancestor of its old and new group must be writable as well.
    return (
        "memory" in controllers
        and os.access(folder, os.W_OK)
        and os.access(folder / "cgroup.procs", os.W_OK)
    )


_numbers = itertools.count()


class Cgroup:
    """The control group of one trial, where the system delegates one.

    With it the kernel counts the memory of the whole tree, shared memory and files in tmpfs
    included, and kills the tree at once.

    Args:
        folder: The group to make it in; raises OSError if it can't be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / f"optuna-quota-{os.getpid()}-{next(_numbers)}"
        self._folder.mkdir()

    def add(self, pid: int) -> None:
        """Move a process in, with all that it starts from now on; raises OSError if refused."""
        _write(self._folder / "cgroup.procs", str(pid))

    def limit_memory(self, room: float) -> None:
        """Set what the group may hold beyond what it holds now, in bytes.

        Pages that the trial shares with the fork server are charged to the fork server's group, so
        the limit is set by what may yet be added. Clean pages of files do not count: the kernel
        drops them when the group needs the room.
        """
        stat = self._table("memory.stat")
        held = sum(stat.get(name, 0) for name in ("anon", "shmem", "kernel"))
        _write(self._folder / "memory.max", str(max(0, held + int(room))))
        with contextlib.suppress(OSError):
            _write(self._folder / "memory.swap.max", "0")

    def oom_kills(self) -> int:
        """Return how many processes the kernel has killed in this group for its memory."""
        return self._table("memory.events").get("oom_kill", 0)

    def kill(self) -> bool:
        """Kill all its processes at once; return whether the kernel can (5.14 and later)."""
        try:
            _write(self._folder / "cgroup.kill", "1")
        except OSError:
            return False
        return True

    def remove(self) -> None:
        """Remove the group, which must be empty."""
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _table(self, name: str) -> dict[str, int]:
        """Return the numbers of a file of lines such as ``anon 123``, none without the file."""
        try:
            text = (self._folder / name).read_text(encoding="utf-8")
        except OSError:
            return {}
        fields = (line.split() for line in text.splitlines())
        return {pair[0]: int(pair[1]) for pair in fields if len(pair) == 2}
