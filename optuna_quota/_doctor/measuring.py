"""What this host can measure of a trial, judged from what was tried and read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from optuna_quota._doctor.finding import Finding
from optuna_quota._metering.energy import Rapl


POWERCAP = Path("/sys/class/powercap")


def judge_processes(attempts: Mapping[str, str | None]) -> list[Finding]:
    """Return how well memory and CPU time of a trial's process tree can be measured."""
    refusal = attempts.get("list_children")
    tree = Finding(
        "measuring", "process tree", "ok", "Read from /proc: tens of microseconds a look."
    )
    if refusal is not None:
        tree = Finding(
            "measuring",
            "process tree",
            "degraded",
            f"No list of children in /proc: {refusal}.",
            "psutil looks through all processes instead: about a millisecond a look.",
            "Run on a Linux kernel built with CONFIG_PROC_CHILDREN.",
        )
    return [tree, _judge_peak(attempts.get("reset_peak"))]


def _judge_peak(refusal: str | None) -> Finding:
    if refusal is None:
        return Finding(
            "measuring", "peak memory", "ok", "The kernel keeps the exact peak of each process."
        )
    return Finding(
        "measuring",
        "peak memory",
        "degraded",
        f"The kernel's peak can't be reset: {refusal}.",
        "A peak between two samples may be missed in process; isolated trials start at their own.",
        "Run on Linux 4.0 or newer, with /proc writable.",
    )


def try_rapl(folder: Path = POWERCAP) -> OSError | None:
    """Return why the energy counters can't be read, None when they can.

    Args:
        folder: Where Linux shows them.
    """
    try:
        Rapl(folder)
    except OSError as error:
        return error
    return None


def judge_rapl(refusal: OSError | None) -> Finding:
    """Return whether the energy of the processors is known."""
    if refusal is None:
        return Finding("measuring", "CPU energy", "ok", "RAPL's counters can be read.")
    degrades = "`energy` is what GPUs report, or unknown."
    if isinstance(refusal, PermissionError):
        return Finding(
            "measuring",
            "CPU energy",
            "degraded",
            "RAPL's counters are there, but this user may not read them.",
            degrades,
            "As root: chmod o+r /sys/class/powercap/*rapl:*/energy_uj",
        )
    return Finding(
        "measuring",
        "CPU energy",
        "missing",
        "No RAPL counter (a virtual machine, or no Intel or AMD processor).",
        degrades,
        "Run on the bare machine.",
    )
