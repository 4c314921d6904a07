"""How a trial's process ended, and the name for it: pure, from facts alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
import signal
from typing import Literal

from optuna_quota._isolation.shortage import Shortage
from optuna_quota._resources import Breach
from optuna_quota._resources import format_amount
from optuna_quota.exceptions import LimitBreached


# A death this close to a limit is a death at the limit: what the next allocation would have
# taken is not known when native code ends the process instead of raising.
AT_LIMIT = 0.95

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
    ceilings: Mapping[str, tuple[float, bool]],
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
    cpu_signal = ended.exitcode == -getattr(signal, "SIGXCPU", 0)
    # Native code ends the process where Python would raise; what it had asked for isn't known.
    # Nobody who is refused memory sends SIGKILL: that is the kernel, or somebody else.
    may_be_refused = strict_memory and ended.exitcode != -signal.SIGKILL
    memory_share = 0.0 if ended.leaf_oom_kills else AT_LIMIT if may_be_refused else 1.0
    for name, used, share in (
        ("memory", ended.memory, memory_share),
        ("cpu_time", ended.cpu_time, AT_LIMIT if cpu_signal else 1.0),
    ):
        if name in ceilings and used is not None and used >= share * ceilings[name][0]:
            limit, quota = ceilings[name]
            refused = name == "memory" and used <= limit
            # What was refused counts: the trial was on its way over the limit.
            observed = max(used, _just_over(limit))
            return Breach(name, limit, observed, elapsed, quota=quota, refused=refused)
    return None


def find_breach_in_shortage(
    shortage: Shortage,
    used: float | None,
    ceilings: Mapping[str, tuple[float, bool]],
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
    limit, quota = ceilings.get(shortage.resource, (None, False))
    if limit is None or not (enforced or wanted >= AT_LIMIT * limit):
        return None
    observed = max(wanted, _just_over(limit))
    return Breach(shortage.resource, limit, observed, elapsed, quota=quota, refused=True)


def find_breach_in_stop(
    error: LimitBreached,
    used: float | None,
    ceilings: Mapping[str, tuple[float, bool]],
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
    limit, quota = ceilings["cpu_time"]
    return Breach("cpu_time", limit, max(used or 0.0, limit), elapsed, quota=quota)


def _just_over(limit: float) -> float:
    """Return the least that is over a limit: what was refused is not known more closely."""
    return limit * (1 + 1e-6) + 1
