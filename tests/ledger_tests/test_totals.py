"""Clock time in which at least one trial ran, on one clock and on clocks that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
import multiprocessing
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
import time
from types import SimpleNamespace

from hypothesis import given, settings, strategies as st
import optuna
import pytest

from optuna_quota import Limits, Quota, QuotaSampler, status
from optuna_quota._ledger import ledger as ledger_module, protocol
from optuna_quota._ledger.ledger import Ledger
from optuna_quota._ledger.protocol import Reservation, reservation_object, this_worker, Worker
from optuna_quota._ledger.totals import Entry, IntervalUnion, QuotaTotals
from optuna_quota._metering import metering_loop
from optuna_quota._optuna import storage_of, trial_id_of
from optuna_quota._records import RESERVATION
from tests.ledger_tests import workers
from tests.ledger_tests.test_heartbeat import FakeClock
from tests.ledger_tests.test_ledger import begin, reserve
from tests.storages import Address, storage_at, study_in


INTERVALS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda t: (t[0], t[0] + t[1])),
    max_size=12,
)


@pytest.mark.parametrize(
    ("intervals", "total"),
    [
        ([], 0),
        ([(0, 10)], 10),
        ([(0, 10), (20, 30)], 20),
        ([(0, 10), (5, 15)], 15),
        ([(0, 10), (10, 20)], 20),
        ([(0, 30), (5, 10)], 30),
        ([(5, 10), (20, 25), (0, 30)], 30),
        ([(10, 5)], 0),
    ],
)
def test_overlaps_count_once_and_pauses_not_at_all(
    intervals: list[tuple[float, float]], total: float
) -> None:
    assert union(intervals).total == total


def union(intervals: Sequence[tuple[float, float]]) -> IntervalUnion:
    spans = IntervalUnion()
    for start, end in intervals:
        spans.add(start, end)
    return spans


@given(INTERVALS, INTERVALS)
@settings(max_examples=200, deadline=None)
def test_a_union_is_what_it_is_by_counting_seconds(
    first: list[tuple[int, int]], more: list[tuple[int, int]]
) -> None:
    def seconds(intervals: list[tuple[int, int]]) -> int:
        return len({second for start, end in intervals for second in range(start, end)})

    spans = union(first)
    assert spans.total == seconds(first)
    grown = spans.copy()
    for start, end in more:
        grown.add(start, end)
    assert grown.total == seconds([*first, *more])
    assert spans.total == seconds(first)


def worker(machine: str) -> Worker:
    return Worker(machine, machine)


def row(number: int, machine: str, start: float, end: float) -> Entry:
    held = Reservation(number, worker=worker(machine), began=start, beat=start)
    return Entry(
        number, number, "finished", "completed", held, {"trial_time": end - start}, (start, end)
    )


@pytest.mark.parametrize(
    ("starts", "seconds"),
    [
        ([("a", 0, 5), ("a", 15, 20)], 20),
        ([("a", 15, 20), ("a", 0, 5)], 20),
        ([("a", 0, 5), ("a", 15.1, 20)], 9.9),
        ([("a", 0, 5), ("b", 15, 20)], 10),
        ([("a", 0, 5), ("b", 7, 12), ("a", 13, 15)], 15),
    ],
)
def test_the_time_between_trials_of_one_worker_counts_and_a_pause_does_not(
    starts: list[tuple[str, float, float]], seconds: float
) -> None:
    totals = QuotaTotals(Quota())
    for number, (machine, start, end) in enumerate(starts):
        totals.update([row(number, machine, start, end)], [])
    assert totals.used(0)["wall_time"] == pytest.approx(seconds)


def test_a_trial_of_unknown_time_counts_with_the_limit_on_wall_time() -> None:
    totals = QuotaTotals(Quota(trial_time=100), {"wall_time": 20.0})
    unknown = Entry(1, 1, "finished", "failed", Reservation(1), {"trial_time": None})
    totals.update([row(0, "a", 0, 5), unknown], [])
    assert totals.used(0)["trial_time"] == 25


def test_the_time_before_a_trial_that_starts_now_counts_too() -> None:
    totals = QuotaTotals(Quota())
    totals.update([row(0, "a", 100, 105)], [])
    assert totals.used(112)["wall_time"] == 5
    assert totals.used(112, worker("a"))["wall_time"] == 12
    assert totals.used(116, worker("a"))["wall_time"] == 5
    assert totals.used(112, worker("b"))["wall_time"] == 5
    running = Reservation(1, worker=worker("a"), began=112, beat=112)
    totals.update([], [Entry(1, 1, "running", reservation=running)])
    assert totals.used(113)["wall_time"] == 13


def test_trials_at_once_on_two_machines_count_once() -> None:
    totals = QuotaTotals(Quota())
    totals.update([row(0, "a", 100, 110), row(1, "b", 105, 115)], [])
    assert totals.used(0)["wall_time"] == 15


@pytest.mark.parametrize(("silent", "passed"), [(-300, 0), (0, 0), (7, 7), (33, 30), (300, 0)])
def test_since_its_last_heartbeat_a_trial_ran_no_longer_than_to_the_next(
    silent: float, passed: float
) -> None:
    totals = QuotaTotals(Quota())
    for machine in ("b", this_worker().machine):
        running = Reservation(1, worker=worker(machine), began=1000, beat=1040)
        totals.update([], [Entry(1, 1, "running", reservation=running)])
        assert totals.used(now=1040 + silent)["wall_time"] == 40 + passed
    seldom = replace(running, every=600.0)
    totals.update([], [Entry(1, 1, "running", reservation=seldom)])
    assert totals.used(now=1340)["wall_time"] == 340


def test_a_clock_that_is_ahead_is_warned_of_once_and_followed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    study, clock = optuna.create_study(), FakeClock()
    ledger = Ledger(study, Quota(wall_time="1h"), clock=clock)
    long = begin(study)
    reserve(ledger, long)
    monitor = metering_loop().monitor((0, 0), limits=Limits(), here=False)
    ledger.attach_monitor(trial_id_of(long), monitor)
    clock.sleep(20.0)
    ahead = {"near": 2.0, "far": 330.0, "absurd": 1e9}
    for host, seconds in ahead.items():
        trial_id = trial_id_of(study.ask())
        at = clock.now + seconds
        held = Reservation(trial_id, worker=worker(host), began=at, beat=at)
        storage_of(study).set_trial_system_attr(trial_id, RESERVATION, reservation_object(held))
        for _ in range(2):
            reserve(ledger, begin(study))
        # Another trial runs here since the beginning, so that no more than that has passed.
        ledger._beat(trial_id_of(long))
        assert status(study).table.loc["wall_time", "used"] == pytest.approx(20, abs=3)
    found = [r.message for r in caplog.records if "clock" in r.message]
    assert [m.split(" that ")[0] for m in found] == [
        "The clock of host far is 5 min 30 s ahead of",
        "The clock of host absurd is 11574 d 1 h ahead of",
    ]


def work(address: Address, name: str, host: str, ahead: float, go: Event, ends: Queue) -> None:
    """Run trials as on a host whose clock is ahead."""
    protocol._machine = lambda: host  # type: ignore[assignment]
    ledger_module.time = SimpleNamespace(  # type: ignore[attr-defined]
        time=lambda: time.time() + ahead, monotonic=time.monotonic, sleep=time.sleep
    )
    study = workers.load(address, name)
    study.sampler = QuotaSampler(study.sampler, quota=Quota(wall_time=4))
    ends.put(0.0)
    assert go.wait(60)
    study.optimize(lambda trial: time.sleep(0.2 * trial.suggest_float("x", 0.5, 1)) or 0.0)
    ends.put(time.monotonic())


@pytest.mark.parametrize("first", ["right", "ahead"])
def test_a_host_whose_clock_is_ahead_neither_ends_a_study_nor_stretches_its_quota(
    first: str, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    hosts, ends = {"right": 0.0, "ahead": 300.0}, context.Queue()
    with storage_at("sqlite", tmp_path) as address, study_in(address) as study:
        go = {host: context.Event() for host in hosts}
        processes = [
            workers.start(work, address, study.study_name, host, ahead, go[host], ends)
            for host, ahead in hosts.items()
        ]
        for _ in hosts:
            ends.get(timeout=60)
        begun = time.monotonic()
        go.pop(first).set()
        while not any(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)):
            time.sleep(0.02)
        go.popitem()[1].set()
        workers.wait_for(processes)
        lasted = max(ends.get() for _ in hosts) - begun
        ran = {t.system_attrs[RESERVATION]["worker"]["machine"] for t in study.trials}
        assert ran == {*hosts}
        # The clocks' own difference would count for 300 s, and twice the time for 8.
        assert 2.5 < status(study).table.loc["wall_time", "used"] < 7
        assert lasted > 2.5
