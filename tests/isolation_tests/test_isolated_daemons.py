"""What an isolated trial starts belongs to it: daemons, and groups of processes."""

from __future__ import annotations

from collections.abc import Callable
import mmap
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

import optuna
import psutil
import pytest

from optuna_quota import Limits
from optuna_quota._isolation.forkserver_client import fork_server_client
from optuna_quota._isolation.launch import can_supervise
from optuna_quota._isolation.linux import is_exiting
from optuna_quota._isolation.memory_limits import find_delegated
from optuna_quota._isolation.memory_limits import own_cgroup
from optuna_quota._records import read_record
from tests.isolation_tests.trials import escape
from tests.isolation_tests.trials import run_one


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not can_supervise(), reason="needs Linux with pidfds"
)


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
    def refuse(*_: Any) -> Any:
        raise OSError("No process today.")

    monkeypatch.setattr(
        "optuna_quota._isolation.forkserver_client.ForkServerClient.launch", refuse
    )
    trial = run_one(lambda trial: 1.0, Limits(wall_time="1h"))
    record = read_record(trial)
    assert record.outcome == "failed" and "No process today" in (record.reason or "")
    # Neither this process's memory nor that of its template.
    assert record.usage.memory is None and record.isolation == "process"


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
    monkeypatch.setattr("optuna_quota._isolation.run._delegated_cgroup", lambda: folder)
    fork_server_client().reset()  # the processes that it has ready are in no group


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
    fork_server_client().reset()


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
    fork_server_client().reset()


def test_a_process_that_has_ended_by_itself_was_not_left_behind() -> None:
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
