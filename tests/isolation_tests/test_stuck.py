"""A trial's processes that hang, or end without a word, keep no study waiting."""

from __future__ import annotations

import atexit
import os
from pathlib import Path
import pickle
import signal
import socket
import subprocess
import textwrap
import time

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits
from optuna_quota._isolation import linux, run, server, supervisor
from optuna_quota._isolation.channel import channel_pair
from optuna_quota._isolation.messages import BeginMonitoring, Ready
from optuna_quota._isolation.signals import BEGIN
from optuna_quota._isolation.supervisor import Supervisor
from optuna_quota._records import read_record
from tests.isolation_tests.scripts import run_python
from tests.isolation_tests.trials import needs_supervisor, run_one
from tests.waiting import until


pytestmark = needs_supervisor


def test_a_killed_supervisor_is_noticed_though_a_process_of_the_trial_lives_on() -> None:
    def objective(trial: optuna.Trial) -> float:
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
        return 0.0

    begun = time.monotonic()
    # It has what the supervisor had open.
    assert run_one(objective, start_method="fork").state == TrialState.FAIL
    assert time.monotonic() - begun < 15


def test_the_study_goes_on_without_a_supervisor_that_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def objective(trial: optuna.Trial) -> float:
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(600)
        return 0.0

    monkeypatch.setattr(server, "PATIENCE", 0.5)
    optuna.logging.enable_propagation()
    try:
        trial = run_one(objective, Limits(wall_time=1.0), grace_period=0.5)
    finally:
        optuna.logging.disable_propagation()
    assert read_record(trial).outcome == "terminated"
    assert "did not report its end" in caplog.text


def test_the_study_goes_on_without_a_process_that_can_not_be_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("pid", os.getpid())
        time.sleep(600)
        return 0.0

    # As of one that waits for a failed device. The supervisor inherits it, as it is forked.
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda handle, number: None)
    monkeypatch.setattr(supervisor, "KILL_TIME", 0.5)
    trial = run_one(objective, Limits(wall_time=1), grace_period=0.2, start_method="fork")
    assert read_record(trial).outcome == "terminated"
    # Once its supervisor has ended, the kernel kills it.
    until(lambda: linux.is_exiting(trial.user_attrs["pid"]))


def test_the_study_goes_on_without_what_a_trial_leaves_and_can_not_be_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def objective(trial: optuna.Trial) -> float:
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        return 1.0

    monkeypatch.setattr(linux, "send", lambda *_: None)
    monkeypatch.setattr(supervisor, "KILL_TIME", 0.5)
    optuna.logging.enable_propagation()
    try:
        begun = time.monotonic()
        assert run_one(objective, start_method="fork").value == 1.0
        assert time.monotonic() - begun < 4
    finally:
        optuna.logging.disable_propagation()
    assert "SIGKILL has not ended processes of the trial" in caplog.text


def test_a_trial_that_waits_to_begin_begins_though_its_limit_is_gone(tmp_path: Path) -> None:
    link, trial_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, theirs = channel_pair()
    with subprocess.Popen(["sleep", "600"]) as child, (tmp_path / "crash").open("w") as crash:
        own = os.pidfd_open(os.getpid())
        found = Supervisor(
            theirs, child.pid, link=link, parent=own, crash_file=crash.fileno(), cgroup=None
        )
        found._monitoring = BeginMonitoring(grace_period=1.0, memory=None, quota=False, elapsed=0)
        trial_link.send(pickle.dumps(Ready(child.pid, os.getpid(), None, waits=True)))
        found._begin_enforcing()
        child.kill()
    trial_link.setblocking(False)
    assert trial_link.recv(len(BEGIN)) == BEGIN
    os.close(own)
    os.close(found._child_handle)
    for each in (link, trial_link, ours, theirs):
        each.close()


def test_a_fork_server_answers_though_an_orphan_can_not_be_killed(tmp_path: Path) -> None:
    # In a process of its own, as it waits for all children of its process.
    script = """
        import os, subprocess
        from optuna_quota._isolation import forkserver, linux
        from optuna_quota._isolation.channel import channel_pair

        orphan = subprocess.Popen(["sleep", "600"])
        linux.send = lambda *_: None
        ours, theirs = channel_pair()
        server = forkserver.ForkServer(theirs, os.pidfd_open(os.getppid()))
        assert server._reap()
        orphan.kill()
        ours.close()
        server.serve()
    """
    run_python(tmp_path, "-c", textwrap.dedent(script))


@pytest.mark.slow
@pytest.mark.parametrize("limits", [None, Limits(memory="1GiB")], ids=str)
def test_a_process_that_does_not_end_after_its_result_is_killed(
    limits: Limits | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def objective(trial: optuna.Trial) -> float:
        # The timer that ends exit handlers is lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        atexit.register(time.sleep, 600)
        return 3.0

    monkeypatch.setattr(run, "_LONGEST_END", 0.5)
    assert run_one(objective, limits, grace_period=0.5).value == 3.0
