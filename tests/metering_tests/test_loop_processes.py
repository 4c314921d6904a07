"""The metering loop on real processes, over many trials, forks and the interpreter's exit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from optuna_quota import Limits
from optuna_quota._metering import MeteringLoop
from optuna_quota._metering.monitored_tree import open_tree, ThreadTime
from optuna_quota._metering.process_tree import PsutilProcessTree
from tests.waiting import until


MIB = 2**20


@pytest.fixture(params=["proc", "psutil"])
def loop(request):  # type: ignore[no-untyped-def]
    made = MeteringLoop(open_tree=open_tree if request.param == "proc" else PsutilProcessTree)
    yield made
    made.stop()


def test_a_trial_in_process_is_measured(loop) -> None:  # type: ignore[no-untyped-def]
    monitor = loop.monitor((1, 1))
    assert loop.find((1, 1)) is monitor
    block = bytearray(80 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    while time.process_time() == 0 or monitor.sample().cpu_time == 0:
        sum(range(10000))
    del block
    usage = monitor.close()
    assert usage.memory is not None and usage.memory > 80 * MIB
    assert usage.cpu_time is not None and usage.cpu_time > 0
    assert usage.wall_time == pytest.approx(monitor.elapsed)
    assert monitor.isolation == "thread"
    assert loop.find((1, 1)) is None
    assert monitor.close() == usage


def test_a_breach_is_found_by_the_loop_and_called_back_once(loop) -> None:  # type: ignore[no-untyped-def]
    seen = []
    called = threading.Event()
    monitor = loop.monitor((1, 2), limits=Limits(wall_time=0.5))
    monitor.on_breach(
        lambda breach: (seen.append((breach, threading.current_thread())), called.set())
    )
    assert called.wait(20)
    assert monitor.breach is not None and monitor.breach.resource == "wall_time"
    again = []
    monitor.on_breach(again.append)
    assert again == [monitor.breach]
    monitor.close()
    assert len(seen) == 1
    assert seen[0][1].name == "optuna-quota-metering"


def test_a_child_is_metered_alone_once_attached(loop) -> None:  # type: ignore[no-untyped-def]
    code = "b = bytearray(60 * 2**20); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        monitor = loop.monitor((1, 3), limits=Limits(memory="50MiB"))
        monitor.attach(child.pid)
        assert child.stdout is not None
        child.stdout.readline()
        until(lambda: monitor.breach is not None)
        assert monitor.isolation == "process"
        assert monitor.breach.resource == "memory"
        monitor.sample()
        child.kill()
    usage = monitor.close()
    assert 60 * MIB < usage.memory < 90 * MIB
    assert monitor.timeline()


def test_trials_at_once_in_one_process_are_shared(loop) -> None:  # type: ignore[no-untyped-def]
    first = loop.monitor((1, 4), limits=Limits(memory="1B"))
    second = loop.monitor((1, 5), limits=Limits(memory="1B"))
    start = time.process_time()
    while time.process_time() < start + 0.1:
        pass
    second_usage = second.close()
    first_usage = first.close()
    assert first.isolation == second.isolation == "shared"
    assert first_usage.memory is None and second_usage.memory is None
    assert second.breach is None
    assert first_usage.cpu_time + second_usage.cpu_time >= 0.09


@pytest.mark.slow
def test_ten_thousand_trials_leave_nothing_behind() -> None:
    # In a process of its own: threads and descriptors of other tests come and go in this one.
    code = """
import psutil
from optuna_quota import Limits
from optuna_quota._metering import MeteringLoop

loop = MeteringLoop()
process = psutil.Process()

def run(n):
    for i in range(n):
        loop.monitor((0, i), limits=Limits(memory="64GiB")).close()

run(500)
memory, descriptors = process.memory_info().rss, process.num_fds()
threads = process.num_threads()
run(10_000)
assert process.num_fds() == descriptors
assert process.num_threads() == threads
assert process.memory_info().rss - memory < 8 * 2**20
assert loop.find((0, 9_999)) is None
loop.stop()
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_loop_of_its_own() -> None:
    code = """
import os, sys
from optuna_quota._metering import metering_loop
monitor = metering_loop().monitor((1, 1))
pid = os.fork()
if pid == 0:
    old = monitor.close()  # the parent's: dropped, without a hang
    mine = metering_loop()
    assert mine.find((1, 1)) is None
    usage = mine.monitor((1, 2)).close()
    os._exit(0 if usage.memory else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
assert metering_loop().find((1, 1)) is monitor
assert monitor.close().memory
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "0"


@pytest.mark.slow
def test_the_interpreter_ends_while_trials_are_metered() -> None:
    code = """
from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota._metering import metering_loop
monitor = metering_loop().monitor((1, 1), limits=Limits(wall_time=3600))
print("end")
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.strip() == "end"
    assert "Traceback" not in done.stderr and "Fatal" not in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has the clock")
def test_the_time_of_a_thread_whose_identifier_gevent_made_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threading, "get_ident", lambda: 1)
    thread = ThreadTime()
    begun = time.thread_time()
    while time.thread_time() - begun < 0.02:
        pass
    assert 0.02 <= thread.growth() < 1.0
    assert thread.growth() < 0.02
