"""Why a trial's process ended: in words, and as a breach."""

from __future__ import annotations

import signal

import pytest

from optuna_quota._isolation.exit_cause import describe_exit, find_breach_at_exit
from optuna_quota._isolation.messages import ExitReport


MIB = 2**20
GIB = 2**30


LIMITS = {"memory": (1.0 * GIB, False), "cpu_time": (10.0, True)}


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (ExitReport(-signal.SIGSEGV), "segmentation fault"),
        (ExitReport(-signal.SIGKILL), "from outside"),
        (ExitReport(-signal.SIGKILL, oom_kills=1, memory=GIB), "out-of-memory killer"),
        (ExitReport(-signal.SIGKILL, "stopped"), "SIGSTOP"),
        (ExitReport(-signal.SIGKILL, "request"), "interrupted"),
        (ExitReport(0), "before it gave a result"),
        (ExitReport(7), "exit code 7"),
        (ExitReport(None), "unknown way"),
        (ExitReport(-200), "signal 200"),
    ],
)
def test_every_exit_is_described(ended: ExitReport, words: str) -> None:
    assert words in describe_exit(ended)
    assert describe_exit(ended).endswith(".")


@pytest.mark.parametrize(
    ("ended", "strict", "resource"),
    [
        (ExitReport(-signal.SIGABRT, memory=0.97 * GIB), True, "memory"),
        # Nothing is refused where memory is measured.
        (ExitReport(-signal.SIGABRT, memory=0.97 * GIB), False, None),
        (ExitReport(-signal.SIGKILL, memory=0.97 * GIB, oom_kills=1), True, None),
        (ExitReport(-signal.SIGABRT, memory=1.01 * GIB), False, "memory"),
        (ExitReport(-signal.SIGKILL, memory=0.5 * GIB, cgroup_oom_kills=1), False, "memory"),
        (ExitReport(-signal.SIGKILL, memory=0.5 * GIB, oom_kills=1), False, None),
        (ExitReport(-signal.SIGXCPU, cpu_time=9.9), False, "cpu_time"),
        (ExitReport(1, cpu_time=9.9), False, None),
        (ExitReport(1), False, None),
    ],
)
def test_an_exit_at_a_limit_is_a_breach(
    ended: ExitReport, strict: bool, resource: str | None
) -> None:
    breach = find_breach_at_exit(ended, LIMITS, 5.0, strict_memory=strict)
    assert (None if breach is None else breach.resource) == resource
    if breach is not None:
        assert breach.observed > breach.limit
