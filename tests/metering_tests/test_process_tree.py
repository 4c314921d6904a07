"""CPU time of process trees whose members come and go."""

from __future__ import annotations

import pytest

from optuna_quota._metering.process_tree import CpuTimes, TreeCpuTime


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
