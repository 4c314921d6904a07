"""Clock time in which at least one trial ran, on one clock and on clocks that differ."""

from __future__ import annotations

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from optuna_quota import Quota
from optuna_quota._ledger.book import Book
from optuna_quota._ledger.book import Entry
from optuna_quota._ledger.clocks import Clocks
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._ledger.reservation import Worker
from optuna_quota._ledger.spans import Spans


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
    assert Spans(intervals).total == total


@given(INTERVALS, INTERVALS)
@settings(max_examples=200, deadline=None)
def test_a_union_is_what_it_is_by_counting_seconds(
    first: list[tuple[int, int]], more: list[tuple[int, int]]
) -> None:
    def seconds(intervals: list[tuple[int, int]]) -> int:
        return len({second for start, end in intervals for second in range(start, end)})

    spans = Spans(first)
    assert spans.total == seconds(first)
    assert spans.with_added(more) == seconds([*first, *more])
    assert spans.total == seconds(first)


def worker(machine: str) -> Worker:
    return Worker(machine, machine)


def row(
    number: int, machine: str, start: float, end: float, after: dict[str, float] | None = None
) -> Entry:
    held = Reservation(number, worker=worker(machine), began=start, beat=start, after=after or {})
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
    book = Book(Quota())
    for number, (machine, start, end) in enumerate(starts):
        book.fold([row(number, machine, start, end)], [])
    assert book.used(0)["wall_time"] == pytest.approx(seconds)


def test_the_time_before_a_trial_that_starts_now_counts_too() -> None:
    book = Book(Quota())
    book.fold([row(0, "a", 100, 105)], [])
    assert book.used(112)["wall_time"] == 5
    assert book.used(112, worker("a"))["wall_time"] == 12
    assert book.used(116, worker("a"))["wall_time"] == 5
    assert book.used(112, worker("b"))["wall_time"] == 5
    running = Reservation(1, worker=worker("a"), began=112, beat=112)
    book.fold([], [Entry(1, 1, "running", reservation=running)])
    assert book.used(113)["wall_time"] == 13


def test_trials_at_once_on_two_machines_count_once() -> None:
    book = Book(Quota())
    book.fold([row(0, "a", 100, 110), row(1, "b", 105, 115)], [])
    assert book.used(0)["wall_time"] == 15


def test_a_clock_that_rows_prove_wrong_is_moved_by_the_least_that_explains_them() -> None:
    # Machine b's clock is an hour behind a's. Its worker began 5 s after a's did, and wrote that
    # it had read a's stamp 100, which its own clock has yet to reach, at -3495 on its clock.
    book = Book(Quota())
    book.fold([row(0, "a", 100 + 3600, 110 + 3600), row(1, "b", 105, 115, {"a": 3700.0})], [])
    # Moved by the least: b began when a's stamp was written, 5 s before it truly did.
    assert book.used(0)["wall_time"] == 10
    # A later stamp, read at once, tells the offset exactly; rows that were added before move too.
    book.fold([row(2, "b", 130, 131, {"a": 3730.0})], [])
    assert book.used(0)["wall_time"] == 16


def test_clocks_are_believed_unless_rows_prove_them_wrong() -> None:
    clocks = Clocks()
    for entry in (row(0, "a", 100, 110), row(1, "b", 90, 110)):
        assert entry.reservation is not None
        assert not clocks.learn(entry.reservation)
    assert clocks.shifts == {}
    assert clocks.later_than("b", 95) == {"a": 100}
    assert clocks.later_than("b", 105) == {}


def test_proofs_carry_over_from_machine_to_machine() -> None:
    clocks = Clocks()
    chain = [
        Reservation(worker=worker("b"), beat=10, after={"a": 110}),
        Reservation(worker=worker("c"), beat=5, after={"b": 15}),
    ]
    assert [clocks.learn(reservation) for reservation in chain] == [True, True]
    assert clocks.shifts == {"b": 100, "c": 110}
    assert clocks.moved("c", 5) == 115


def test_a_reader_whose_clock_is_behind_counts_up_to_what_it_has_read() -> None:
    book = Book(Quota())
    running = Reservation(1, worker=worker("a"), began=100, beat=130)
    book.fold([], [Entry(1, 1, "running", reservation=running)])
    assert book.used(now=50)["wall_time"] == 30
    assert book.used(now=140)["wall_time"] == 40
