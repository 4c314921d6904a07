"""Every death of an isolated trial has a name, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import ctypes
import mmap
import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import optuna
from optuna.trial import TrialState
import psutil
import pytest

from optuna_quota import isolated
from optuna_quota import Limits
from optuna_quota import QuotaPruner
from optuna_quota import TrialCrashed
from optuna_quota._enforcement.isolation.cgroup import find_delegated
from optuna_quota._enforcement.isolation.cgroup import own_cgroup
from optuna_quota._enforcement.isolation.launch import can_supervise
from optuna_quota._enforcement.isolation.template_client import template_client
from optuna_quota._records import read_record


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not can_supervise(), reason="needs Linux with pidfds"
)


def run_one(
    objective: Callable[..., Any], limits: Limits | None = None, **options: Any
) -> optuna.trial.FrozenTrial:
    pruner = None if limits is None else QuotaPruner(limits=limits)
    study = optuna.create_study(pruner=pruner)
    study.optimize(isolated(objective, **options), n_trials=1, catch=(Exception,))
    return study.trials[0]


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
        study.optimize(isolated(reporting), n_trials=1)
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


def allocate_bytes(trial: optuna.Trial) -> float:
    held = []
    while True:
        held.append(bytearray(8 * 2**20))


def ask_for_too_much(trial: optuna.Trial) -> float:
    import numpy as np

    return float(np.ones(2**31).sum())


def ask_for_too_much_untyped(trial: optuna.Trial) -> float:
    return float(len(bytearray(2**31)))


def allocate_shared(trial: optuna.Trial) -> float:
    import mmap

    held = []
    while True:
        shared = mmap.mmap(-1, 4 * 2**20)
        for page in range(0, len(shared), 4096):
            shared[page] = 1
        held.append(shared)


def allocate_in_a_child(trial: optuna.Trial) -> float:
    code = "x = []\nwhile True: x.append(bytearray(2**22))"
    subprocess.run([sys.executable, "-c", code], check=False)
    time.sleep(60)
    return 0.0


@pytest.mark.parametrize(
    "objective",
    [
        allocate_bytes,
        ask_for_too_much,
        ask_for_too_much_untyped,
        allocate_shared,
        allocate_in_a_child,
    ],
    ids=lambda value: value.__name__,
)
def test_memory_breaches(objective: Callable[..., Any]) -> None:
    trial = run_one(objective, Limits(memory="256MiB"), grace_period=1.0)
    record = read_record(trial)
    assert trial.state == TrialState.PRUNED
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "memory"
    assert record.breach.observed > record.breach.limit == 256 * 2**20
    assert record.usage.memory is not None and record.usage.memory < 600 * 2**20
    assert any(value > 0 for value in trial.constraints.values()) or trial.system_attrs


def test_a_limit_below_what_a_process_takes_is_a_breach_at_once() -> None:
    def objective(trial: optuna.Trial) -> float:
        import numpy as np

        total = 0.0
        for _ in range(600):
            total += float((np.ones((400, 400)) @ np.ones((400, 400))).sum())
            time.sleep(0.05)
        return total

    trial = run_one(objective, Limits(memory="20MiB"), grace_period=0.5)
    record = read_record(trial)
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "memory"


def test_the_start_counts_against_the_time_limit() -> None:
    class SlowToArrive:
        def __reduce__(self) -> Any:
            return (time.sleep, (60,))

    slow = SlowToArrive()
    trial = run_one(lambda trial: float(slow is None), Limits(wall_time=1.0), grace_period=0.5)
    record = read_record(trial)
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "wall_time"


def test_a_memory_error_of_its_own_is_the_objectives_error() -> None:
    def objective(trial: optuna.Trial) -> float:
        raise MemoryError("I made this up")

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(memory="1GiB")))
    with pytest.raises(MemoryError, match="made this up"):
        study.optimize(isolated(objective), n_trials=1)
    assert study.trials[0].state == TrialState.FAIL


def test_untouched_memory_is_given_back() -> None:
    def objective(trial: optuna.Trial) -> float:
        import numpy as np

        sparse = np.empty(300 * 2**20, dtype=np.uint8)
        time.sleep(1.5)
        filled = np.ones(240 * 2**20, dtype=np.uint8)
        return float(len(sparse) + len(filled))

    trial = run_one(objective, Limits(memory="512MiB"))
    assert trial.state == TrialState.COMPLETE


def test_a_hung_native_call_is_killed_after_the_grace_period() -> None:
    def objective(trial: optuna.Trial) -> float:
        # Holds the interpreter lock and never looks for signals.
        ctypes.PyDLL(None).sleep(60)
        return 0.0

    start = time.monotonic()
    trial = run_one(objective, Limits(wall_time=0.3), grace_period=0.2)
    assert time.monotonic() - start < 30
    assert trial.state == TrialState.PRUNED
    assert read_record(trial).outcome == "terminated"


def test_a_stopped_process_meets_its_time_limit() -> None:
    def objective(trial: optuna.Trial) -> float:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
        return 0.0

    trial = run_one(objective, Limits(wall_time=0.5), grace_period=10)
    record = read_record(trial)
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "wall_time"


def test_a_stopped_process_does_not_hang_the_study() -> None:
    def objective(trial: optuna.Trial) -> float:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
        return 0.0

    trial = run_one(objective, grace_period=0.3)
    assert trial.state == TrialState.FAIL
    assert "SIGSTOP" in (read_record(trial).reason or "")


def test_cpu_time() -> None:
    def objective(trial: optuna.Trial) -> float:
        while True:
            pass

    trial = run_one(objective, Limits(cpu_time=0.5), grace_period=1)
    record = read_record(trial)
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "cpu_time"


def test_swallowing_the_stop_does_not_help() -> None:
    def objective(trial: optuna.Trial) -> float:
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(60)

    trial = run_one(objective, Limits(wall_time=0.3), grace_period=0.3)
    assert read_record(trial).outcome == "terminated"


def test_swallowing_the_stop_and_returning_is_a_breach_all_the_same() -> None:
    def objective(trial: optuna.Trial) -> float:
        try:
            time.sleep(60)
        except optuna.TrialPruned:
            trial.set_user_attr("saved", True)
        return 1.0

    trial = run_one(objective, Limits(wall_time=0.3))
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["saved"] is True
    assert read_record(trial).outcome == "terminated"


def daemonize(act: Callable[[], Any]) -> None:
    """Start a process that has lost its parent and left the session."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork() == 0:
            act()
            time.sleep(120)
        os._exit(0)
    os.waitpid(pid, 0)


def burn() -> None:
    while True:
        pass


def grow() -> None:
    held = []
    while True:
        held.append(b"x" * 2**20)
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("act", "limits"),
    [(burn, Limits(cpu_time="1s")), (grow, Limits(memory="250MiB"))],
    ids=["cpu_time", "memory"],
)
def test_what_a_daemon_of_the_trial_uses_counts_while_it_runs(
    act: Callable[[], Any], limits: Limits
) -> None:
    def objective(trial: optuna.Trial) -> float:
        daemonize(act)
        time.sleep(100)
        return 1.0

    trial = run_one(objective, limits, grace_period=0.2)
    record = read_record(trial)
    (resource,) = limits.amounts()
    assert record.breach is not None and record.breach.resource == resource
    assert record.usage.wall_time is not None and record.usage.wall_time < 80


def test_what_a_daemon_shares_with_the_trial_counts_once() -> None:
    def objective(trial: optuna.Trial) -> float:
        block = bytearray(b"x") * (200 * 2**20)
        daemonize(lambda: time.sleep(120))
        time.sleep(0.5)
        return float(len(block))

    trial = run_one(objective, Limits(memory="400MiB"))
    record = read_record(trial)
    assert record.outcome == "completed"
    assert record.usage.memory is not None and record.usage.memory < 350 * 2**20


def test_a_trial_that_never_began_has_used_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, cgroup: Any) -> Any:
        raise OSError("No process today.")

    monkeypatch.setattr(
        "optuna_quota._enforcement.isolation.template_client.TemplateClient.launch", refuse
    )
    trial = run_one(lambda trial: 1.0, Limits(wall_time="1h"))
    record = read_record(trial)
    assert record.outcome == "failed" and "No process today" in (record.reason or "")
    # Neither this process's memory nor that of its template.
    assert record.usage.memory is None and record.isolation == "process"


def escape(folder: str) -> None:
    """Start a child in a session of its own and two that have lost their parents."""
    for depth in (1, 2, 2):
        pid = os.fork()
        if pid == 0:
            if depth == 1:
                os.setsid()
            elif os.fork() > 0:
                os._exit(0)
            Path(folder, str(os.getpid())).touch()
            time.sleep(60)
            os._exit(0)
        elif depth == 2:
            os.waitpid(pid, 0)
    while len(os.listdir(folder)) < 3:
        time.sleep(0.01)


def real_group() -> Path:
    """Return a folder in which real control groups of version 2 can be made."""
    mounts = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")]
    mount = next((m for m in mounts if (m / "cgroup.procs").exists() and os.access(m, 2)), None)
    if mount is None:
        pytest.skip("no control groups of version 2 may be made here")
    return mount


def delegated_group(mount: Path) -> Path:
    """Return a folder in which groups with a memory limit can be made."""
    own = own_cgroup(mount)
    folder = find_delegated(own, mount)
    if folder is None:
        text = (mount / "cgroup.controllers").read_text().split()
        why = "none is delegated" if "memory" in text else "the controller is not of version 2"
        pytest.skip(f"no group with a memory limit can be made here: {why}")
    return folder


def in_group(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trials have their groups made in a folder."""
    monkeypatch.setattr(
        "optuna_quota._enforcement.isolation.run._delegated_cgroup", lambda: folder
    )
    template_client().lost()  # the processes that it has ready are in no group


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_a_real_control_group_holds_the_trial_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_method: Any
) -> None:
    mount = real_group()
    in_group(mount, monkeypatch)
    folder = str(tmp_path)

    def objective(trial: optuna.Trial) -> float:
        escape(folder)
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        trial.set_user_attr("group", next(x for x in lines if x.startswith("0::"))[3:])
        held = []
        while True:  # shared memory: it is the supervisor that ends this, by the group
            held.append(mmap.mmap(-1, 2**20))
            held[-1].write(b"x" * 2**20)
            time.sleep(0.001)

    trial = run_one(objective, Limits(memory="300MiB"), grace_period=0, start_method=start_method)
    group = trial.user_attrs["group"]
    assert "optuna-quota-" in group
    assert read_record(trial).outcome == "terminated"
    pids = [int(name) for name in os.listdir(folder)]
    assert len(pids) == 3 and not [pid for pid in pids if psutil.pid_exists(pid)]
    assert not (mount / group.lstrip("/")).exists()
    template_client().lost()


def test_a_real_control_group_limits_what_no_other_limit_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_group(delegated_group(real_group()), monkeypatch)

    def objective(trial: optuna.Trial) -> float:
        # Files in memory are nobody's resident memory: only the group counts them.
        handle = os.memfd_create("held")
        for _ in range(400):
            os.write(handle, b"x" * 2**20)
        return 1.0

    trial = run_one(objective, Limits(memory="250MiB"), grace_period=0)
    record = read_record(trial)
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "memory"
    template_client().lost()


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
        # To start takes a second or more on a busy machine, and counts.
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

    # A shell's background job, as this suite may be one, is started deaf to it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

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

    study = optuna.create_study(storage=f"sqlite:///{folder}/study.db", study_name="s")
    study.optimize(isolated(objective), n_trials=1)
"""


def test_a_dead_parent_takes_its_trials_along(tmp_path: Path) -> None:
    process = run_script(tmp_path, SLEEPER)
    pids = [int(pid) for pid in wait_for_file(tmp_path / "pids", process).split()]
    family = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    process.communicate()
    assert not wait_until_gone([*pids, *family])


def test_an_interrupt_ends_the_trial_and_the_row(tmp_path: Path) -> None:
    process = run_script(tmp_path, SLEEPER)
    pids = [int(pid) for pid in wait_for_file(tmp_path / "pids", process).split()]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert not wait_until_gone(pids)
    study = optuna.load_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="s")
    assert [t.state for t in study.trials] == [TrialState.FAIL]


def test_a_killed_supervisor_takes_its_trial_along() -> None:
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
    # The metering holds what was last seen of a trial's processes until it looks again.
    assert len(os.listdir("/proc/self/fd")) < handles + 60
    assert own_files() <= files
    # The last trial's supervisor may be at its end, the template's next processes on their way.
    deadline = time.monotonic() + 30
    while len(psutil.Process().children(recursive=True)) > children:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def own_files() -> set[str]:
    """Return temporary files and shared memory of ours: others use these folders as well."""
    return {n for folder in ("/tmp", "/dev/shm") for n in os.listdir(folder) if "optuna" in n}
