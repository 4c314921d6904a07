"""What processes share: the arithmetic, when it is measured again, and real forks."""

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
from optuna_quota._metering.shared_pages import (
    find_doubt,
    find_inherited,
    ProcessMemory,
    SharedPages,
    TreeMemory,
)
from tests.metering_tests.scripts import line, script, tell


MIB = 2**20


def share(private: int, common: int = 0, holders: int = 1) -> ProcessMemory:
    """Return the share of a process that has some pages in common with others."""
    part = common // holders
    return ProcessMemory(private + common, private + part, common=common, common_part=part)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([], 0),
        ([share(7)], 7),
        # A parent and two workers of its own, which all hold the parent's 90.
        ([share(1, 90, 3), share(20, 90, 3), share(20, 90, 3)], 131),
        # The same, when a template and two spare forks of it hold these pages as well.
        ([share(1, 90, 6), share(20, 90, 6), share(20, 90, 6)], 86),
        # Two pairs, each of which shares what the others don't have.
        ([share(1), share(0, 60, 2), share(0, 60, 2), share(0, 60, 2), share(0, 60, 2)], 121),
    ],
)
def test_each_page_is_divided_among_its_holders(
    shares: list[ProcessMemory], expected: int
) -> None:
    found = SharedPages().update(dict(enumerate(shares)), faulted=0, cost=0.001, now=0.0)
    assert found == expected


@pytest.mark.parametrize(
    ("tree", "lender", "expected"),
    [
        # The study, its supervisor and a trial hold 600; the trial has 40 of its own.
        ([share(40, 600, 3)], share(2, 600, 3), 200),
        # The trial has written to 300 of them: these are its own by now.
        ([share(340, 300, 3)], share(2, 600, 2), 100),
        # It forked two workers, and started a third process that holds none of it.
        (
            [share(40, 600, 5), share(9, 600, 5), share(9, 600, 5), share(70)],
            share(2, 600, 5),
            360,
        ),
        # What it shares with its workers is its own.
        ([share(0, 660, 4), share(9, 660, 4)], share(2, 600, 4), 300),
        ([share(40)], share(2, 600, 2), 0),
        ([share(40, 600, 3), share(7)], share(2), 0),
    ],
)
def test_inherited_pages_are_distinguished_from_the_trees_own(
    tree: list[ProcessMemory], lender: ProcessMemory, expected: int
) -> None:
    assert find_inherited(tree, tree[0], lender).part() == expected


def test_the_part_of_inherited_pages_does_not_grow_when_others_end() -> None:
    lent = find_inherited([share(40, 600, 3)], share(40, 600, 3), share(2, 600, 3))
    assert (lent.part(), lent.part(outsiders=5)) == (200, 100)


def known(
    shares: dict[int, ProcessMemory], *, faulted: int = 0, cost: float = 0.001
) -> SharedPages:
    pages = SharedPages()
    pages.update(shares, faulted=faulted, cost=cost, now=0.0)
    return pages


PAIR = {1: share(0, 100, 2), 2: share(50, 100, 2)}
SIZES = {1: 100, 2: 150}


def is_due(
    pages: SharedPages,
    sizes: dict[int, int],
    now: float,
    faulted: int = 0,
    limit: float = math.inf,
    shareable: int = 0,
) -> bool:
    return pages.is_due(TreeMemory(sizes, shareable), limit, now, lambda: faulted)


def test_growth_counts_at_once() -> None:
    pages = known(PAIR)
    assert pages.memory(TreeMemory(SIZES)) == 150
    assert pages.memory(TreeMemory({1: 100, 2: 190})) == 190
    assert pages.memory(TreeMemory({1: 170, 2: 190})) == 260


def test_a_new_process_counts_by_its_growth_until_it_is_measured() -> None:
    pages = known(PAIR)
    assert pages.memory(TreeMemory({**SIZES, 3: 150})) == 150
    assert pages.memory(TreeMemory({**SIZES, 3: 170})) == 170
    assert pages.memory(TreeMemory({**SIZES, 4: 80})) == 150
    assert is_due(pages, {**SIZES, 3: 150}, 0.011)
    assert not is_due(pages, {**SIZES, 3: 150}, 0.009)


def test_a_new_process_that_has_ended_hides_nothing() -> None:
    pages = known(PAIR)
    assert pages.memory(TreeMemory({**SIZES, 3: 150})) == 150
    assert pages.memory(TreeMemory(SIZES)) == 150


def test_added_shared_memory_counts_once_it_is_measured() -> None:
    # Each reader of an array that exists once comes to hold all of it.
    assert known(PAIR).memory(TreeMemory({1: 400, 2: 490}, shareable=600)) == 190
    assert is_due(known(PAIR), {1: 400, 2: 490}, 0.06, shareable=600)
    assert is_due(known(PAIR), {1: 400, 2: 490}, 0.0011, limit=500, shareable=600)


@pytest.mark.parametrize(
    ("sizes", "faulted", "limit", "now", "expected"),
    [
        (SIZES, 0, math.inf, 3600.0, False),
        # More anonymous memory is not shared.
        ({1: 100, 2: 190}, 40, math.inf, 0.06, False),
        ({1: 100, 2: 151}, 1, math.inf, 0.06, False),
        ({1: 100, 2: 151}, 1, math.inf, 1.1, True),
        ({1: 60, 2: 110}, 0, math.inf, 0.06, True),
        # As much memory as before, but pages were written to: it may be others by now.
        (SIZES, 60, math.inf, 0.06, True),
        (SIZES, 60, 200.0, 0.011, True),
        (SIZES, 60, 220.0, 0.011, False),
        (SIZES, 60, 300.0, 0.011, False),
        # Before a verdict.
        (SIZES, 0, 140.0, 0.0011, True),
        (SIZES, 0, 140.0, 0.0009, False),
        ({}, 0, 50.0, 1.0, False),
    ],
)
def test_when_it_is_measured_again(
    sizes: dict[int, int], faulted: int, limit: float, now: float, expected: bool
) -> None:
    assert is_due(known(PAIR), sizes, now, faulted, limit) is expected


def test_more_shared_memory_is_measured_again() -> None:
    assert is_due(known(PAIR), {1: 100, 2: 190}, 0.06, shareable=40)
    assert not is_due(known(PAIR), {1: 100, 2: 190}, 0.04, shareable=40)


@pytest.mark.parametrize(
    ("moved", "ended", "expected"),
    [
        (0, [], 0),
        (40, [], 20),
        # All of them hold 100: they can't count for more than their sum beyond that.
        (90, [], 33),
        (0, [3], 43),
        (0, [9], 0),
    ],
)
def test_what_may_count_twice(moved: int, ended: list[int], expected: int) -> None:
    # The first two were read while they alone held it, the last one after it had mapped it too.
    halves = [ProcessMemory(110, 60, shareable=100, shareable_part=50) for _ in range(2)]
    third = ProcessMemory(110, 43, shareable=100, shareable_part=33)
    assert find_doubt({1: halves[0], 2: halves[1], 3: third}, moved, ended) == expected


def test_what_may_count_twice_is_no_memory_until_it_is_measured_again() -> None:
    pages = SharedPages()
    assert pages.update(PAIR, faulted=0, cost=0.001, now=0.0, doubt=30) == 120
    held = TreeMemory(SIZES)
    assert (pages.memory(held), pages.at_most(held), pages.excess) == (120, 150, 130)
    assert not is_due(pages, SIZES, 0.04)
    assert is_due(pages, SIZES, 0.06)
    assert is_due(pages, SIZES, 0.0011, limit=140)
    pages.update(PAIR, faulted=0, cost=0.001, now=0.06)
    assert pages.memory(held) == 150


def test_a_certain_verdict_waits_for_no_long_measurement() -> None:
    pages = known(PAIR, cost=0.002)
    assert not is_due(pages, {1: 100, 2: 190}, 0.1, limit=160)
    assert is_due(pages, {1: 100, 2: 190}, 0.1, limit=160, shareable=40)
    assert is_due(known(PAIR, cost=0.0005), {1: 100, 2: 190}, 0.1, limit=160)
    assert not is_due(pages, {1: 100, 2: 190}, 0.1, limit=200)


def test_the_first_measurement_is_due_at_once() -> None:
    assert is_due(SharedPages(), SIZES, 0.0)
    assert is_due(SharedPages(), {1: 100}, 0.0)


needs_proc = pytest.mark.skipif(
    not linux_process_tree.is_available(), reason="needs Linux's /proc"
)


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


@needs_proc
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


@needs_proc
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


@needs_proc
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


@needs_proc
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


@needs_proc
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


@needs_proc
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


@needs_proc
def test_a_reaper_that_is_not_there_leaves_nothing_open() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ProcessLookupError):
        LinuxProcessTree(os.getpid(), reaper=ended.pid)
    assert len(os.listdir("/proc/self/fd")) == before


@needs_proc
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


@needs_proc
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


@needs_proc
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
