"""Memory and cores of this host, or of the container that this process is in.

In a cgroup with a limit, the kernel kills at that limit, whatever the host has. Limits of
ancestors apply as well, so the tightest one counts. Versions 1 and 2 of cgroups are supported,
also mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import os
from pathlib import Path

import psutil


# Where /proc and /sys are; tests pass another folder.
_ROOT = Path("/")


def host_memory_limit(root: Path = _ROOT) -> float:
    """Return the bytes of memory that all processes here may hold together."""
    limits = [_number(text) for text in _memory_limits(root)]
    total = float(psutil.virtual_memory().total)
    return min([total, *(limit for limit in limits if limit is not None)])


def cpu_count(root: Path = _ROOT) -> float:
    """Return the cores that all processes here may keep busy together; may be a fraction.

    The minimum of the processors that this process may run on and the CPU quotas of its cgroup
    and the cgroup's ancestors.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return usable_cores(cores, _cpu_quotas(root))


def usable_cores(cores: float, quotas: Iterable[str]) -> float:
    """Return the cores that the processes of a cgroup may keep busy together (pure).

    Args:
        cores: The processors that this process may run on.
        quotas: Contents of ``cpu.max`` such as ``"150000 100000"``: microseconds of CPU time in
            each period, and microseconds of a period; ``"max"`` or -1 for no quota.
    """
    found = [float(cores)]
    for quota in quotas:
        fields = quota.split()
        if len(fields) == 2:
            budget, period = map(_number, fields)
            if budget is not None and period:
                found.append(budget / period)
    return min(found)


def _number(text: str) -> float | None:
    """Return a file's number; None for "max", -1, and the huge number for no limit in v1."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < 2**62 else None


def _memory_limits(root: Path) -> Iterator[str]:
    for folder in _folders(root, "memory"):
        yield _text(folder / "memory.limit_in_bytes")
    for folder in _folders(root, ""):
        yield _text(folder / "memory.max")


def _cpu_quotas(root: Path) -> Iterator[str]:
    for folder in _folders(root, "cpu"):
        yield " ".join(_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    for folder in _folders(root, ""):
        yield _text(folder / "cpu.max")


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and its ancestors; version 2 is under "".

    In a container the path may be the host's, while the mount has the container's own cgroup at
    its root: missing folders are skipped, and the root is always included.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller or "unified")
        mount = mount if controller or mount.is_dir() else mount.parent
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:depth])
            if depth == 0 or folder.is_dir():
                yield folder


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
