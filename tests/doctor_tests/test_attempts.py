"""The attempts are made for real, in a process of their own."""

from __future__ import annotations

import os
import sys

import pytest

from optuna_quota._doctor import attempts


linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel")


@linux
def test_every_attempt_is_answered_and_this_process_is_untouched() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA), resource.getrlimit(resource.RLIMIT_CPU)
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        score = file.read()
    answers = attempts.run_attempts()
    assert set(answers) == set(attempts.ATTEMPTS)
    assert "not tried" not in answers.values()
    assert before == (
        resource.getrlimit(resource.RLIMIT_DATA),
        resource.getrlimit(resource.RLIMIT_CPU),
    )
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        assert file.read() == score


@linux
def test_the_kernels_memory_limit_is_seen_to_work() -> None:
    answers = attempts.run_attempts()
    assert answers["limit_memory"] is None
    assert answers["adopt_orphans"] is None


@linux
def test_a_hard_limit_that_is_too_low_is_told() -> None:
    import resource

    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_DATA, (2**25, 2**25))
        answer = attempts._limit_memory()
        os._exit(0 if answer == f"the hard limit is already down to {2**25} bytes" else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_an_attempt_that_raises_is_an_answer() -> None:
    def refuse() -> str | None:
        raise PermissionError(13, "Permission denied")

    assert attempts._attempt(refuse) == "PermissionError: [Errno 13] Permission denied"


def test_no_answer_is_told_for_every_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    answers = attempts.run_attempts()
    assert set(answers) == set(attempts.ATTEMPTS)
    assert all(answer and "did not answer" in answer for answer in answers.values())
