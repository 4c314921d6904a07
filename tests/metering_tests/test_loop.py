"""The metering loop on fake clocks and process trees, some of which can't be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import queue
import threading
import time
from typing import Any

import optuna
import pytest

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, Usage
from optuna_quota._metering import metering_loop
from optuna_quota._metering.breach import find_breaches, tightest_ceilings
from optuna_quota._metering.loop import MeteringLoop
from optuna_quota._metering.meter import MeterReading
from optuna_quota._records import read_record
from optuna_quota._usage import Breach
from optuna_quota.testing import fake_metering, FakeMeter, FakeMetering, FakeProcessTree


GIB = 2**30
KEY = (1, 1)
OTHER = (1, 2)


def test_the_fake_is_the_process_own_loop_while_it_lasts() -> None:
    before = metering_loop()
    with fake_metering() as metering:
        assert metering_loop() is metering.loop
    assert metering_loop() is before


def test_peaks_are_maxima_and_totals_are_growth(fake: FakeMetering) -> None:
    fake.tree.memory, fake.tree.cpu_time = 5 * GIB, 100.0
    monitor = fake.loop.monitor(KEY)
    fake.tree.memory, fake.tree.cpu_time = 9 * GIB, 103.0
    fake.advance(1.0)
    fake.tree.memory, fake.tree.cpu_time = 2 * GIB, 104.0
    fake.advance(1.0)
    usage = monitor.close()
    assert usage == Usage(memory=9 * GIB, wall_time=2.0, cpu_time=4.0)
    assert max(m for _, m in monitor.timeline()) == 9 * GIB
    assert monitor.timeline()[0] == (0.0, 5 * GIB)


def test_resources_with_a_ceiling_have_a_timeline(fake: FakeMetering) -> None:
    monitor = fake.loop.monitor(KEY, limits=Limits(cpu_time=3))
    for _ in range(2):
        fake.tree.cpu_time += 1.0
        fake.advance(1.0)
    assert [value for _, value in monitor.timeline("cpu_time")][-1:] == [2.0]
    assert monitor.timeline("gpu_memory") == ()
    monitor.close()


def test_a_peak_between_samples_is_recorded_and_no_breach(fake: FakeMetering) -> None:
    fake.tree.memory = GIB
    monitor = fake.loop.monitor(KEY, limits=Limits(memory="3GiB"))
    fake.tree.peak = 4 * GIB
    usage = monitor.close()
    assert usage.memory == 4 * GIB
    assert monitor.breach is None


def test_unknown_usage_stays_unknown(fake: FakeMetering) -> None:
    fake.tree.memory = fake.tree.cpu_time = None
    monitor = fake.loop.monitor(KEY, limits=Limits(memory="1B", cpu_time=1))
    fake.advance(5.0)
    usage = monitor.close()
    assert (usage.memory, usage.cpu_time, monitor.breach) == (None, None, None)


@pytest.mark.parametrize("limit", [0.05, 0.1, 3.25, 61.0])
def test_a_limit_on_the_clock_fires_on_time(fake: FakeMetering, limit: float) -> None:
    monitor = fake.loop.monitor(KEY, limits=Limits(wall_time=limit))
    found: list[tuple[float, Breach]] = []
    monitor.on_breach(lambda breach: found.append((fake.clock(), breach)))
    fake.advance(limit * 3)
    [(when, breach)] = found
    assert when == pytest.approx(limit)
    assert breach.resource == "wall_time"
    assert breach.seconds == pytest.approx(limit)


def test_a_nearby_limit_shortens_the_sampling_interval(fake: FakeMetering) -> None:
    fake.tree.memory = 1e9
    monitor = fake.loop.monitor(KEY, limits=Limits(memory=2e9))
    seen: list[float] = []
    while monitor.breach is None:
        wait = fake.loop.tick()
        assert wait is not None
        fake.clock.advance(max(wait, 1e-9))
        fake.tree.memory += 4e9 * max(wait, 1e-9)  # as fast as memory can be touched
        seen.append(wait)
        assert len(seen) < 10_000
    assert seen[0] == pytest.approx(0.1)
    assert min(seen) == pytest.approx(0.0005)
    # The last wait is the shortest: half a millisecond is 2 MB at 4 GB/s.
    assert monitor.breach.observed - 2e9 <= 2e6 + 1.0
    assert len(seen) < 40


def test_far_from_the_limit_it_samples_rarely_and_idle_never(fake: FakeMetering) -> None:
    assert fake.loop.tick() is None
    monitor = fake.loop.monitor(KEY, limits=Limits(memory=2**50))
    fake.loop.tick()
    wait = fake.loop.tick()
    assert wait is not None and wait > 0.09
    monitor.close()
    assert fake.loop.tick() is None


def test_a_process_that_is_no_longer_alone_is_sampled_more_often(fake: FakeMetering) -> None:
    fake.tree.memory = GIB
    monitor = fake.loop.monitor(KEY, limits=Limits(memory=2**50))
    fake.tree.peak = GIB
    fake.advance(2.0)

    def longest_wait(samples: int) -> float:
        waits = []
        for _ in range(samples):
            wait = fake.loop.tick()
            assert wait is not None
            waits.append(wait)
            fake.clock.advance(max(wait, 1e-9))
        return max(waits)

    assert longest_wait(8) == pytest.approx(0.25)
    fake.tree.pids = (*fake.tree.pids, 2**22 + 1)
    fake.loop.tick()  # sees it, at the end of the last wait
    fake.clock.advance(1e-9)
    assert longest_wait(2) <= 0.1 + 1e-6
    monitor.close()


def test_deadlines_do_not_drift(fake: FakeMetering) -> None:
    monitor = fake.loop.monitor(KEY)
    dues = []
    for _ in range(50):
        wait = fake.loop.tick()
        assert wait is not None
        fake.clock.advance(wait + 0.013)  # every wakeup is late
        dues.append(fake.clock() - 0.013)
    assert all(min(due % 0.05, -due % 0.05) < 1e-6 for due in dues)
    monitor.close()


def test_a_limit_on_cores_needs_a_second_over_it(fake: FakeMetering) -> None:
    monitor = fake.loop.monitor(KEY, limits=Limits(cpu_cores=2))

    def run(cores: float, seconds: float) -> None:
        for _ in range(round(seconds / 0.1)):
            assert fake.tree.cpu_time is not None
            fake.tree.cpu_time += cores * 0.1
            fake.advance(0.1)

    run(2.0, 3.0)
    run(1.0, 2.0)
    run(4.0, 0.3)  # a burst
    run(1.0, 1.0)
    assert monitor.breach is None
    run(3.0, 1.5)
    assert monitor.breach is not None and monitor.breach.resource == "cpu_cores"
    assert 2.1 < monitor.breach.observed <= 3.0


def test_what_is_left_of_a_quota_can_change(fake: FakeMetering) -> None:
    monitor = fake.loop.monitor(KEY, left={"cpu_time": 5.0})
    fake.tree.cpu_time = 4.0
    fake.advance(1.0)
    monitor.allow({"cpu_time": 10.0})
    fake.tree.cpu_time = 8.0
    fake.advance(1.0)
    assert monitor.breach is None
    monitor.allow({"cpu_time": 7.0})
    fake.advance(0.1)
    assert monitor.breach is not None and monitor.breach.quota and monitor.breach.limit == 7.0
    assert monitor.left == {"cpu_time": 7.0}


def test_the_first_breach_stays(fake: FakeMetering) -> None:
    monitor = fake.loop.monitor(KEY, limits=Limits(memory=GIB, wall_time=10))
    fake.tree.memory = 2 * GIB
    fake.advance(1.0)
    first = monitor.breach
    fake.tree.memory = 9 * GIB
    fake.advance(100.0)
    assert monitor.breach is first
    assert monitor.close().memory == 9 * GIB


def test_of_several_breaches_the_furthest_over_its_limit_is_taken(fake: FakeMetering) -> None:
    limits = Limits(memory=GIB, cpu_time=2)
    monitor = fake.loop.monitor(KEY, limits=limits)
    fake.tree.memory, fake.tree.cpu_time = 3 * GIB, 5.0
    monitor.sample()
    amounts, ceilings = monitor.usage().amounts(), tightest_ceilings(limits.amounts(), {})
    furthest, other = find_breaches(amounts, ceilings, monitor.elapsed)
    assert (furthest.resource, other.resource) == ("memory", "cpu_time")
    assert monitor.breach == furthest


def test_a_sample_finds_the_breach_and_the_loop_calls_back(fake: FakeMetering) -> None:
    monitor = fake.loop.monitor(KEY, limits=Limits(memory=GIB))
    calls: list[Breach] = []
    monitor.on_breach(calls.append)
    fake.tree.memory = 2 * GIB
    assert monitor.sample().memory == 2 * GIB
    assert monitor.breach is not None and calls == []
    fake.loop.tick()
    fake.loop.tick()
    assert calls == [monitor.breach]


def test_a_callback_that_fails_does_not_end_the_loop(fake: FakeMetering) -> None:
    def fail(breach: Breach) -> None:
        raise RuntimeError("mine")

    monitor = fake.loop.monitor(KEY, limits=Limits(wall_time=1))
    calls: list[Breach] = []
    monitor.on_breach(fail)
    monitor.on_breach(calls.append)
    fake.advance(2.0)
    assert len(calls) == 1


def test_shared_memory_of_workers_counts_once(fake: FakeMetering) -> None:
    fake.tree.pids = (1, 2, 3)
    fake.tree.memory, fake.tree.shared = GIB, 4.0 * GIB
    monitor = fake.loop.monitor(KEY, limits=Limits(memory="2GiB"))
    fake.advance(3.0)
    assert monitor.breach is None
    fake.tree.memory = 3 * GIB
    fake.advance(1.0)
    assert monitor.breach is not None and monitor.breach.observed == 3 * GIB


# Trials at once in one process.


def test_trials_at_once_are_shared_for_good(fake: FakeMetering, warned: list[str]) -> None:
    fake.tree.memory = GIB
    first = fake.loop.monitor(KEY, limits=Limits(memory="2GiB"))
    second = fake.loop.monitor(OTHER, limits=Limits(memory="2GiB"))
    fake.tree.memory = fake.tree.peak = 50 * GIB
    fake.advance(5.0)
    assert second.close().memory is None
    fake.advance(5.0)
    usage = first.close()
    assert (first.isolation, second.isolation) == ("shared", "shared")
    assert usage.memory is None and first.breach is None and second.breach is None
    assert first.timeline() == ()
    assert len([text for text in warned if "can't be told apart" in text]) == 1


def test_cpu_time_of_trials_at_once_adds_up(fake: FakeMetering) -> None:
    first = fake.loop.monitor(KEY)
    fake.tree.cpu_time = 3.0
    second = fake.loop.monitor(OTHER)
    fake.tree.cpu_time = 10.0
    fake.advance(1.0)
    a = first.close().cpu_time
    fake.tree.cpu_time = 14.0
    b = second.close().cpu_time
    assert a is not None and b is not None
    assert a >= 3.0 and b >= 4.0
    assert a + b == pytest.approx(14.0)


def test_a_trial_after_another_is_alone(fake: FakeMetering) -> None:
    fake.tree.memory = 3 * GIB
    fake.loop.monitor(KEY).close()
    fake.tree.memory = GIB
    monitor = fake.loop.monitor(OTHER)
    assert monitor.close().memory == GIB
    assert monitor.isolation == "thread"


def test_isolated_trials_at_once_are_each_alone(fake: FakeMetering, warned: list[str]) -> None:
    fake.tree.memory, fake.tree.cpu_time = 9 * GIB, 50.0
    first = fake.loop.monitor(KEY, limits=Limits(memory="2GiB"))
    second = fake.loop.monitor(OTHER, limits=Limits(memory="2GiB"))
    first.attach(101)
    second.attach(102)
    fake.trees[101].memory, fake.trees[101].cpu_time = GIB, 7.0
    fake.trees[102].memory, fake.trees[102].cpu_time = 3 * GIB, 1.0
    fake.advance(5.0)
    assert first.breach is None and first.close().memory == GIB
    assert second.breach is not None and second.breach.resource == "memory"
    assert first.usage().cpu_time == 7.0
    assert (first.isolation, second.isolation) == ("process", "process")
    second.close()
    assert fake.trees[101].is_closed and fake.trees[102].is_closed
    assert not warned


def test_a_breach_of_this_process_is_forgotten_when_the_trial_is_isolated(
    fake: FakeMetering,
) -> None:
    fake.tree.memory = 9 * GIB
    monitor = fake.loop.monitor(KEY, limits=Limits(memory="2GiB"))
    fake.advance(0.01)
    assert monitor.breach is not None
    monitor.attach(101)
    assert monitor.breach is None
    assert monitor.elapsed == pytest.approx(0.01)


def test_cpu_time_of_a_trials_own_process_counts_from_its_creation(fake: FakeMetering) -> None:
    monitor = fake.loop.monitor(KEY)
    fake.advance(1.0)
    fake.trees[7] = FakeProcessTree(cpu_time=3.0, pids=[7])
    monitor.attach(7)
    fake.trees[7].cpu_time = 4.0
    assert monitor.close().cpu_time == 4.0


def test_totals_from_another_source_are_merged(fake: FakeMetering) -> None:
    fake.tree.memory, fake.tree.cpu_time = 5.0, 0.0
    monitor = fake.loop.monitor(KEY, limits=Limits(memory="7B"))
    fake.tree.cpu_time = 3.0
    monitor.add_usage(Usage(memory=8.0, cpu_time=2.0, energy=4.0, custom={"io": 1.0}))
    usage = monitor.close()
    assert (usage.memory, usage.cpu_time, usage.energy) == (8.0, 3.0, 4.0)
    assert usage.custom == {"io": 1.0}
    assert monitor.breach is not None and monitor.breach.observed == 8.0
    monitor.add_usage(Usage(memory=9.0))
    assert monitor.usage().memory == 9.0


def test_close_is_idempotent(fake: FakeMetering) -> None:
    monitor = fake.loop.monitor(KEY, limits=Limits(wall_time=5))
    fake.advance(2.0)
    usage = monitor.close()
    fake.advance(60.0)
    assert monitor.close() == usage == monitor.sample() == monitor.usage()
    assert monitor.elapsed == 2.0 and monitor.breach is None and monitor.closed
    assert fake.loop.find(KEY) is None


METHODS = ("read", "reset_peak")


class FaultyTree(FakeProcessTree):
    """Fails in some of its methods."""

    def __init__(self, *failing: str) -> None:
        super().__init__(memory=100.0)
        self.failing = set(failing)

    def _check(self, method: str) -> None:
        if method in self.failing:
            raise OSError(5, "on purpose")

    def read(self, **arguments: Any) -> Any:
        self._check("read")
        return super().read(**arguments)

    def reset_peak(self) -> None:
        self._check("reset_peak")
        super().reset_peak()


def new_study() -> optuna.Study:
    return optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=9, trial_time="1h")),
        pruner=QuotaPruner(limits=Limits(memory="1000B", wall_time=60)),
    )


def test_a_study_goes_on_without_process_figures(fake: FakeMetering, warned: list[str]) -> None:
    fake.tree = FaultyTree(*METHODS)
    study = new_study()
    for _ in range(2):
        trial = study.ask()
        fake.advance(5)
        assert not trial.should_prune()
        study.tell(trial, 1.0)
    # Time is read from no tree.
    trial = study.ask()
    fake.advance(61)
    assert trial.should_prune()
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    usages = [read_record(row).usage for row in study.trials]
    assert [usage.wall_time for usage in usages] == [5, 5, 61]
    assert all(usage.memory is None and usage.cpu_time is None for usage in usages)
    (message,) = warned
    assert "not known" in message and "on purpose" in message


def test_cpu_time_used_during_a_fault_is_counted_after_it(fake: FakeMetering) -> None:
    tree = fake.tree = FaultyTree()
    study = new_study()
    trial = study.ask()
    tree.cpu_time, tree.failing = 3.0, set(METHODS)
    fake.advance(5)
    assert not trial.should_prune()
    tree.cpu_time, tree.memory, tree.failing = 7.0, 2000.0, set()
    fake.advance(5)
    assert trial.should_prune()
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    record = read_record(study.trials[0])
    assert (record.usage.cpu_time, record.usage.memory) == (7, 2000)
    assert record.outcome == "terminated"


@pytest.mark.parametrize("failing", METHODS)
def test_a_tree_that_fails_in_one_method(fake: FakeMetering, failing: str) -> None:
    fake.trees[7] = FaultyTree(failing)
    monitor = metering_loop().monitor((0, 0), limits=Limits(memory="1000B", wall_time=60))
    monitor.attach(7)
    fake.trees[7].memory = 2000.0
    fake.advance(5)
    assert (monitor.breach is None) is (failing == "read")
    # It still has its clock.
    fake.advance(56)
    assert monitor.breach is not None
    monitor.close()


class HangingMeter:
    """A meter that answers at first, and then once ``answers`` is set."""

    name, peak = "scratch", True

    def __init__(self) -> None:
        self.asked, self.answers = threading.Event(), threading.Event()
        self.is_first = True

    def read(self, pids: Sequence[int]) -> float:
        if not self.is_first:
            self.asked.set()
            self.answers.wait(30)
        self.is_first = False
        return 2.0


@pytest.fixture
def hanging() -> Iterator[HangingMeter]:
    meter = HangingMeter()
    yield meter
    meter.answers.set()


def test_a_meter_that_hangs_holds_up_no_other_limit(hanging: HangingMeter) -> None:
    loop = MeteringLoop()
    breaches: queue.SimpleQueue[Breach] = queue.SimpleQueue()
    limits = Limits(wall_time=0.5, custom={"scratch": 3})
    monitor = loop.monitor(KEY, limits=limits, meters=[hanging])
    monitor.on_breach(breaches.put)
    assert breaches.get(timeout=10).resource == "wall_time"
    assert hanging.asked.is_set()
    begun = time.monotonic()
    assert monitor.close().custom == {"scratch": 2.0}
    assert time.monotonic() - begun < 10
    hanging.answers.set()
    loop.stop()
    assert not any(thread.is_alive() for thread in loop._threads)


def test_no_meter_is_read_after_the_end_of_its_trial(hanging: HangingMeter) -> None:
    loop, meter = MeteringLoop(), FakeMeter()
    first = loop.monitor(KEY, meters=[hanging])
    assert hanging.asked.wait(10)
    second = loop.monitor(OTHER, meters=[meter])
    second.close()
    reads = meter.reads
    hanging.asked.clear()
    hanging.answers.set()
    assert hanging.asked.wait(10)  # the thread has looked at all meters since
    assert meter.reads == reads
    first.close()
    loop.stop()


def test_a_reading_that_fails_does_not_end_the_loop() -> None:
    class Failing:
        period, eager, n_readings = 0.01, True, 0

        def read(self, pids: Sequence[int], *, fully: bool = False) -> dict[str, MeterReading]:
            self.n_readings += 1
            raise KeyError("mine")

        def close(self) -> None:
            pass

    failing = Failing()
    loop = MeteringLoop(open_meters=lambda monitor: [failing])
    monitor = loop.monitor(KEY, limits=Limits(wall_time=0.3))
    breaches: queue.SimpleQueue[Breach] = queue.SimpleQueue()
    monitor.on_breach(breaches.put)
    assert breaches.get(timeout=10).resource == "wall_time"
    assert failing.n_readings > 2
    assert monitor.close().wall_time is not None
    loop.stop()
