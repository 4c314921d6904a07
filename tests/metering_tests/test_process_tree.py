"""CPU time of process trees whose members come and go."""

from __future__ import annotations

import math

import pytest

from optuna_quota._metering.process_tree import (
    CpuTimes,
    find_doubt,
    find_inherited,
    ProcessMemory,
    SharedPages,
    TreeCpuTime,
    TreeMemory,
)


def total_after(*samples: dict[str, CpuTimes]) -> float:
    tree = TreeCpuTime()
    for sample in samples:
        before = tree.total
        tree.update(sample)
        assert tree.total >= before
    return tree.total


def test_a_child_that_was_waited_for_is_counted_once() -> None:
    assert total_after(
        {"root": CpuTimes(1.0), "child": CpuTimes(2.0, parent="root")},
        {"root": CpuTimes(1.5, reaped=2.5)},  # it used half a second more before it ended
    ) == pytest.approx(4.0)


def test_a_child_that_came_and_went_between_samples_is_counted() -> None:
    assert total_after({"root": CpuTimes(1.0)}, {"root": CpuTimes(1.0, reaped=3.0)}) == 4.0


def test_a_child_that_was_not_waited_for_keeps_what_it_had() -> None:
    assert (
        total_after(
            {"root": CpuTimes(1.0), "child": CpuTimes(2.0, parent="root")},
            {"root": CpuTimes(1.5)},
            {"root": CpuTimes(2.0)},
        )
        == 4.0
    )


def test_a_grandchild_is_inherited_through_a_dead_parent() -> None:
    family = {
        "root": CpuTimes(1.0),
        "child": CpuTimes(1.0, parent="root"),
        "grandchild": CpuTimes(5.0, parent="child"),
    }
    assert total_after(family, {"root": CpuTimes(1.0, reaped=6.5)}) == pytest.approx(7.5)


def test_an_orphan_that_lives_on_is_counted_and_so_is_its_dead_parent() -> None:
    assert total_after(
        {
            "root": CpuTimes(1.0),
            "child": CpuTimes(1.0, parent="root"),
            "orphan": CpuTimes(2.0, parent="child"),
        },
        {"root": CpuTimes(1.0, reaped=1.0), "orphan": CpuTimes(3.0, parent="child")},
        {"root": CpuTimes(1.0, reaped=1.0)},  # it ended under init: its time is not inherited
    ) == pytest.approx(5.0)


def test_the_whole_tree_gone_keeps_its_total() -> None:
    assert (
        total_after({"root": CpuTimes(1.0), "child": CpuTimes(2.0, parent="root")}, {}, {}) == 3.0
    )


def test_another_trials_process_is_not_counted_nor_inherited() -> None:
    assert total_after(
        {"root": CpuTimes(1.0), "theirs": CpuTimes(50.0, parent="root", foreign=True)},
        {"root": CpuTimes(2.0), "theirs": CpuTimes(70.0, parent="root", foreign=True)},
        {"root": CpuTimes(3.0, reaped=70.0)},
        {"root": CpuTimes(4.0, reaped=70.0)},
    ) == pytest.approx(4.0)


def test_own_and_foreign_children_that_end_together() -> None:
    assert total_after(
        {
            "root": CpuTimes(0.0),
            "mine": CpuTimes(3.0, parent="root"),
            "theirs": CpuTimes(10.0, parent="root", foreign=True),
        },
        {"root": CpuTimes(0.0, reaped=13.0)},
    ) == pytest.approx(3.0)


def test_a_child_that_becomes_another_trials_does_not_hide_what_follows() -> None:
    assert total_after(
        {"root": CpuTimes(1.0), "child": CpuTimes(2.0, parent="root")},
        {"root": CpuTimes(1.5), "child": CpuTimes(9.0, parent="root", foreign=True)},
    ) == pytest.approx(3.5)


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


def test_a_new_process_that_gives_up_what_it_began_with_counts_by_its_growth_since() -> None:
    pages = known(PAIR)
    assert pages.memory(TreeMemory({**SIZES, 3: 150})) == 150
    assert pages.memory(TreeMemory({**SIZES, 3: 10})) == 150
    assert pages.memory(TreeMemory({**SIZES, 3: 140})) == 280


@pytest.mark.parametrize("sizes", [{1: 100, 2: 0}, {1: 100}])
def test_what_a_process_gives_up_may_be_the_others_own_by_now(sizes: dict[int, int]) -> None:
    pages = known(PAIR)
    grown = {**sizes, 1: sizes[1] + 30}
    assert pages.at_most(TreeMemory(grown)) == sum(grown.values())
    # Before a verdict.
    assert is_due(pages, grown, 0.0011, limit=120)
    assert not is_due(pages, grown, 0.0011, limit=190)


def test_of_what_a_process_gives_up_its_own_goes_first() -> None:
    pages = known(PAIR)
    grown = {1: 130, 2: 110}
    assert pages.at_most(TreeMemory(grown)) == 140
    assert not is_due(pages, grown, 0.0011, limit=150)
    # It may have been the others' as well.
    assert is_due(pages, grown, 0.011, limit=150)


def test_what_a_process_has_given_up_stays_the_others_own_when_it_grows_again() -> None:
    pages = known(PAIR)
    pages.at_most(TreeMemory({1: 100, 2: 20}))
    assert pages.at_most(TreeMemory({1: 100, 2: 150})) == 230


def test_what_a_process_gives_up_while_others_are_measured_counts() -> None:
    pages = SharedPages()
    # The first was read while they shared 100, the second after it had given these up.
    shares = {1: share(0, 100, 2), 2: share(50)}
    pages.update(shares, faulted=0, cost=0.001, now=0.0, before={1: 100, 2: 150})
    held = TreeMemory({1: 100, 2: 50})
    assert (pages.memory(held), pages.at_most(held)) == (100, 150)


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
def test_memory_that_may_count_twice(moved: int, ended: list[int], expected: int) -> None:
    # The first two were read while they alone held it, the last one after it had mapped it too.
    halves = [ProcessMemory(110, 60, shareable=100, shareable_part=50) for _ in range(2)]
    third = ProcessMemory(110, 43, shareable=100, shareable_part=33)
    assert find_doubt({1: halves[0], 2: halves[1], 3: third}, moved, ended) == expected


def test_memory_that_may_count_twice_is_excluded_until_it_is_measured_again() -> None:
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
