"""The parts of isolated trials that need no trial: parsing, messages, limits of the system."""

from __future__ import annotations

import os
from pathlib import Path
import pickle
import signal
import socket
from typing import Any

import pytest

from optuna_quota._isolation import memory_limits
from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.channel import channel_pair
from optuna_quota._isolation.gpu_caps import cap_torch
from optuna_quota._isolation.gpu_caps import set_gpu_caps
from optuna_quota._isolation.memory_limits import Cgroup
from optuna_quota._isolation.memory_limits import find_delegated
from optuna_quota._metering import metering_loop


GIB = 2**30


def test_a_channel_keeps_in_step_with_messages_of_any_size() -> None:
    import threading

    left, right = channel_pair()
    messages: list[Any] = [1, "two", b"3" * 5_000_000, {"four": [None]}]
    sender = threading.Thread(target=lambda: [left.send(m) for m in messages])
    sender.start()
    assert [right.receive() for _ in messages] == messages
    sender.join()
    left.send("last")
    left.close()
    assert right.drain() == ["last"]
    with pytest.raises(EOFError):
        right.receive()
    right.close()


def test_a_message_that_was_cut_off_is_completed() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    whole = Channel(theirs)
    data = pickle.dumps("whole")
    theirs.sendall(len(data).to_bytes(8, "big") + data[:3])
    assert not channel.pending()
    assert channel.drain() == []
    theirs.sendall(data[3:])
    assert channel.receive() == "whole"
    channel.close()
    whole.close()


def test_the_kernels_limit_needs_room_for_native_libraries() -> None:
    mib = 2**20
    assert not memory_limits.has_room(120 * mib, 100 * mib, 2)
    assert not memory_limits.has_room(100 * mib, 120 * mib, 2)
    assert memory_limits.has_room(256 * mib, 70 * mib, 2)
    assert memory_limits.has_room(2048 * mib, 300 * mib, 64)


def test_data_limit() -> None:
    assert memory_limits.data_limit(300, 100, 1000.7) == 1200
    assert memory_limits.data_limit(300, 2000, 1000) == 300


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
    monkeypatch.setattr("optuna_quota._isolation.gpu_caps.after_import", lambda *_: None)
    set_gpu_caps(2.0 * GIB, 8.0 * GIB)
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.2500"
    assert os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
    # What a trial needs would not be known otherwise, and its limit would be passed at once.
    assert os.environ[preallocate] == "false"
    assert os.environ["CUPY_GPU_MEMORY_LIMIT"] == str(2 * GIB)
    cuda = FakeCuda()
    cap_torch(cuda, 4.0 * GIB)
    assert cuda.fractions == {0: 0.5, 1: 0.25}


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


def test_a_template_is_no_part_of_a_trial_in_its_studys_process() -> None:
    from optuna_quota._isolation.forkserver_client import ForkServerClient

    client = ForkServerClient()
    loop = metering_loop()
    try:
        client.launch(None).close()
        assert client._process is not None
        template = client._process.pid
        assert template in loop.excluded_pids
        watch = loop.monitor((0, 0))
        target = loop.trees.of(watch)
        assert target is not None and template not in target.pids
        watch.close()
    finally:
        client.close()
        client.reset()
        client._errors.close()
    assert template not in loop.excluded_pids
