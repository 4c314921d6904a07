"""A control group of its own for each trial, where the system delegates one (cgroup v2).

What it adds to everything else: the kernel counts the memory of the whole tree, with shared
memory and files in tmpfs, and kills it as one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path


_MOUNT = Path("/sys/fs/cgroup")
_numbers = itertools.count()


def own_cgroup(mount: Path = _MOUNT) -> Path | None:
    """Return the folder of this process's group in the unified hierarchy, None without one."""
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
    # To move a process, its old and new group's common ancestor must be writable as well.
    return (
        "memory" in controllers
        and os.access(folder, os.W_OK)
        and os.access(folder / "cgroup.procs", os.W_OK)
    )


class CgroupLeaf:
    """The group of one trial.

    Args:
        folder: Where it is to be made.

    Raises:
        OSError: If it can't be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / f"optuna-quota-{os.getpid()}-{next(_numbers)}"
        self._folder.mkdir()

    def add(self, pid: int) -> None:
        """Move a process in; what it starts will be in too.

        Raises:
            OSError: If it can't be moved.
        """
        self._write("cgroup.procs", str(pid))

    def limit_memory(self, budget: float) -> None:
        """Set what the group may hold beyond what it holds now, in bytes.

        The pages that the trial shares with its template are charged to the template's group, so
        the limit is set by what may yet be added. Clean pages of files are no part of what it
        holds: the kernel drops them when the group needs the room.
        """
        known = self._table("memory.stat")
        held = sum(known.get(name, 0) for name in ("anon", "shmem", "kernel"))
        self._write("memory.max", str(max(0, held + int(budget))))
        with contextlib.suppress(OSError):
            self._write("memory.swap.max", "0")

    def oom_kills(self) -> int:
        """Return how often the kernel has killed in this group for its memory."""
        return self._table("memory.events").get("oom_kill", 0)

    def kill(self) -> bool:
        """Kill all its processes at once; return whether the kernel can (5.14 and later)."""
        try:
            self._write("cgroup.kill", "1")
        except OSError:
            return False
        return True

    def remove(self) -> None:
        """Remove the group, which must be empty."""
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _table(self, name: str) -> dict[str, int]:
        """Return the numbers of a file of lines such as ``anon 123``."""
        fields = (line.split() for line in self._read(name).splitlines())
        return {pair[0]: int(pair[1]) for pair in fields if len(pair) == 2}

    def _read(self, name: str) -> str:
        try:
            return (self._folder / name).read_text(encoding="utf-8")
        except OSError:
            return ""

    def _write(self, name: str, text: str) -> None:
        handle = os.open(self._folder / name, os.O_WRONLY)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)
