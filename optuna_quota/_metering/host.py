"""How much memory and how many cores there are: the container's answer where there is one.

Inside a cgroup with a limit, the host's totals are of no use: the kernel kills at the cgroup's. A
limit of an ancestor binds as well, so the tightest on the way up counts. Versions 1 and 2 of
cgroups are heeded, also mixed.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
import os
from pathlib import Path


_ROOT = Path("/")


@dataclass(frozen=True)
class CgroupMemory:
    """What one cgroup says of its memory, as the text of its files; empty where there is none.

    Attributes:
        limit: ``memory.max``, or ``memory.limit_in_bytes`` of version 1.
        current: ``memory.current``, or ``memory.usage_in_bytes``.
        stat: ``memory.stat``.
    """

    limit: str = ""
    current: str = ""
    stat: str = ""


def memory_limit(total: float, cgroups: Iterable[CgroupMemory]) -> float:
    """Return the bytes that the processes of a cgroup may hold together (pure).

    Args:
        total: The host's memory in bytes.
        cgroups: The cgroup and its ancestors.
    """
    limits = (_amount(cgroup.limit) for cgroup in cgroups)
    return min([total, *(limit for limit in limits if limit is not None)])


def memory_available(available: float, cgroups: Iterable[CgroupMemory]) -> float:
    """Return the bytes that can still be had without swapping or being killed (pure).

    Of what a cgroup holds, the inactive part of the page cache is given back on demand.

    Args:
        available: What the host says is available, in bytes.
        cgroups: The cgroup and its ancestors.
    """
    rooms = [available]
    for cgroup in cgroups:
        limit, current = _amount(cgroup.limit), _amount(cgroup.current)
        if limit is not None and current is not None:
            rooms.append(limit - current + _inactive_file(cgroup.stat))
    return max(0.0, min(rooms))


def usable_cores(cores: float, quotas: Iterable[str]) -> float:
    """Return the cores that the processes of a cgroup may keep busy together (pure).

    Args:
        cores: The processors that this process may run on.
        quotas: Texts of ``cpu.max`` such as ``"150000 100000"``: microseconds of CPU time in each
            period of so many microseconds; ``"max"`` or -1 for no quota.
    """
    found = [cores]
    for quota in quotas:
        fields = quota.split()
        budget = _amount(fields[0]) if len(fields) == 2 else None
        period = _amount(fields[1]) if len(fields) == 2 else None
        if budget is not None and period:
            found.append(budget / period)
    return min(found)


def cgroup_paths(text: str) -> dict[str, str]:
    """Return each controller's cgroup, version 2 under ``""``, from /proc/self/cgroup."""
    paths = {}
    for line in text.splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            for controller in fields[1].split(","):
                paths[controller] = fields[2]
    return paths


def _amount(text: str) -> float | None:
    """Return a file's number; None for "max", -1, and the huge number that is v1's no limit."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < 2**62 else None


def _inactive_file(stat: str) -> float:
    for line in stat.splitlines():
        name, _, value = line.partition(" ")
        # Version 1 counts a cgroup without its descendants, and with them under "total_".
        if name in ("inactive_file", "total_inactive_file"):
            return _amount(value) or 0.0
    return 0.0


# From here on: the thin reader.


def host_memory_limit(root: Path = _ROOT) -> float:
    """Return the bytes of memory that the processes here may hold together.

    The least of the host's memory and the limits of this process's cgroup and its ancestors.

    Args:
        root: Where /proc and /sys are; for tests.
    """
    total = _meminfo(root).get("MemTotal")
    if total is None:
        import psutil

        total = float(psutil.virtual_memory().total)
    return memory_limit(total, _memory_cgroups(root))


def available_memory(root: Path = _ROOT) -> float:
    """Return the bytes of memory that can still be had here without swapping or being killed.

    Args:
        root: Where /proc and /sys are; for tests.
    """
    available = _meminfo(root).get("MemAvailable")
    if available is None:
        import psutil

        available = float(psutil.virtual_memory().available)
    return memory_available(available, _memory_cgroups(root))


def cpu_count(root: Path = _ROOT) -> float:
    """Return the cores that the processes here may keep busy together; may be a fraction.

    The least of the processors this process may run on and the quotas of its cgroup and its
    ancestors.

    Args:
        root: Where /proc and /sys are; for tests.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = float(len(os.sched_getaffinity(0)))
    else:
        cores = float(os.cpu_count() or 1)
    return usable_cores(cores, _cpu_quotas(root))


def _meminfo(root: Path) -> Mapping[str, float]:
    found = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        fields = rest.split()
        if fields and fields[0].isdigit():
            found[name] = float(fields[0]) * (1024 if fields[-1] == "kB" else 1)
    return found


def _memory_cgroups(root: Path) -> list[CgroupMemory]:
    paths = cgroup_paths(_text(root / "proc/self/cgroup"))
    cgroups = []
    if "memory" in paths:
        for folder in _way_up(root / "sys/fs/cgroup/memory", paths["memory"]):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
            cgroups.append(CgroupMemory(*(_text(folder / name) for name in names)))
    if "" in paths:
        for folder in _way_up(_unified(root), paths[""]):
            names = ("memory.max", "memory.current", "memory.stat")
            cgroups.append(CgroupMemory(*(_text(folder / name) for name in names)))
    return cgroups


def _cpu_quotas(root: Path) -> list[str]:
    paths = cgroup_paths(_text(root / "proc/self/cgroup"))
    quotas = []
    if "cpu" in paths:
        for folder in _way_up(root / "sys/fs/cgroup/cpu", paths["cpu"]):
            quota, period = (_text(folder / f"cpu.cfs_{n}_us") for n in ("quota", "period"))
            quotas.append(f"{quota.strip()} {period.strip()}")
    if "" in paths:
        quotas += [_text(folder / "cpu.max") for folder in _way_up(_unified(root), paths[""])]
    return quotas


def _unified(root: Path) -> Path:
    mixed = root / "sys/fs/cgroup/unified"
    return mixed if mixed.is_dir() else root / "sys/fs/cgroup"


def _way_up(mount: Path, path: str) -> Iterator[Path]:
    """Yield the folder of a cgroup and those of its ancestors.

    In a container the path may be the host's while the mount shows the container's own cgroup at
    its top: what isn't there is left out, and the top is always tried.
    """
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
