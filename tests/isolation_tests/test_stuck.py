"""A trial's processes that hang, or end without output, don't block the study."""

from __future__ import annotations

import atexit
import contextlib
import os
from pathlib import Path
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import time

import optuna
from optuna.trial import TrialState
import psutil
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

# Begins scripts that supervise a process themselves.
SUPERVISE = """
        import contextlib, os, pickle, signal, socket, subprocess, sys, threading, time
        import psutil
        from optuna_quota._isolation import linux, supervisor
        from optuna_quota._isolation.channel import channel_pair
        from optuna_quota._isolation.messages import BeginMonitoring, KillTrial, Ready
        from tests.waiting import until

        @contextlib.contextmanager
        def supervise(command):
            link, trial_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours, theirs = channel_pair()
            crash, own = os.memfd_create("crash"), os.pidfd_open(os.getppid())
            linux.become_subreaper()
            child = subprocess.Popen(command)
            found = supervisor.Supervisor(
                theirs, child.pid, link=link, parent=own, crash_file=crash, cgroup=None
            )
            try:
                yield found, ours, trial_link
            finally:
                for pid in linux.descendants():
                    os.kill(pid, signal.SIGKILL)
"""


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

    monkeypatch.setattr(server, "REPORT_TIME", 0.5)
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

    # As if waiting for a failed device. The forked supervisor inherits this.
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda handle, number: None)
    monkeypatch.setattr(supervisor, "KILL_TIME", 0.5)
    trial = run_one(objective, Limits(wall_time=1), grace_period=0.2, start_method="fork")
    assert read_record(trial).outcome == "terminated"
    # Once its supervisor has ended, the kernel kills it.
    until(lambda: linux.is_exiting(trial.user_attrs["pid"]))


def run_paused(folder: Path, script: str, seconds: float) -> None:
    """Run a script, and stop it and what it started for a while once it makes a file ``now``."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=folder,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        until(lambda: (folder / "now").exists() or process.poll() is not None)
        time.sleep(0.03)  # until it waits
        everything = [psutil.Process(process.pid)]
        everything += everything[0].children(recursive=True)
        for each in everything:
            each.suspend()
        time.sleep(seconds)
        for each in reversed(everything):
            each.resume()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_pause_is_no_time_in_which_a_killed_process_does_not_end(tmp_path: Path) -> None:
    script = (
        SUPERVISE
        + """
        supervisor.KILL_TIME = 2.0
        signal.pidfd_send_signal = lambda *_: open("now", "w").close()
        with supervise(["sleep", "600"]) as (found, ours, link):
            begun = time.monotonic()
            ours.send(KillTrial())
            assert found.run().stuck
            assert time.monotonic() - begun > 4, "The pause counts."
    """
    )
    run_paused(tmp_path, script, 3.0)


def test_processes_that_a_trial_leaves_are_killed_after_a_pause(tmp_path: Path) -> None:
    script = (
        SUPERVISE
        + """
        def look(pid):
            open("now", "w").close()
            return False

        supervisor.KILL_TIME = supervisor.EXIT_TIME = 1.0
        linux.is_cleaner = look
        body = "import subprocess; subprocess.Popen(['sleep', '600'])"
        with supervise([sys.executable, "-c", body]) as (found, ours, link):
            report = found.run()
            assert not report.stuck, report.stuck
            assert len(report.leftovers) == 1 and not linux.descendants()
    """
    )
    run_paused(tmp_path, script, 2.0)


def test_a_pause_during_an_import_fails_no_trial(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nopen('now', 'w').close()\nfor _ in range(15): time.sleep(0.1)\n"
    )
    script = """
        import sys
        from optuna_quota._isolation import forkserver_client as module

        sys.path.insert(0, "")
        client = module.ForkServerClient()
        client.prepare()
        module.ANSWER_TIME = 4.0
        client.prepare(["slow"])
        client.close()
    """
    run_paused(tmp_path, script, 6.0)


def test_nothing_that_a_process_has_started_stays_where_it_can_not_be_killed(
    tmp_path: Path,
) -> None:
    # In a process of its own, as a supervisor waits for all children of its process.
    script = (
        SUPERVISE
        + """
        def kill_workers(handle, number):
            if psutil.Process(linux._pid_of(handle)).ppid() != os.getpid():
                send(handle, number)

        send, signal.pidfd_send_signal = signal.pidfd_send_signal, kill_workers
        supervisor.KILL_TIME = 0.2
        body = "import subprocess as s, time; p = s.Popen(['sleep', '600']); time.sleep(600)"
        with supervise([sys.executable, "-c", body]) as (found, ours, link):
            until(lambda: linux.children(found.child))
            (worker,) = linux.children(found.child)
            ours.send(BeginMonitoring(1.0, None, False, 0.0))
            ready = Ready(found.child, os.getpid(), None, waits=False, memory=None)
            link.send(pickle.dumps(ready))
            threading.Timer(0.5, ours.send, [KillTrial()]).start()
            report = found.run()
            until(lambda: linux.process_state(worker) in ("", "Z"), 10)
            assert report.exitcode is None and str(found.child) in report.stuck
            assert report.killer == "request" and report.memory > 2**20
            assert report.cpu_time > 0
    """
    )
    run_python(tmp_path, "-c", textwrap.dedent(script))


def test_a_trial_that_has_begun_and_ended_before_its_supervisor_looks_is_reported(
    tmp_path: Path,
) -> None:
    # On a busy host, a trial of milliseconds takes less time than its supervisor waits for a core.
    script = (
        SUPERVISE
        + """
        with supervise([sys.executable, "-c", "raise SystemExit(3)"]) as (found, ours, link):
            ours.send(BeginMonitoring(1.0, None, False, 0.0))
            ready = Ready(found.child, os.getpid(), None, waits=False, memory=None)
            link.send(pickle.dumps(ready))
            until(lambda: linux.process_state(found.child) == "Z")
            assert found.run().exitcode == 3
    """
    )
    run_python(tmp_path, "-c", textwrap.dedent(script))


@pytest.mark.parametrize("leaves", [False, True], ids=["stuck", "left"])
def test_the_command_of_a_process_that_hangs_in_the_kernel_is_not_read(
    tmp_path: Path, leaves: bool
) -> None:
    # To read it waits for the memory map's lock, which a hanging thread may hold.
    script = (
        SUPERVISE
        + f"""
        def kill_workers(handle, number):
            if {leaves} or psutil.Process(linux._pid_of(handle)).ppid() != os.getpid():
                send(handle, number)

        def ask(pid):
            raise AssertionError("It was asked.")

        send, signal.pidfd_send_signal = signal.pidfd_send_signal, kill_workers
        supervisor.KILL_TIME = supervisor.CLEANUP_TIME = 0.2
        body = "import subprocess as s, time; p = s.Popen(['sleep', '600']); time.sleep({{}})"
        body = body.format(0.5 if {leaves} else 600)
        with supervise([sys.executable, "-c", body]) as (found, ours, link):
            until(lambda: linux.children(found.child))
            (worker,) = linux.children(found.child)
            linux.is_cleaner = linux.describe_process = ask
            state, linux.process_state = linux.process_state, lambda pid: "D"
            if not {leaves}:
                ours.send(KillTrial())
            report = found.run()
            until(lambda: state(worker) in ("", "Z"), 10)
            assert report.leftovers == ()
            assert (report.exitcode is None) == (not {leaves})
    """
    )
    run_python(tmp_path, "-c", textwrap.dedent(script))


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
        found.monitoring = BeginMonitoring(grace_period=1.0, memory=None, quota=False, elapsed=0)
        trial_link.send(pickle.dumps(Ready(child.pid, os.getpid(), None, waits=True, memory=None)))
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


def test_a_fork_server_does_not_wait_for_a_study_that_reads_nothing(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from optuna_quota._isolation import forkserver
        from optuna_quota._isolation.channel import channel_pair

        signal.alarm(30)
        forkserver._preload = lambda name: None
        ours, theirs = channel_pair()
        server = forkserver.ForkServer(theirs, os.pidfd_open(os.getppid()))
        names = [f"module_{number}" for number in range(3000)]
        server._prepare(forkserver.Prepare(sys.path, names, None))
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
