"""When to sample, and a clock that stands still while its process is stopped."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from optuna_quota._metering.timing import (
    count_context_switches,
    next_due,
    RunningClock,
    sampling_interval,
)


@pytest.mark.parametrize(
    ("headroom", "growth", "expected"),
    [
        (None, 4e9, 0.1),  # no ceiling
        (8e9, 4e9, 0.1),  # in plenty
        (2e8, 4e9, 0.05),
        (2e7, 4e9, 0.005),
        (1e3, 4e9, 0.0005),  # at the ceiling
        (-5e8, 4e9, 0.0005),  # over it
        (2e8, 8e9, 0.025),  # a trial that was seen to grow faster is watched more closely
        (2e8, 0.0, 0.1),
    ],
)
def test_the_interval_is_the_time_that_the_headroom_lasts(
    headroom: float | None, growth: float, expected: float
) -> None:
    assert sampling_interval(headroom, growth, longest=0.1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("due", "now", "period", "expected"),
    [
        (10.0, 9.0, 0.1, 10.0),  # not due yet
        (10.0, 10.03, 0.1, 10.1),  # late by less than a period: no drift
        (10.0, 10.0, 0.1, 10.1),
        (10.0, 15.04, 0.1, 15.1),  # after a stall the missed ones are left out
        (10.0, 10.0, math.inf, math.inf),
    ],
)
def test_deadlines_stay_on_their_grid(
    due: float, now: float, period: float, expected: float
) -> None:
    assert next_due(due, now, period) == pytest.approx(expected)
    assert next_due(due, now, period) > now or due > now


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


class FakeHost:
    """A time and a number of context switches that a test sets."""

    def __init__(self) -> None:
        self.time = 100.0
        self.switches: int | None = 7
        self.clock = RunningClock(lambda: self.time, lambda thread: self.switches)


def test_a_late_wakeup_is_a_pause() -> None:
    host = FakeHost()
    host.clock.fall_asleep(0.2)
    host.time += 60.2
    assert host.clock() == pytest.approx(100.2)
    host.time += 0.1
    assert host.clock() == pytest.approx(100.3)
    host.clock.wake_up()
    assert host.clock() == pytest.approx(100.3)


def test_the_first_reading_detects_the_pause_once() -> None:
    host = FakeHost()
    host.clock.fall_asleep(0.2)
    host.time += 30.0
    host.clock.wake_up()
    assert host.clock() == pytest.approx(100.2)
    host.clock.fall_asleep(0.2)
    host.time += 10.0
    assert [host.clock() for _ in range(3)] == pytest.approx([100.4] * 3)


def test_a_slightly_late_wakeup_is_no_pause() -> None:
    host = FakeHost()
    host.clock.fall_asleep(0.2)
    host.time += 0.6
    assert host.clock() == pytest.approx(100.6)


def test_waiting_for_the_interpreter_lock_is_no_pause() -> None:
    host = FakeHost()
    host.clock.fall_asleep(0.2)
    host.time += 10.0
    assert host.switches is not None
    host.switches += 1900  # one each 5 ms
    assert host.clock() == pytest.approx(110.0)


def test_without_context_switches_there_is_no_pause() -> None:
    host = FakeHost()
    host.switches = None
    host.clock.fall_asleep(0.2)
    host.time += 10.0
    assert host.clock() == pytest.approx(110.0)


def test_an_awake_thread_may_take_its_time() -> None:
    host = FakeHost()
    host.clock.fall_asleep(0.2)
    host.time += 0.2
    host.clock.wake_up()
    host.time += 10.0
    assert host.clock() == pytest.approx(110.2)
    host.clock.fall_asleep(None)
    host.time += 10.0
    assert host.clock() == pytest.approx(120.2)


def test_seconds_can_be_left_out() -> None:
    host = FakeHost()
    host.time += 10.0
    host.clock.skip(4.0)
    assert host.clock() == pytest.approx(106.0)


@linux
def test_context_switches_are_the_same_from_outside() -> None:
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
    monitor = loop.monitor((1, 1))
    print("started", flush=True)
    if sys.argv[1] == "held":
        # Sleeps with the interpreter's lock held.
        ctypes.PyDLL(None).usleep(1_500_000)
    else:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            pass
    print(monitor.elapsed)
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize(("how", "least", "most"), [("held", 1.4, 9), ("stopped", 0.0, 1.2)])
def test_a_held_interpreter_lock_is_no_pause_and_a_stop_is_one(
    how: str, least: float, most: float
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(BUSY), how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    if how == "stopped":
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert least < float(out) < most
