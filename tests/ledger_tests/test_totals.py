"""Clock time in which at least one trial ran, on one clock and on clocks that differ."""

from __future__ import annotations

from dataclasses import replace
import time

from hypothesis import given, settings, strategies as st
import optuna
import pytest

from optuna_quota import Quota
from optuna_quota._ledger import Ledger
from optuna_quota._ledger.reservation import Reservation, reservation_object, this_worker, Worker
from optuna_quota._ledger.totals import Entry, IntervalUnion, QuotaTotals
from optuna_quota._optuna import storage_of, trial_id_of
from optuna_quota._records import RESERVATION
from tests.ledger_tests.test_ledger import begin, reserve


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
    assert IntervalUnion(intervals).total == total


@given(INTERVALS, INTERVALS)
@settings(max_examples=200, deadline=None)
def test_a_union_is_what_it_is_by_counting_seconds(
    first: list[tuple[int, int]], more: list[tuple[int, int]]
) -> None:
    def seconds(intervals: list[tuple[int, int]]) -> int:
        return len({second for start, end in intervals for second in range(start, end)})

    spans = IntervalUnion(first)
    assert spans.total == seconds(first)
    assert spans.with_added(more) == seconds([*first, *more])
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


@pytest.mark.parametrize("ahead", [-300.0, 300.0])
def test_a_running_trial_is_timed_by_its_own_clock(ahead: float) -> None:
    totals = QuotaTotals(Quota())
    running = Reservation(1, worker=worker("b"), began=1000 + ahead, beat=1040 + ahead)
    totals.update([], [Entry(1, 1, "running", reservation=running)])
    assert 40 <= totals.used(now=1050)["wall_time"] <= 70


def test_a_clock_that_is_ahead_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(wall_time="1h"))
    for host, ahead in (("near", 2.0), ("far", 330.0)):
        trial_id = trial_id_of(study.ask())
        held = Reservation(trial_id, worker=worker(host), beat=time.time() + ahead)
        storage_of(study).set_trial_system_attr(trial_id, RESERVATION, reservation_object(held))
    for _ in range(2):
        reserve(ledger, begin(study))
    (message,) = [r.message for r in caplog.records if "clock" in r.message]
    assert message.startswith("The clock of host far is 5 min 30 s ahead of this host's")


def test_a_reader_whose_clock_is_behind_counts_up_to_what_it_has_read() -> None:
    totals = QuotaTotals(Quota())
    running = Reservation(1, worker=worker("a"), began=100, beat=130)
    totals.update([], [Entry(1, 1, "running", reservation=running)])
    assert totals.used(now=50)["wall_time"] == 30
    assert totals.used(now=140)["wall_time"] == 40


def test_a_live_worker_of_this_machine_counts_up_to_now_whatever_its_lease() -> None:
    totals, here = QuotaTotals(Quota()), this_worker()
    running = Reservation(1, worker=here, began=1000, beat=1000)
    totals.update([], [Entry(1, 1, "running", reservation=running)])
    assert totals.used(now=1600)["wall_time"] == 600
    dead = replace(running, worker=replace(here, started=here.started + 1))
    totals.update([], [Entry(1, 1, "running", reservation=dead)])
    assert totals.used(now=1600)["wall_time"] == 30
