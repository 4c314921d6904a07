"""Whether each trial can have a control group of its own here, and why not."""

from __future__ import annotations

from dataclasses import dataclass
import os
from pathlib import Path

from optuna_quota._doctor.finding import Finding
from optuna_quota._isolation.memory_limits import find_delegated
from optuna_quota._isolation.memory_limits import own_cgroup


_BOOT = "Boot with systemd.unified_cgroup_hierarchy=1."
_DELEGATE = "Start with `systemd-run --user --scope -p Delegate=yes COMMAND`."
_WANTED = ("memory.max", "cgroup.kill")


@dataclass(frozen=True)
class CgroupFacts:
    """What the kernel says of this process's control group of version 2.

    Attributes:
        own: Folder of this process's group; None without one.
        delegated: Folder of the nearest group in which trials' groups can be made; None without.
        refused: Why no group could be made there; None when one was made.
        files: What the kernel offers in a group made there.
    """

    own: str | None = None
    delegated: str | None = None
    refused: str | None = None
    files: tuple[str, ...] = ()


def read_cgroup() -> CgroupFacts:
    """Return the facts, making a group where that should be possible and removing it again."""
    own = own_cgroup()
    delegated = find_delegated(own)
    if own is None or delegated is None:
        return CgroupFacts(None if own is None else str(own))
    files, refused = try_group(delegated)
    return CgroupFacts(str(own), str(delegated), refused, files)


def try_group(parent: Path) -> tuple[tuple[str, ...], str | None]:
    """Make a group and remove it again; return its files, and why it could not be made."""
    group = parent / f"optuna-quota-doctor-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        return (), f"{error.strerror or error}"
    try:
        return tuple(sorted(entry.name for entry in group.iterdir())), None
    finally:
        group.rmdir()


def judge_cgroup(facts: CgroupFacts) -> Finding:
    """Return whether a trial can have a control group of its own, with its memory limited."""
    if facts.own is None:
        return _without("This process is in no control group of version 2.", _BOOT)
    if facts.delegated is None:
        return _without(f"{facts.own} lets nobody limit memory below it.", _DELEGATE)
    if facts.refused is not None:
        return _without(f"No group can be made in {facts.delegated}: {facts.refused}.", _DELEGATE)
    found = f"Each trial gets its own group in {facts.delegated}."
    lacking = [name for name in _WANTED if name not in facts.files]
    if not lacking:
        return Finding("stopping", "control group", "ok", found)
    degrades = f"This kernel offers no {' and no '.join(lacking)} there."
    return Finding(
        "stopping", "control group", "degraded", found, degrades, "Run on Linux 5.19 or newer."
    )


def _without(found: str, fix: str) -> Finding:
    degrades = (
        "Memory that RLIMIT_DATA doesn't count (shared memory, a tree of processes) is held by "
        "sampling."
    )
    return Finding("stopping", "control group", "degraded", found, degrades, fix)
