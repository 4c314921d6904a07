"""How a trial's process ended, and the name for it: pure, from facts alone."""

from __future__ import annotations

from dataclasses import dataclass
import signal
from typing import Literal

from optuna_quota._isolation.shortage import Shortage
from optuna_quota._metering.breach import AT_LIMIT
from optuna_quota._metering.breach import Ceilings
from optuna_quota._metering.breach import find_breaches
from optuna_quota._metering.breach import find_refused_breach
from optuna_quota._resources import Breach
from optuna_quota._resources import format_amount
from optuna_quota.exceptions import LimitBreached


Killer = Literal["breach", "request", "stopped"]


@dataclass(frozen=True)
class Ended:
    """What the supervisor knows at the end, when nothing of the trial is left.

    Attributes:
        exitcode: The exit code of the trial's process, negative for a signal.
        killer: Why the supervisor killed it: a breach, a request of the study's process, or that
            it had been stopped for too long; None when it ended by itself.
        memory: The highest memory of the tree that was measured, in bytes; None when unknown.
        unseen_memory: A peak that the kernel tells of, which was over before it was seen.
        cpu_time: CPU-seconds of all that the trial started.
        leftovers: Names of the processes that it left behind.
        oom_kills: How often the kernel's out-of-memory killer struck on this host meanwhile.
        leaf_oom_kills: How often it did in the trial's own control group.
        traceback: Where Python was when the process died of a signal.
    """

    exitcode: int | None
    killer: Killer | None = None
    memory: float | None = None
    unseen_memory: float | None = None
    cpu_time: float | None = None
    leftovers: tuple[str, ...] = ()
    oom_kills: int = 0
    leaf_oom_kills: int = 0
    traceback: str = ""


def name_death(ended: Ended) -> str:
    """Return one sentence on how a process ended that had given no result."""
    code = ended.exitcode
    if ended.killer == "stopped":
        return "The trial's process was stopped (SIGSTOP) and did not go on, so it was killed."
    if ended.killer == "request":
        return "The trial's process was killed because the study was interrupted."
    if code is None:
        return "The trial's process ended in an unknown way."
    if code < 0:
        return _name_signal(-code, ended)
    if code == 0:
        return "The trial's process ended by itself, with exit code 0, before it gave a result."
    return f"The trial's process ended by itself with exit code {code}."


def _name_signal(number: int, ended: Ended) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if name == "SIGKILL" and (ended.oom_kills or ended.leaf_oom_kills):
        used = format_amount("memory", ended.memory)
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


def find_breach_in_death(
    ended: Ended,
    ceilings: Ceilings,
    elapsed: float,
    *,
    strict_memory: bool = False,
) -> Breach | None:
    """Return the limit that a process died at, None when it died of something else.

    Args:
        ended: How it ended.
        ceilings: The ceilings in force by resource, and whether each comes from a quota.
        elapsed: Seconds since the start of the trial.
        strict_memory: Whether the kernel refused it memory over its limit.
    """
    found = find_breaches({"memory": ended.memory, "cpu_time": ended.cpu_time}, ceilings, elapsed)
    if found:
        return found[0]
    # Native code ends the process where Python would raise; what it had asked for isn't known.
    # Nobody who is refused memory sends SIGKILL: that is the kernel, or somebody else.
    may_be_refused = strict_memory and ended.exitcode != -signal.SIGKILL
    if ended.memory is not None and (ended.leaf_oom_kills or may_be_refused):
        share = 0.0 if ended.leaf_oom_kills else AT_LIMIT
        breach = find_refused_breach("memory", ended.memory, ceilings, elapsed, share=share)
        if breach is not None:
            return breach
    if ended.cpu_time is None or ended.exitcode != -getattr(signal, "SIGXCPU", 0):
        return None
    return find_refused_breach("cpu_time", ended.cpu_time, ceilings, elapsed, refused=False)


def find_breach_in_shortage(
    shortage: Shortage,
    used: float | None,
    ceilings: Ceilings,
    elapsed: float,
    *,
    enforced: bool,
) -> Breach | None:
    """Return the limit that an allocation of memory failed at, None when it failed otherwise.

    Args:
        shortage: The allocation.
        used: What the trial held of that memory at its peak, in bytes.
        ceilings: The ceilings in force by resource, and whether each comes from a quota.
        elapsed: Seconds since the start of the trial.
        enforced: Whether the kernel refuses what is over the limit, touched or not.
    """
    wanted = (used or 0.0) + (shortage.requested or 0.0)
    share = 0.0 if enforced else AT_LIMIT
    return find_refused_breach(shortage.resource, wanted, ceilings, elapsed, share=share)


def find_breach_in_stop(
    error: LimitBreached,
    used: float | None,
    ceilings: Ceilings,
    elapsed: float,
) -> Breach | None:
    """Return the breach for which the kernel stopped a trial, None when it was not the kernel.

    Args:
        error: What came out of the trial; the kernel's signal tells no figures.
        used: The CPU-seconds of the trial.
        ceilings: The ceilings in force by resource, and whether each comes from a quota.
        elapsed: Seconds since the start of the trial.
    """
    if error.resource != "cpu_time" or error.limit is not None or "cpu_time" not in ceilings:
        return None
    return find_refused_breach("cpu_time", used or 0.0, ceilings, elapsed, share=0, refused=False)
