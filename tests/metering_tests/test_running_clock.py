"""A clock that stands still while its process is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from optuna_quota._metering.timing import count_context_switches
from optuna_quota._metering.timing import RunningClock


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


class World:
    """A time and a number of turns that a test sets."""

    def __init__(self) -> None:
        self.time = 100.0
        self.turns: int | None = 7
        self.clock = RunningClock(lambda: self.time, lambda thread: self.turns)


def test_a_sleep_that_took_too_long_is_a_pause() -> None:
    world = World()
    world.clock.fall_asleep(0.2)
    world.time += 60.2
    assert world.clock() == pytest.approx(100.2)
    world.time += 0.1
    assert world.clock() == pytest.approx(100.3)
    world.clock.wake_up()
    assert world.clock() == pytest.approx(100.3)


def test_whoever_reads_first_finds_the_pause_once() -> None:
    world = World()
    world.clock.fall_asleep(0.2)
    world.time += 30.0
    world.clock.wake_up()
    assert world.clock() == pytest.approx(100.2)
    world.clock.fall_asleep(0.2)
    world.time += 10.0
    assert [world.clock() for _ in range(3)] == pytest.approx([100.4] * 3)


def test_a_sleep_that_took_a_little_too_long_is_none() -> None:
    world = World()
    world.clock.fall_asleep(0.2)
    world.time += 0.6
    assert world.clock() == pytest.approx(100.6)


def test_who_waits_for_the_interpreter_was_not_stopped() -> None:
    world = World()
    world.clock.fall_asleep(0.2)
    world.time += 10.0
    assert world.turns is not None
    world.turns += 1900  # one each 5 ms
    assert world.clock() == pytest.approx(110.0)


def test_what_is_not_known_is_no_pause() -> None:
    world = World()
    world.turns = None
    world.clock.fall_asleep(0.2)
    world.time += 10.0
    assert world.clock() == pytest.approx(110.0)


def test_who_is_awake_may_take_its_time() -> None:
    world = World()
    world.clock.fall_asleep(0.2)
    world.time += 0.2
    world.clock.wake_up()
    world.time += 10.0
    assert world.clock() == pytest.approx(110.2)
    world.clock.fall_asleep(None)
    world.time += 10.0
    assert world.clock() == pytest.approx(120.2)


def test_seconds_can_be_left_out() -> None:
    world = World()
    world.time += 10.0
    world.clock.skip(4.0)
    assert world.clock() == pytest.approx(106.0)


@linux
def test_turns_are_the_same_from_outside() -> None:
    done, release = threading.Event(), threading.Event()
    found: list[int | None] = []

    def sleep() -> None:
        for _ in range(20):
            time.sleep(0.001)
        found.extend(
            [threading.get_native_id(), count_context_switches(threading.get_native_id())]
        )
        done.set()
        release.wait()

    thread = threading.Thread(target=sleep)
    thread.start()
    done.wait()
    time.sleep(0.1)
    number, own = found
    assert number is not None and own is not None and own >= 20
    seen = count_context_switches(number)
    release.set()
    thread.join()
    assert seen is not None and own <= seen <= own + 5
    assert count_context_switches(2**22 + 1) is None


BUSY = """
    import ctypes, sys, time
    from optuna_quota._metering import metering_loop

    loop = metering_loop()
    watch = loop.monitor((1, 1))
    print("started", flush=True)
    if sys.argv[1] == "held":
        # Sleeps with the interpreter's lock held.
        ctypes.PyDLL(None).usleep(2_000_000)
    else:
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            pass
    print(watch.elapsed)
"""


@linux
@pytest.mark.parametrize(("how", "least", "most"), [("held", 1.9, 9), ("stopped", 0.0, 1.5)])
def test_a_process_that_keeps_its_interpreter_is_told_from_one_that_is_stopped(
    how: str, least: float, most: float
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(BUSY), how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    if how == "stopped":
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert least < float(out) < most
