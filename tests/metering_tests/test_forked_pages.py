"""Pages that real processes share: forks, their workers, daemons and zombies."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time

import pytest

from optuna_quota._metering import linux_process_tree
from optuna_quota._metering.linux_process import LinuxProcess
from optuna_quota._metering.linux_process_tree import LinuxProcessTree
from optuna_quota._metering.process_tree import ProcessMemory
from tests.metering_tests.scripts import line, script, tell


pytestmark = pytest.mark.skipif(
    not linux_process_tree.is_available(), reason="needs Linux's /proc"
)
MIB = 2**20


def memory(tree: LinuxProcessTree, limit: float = math.inf) -> float:
    found = tree.read(thorough=True, ceiling=limit).memory
    assert found is not None
    return found


def wait_for_memory(tree: LinuxProcessTree, least: float, limit: float = math.inf) -> float:
    deadline = time.monotonic() + 60
    while memory(tree, limit) < least:
        assert time.monotonic() < deadline, memory(tree, limit) / MIB
        time.sleep(0.005)
    return memory(tree, limit)


# As a trial does that was forked by a supervisor, beside other forks of the same process.
FORKED = """
from optuna_quota._isolation.linux import become_subreaper

block = bytearray(150 * MIB)
held = []

def work():
    held.append(bytearray(b"x") * (60 * MIB))
    say("holds")

def trial():
    hear()
    for _ in range(2):
        fork(work)

def supervise():
    become_subreaper()
    say(fork(trial))

for _ in range(2):
    fork(lambda: None)
say(fork(supervise))
time.sleep(120)
"""


@pytest.mark.parametrize(
    ("forked_from_study", "alone", "more"),
    # Five hold the block, then seven.
    [(False, 150 / 5, 150 * 3 / 7), (True, 0.0, 0.0)],
    ids=["template", "study"],
)
def test_pages_that_outsiders_hold_too(forked_from_study: bool, alone: float, more: float) -> None:
    with script(FORKED) as child:
        supervisor, trial = sorted(int(line(child)) for _ in range(2))
        tree = LinuxProcessTree(trial, reaper=supervisor, forked_from_study=forked_from_study)
        before = memory(tree)
        tell(child)
        assert [line(child) for _ in range(2)] == ["holds"] * 2
        after = wait_for_memory(tree, (110 + more) * MIB)
        assert len(tree.read(thorough=True).pids) == 3
        tree.close()
    assert alone - 1 <= before / MIB < alone + 12
    assert after / MIB < 120 + more + 30


def test_a_zombie_worker_hides_nothing() -> None:
    code = """
block = bytearray(150 * MIB)
gone = fork(lambda: os._exit(0))
for _ in range(2):
    fork(lambda: None)
while b") Z " not in open(f"/proc/{gone}/stat", "rb").read():
    time.sleep(0.01)
say("ready")
hear()
"""
    with script(code) as child:
        assert line(child) == "ready"
        tree = LinuxProcessTree(child.pid)
        found = memory(tree)
        assert len(tree.read(thorough=True).pids) == 4
        tree.close()
    assert 150 * MIB < found < 220 * MIB


WRITER = """
block = bytearray(100 * MIB)

def work():
    say("holds")
    hear()
    for page in range(0, len(block), 4096):
        block[page] = 1
    say("written")

fork(work)
time.sleep(120)
"""


@pytest.mark.parametrize("limit", [math.inf, 150.0 * MIB], ids=["no limit", "limit"])
def test_pages_that_a_worker_writes_to_become_its_own(limit: float) -> None:
    # The plain sum stays as it was: neither process grows.
    with script(WRITER) as child:
        assert line(child) == "holds"
        tree = LinuxProcessTree(child.pid)
        before = memory(tree, limit)
        assert before < 150 * MIB
        tell(child)
        assert line(child) == "written"
        after = wait_for_memory(tree, before + 90 * MIB, limit)
        tree.close()
    assert after < 260 * MIB


def test_a_quick_reading_sees_that_pages_were_written_to() -> None:
    with script(WRITER) as child:
        assert line(child) == "holds"
        tree = LinuxProcessTree(child.pid)
        limit = 150.0 * MIB
        memory(tree, limit)
        tell(child)
        assert line(child) == "written"
        deadline = time.monotonic() + 60
        while (tree.read(thorough=False, ceiling=limit).memory or 0.0) <= limit:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        tree.close()


def test_new_workers_count_only_by_what_they_add() -> None:
    code = """
block = bytearray(100 * MIB)
for _ in range(6):
    hear()
    fork(lambda: None)
    say("forked")
hear()
"""
    with script(code) as child:
        tree = LinuxProcessTree(child.pid)
        seen = []
        for _ in range(6):
            tell(child)
            assert line(child) == "forked"
            seen.append(memory(tree))
        tree.close()
    assert max(seen) < 190 * MIB


# A daemon of the trial: its parent has ended, and the subreaper has inherited it.
DAEMON = """
from optuna_quota._isolation.linux import become_subreaper
become_subreaper()

def daemon():
    own = bytearray(b"x") * (60 * MIB)
    begun = time.process_time()
    while time.process_time() < begun + 0.5:
        pass
    say("daemon", os.getpid())
    time.sleep(120)

def trial():
    global block
    block = bytearray(100 * MIB)
    if os.fork() == 0:
        fork(daemon)
        os._exit(0)
    os.wait()
    time.sleep(120)

say("trial", fork(trial))
hear()
os.kill(int(hear()), 9)
os.waitpid(-1, 0)
say("waited")
hear()
"""


def test_an_orphan_that_the_reaper_inherited_is_the_trials() -> None:
    with script(DAEMON) as child:
        pids = dict(line(child).split() for _ in range(2))
        trial, daemon = int(pids["trial"]), int(pids["daemon"])
        tree, blind = LinuxProcessTree(trial, reaper=child.pid), LinuxProcessTree(trial)
        reading = tree.read(thorough=True)
        assert set(reading.pids) == {trial, daemon}
        assert reading.memory is not None and 160 * MIB < reading.memory < 230 * MIB
        assert reading.cpu_time is not None and reading.cpu_time >= 0.5
        assert blind.read(thorough=True).pids == (trial,)
        tell(child)
        tell(child, str(daemon))
        assert line(child) == "waited"
        after = tree.read(thorough=True)
        assert after.pids == (trial,)
        assert after.cpu_time is not None and 0.5 <= after.cpu_time < reading.cpu_time + 0.4
        tree.close()
        blind.close()


def test_a_reaper_that_is_not_there_leaves_nothing_open() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ProcessLookupError):
        LinuxProcessTree(os.getpid(), reaper=ended.pid)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_runs_in_its_parents_memory_is_not_counted_again() -> None:
    # By vfork, whose child stays in its parent's memory until it calls exec.
    code = """
import ctypes, threading
block = bytearray(100 * MIB)
libc = ctypes.CDLL(None)

def start():
    if libc.vfork() == 0:
        libc.sleep(120)
        libc._exit(0)

say("ready")
hear()
threading.Thread(target=start, daemon=True).start()
time.sleep(0.2)
say("forked")
hear()
"""
    with script(code) as child:
        assert line(child) == "ready"
        tree = LinuxProcessTree(child.pid)
        before = memory(tree)
        tell(child)
        assert line(child) == "forked"
        seen = [memory(tree, 150.0 * MIB) for _ in range(3)]
        assert len(tree.read(thorough=True).pids) == 2
        tree.close()
    assert max(seen) < before + 10 * MIB


def test_a_new_process_is_no_breach_at_once() -> None:
    code = """
hear()
held = []
fork(lambda: (held.append(bytearray(b"x") * (100 * MIB)), say("holds")))
hear()
"""
    with script(code) as child:
        tree = LinuxProcessTree(child.pid)
        memory(tree)
        tell(child)
        assert line(child) == "holds"
        assert memory(tree, 50.0 * MIB) <= 50 * MIB
        assert wait_for_memory(tree, 100 * MIB, 50.0 * MIB) < 140 * MIB
        tree.close()


def test_memory_that_is_mapped_during_a_measurement_counts_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = """
import mmap
block = mmap.mmap(-1, 100 * MIB)
block.write(bytes(100 * MIB))

def read():
    return sum(block[i] for i in range(0, len(block), 4096))

def read_later():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    say("waits", os.getpid())
    signal.sigwait({signal.SIGUSR1})
    read()
    say("has read")

fork(lambda: (read(), say("has read")))
hear()
fork(read_later)
hear()
"""
    with script(code) as child:
        assert line(child) == "has read"
        tree = LinuxProcessTree(child.pid)
        memory(tree)
        tell(child)
        late = int(line(child).removeprefix("waits "))
        expected = wait_for_memory(tree, 100 * MIB)
        assert late in tree.read(thorough=True).pids
        measure = LinuxProcess.proportional_memory
        mapped = []

        def measure_slowly(process: LinuxProcess) -> ProcessMemory:
            if process.pid == late and not mapped:
                os.kill(late, signal.SIGUSR1)
                mapped.append(line(child))
            return measure(process)

        monkeypatch.setattr(LinuxProcess, "proportional_memory", measure_slowly)
        limit, seen = expected + 15 * MIB, []
        while len(seen) < 5 or not mapped:
            time.sleep(0.02)
            seen.append(memory(tree, limit))
        tree.close()
    assert mapped == ["has read"]
    assert max(seen) < expected + 10 * MIB
    assert seen[-1] > expected - 10 * MIB
