"""How trials' processes end, and that none is left behind."""

from __future__ import annotations

import atexit
from collections.abc import Callable
import concurrent.futures
import ctypes
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import Any

import optuna
from optuna.trial import TrialState
import psutil
import pytest

from optuna_quota import isolated, Limits, TrialCrashed
from optuna_quota._isolation.launch import StartMethod
from optuna_quota._isolation.linux import is_exiting
from optuna_quota._isolation.messages import BeginMonitoring
from optuna_quota._isolation.supervisor import Supervisor
from optuna_quota._records import read_record
from tests.isolation_tests.scripts import journal, METHODS
from tests.isolation_tests.trials import escape, needs_supervisor, run_one


pytestmark = needs_supervisor


def segfault(trial: optuna.Trial) -> float:
    ctypes.string_at(0)
    return 0.0


def exit_at_once(trial: optuna.Trial) -> float:
    os._exit(int(trial.suggest_categorical("code", [3])))


def exit_as_if_well(trial: optuna.Trial) -> float:
    os._exit(0)


def exit_politely(trial: optuna.Trial) -> float:
    sys.exit(4)


def kill_itself(trial: optuna.Trial) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def terminate_itself(trial: optuna.Trial) -> float:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    return 0.0


def abort(trial: optuna.Trial) -> float:
    os.abort()


@pytest.mark.parametrize(
    ("objective", "words", "exitcode"),
    [
        (segfault, "segmentation fault (SIGSEGV)", -signal.SIGSEGV),
        (abort, "aborted (SIGABRT)", -signal.SIGABRT),
        (exit_at_once, "exit code 3", 3),
        (exit_as_if_well, "before it gave a result", 0),
        (exit_politely, "sys.exit(4)", 4),
        (kill_itself, "killed from outside (SIGKILL)", -signal.SIGKILL),
        (terminate_itself, "killed from outside (SIGTERM)", -signal.SIGTERM),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_crashes(objective: Callable[..., Any], words: str, exitcode: int) -> None:
    def reporting(trial: optuna.Trial) -> Any:
        trial.report(0.25, 0)
        return objective(trial)

    study = optuna.create_study()
    with pytest.raises(TrialCrashed) as caught:
        study.optimize(isolated(reporting, on_crash="raise"), n_trials=1)
    assert words in str(caught.value)
    assert caught.value.exitcode == exitcode
    assert isinstance(caught.value, RuntimeError)
    (trial,) = study.trials
    record = read_record(trial)
    assert trial.state == TrialState.FAIL
    assert trial.intermediate_values == {0: 0.25}
    assert record.outcome == "failed" and record.reason == str(caught.value)
    assert record.usage.memory is not None and record.usage.wall_time is not None


def test_a_segfault_shows_where_python_was(caplog: pytest.LogCaptureFixture) -> None:
    optuna.logging.enable_propagation()
    try:
        run_one(segfault)
    finally:
        optuna.logging.disable_propagation()
    assert "in segfault" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("end", ["return", "breach", "crash"])
def test_nothing_that_a_trial_starts_survives_it(
    tmp_path: Path, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tmp_path)

    def objective(trial: optuna.Trial) -> float:
        escape(folder)
        if end == "breach":
            time.sleep(60)
        elif end == "crash":
            os._exit(1)
        return 1.0

    optuna.logging.enable_propagation()
    try:
        # Starting takes a second or more on a busy machine, and counts.
        limits = Limits(wall_time="8s" if end == "breach" else "5min")
        trial = run_one(objective, limits, grace_period=0.1)
    finally:
        optuna.logging.disable_propagation()
    pids = [int(name) for name in os.listdir(folder)]
    assert len(pids) == 3
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert (
        trial.state
        == {
            "return": TrialState.COMPLETE,
            "breach": TrialState.PRUNED,
            "crash": TrialState.FAIL,
        }[end]
    )
    assert ("left processes behind" in caplog.text) == (end == "return")


def test_shared_memory_of_a_killed_trial_is_removed() -> None:
    before = set(os.listdir("/dev/shm"))

    def objective(trial: optuna.Trial) -> float:
        from multiprocessing import shared_memory

        block = shared_memory.SharedMemory(create=True, size=4096)
        trial.set_user_attr("block", block.name)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    trial = run_one(objective)
    assert "killed from outside" in (read_record(trial).reason or "")
    assert trial.user_attrs["block"] not in set(os.listdir("/dev/shm")) - before


def test_workers_of_multiprocessing_end_with_the_trial() -> None:
    def square(x: int) -> int:
        return x * x

    def objective(trial: optuna.Trial) -> float:
        import multiprocessing

        pool = multiprocessing.get_context("fork").Pool(2)
        total = float(sum(pool.map(abs, [1, -2])))
        trial.set_user_attr("pids", [p.pid for p in multiprocessing.active_children()])
        return total

    trial = run_one(objective)
    assert trial.value == 3.0
    assert len(trial.user_attrs["pids"]) == 2
    assert not [pid for pid in trial.user_attrs["pids"] if psutil.pid_exists(pid)]


def run_script(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(body))
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_file(path: Path, process: subprocess.Popen[str]) -> str:
    for _ in range(3000):
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written.")


def wait_until_gone(pids: list[int]) -> list[int]:
    for _ in range(2000):
        pids = [pid for pid in pids if _is_alive(pid)]
        if not pids:
            break
        time.sleep(0.01)
    return pids


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


SLEEPER = """
    import os, signal, sys, time
    import optuna
    from optuna_quota import isolated
    from tests.isolation_tests.scripts import journal

    # A shell's background job, as this suite may be one, is started deaf to these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    folder = sys.argv[1]

    def objective(trial):
        child = os.fork()
        if child == 0:
            os.setsid()
            time.sleep(60)
        temporary = os.path.join(folder, "pids.part")
        with open(temporary, "w") as file:
            file.write(f"{os.getpid()} {child} {os.getppid()}")
        os.rename(temporary, os.path.join(folder, "pids"))
        time.sleep(60)

    study = optuna.create_study(storage=journal(folder), study_name="s")
    study.optimize(isolated(objective), n_trials=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_trials_end_with_their_study(tmp_path: Path, name: str) -> None:
    process = run_script(tmp_path, SLEEPER)
    pids = [int(pid) for pid in wait_for_file(tmp_path / "pids", process).split()]
    family = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(getattr(signal, name))
    process.communicate()
    assert not wait_until_gone([*pids, *family])


@pytest.mark.slow
def test_an_interrupt_ends_the_trial_and_the_row(tmp_path: Path) -> None:
    process = run_script(tmp_path, SLEEPER)
    pids = [int(pid) for pid in wait_for_file(tmp_path / "pids", process).split()]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert not wait_until_gone(pids)
    study = optuna.load_study(storage=journal(tmp_path), study_name="s")
    assert [t.state for t in study.trials] == [TrialState.FAIL]


def test_a_trial_ends_with_its_supervisor() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("pid", os.getpid())
        orphan = os.fork()
        if orphan == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
        trial.set_user_attr("orphan", orphan)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
        return 0.0

    trial = run_one(objective)
    assert trial.state == TrialState.FAIL
    assert not wait_until_gone([trial.user_attrs["pid"], trial.user_attrs["orphan"]])


@pytest.mark.parametrize("method", METHODS)
def test_processes_of_a_trial_end_with_its_supervisor(method: StartMethod) -> None:
    def objective(trial: optuna.Trial) -> float:
        child = subprocess.Popen(["sh", "-c", "sleep 60 & wait"])
        trial.set_user_attr("children", [child.pid])
        while not (found := psutil.Process(child.pid).children()):
            time.sleep(0.005)
        trial.set_user_attr("children", [child.pid, found[0].pid])
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
        return 0.0

    trial = run_one(objective, start_method=method)
    assert trial.state == TrialState.FAIL
    assert not wait_until_gone(trial.user_attrs["children"])


@pytest.mark.parametrize("sent", [b"no pickle", b"I5\n."])
def test_what_an_objective_writes_to_a_socket_of_ours_does_no_harm(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("child", subprocess.Popen(["sleep", "60"]).pid)
        for handle in range(3, 64):
            try:
                found = socket.socket(fileno=os.dup(handle))
            except OSError:
                continue
            with found:
                if found.type == socket.SOCK_SEQPACKET:
                    found.send(sent)
        return 1.0

    optuna.logging.enable_propagation()
    try:
        trial = run_one(objective, start_method="fork")
    finally:
        optuna.logging.disable_propagation()
    assert trial.value == 1.0
    assert not wait_until_gone([trial.user_attrs["child"]])
    assert "left processes behind" in caplog.text  # by the report of the supervisor


@pytest.mark.slow
def test_an_exit_handler_that_hangs_meets_the_limit() -> None:
    def objective(trial: optuna.Trial) -> float:
        atexit.register(time.sleep, 600)
        return 3.0

    run_one(lambda trial: 0.0)  # starts the fork server
    started = time.monotonic()
    trial = run_one(objective, Limits(wall_time=3.0), grace_period=0.1)
    assert time.monotonic() - started < 300
    assert trial.value == 3.0


def test_workers_of_an_executor_that_was_left_open_end_with_the_trial() -> None:
    def objective(trial: optuna.Trial) -> float:
        executor = concurrent.futures.ProcessPoolExecutor(2)
        globals()["kept"] = executor
        return float(sum(executor.map(abs, [-1, 2])))

    trial = run_one(objective, Limits(wall_time=60.0), grace_period=0.1)
    assert trial.value == 3.0
    assert read_record(trial).breach is None


def leave_by_exit(trial: optuna.Trial) -> float:
    own = os.getpid()
    if os.fork() == 0:
        while os.getppid() == own:
            time.sleep(0.001)
        sys.exit(3)
    return 1.0


def leave_by_error(trial: optuna.Trial) -> float:
    own = os.getpid()
    if os.fork() == 0:
        while os.getppid() == own:
            time.sleep(0.001)
        raise ValueError("in a fork")
    return 1.0


@pytest.mark.parametrize("objective", [leave_by_exit, leave_by_error])
def test_a_fork_of_the_trial_sends_no_outcome(objective: Callable[..., Any]) -> None:
    assert run_one(objective).value == 1.0


def test_a_breach_of_memory_stops_the_trial_first_and_is_followed_closely() -> None:
    order: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def send(self, _: Any) -> None:
            order.append(self.name)

    child = subprocess.Popen(["sleep", "60"])
    parent = os.pidfd_open(os.getpid())
    supervisor = Supervisor(
        Recorder("report"),  # type: ignore[arg-type]
        child.pid,
        link=Recorder("stop"),  # type: ignore[arg-type]
        parent=parent,
        crash_file=-1,
        cgroup=None,
    )
    try:
        supervisor.monitoring = BeginMonitoring(5.0, memory=1.0, quota=False, elapsed=0.0)
        supervisor._ready_at = 0.0
        supervisor._memory.begin(None)
        assert supervisor._check_memory(100.0) <= 0.0001
        assert order == ["stop", "report"]
        # It has not stopped, and takes no more.
        assert supervisor._check_memory(100.01) <= 0.0001
        assert supervisor._check_memory(100.1) > 0.0001
    finally:
        child.kill()
        child.wait()
        os.close(parent)
        os.close(supervisor._child_handle)


@pytest.mark.slow
def test_nothing_leaks() -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.number % 5 == 4:
            os._exit(1)
        return 0.0

    study = optuna.create_study()
    wrapped = isolated(objective)
    study.optimize(wrapped, n_trials=20, n_jobs=2, catch=(TrialCrashed,))
    handles = len(os.listdir("/proc/self/fd"))
    children = len(psutil.Process().children(recursive=True))
    files = own_files()
    study.optimize(wrapped, n_trials=180, n_jobs=2, catch=(TrialCrashed,))
    # The metering keeps descriptors of a trial's processes until the next sample.
    assert len(os.listdir("/proc/self/fd")) < handles + 60
    assert own_files() <= files
    # The last trial's supervisor may be at its end, the fork server's next processes on their way.
    deadline = time.monotonic() + 30
    while len(psutil.Process().children(recursive=True)) > children:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def own_files() -> set[str]:
    """Return temporary files and shared memory of ours: others use these folders as well."""
    return {n for folder in ("/tmp", "/dev/shm") for n in os.listdir(folder) if "optuna" in n}


def test_a_process_that_ends_by_itself_is_no_leftover() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not is_exiting(process.pid)
    # Not waited for: it stays a zombie.
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert is_exiting(process.pid)
    process.communicate()
    assert is_exiting(process.pid)
