"""What glibc's heap takes for blocks that come and go."""

from __future__ import annotations

import pytest

from optuna_quota._footprint import glibc_heap
from optuna_quota._footprint.glibc_heap import GlibcHeap


MIB = 2**20


def warmed_heap() -> GlibcHeap:
    """Return a heap from which blocks of up to 32 MiB are taken, as after a first one is freed."""
    heap = GlibcHeap()
    heap.allocate("first", 31 * MIB)
    heap.free("first")
    return heap


def test_large_blocks_go_back_and_others_are_kept() -> None:
    heap = warmed_heap()
    for _ in range(3):
        heap.allocate("large", 100 * MIB)
        heap.free("large")
    assert 100 * MIB < heap.peak < 101 * MIB
    for each in range(40):
        heap.allocate(each, 10 * MIB)
    for each in range(39):
        heap.free(each)
    heap.allocate("large", 500 * MIB)
    assert 900 * MIB < heap.peak < 901 * MIB


def test_a_block_that_was_freed_fits_no_other_of_its_size_before_it_joins_its_neighbours() -> None:
    heap = warmed_heap()
    for each in range(40):
        heap.allocate(each, 10 * MIB)
    heap.free(0)
    heap.allocate("same", 10 * MIB)
    assert 410 * MIB < heap.peak < 411 * MIB
    heap.free(1)
    heap.allocate("less", 9 * MIB)
    assert heap.peak < 411 * MIB
    for each in range(2, 30):
        heap.free(each)
    for each in range(100, 105):
        heap.allocate(each, 10 * MIB)
    assert heap.peak < 411 * MIB


def test_blocks_of_one_size_are_taken_from_the_heap_once_the_first_is_freed() -> None:
    heap = GlibcHeap()
    heap.allocate("first", 20 * MIB)
    heap.allocate("kept", 20 * MIB)
    heap.free("first")
    heap.allocate("second", 20 * MIB)
    heap.allocate("third", MIB)
    heap.free("second")
    heap.allocate("other", 30 * MIB)
    # The second one's place in the heap stays; only the first one's went back.
    assert 71 * MIB < heap.peak < 72 * MIB


def test_a_training_takes_more_in_its_later_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [(0, 4 * MIB), (1, 4 * MIB), (0, 0), (2, 4 * MIB), (3, 2 * MIB)]
    trained, state, temporary = [4 * MIB, 4 * MIB], 16 * MIB, 4 * MIB
    made = [("weight", 4 * MIB), ("bias", 4 * MIB)]
    peaks = []
    for steps in (1, 4):
        monkeypatch.setattr(glibc_heap, "_HEAP_STEPS", steps)
        peaks.append(glibc_heap.heap_peak(made, trained, state, temporary, calls))
    live = 8 + 16 + 4 + 4 + 2 + 4  # parameters, state, what is left of a step, and in between
    assert live * MIB < peaks[0] < peaks[1] < 3 * live * MIB
