"""How much there is of what trials need: the container's answer where there is one."""

from __future__ import annotations

from dataclasses import dataclass
import os
from pathlib import Path

from optuna_quota import _units
from optuna_quota._doctor.finding import Finding
from optuna_quota._metering.host import available_memory
from optuna_quota._metering.host import cpu_count
from optuna_quota._metering.host import host_memory_limit


# Docker gives 64 MiB, too little for one batch of a DataLoader's workers.
_ENOUGH_SHARED = 2**30
_STRICT = "2"


@dataclass(frozen=True)
class HostFacts:
    """What there is, in bytes and cores; None where it can't be told.

    Attributes:
        memory: The host's memory.
        memory_limit: What processes here may hold together.
        available: What can be had now.
        cores: The host's processors.
        usable_cores: What processes here may keep busy together.
        swap: Swap space in all.
        shared: Size of /dev/shm.
        overcommit: The kernel's vm.overcommit_memory.
    """

    memory: float
    memory_limit: float
    available: float
    cores: float
    usable_cores: float
    swap: float
    shared: float | None = None
    overcommit: str | None = None


def read_host() -> HostFacts:
    """Return the facts of this host."""
    import psutil

    return HostFacts(
        memory=float(psutil.virtual_memory().total),
        memory_limit=host_memory_limit(),
        available=available_memory(),
        cores=float(os.cpu_count() or 1),
        usable_cores=cpu_count(),
        swap=float(psutil.swap_memory().total),
        shared=_shared_memory(),
        overcommit=_overcommit(),
    )


def judge_host(facts: HostFacts) -> list[Finding]:
    """Return how much there is, and what of it misleads."""
    findings = [_judge_memory(facts), _judge_cores(facts), _judge_swap(facts.swap)]
    if facts.shared is not None:
        findings.append(_judge_shared(facts.shared))
    if facts.overcommit is not None:
        findings.append(_judge_overcommit(facts.overcommit))
    return findings


def _judge_memory(facts: HostFacts) -> Finding:
    there = _units.format_bytes(facts.memory_limit)
    available = _units.format_bytes(facts.available)
    limited = facts.memory_limit < facts.memory
    by = f", the container's limit (the host has {_units.format_bytes(facts.memory)})"
    found = f"{there}{by if limited else ''}; {available} available now."
    return Finding("host", "memory", "ok", found)


def _judge_cores(facts: HostFacts) -> Finding:
    usable, cores = (_units.format_number(n) for n in (facts.usable_cores, facts.cores))
    limited = facts.usable_cores < facts.cores
    found = f"{usable} usable{f' of {cores}: an affinity or the container limits them' * limited}."
    return Finding("host", "CPU cores", "ok", found)


def _judge_swap(swap: float) -> Finding:
    if not swap:
        return Finding("host", "swap", "ok", "None.")
    return Finding(
        "host",
        "swap",
        "degraded",
        f"{_units.format_bytes(swap)} of swap.",
        "What is swapped out counts, but a trial slows down long before it is over its limit.",
        "`swapoff -a`, or memory.swap.max=0 in the control group.",
    )


def _judge_shared(shared: float) -> Finding:
    found = f"/dev/shm has {_units.format_bytes(shared)}."
    if shared >= _ENOUGH_SHARED:
        return Finding("host", "shared memory", "ok", found)
    return Finding(
        "host",
        "shared memory",
        "degraded",
        found,
        "Workers of a DataLoader die of a bus error when it is full.",
        "Start the container with `--shm-size=8g`.",
    )


def _judge_overcommit(overcommit: str) -> Finding:
    if overcommit != _STRICT:
        found = "The kernel promises memory freely (vm.overcommit_memory is not 2)."
        return Finding("host", "overcommit", "ok", found)
    return Finding(
        "host",
        "overcommit",
        "degraded",
        "The kernel promises no more memory than there is (vm.overcommit_memory is 2).",
        "An allocation may fail below the trial's limit, when others were promised the rest.",
        "`sysctl vm.overcommit_memory=0`",
    )


def _shared_memory() -> float | None:
    if not hasattr(os, "statvfs"):
        return None
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return float(found.f_blocks * found.f_frsize)


def _overcommit() -> str | None:
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip()
    except OSError:
        return None
