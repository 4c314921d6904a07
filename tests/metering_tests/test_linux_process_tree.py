"""Real process trees, read from /proc and through psutil."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import os
from pathlib import Path
import signal
import subprocess
import time
from typing import Any

import pytest

from optuna_quota._metering import linux_process, linux_process_tree, monitored_tree
from optuna_quota._metering.linux_process import LinuxProcess
from optuna_quota._metering.linux_process_tree import (
    LinuxProcessTree,
    ProcessCreationProbe,
    TreeSampler,
)
from optuna_quota._metering.monitored_tree import open_tree
from optuna_quota._metering.process_tree import ProcessMemory, ProcessTree, PsutilProcessTree
from tests.metering_tests.scripts import line, script, tell


MIB = 2**20
pytestmark = pytest.mark.skipif(
    not linux_process_tree.is_available(), reason="needs Linux's /proc"
)

OpenTree = Callable[["int | None"], ProcessTree]
BOTH = pytest.mark.parametrize(
    "make", [LinuxProcessTree, PsutilProcessTree], ids=["proc", "psutil"]
)


HOLD = "b = bytearray({size}); print(1, flush=True); input()"


@BOTH
def test_memory_of_a_process(make: OpenTree) -> None:
    with script(HOLD.format(size=70 * MIB)) as child:
        line(child)
        tree = make(child.pid)
        reading = tree.read(thorough=True)
        assert reading.memory is not None and 70 * MIB < reading.memory < 100 * MIB
        assert reading.pids == (child.pid,)
        tree.close()


FAMILY = """
import os, subprocess, sys, time
hold = "b = bytearray(40 * 2**20); print(1, flush=True); input()"
def start(**how):
    p = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, **how)
    p.stdout.readline()
    return p
input()
children = [start(), start(start_new_session=True)]
print(*[c.pid for c in children], flush=True)
input()
for c in children:
    c.kill(); c.wait()
print("done", flush=True)
input()
"""


@BOTH
def test_children_come_into_the_sum_and_leave_it(make: OpenTree) -> None:
    with script(FAMILY) as child:
        tree = make(child.pid)
        alone = tree.read(thorough=True).memory
        tell(child)
        pids = set(map(int, line(child).split()))
        together = tree.read(thorough=True)
        assert set(together.pids) == {child.pid, *pids}
        assert together.memory is not None and alone is not None
        assert together.memory > alone + 80 * MIB
        tell(child)
        line(child)
        after = tree.read(thorough=True)
        assert after.pids == (child.pid,)
        assert after.memory is not None and after.memory < 40 * MIB
        tree.close()


ORPHAN = """
def daemon():
    global block
    block = bytearray(50 * MIB)
    say(os.getpid())

def parent():
    os.setsid()
    fork(daemon)

pid = fork(parent)
hear()
os.kill(pid, 9)
os.wait()
say("waited")
hear()
"""


@BOTH
def test_a_daemon_that_was_seen_once_stays_in_the_tree(make: OpenTree) -> None:
    with script(ORPHAN) as child:
        tree = make(child.pid)
        daemon = int(line(child))
        try:
            assert daemon in tree.read(thorough=True).pids
            tell(child)
            assert line(child) == "waited"
            reading = tree.read(thorough=True)
            assert set(reading.pids) == {child.pid, daemon}
            assert reading.memory is not None and reading.memory > 50 * MIB
        finally:
            os.kill(daemon, signal.SIGKILL)
            tree.close()


BURN = """
import os, time
def burn(seconds):
    start = time.process_time()
    while time.process_time() < start + seconds:
        pass
input()
burn(0.1)
print(1, flush=True)
input()
if os.fork() == 0:
    burn(0.15)
    os._exit(0)
os.wait()
print(2, flush=True)
input()
"""


@BOTH
def test_cpu_time_includes_children_that_were_waited_for(make: OpenTree) -> None:
    with script(BURN) as child:
        tree = make(child.pid)
        start = tree.read(thorough=True).cpu_time
        tell(child)
        line(child)
        own = tree.read(thorough=True).cpu_time
        tell(child)
        line(child)
        with_child = tree.read(thorough=True).cpu_time
        assert start is not None and own is not None and with_child is not None
        assert own - start >= 0.09
        assert with_child - own >= 0.12
        tree.close()


def test_cpu_time_of_a_root_is_finer_than_a_clock_tick() -> None:
    with script(HOLD.format(size=1)) as child:
        line(child)
        tree = LinuxProcessTree(child.pid)
        used = tree.read(thorough=True).cpu_time
        assert used is not None and used > 0
        assert used * 100 != round(used * 100)
        tree.close()


def test_workers_share_their_parents_pages_once() -> None:
    code = """
block = bytearray(120 * MIB)
for _ in range(3):
    fork(lambda: None)
say("ready")
hear()
"""
    with script(code) as child:
        line(child)
        tree = LinuxProcessTree(child.pid)
        reading = tree.read(thorough=True)
        workers = [pid for pid in reading.pids if pid != child.pid]
        plain = PsutilProcessTree(child.pid).read(thorough=True).memory
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        tree.close()
    assert len(workers) == 3
    assert plain is not None and plain > 450 * MIB
    assert reading.memory is not None and 120 * MIB < reading.memory < 200 * MIB


@pytest.mark.parametrize(
    "give_up",
    [
        "block.clear()",
        "os.execv(sys.executable, [sys.executable, '-c', 'input()'])",
        "os._exit(0)",
    ],
    ids=["freed", "another program", "ended"],
)
def test_pages_that_a_worker_gives_up_are_its_parents(give_up: str) -> None:
    code = f"""
block = bytearray(120 * MIB)
told, tell = os.pipe()
def work():
    say("shares")
    hear()
    os.write(tell, b"x")
    {give_up}
fork(work)
os.read(told, 1)
time.sleep(0.3)
other = bytearray(60 * MIB)
say("grown")
time.sleep(60)
"""
    with script(code) as child:
        assert line(child) == "shares"
        tree = LinuxProcessTree(child.pid)
        shared = tree.read(thorough=True).memory
        assert shared is not None and shared < 150 * MIB
        tell(child)
        assert line(child) == "grown"
        # As if that took so long that the next one is not yet due.
        tree._shared._cost = 0.1
        found = tree.read(thorough=False, ceiling=160 * MIB).memory
        tree.close()
    assert found is not None and found > 180 * MIB


RISE_AND_FALL = """
import mmap
say("ready")
hear()
with mmap.mmap(-1, 90 * 2**20) as block:
    block.write(b"1" * (90 * MIB))
    say("high")
    hear()
say("freed")
hear()
"""


def rise_and_fall(child: subprocess.Popen[str]) -> None:
    for expected in ("high", "freed"):
        tell(child)
        assert line(child) == expected


def test_the_kernels_peak_is_exact_and_can_be_reset() -> None:
    # In a child: what other tests left in this process may be freed at any time.
    with script(RISE_AND_FALL) as child:
        assert line(child) == "ready"
        tree = LinuxProcessTree(child.pid)
        tree.reset_peak()
        start = tree.read(thorough=True).memory
        rise_and_fall(child)
        peak = tree.read(thorough=True).peak
        assert start is not None and peak is not None
        assert peak >= start + 85 * MIB
        tree.reset_peak()
        after = tree.read(thorough=True)
        assert after.peak is not None and after.peak < peak - 60 * MIB
        tree.close()


@pytest.mark.parametrize("quickly_first", [False, True])
def test_pages_that_are_written_to_after_a_peak_are_no_part_of_it(quickly_first: bool) -> None:
    # As by Python's garbage collector, which writes to all objects that a fork has inherited.
    code = """
import mmap
from optuna_quota._metering.linux_process import LinuxProcess, read_huge_pages
from optuna_quota._metering.linux_process_tree import LinuxProcessTree

block = bytearray(100 * MIB)
heard, tell = os.pipe()
done, tell_done = os.pipe()

def work():
    os.read(heard, 1)
    with mmap.mmap(-1, 200 * MIB) as own:
        for _ in range(200):
            own.write(b"1" * MIB)
    for i in range(0, len(block), 4096):
        block[i] = 1
    os.write(tell_done, b"x")
    os.read(heard, 1)

pid = fork(work)
tree = LinuxProcessTree(pid, os.getpid(), forked_from_study=True)
tree.begin(LinuxProcess(pid).snapshot(read_huge_pages()))
tree.read(thorough=True)
tree._shared._cost = 1e-9  # the next measurement is due at once
os.write(tell, b"x")
os.read(done, 1)
if {quickly_first}:
    tree.read(thorough=False)
found = tree.read(thorough=True)
say(int(found.memory), found.peak)
"""
    with script(code.replace("{quickly_first}", str(quickly_first))) as child:
        memory, peak = map(int, line(child).split())
    assert 100 * MIB < memory < 150 * MIB
    assert 200 * MIB < peak < 250 * MIB


def test_the_peak_of_a_process_from_before_is_not_taken() -> None:
    with script("b = bytearray(90 * 2**20); del b; print(1, flush=True); input()") as child:
        line(child)
        tree = LinuxProcessTree(child.pid)
        assert tree.read(thorough=True).peak is None
        tree.reset_peak()
        peak = tree.read(thorough=True).peak
        assert peak is not None and peak < 60 * MIB
        tree.close()


def test_a_peak_during_a_measurement_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = LinuxProcess.proportional_memory
    with script(RISE_AND_FALL) as child:
        assert line(child) == "ready"

        def measure_while_it_rises(self: LinuxProcess) -> ProcessMemory:
            found = measure(self)
            tell(child)
            assert line(child) == "high"
            return found

        tree = LinuxProcessTree(child.pid)
        tree.reset_peak()
        with monkeypatch.context() as patch:
            patch.setattr(LinuxProcess, "proportional_memory", measure_while_it_rises)
            start = tree.read(thorough=True).memory
        tell(child)
        assert line(child) == "freed"
        peak = tree.read(thorough=True).peak
        tree.close()
    assert start is not None and peak is not None and peak >= start + 85 * MIB


def test_a_study_leaves_its_trials_peak_to_the_supervisor() -> None:
    with script(RISE_AND_FALL) as child, subprocess.Popen(["sleep", "60"]) as supervisor:
        assert line(child) == "ready"
        tree = LinuxProcessTree(child.pid, supervisor.pid)
        process = LinuxProcess(child.pid)
        rise_and_fall(child)
        before = process.snapshot(0)
        tree.reset_peak()
        assert before is not None and process.snapshot(0) is not None
        assert process.snapshot(0).highest == before.highest  # type: ignore[union-attr]
        process.close()
        tree.close()
        supervisor.kill()


def test_a_trial_that_ends_before_it_is_measured_tells_its_memory() -> None:
    with script(HOLD.format(size=70 * MIB)) as child:
        line(child)
        with contextlib.closing(LinuxProcess(child.pid)) as process:
            snapshot = process.snapshot(0)
        sampler = TreeSampler(child.pid, forked_from_study=False)
        sampler.begin(snapshot)
        sampler.end(snapshot)
        assert sampler.peak > 70 * MIB


@BOTH
def test_another_trials_process_is_left_out(make: OpenTree) -> None:
    with script(HOLD.format(size=80 * MIB)) as child:
        line(child)
        tree = make(None)
        with_it = tree.read(thorough=True)
        without = tree.read(thorough=True, without=[child.pid])
        assert child.pid in with_it.pids and child.pid not in without.pids
        assert with_it.memory is not None and without.memory is not None
        assert with_it.memory - without.memory > 75 * MIB
        tree.close()


@BOTH
def test_a_process_that_is_not_there(make: OpenTree) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(ProcessLookupError):
        make(child.pid)


@BOTH
def test_a_root_that_has_ended(make: OpenTree) -> None:
    child = subprocess.Popen(["sleep", "60"])
    tree = make(child.pid)
    used = tree.read(thorough=True).cpu_time
    child.kill()
    child.wait()
    for _ in range(2):
        reading = tree.read(thorough=True)
        assert reading.pids == ()
        assert not reading.memory
        assert reading.cpu_time is not None and used is not None and reading.cpu_time >= used
    tree.close()


def test_what_a_root_that_has_ended_held_is_unknown_rather_than_nothing() -> None:
    child = subprocess.Popen(["sleep", "60"])
    tree = LinuxProcessTree(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    reading = tree.read(thorough=True)
    assert reading.pids == (child.pid,)
    assert reading.memory is None
    child.wait()
    assert tree.read(thorough=True).memory is None
    tree.close()


def test_a_reused_pid_shows_no_other_process() -> None:
    last = Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(last, os.W_OK):
        pytest.skip("only root may choose the next pid")
    first = subprocess.Popen(["sleep", "60"])
    known = LinuxProcess(first.pid)
    tree = LinuxProcessTree(first.pid)
    assert known.memory() > 0
    first.kill()
    first.wait()
    for _ in range(50):
        last.write_text(str(first.pid - 1))
        second = subprocess.Popen(["sleep", "60"])
        if second.pid == first.pid:
            break
        second.kill()
        second.wait()
    else:
        pytest.skip("another process took the number")
    with pytest.raises(OSError, match="No such process"):
        known.memory()
    assert tree.read(thorough=True).pids == ()
    second.kill()
    second.wait()
    known.close()
    tree.close()


def test_the_probe_detects_new_processes() -> None:
    probe = ProcessCreationProbe()
    if not probe.is_reliable:
        pytest.skip("/proc/loadavg is an imitation here")
    assert probe.reset()
    subprocess.run(["true"], check=True)
    assert probe.reset()
    probe.close()


def test_an_unreliable_probe_means_a_walk_each_time() -> None:
    probe = ProcessCreationProbe()
    probe.is_reliable = False
    assert probe.reset() and probe.reset()
    probe.close()


def test_where_proc_lists_no_children_psutil_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitored_tree, "is_available", lambda: False)
    assert isinstance(open_tree(None), PsutilProcessTree)


def test_where_proc_can_not_be_read_psutil_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> LinuxProcessTree:
        raise PermissionError(13, "hidden")

    monkeypatch.setattr(monitored_tree, "LinuxProcessTree", refuse)
    assert isinstance(open_tree(None), PsutilProcessTree)


def test_descriptors_are_closed() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(20):
        tree = LinuxProcessTree()
        tree.read(thorough=True)
        tree.close()
        tree.close()
    assert count() == before


@pytest.mark.slow
def test_a_killed_tree_is_read_while_it_dies() -> None:
    with script(FAMILY) as child:
        tree = LinuxProcessTree(child.pid)
        tell(child)
        pids = list(map(int, line(child).split()))
        tree.read(thorough=True)
        for pid in [*pids, child.pid]:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while tree.read(thorough=True).pids:
            child.poll()
            assert time.monotonic() < deadline
        tree.close()


def test_swapped_out_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # There may be no swap here, so the kernel's figures are faked.
    read = LinuxProcess._read_status

    def swapped(self: LinuxProcess) -> bytes:
        lines = [line for line in read(self).splitlines() if not line.startswith(b"VmSwap")]
        return b"\n".join([*lines, b"VmSwap:\t  102400 kB", b""])

    monkeypatch.setattr(linux_process, "has_swap", lambda: True)
    with script(HOLD.format(size=20 * MIB)) as child:
        line(child)
        plain = LinuxProcess(child.pid)
        without = plain.memory()
        monkeypatch.setattr(LinuxProcess, "_read_status", swapped)
        assert plain.memory() == without + 100 * MIB
        plain.close()


@pytest.mark.parametrize("kind", ["read", "copied", "shared"])
def test_clean_pages_of_files_are_no_memory(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"\1" * (60 * MIB))
    access = {"read": "ACCESS_READ", "copied": "ACCESS_COPY", "shared": "ACCESS_WRITE"}[kind]
    code = f"""
import mmap
with open({str(path)!r}, "r+b") as file:
    block = mmap.mmap(file.fileno(), 0, access=mmap.{access})
print(sum(block[::4096]), flush=True)
input()
"""
    with script(code) as child:
        line(child)
        tree = LinuxProcessTree(child.pid)
        memory = tree.read(thorough=True).memory
        tree.close()
    assert memory is not None and memory < 40 * MIB
