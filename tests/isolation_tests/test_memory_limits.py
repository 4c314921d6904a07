"""Limits that the kernel keeps: RLIMIT_DATA, RLIMIT_CPU and control groups."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.trial import TrialState
import psutil
import pytest

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota._isolation import memory_limits
from optuna_quota._isolation.forkserver_client import fork_server_client
from optuna_quota._isolation.memory_limits import (
    cap_tensorflow,
    cap_torch,
    Cgroup,
    DataLimit,
    find_delegated,
    framework_gpu_memory,
    own_cgroup,
    set_gpu_caps,
)
from optuna_quota._records import read_record
from tests.isolation_tests.trials import escape, GIB, needs_supervisor, run_one


def test_the_kernels_limit_needs_room_for_native_libraries() -> None:
    mib = 2**20
    assert not memory_limits.has_room(120 * mib, 100 * mib, 2)
    assert not memory_limits.has_room(100 * mib, 120 * mib, 2)
    assert memory_limits.has_room(256 * mib, 70 * mib, 2)
    assert memory_limits.has_room(2048 * mib, 300 * mib, 64)


def test_data_limit() -> None:
    assert memory_limits.data_limit(300, 100, 1000.7) == 1200
    assert memory_limits.data_limit(300, 2000, 1000) == 300


def hierarchy(tmp_path: Path, controllers: str) -> Path:
    own = tmp_path / "user" / "app"
    own.mkdir(parents=True)
    (own / "cgroup.procs").touch()
    (own / "cgroup.subtree_control").write_text("")
    (tmp_path / "user" / "cgroup.subtree_control").write_text(controllers)
    (tmp_path / "user" / "cgroup.procs").touch()
    return own


def test_a_delegated_group_is_found(tmp_path: Path) -> None:
    own = hierarchy(tmp_path, "cpu memory\n")
    assert find_delegated(own, tmp_path) == tmp_path / "user"
    assert find_delegated(None, tmp_path) is None


def test_a_group_without_the_memory_controller_is_none(tmp_path: Path) -> None:
    assert find_delegated(hierarchy(tmp_path, "cpu\n"), tmp_path) is None


def test_a_leaf_is_limited_read_and_killed(tmp_path: Path) -> None:
    leaf = Cgroup(tmp_path)
    (folder,) = tmp_path.iterdir()
    for name, text in {
        "memory.stat": "anon 600\nfile 9000\nkernel 300\nshmem 100\n",
        "memory.max": "max\n",
        "memory.swap.max": "max\n",
        "memory.events": "low 0\noom 3\noom_kill 2\n",
        "cgroup.kill": "",
        "cgroup.procs": "",
    }.items():
        (folder / name).write_text(text)
    leaf.add(123)
    leaf.limit_memory(500.5)
    assert (folder / "cgroup.procs").read_text() == "123"
    assert (folder / "memory.max").read_text().startswith("1500")
    assert (leaf.oom_kills(), leaf.kill()) == (2, True)


def test_a_real_group_kills_all_that_is_in_it() -> None:
    import subprocess
    import sys

    mounts = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")]
    mount = next((m for m in mounts if (m / "cgroup.procs").exists() and os.access(m, 2)), None)
    if mount is None or not list(mount.glob("cgroup.procs")):
        pytest.skip("no control groups of version 2 may be made here")
    try:
        leaf = Cgroup(mount)
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        leaf.add(process.pid)
        if not leaf.kill():
            pytest.skip("this kernel has no cgroup.kill")
        assert process.wait(timeout=30) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        leaf.remove()
    assert not list(mount.glob(f"optuna-quota-{os.getpid()}-*"))


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
    """Create the groups of trials in a folder."""
    monkeypatch.setattr("optuna_quota._isolation.launch._delegated_cgroup", lambda: folder)
    fork_server_client().reset()  # processes that were forked in advance are in no group


@pytest.mark.slow
@needs_supervisor
@needs_supervisor
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


@needs_supervisor
def test_a_real_control_group_limits_what_no_other_limit_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_group(delegated_group(real_group()), monkeypatch)

    def objective(trial: optuna.Trial) -> float:
        # Files in tmpfs are no process's resident memory: only the group counts them.
        handle = os.memfd_create("held")
        for _ in range(400):
            os.write(handle, b"x" * 2**20)
        return 1.0

    trial = run_one(objective, Limits(memory="250MiB"), grace_period=0)
    record = read_record(trial)
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "memory"
    fork_server_client().reset()


@pytest.mark.slow
@needs_supervisor
def test_untouched_memory_soon_does_not_count() -> None:
    def objective(trial: optuna.Trial) -> float:
        import numpy as np

        sparse = np.empty(300 * 2**20, dtype=np.uint8)
        time.sleep(1.5)
        filled = np.ones(240 * 2**20, dtype=np.uint8)
        return float(len(sparse) + len(filled))

    trial = run_one(objective, Limits(memory="512MiB"))
    assert trial.state == TrialState.COMPLETE


@needs_supervisor
def test_the_data_limit_follows_untouched_memory() -> None:
    import resource

    arguments = [sys.executable, "-c", MAPPING]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        pid = process.pid
        try:
            memory = 400 * 2**20
            before = memory + 2**20
            _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
            resource.prlimit(pid, resource.RLIMIT_DATA, (before, hard))
            limit = DataLimit(pid, memory, before)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "mapped\n"
            waits = [limit.update(10 * 2**20) for _ in range(DataLimit.WINDOW)]
            assert waits == [DataLimit.FAST_PERIOD] * (DataLimit.WINDOW - 1) + [DataLimit.PERIOD]
            after, _ = resource.prlimit(pid, resource.RLIMIT_DATA)
            assert 270 * 2**20 < after - before < 310 * 2**20
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("limits", "most"), [(Limits(wall_time=100), 1000), (Limits(cpu_time=50), 50)]
)
def test_the_cpu_time_limit_allows_for_later_grants(limits: Limits, most: float) -> None:
    def objective(trial: optuna.Trial) -> float:
        import resource

        return float(resource.getrlimit(resource.RLIMIT_CPU)[0])

    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(cpu_time=1000))
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=limits))
    study.optimize(isolated(objective), n_trials=1)
    assert most <= study.trials[0].values[0] <= most + 10


@needs_supervisor
@pytest.mark.parametrize("limits", [Limits(memory=1e30), Limits(cpu_time=1e30)])
def test_huge_limits_are_accepted(limits: Limits) -> None:
    assert run_one(lambda trial: 1.0, limits, grace_period=1e30).value == 1.0


MAPPING = """
import mmap, sys
sys.stdin.readline()
sparse = mmap.mmap(-1, 300 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print("mapped", flush=True)
sys.stdin.readline()
"""


# Caps on GPU memory that the frameworks keep themselves.


class FakeCuda:
    def __init__(self) -> None:
        self.fractions: dict[int, float] = {}

    def device_count(self) -> int:
        return 2

    def get_device_properties(self, device: int) -> Any:
        return type("Properties", (), {"total_memory": (device + 1) * 8 * GIB})

    def set_per_process_memory_fraction(self, fraction: float, device: int) -> None:
        self.fractions[device] = fraction

    def is_available(self) -> bool:
        return True


def test_gpu_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    fraction, preallocate = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"
    for name in ("TF_FORCE_GPU_ALLOW_GROWTH", "CUPY_GPU_MEMORY_LIMIT", fraction, preallocate):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    set_gpu_caps(None, 8.0 * GIB)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ
    # Otherwise a trial takes most of the device: its need would be unknown, its limit exceeded at
    # once, and other trials on the device would fail.
    assert os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
    assert os.environ[preallocate] == "false"
    monkeypatch.setattr("optuna_quota._isolation.memory_limits.after_import", lambda *_: None)
    set_gpu_caps(2.0 * GIB, 8.0 * GIB)
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.2500"
    assert os.environ["CUPY_GPU_MEMORY_LIMIT"] == str(2 * GIB)
    cuda = FakeCuda()
    cap_torch(cuda, 4.0 * GIB)
    assert cuda.fractions == {0: 0.5, 1: 0.25}


@pytest.mark.parametrize(
    ("jax", "cupy", "expected"),
    [
        ("0.1", str(GIB), ("0.1", str(GIB))),
        ("0.9", str(4 * GIB), ("0.2500", str(2 * GIB))),
        ("", "50%", ("0.2500", str(2 * GIB))),
    ],
)
def test_a_smaller_cap_of_the_user_stays(
    monkeypatch: pytest.MonkeyPatch, jax: str, cupy: str, expected: tuple[str, str]
) -> None:
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "CUPY_GPU_MEMORY_LIMIT")
    for name, value in zip(names, (jax, cupy), strict=True):
        monkeypatch.setenv(name, value)
    for name in ("TF_FORCE_GPU_ALLOW_GROWTH", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setattr("optuna_quota._isolation.memory_limits.after_import", lambda *_: None)
    set_gpu_caps(2.0 * GIB, 8.0 * GIB)
    assert tuple(os.environ[name] for name in names) == expected


class FakeTensorFlow:
    """Two GPUs; as in TensorFlow, a capped one takes no setting of its memory growth."""

    def __init__(self) -> None:
        self.caps: dict[str, list[Any]] = {}
        self.config = SimpleNamespace(
            list_physical_devices=lambda kind: ["a", "b"],
            list_logical_devices=lambda kind: ["a", "b"],
            LogicalDeviceConfiguration=lambda memory_limit: memory_limit,
            set_logical_device_configuration=self.caps.__setitem__,
            get_logical_device_configuration=self.caps.get,
            experimental=SimpleNamespace(
                set_memory_growth=self.set_memory_growth,
                get_memory_info=lambda name: {"peak": {"GPU:0": 3, "GPU:1": 4}[name]},
            ),
        )

    def set_memory_growth(self, device: str, enable: bool) -> None:
        raise ValueError("Cannot set memory growth on device when virtual devices configured")


def test_tensorflow_is_capped_and_common_scripts_go_on() -> None:
    tensorflow = FakeTensorFlow()
    cap_tensorflow(tensorflow, 4.0 * GIB)
    assert tensorflow.caps == {"a": [4096.0], "b": [4096.0]}
    tensorflow.config.experimental.set_memory_growth("a", True)


def test_a_version_of_tensorflow_without_caps_is_left_alone() -> None:
    cap_tensorflow(SimpleNamespace(config=SimpleNamespace()), 4.0 * GIB)


@pytest.mark.parametrize(("is_started", "peak"), [(True, 7.0), (False, None)])
def test_the_counters_of_tensorflow(
    monkeypatch: pytest.MonkeyPatch, is_started: bool, peak: float | None
) -> None:
    context = SimpleNamespace(_context=SimpleNamespace(_initialized=is_started))
    for name in ("torch", "jax", "cupy"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "tensorflow", FakeTensorFlow())
    monkeypatch.setitem(sys.modules, "tensorflow.python.eager.context", context)
    assert framework_gpu_memory() == peak
