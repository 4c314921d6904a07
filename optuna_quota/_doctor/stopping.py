"""What this host can stop, judged from what was tried and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optuna_quota._doctor.cgroups import CgroupFacts
from optuna_quota._doctor.cgroups import judge_cgroup
from optuna_quota._doctor.finding import Finding
from optuna_quota._doctor.finding import State


@dataclass(frozen=True)
class _Check:
    """How the answer to one attempt reads."""

    attempt: str
    check: str
    found: str
    degrades: str
    fix: str


_CHECKS = (
    _Check(
        "limit_memory",
        "kernel memory limit",
        "RLIMIT_DATA is enforced: an isolated trial can't pass its memory limit.",
        "Memory is held by sampling alone; a fast allocation overshoots by some MB.",
        "Run on Linux 4.7 or newer, without gVisor.",
    ),
    _Check(
        "limit_cpu_time",
        "kernel CPU-time limit",
        "RLIMIT_CPU can be set: CPU time of one process is limited by the kernel.",
        "CPU time is held by sampling alone.",
        "Run on Linux or macOS.",
    ),
    _Check(
        "adopt_orphans",
        "leftover processes",
        "A subreaper adopts what a trial leaves behind, and ends it.",
        "A daemon that a trial detaches from itself may outlive it.",
        "Run on Linux 3.4 or newer.",
    ),
    _Check(
        "die_with_parent",
        "death of the worker",
        "A trial is told by the kernel when its worker dies, and ends too.",
        "After kill -9 of a worker its trial goes on until it notices a closed pipe.",
        "Run on Linux.",
    ),
    _Check(
        "open_pidfd",
        "waiting for an end",
        "pidfd: an end is seen at once, and a signal never hits a reused process id.",
        "Ends are polled for, a few milliseconds later.",
        "Run on Linux 5.3 or newer.",
    ),
    _Check(
        "volunteer_for_oom_killer",
        "out-of-memory killer",
        "oom_score_adj can be raised: the kernel ends the trial, not the worker.",
        "When the host runs out of memory the kernel may end the worker instead of the trial.",
        "Mount /proc writable in the container.",
    ),
    _Check(
        "make_pid_namespace",
        "PID namespace",
        "A namespace of process ids can be made: its end is the end of all inside.",
        "Little: the subreaper does the same in some milliseconds more.",
        "Allow user namespaces (sysctl user.max_user_namespaces), or run as root.",
    ),
)
_ESSENTIAL = {"limit_memory", "adopt_orphans"}


def judge_stopping(
    attempts: Mapping[str, str | None], cgroup: CgroupFacts, start_methods: tuple[str, ...]
) -> list[Finding]:
    """Return what can be enforced here.

    Args:
        attempts: Why the kernel did not do it, by attempt; None where it did.
        cgroup: This process's control group.
        start_methods: What multiprocessing knows here.
    """
    findings = [_judge_attempt(check, attempts.get(check.attempt)) for check in _CHECKS]
    return [_judge_start(start_methods), findings[0], judge_cgroup(cgroup), *findings[1:]]


def _judge_attempt(check: _Check, refusal: str | None) -> Finding:
    if refusal is None:
        return Finding("stopping", check.check, "ok", check.found)
    state: State = "missing" if check.attempt in _ESSENTIAL else "degraded"
    found = f"Not here: {refusal}."
    return Finding("stopping", check.check, state, found, check.degrades, check.fix)


def _judge_start(start_methods: tuple[str, ...]) -> Finding:
    if "forkserver" in start_methods:
        found = "A warm forkserver starts a trial in some milliseconds."
        return Finding("stopping", "isolated start", "ok", found)
    return Finding(
        "stopping",
        "isolated start",
        "degraded",
        f"Processes start by {', '.join(start_methods)} only.",
        "Each isolated trial pays for a new interpreter and its imports.",
        "Run on Linux or macOS.",
    )
