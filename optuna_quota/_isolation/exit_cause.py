"""Explains how a trial's process ended, and whether it ended at a limit. No I/O."""

from __future__ import annotations

import signal

from optuna_quota._isolation.messages import ExitReport
from optuna_quota._metering.breach import AT_LIMIT, Ceilings, find_breaches, find_refused_breach
from optuna_quota._resources import Breach, format_amount
from optuna_quota._units import format_signal
from optuna_quota.exceptions import LimitBreached


def describe_exit(report: ExitReport) -> str:
    """Return one sentence on how a process ended without a result."""
    code = report.exitcode
    if report.killer == "stopped":
        return "The trial's process was stopped by SIGSTOP and not continued, so it was killed."
    if report.killer == "request":
        return "The trial's process was killed because the study was interrupted."
    if code is None:
        return "The trial's process ended in an unknown way."
    if code < 0:
        return _describe_signal(-code, report)
    if code == 0:
        return "The trial's process ended by itself, with exit code 0, before it gave a result."
    return f"The trial's process ended by itself with exit code {code}."


def _describe_signal(number: int, report: ExitReport) -> str:
    name = format_signal(number)
    if name == "SIGKILL" and (report.oom_kills or report.cgroup_oom_kills):
        used = format_amount("memory", report.memory)
        return (
            f"The trial's process was killed by the kernel's out-of-memory killer; it had used "
            f"{used}."
        )
    if name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"):
        return f"The trial's process was killed from outside ({name})."
    meaning = (signal.strsignal(number) or "a signal").lower() if name.startswith("SIG") else ""
    if not meaning:
        return f"The trial's process was ended by {name}."
    return f"The trial's process crashed: {meaning} ({name})."


def describe_script_exit(code: int, *, oom_kills: int) -> str:
    """Return one sentence on how a script failed.

    Args:
        code: Its exit status, negative for a signal.
        oom_kills: Kills by the kernel's out-of-memory killer on this host meanwhile.
    """
    if code > 0:
        return f"The script ended with exit status {code}."
    by_kernel = -code == signal.SIGKILL and oom_kills > 0
    cause = ", probably by the kernel's out-of-memory killer" if by_kernel else ""
    return f"The script was killed by {format_signal(-code)}{cause}."


def find_breach_at_exit(
    report: ExitReport, ceilings: Ceilings, elapsed: float, *, strict_memory: bool = False
) -> Breach | None:
    """Return the limit that a process ended at, None if it ended of something else.

    Args:
        report: How it ended.
        ceilings: The ceilings in force.
        elapsed: Seconds since the start of the trial.
        strict_memory: Whether the kernel refused it memory over its limit.
    """
    used = {"memory": report.memory, "cpu_time": report.cpu_time}
    found = find_breaches(used, ceilings, elapsed)
    if found:
        return found[0]
    # Native code that is refused memory ends the process where Python would raise; how much it
    # requested is unknown. SIGKILL is not such an end: it comes from outside.
    may_be_refused = strict_memory and report.exitcode != -signal.SIGKILL
    if report.memory is not None and (report.cgroup_oom_kills or may_be_refused):
        share = 0.0 if report.cgroup_oom_kills else AT_LIMIT
        breach = find_refused_breach("memory", report.memory, ceilings, elapsed, share=share)
        if breach is not None:
            return breach
    if report.cpu_time is None or report.exitcode != -getattr(signal, "SIGXCPU", 0):
        return None
    return find_refused_breach("cpu_time", report.cpu_time, ceilings, elapsed, refused=False)


def find_cpu_time_breach(
    error: LimitBreached, used: float | None, ceilings: Ceilings, elapsed: float
) -> Breach | None:
    """Return the breach for which the kernel stopped a trial, None if it did not.

    Args:
        error: What the objective raised; at the kernel's signal it has no figures.
        used: The CPU-seconds of the trial.
        ceilings: The ceilings in force.
        elapsed: Seconds since the start of the trial.
    """
    if error.resource != "cpu_time" or error.limit is not None:
        return None
    return find_refused_breach("cpu_time", used or 0.0, ceilings, elapsed, share=0, refused=False)
