"""Simulated allocators: PyTorch's on a GPU, and glibc's."""

from __future__ import annotations

from hypothesis import given, strategies

from optuna_quota._footprint.allocators import cuda_peak, CudaCache, GlibcHeap, TrainingBlocks


MIB = 2**20


def test_small_blocks_share_segments_of_2_mib() -> None:
    cache = CudaCache()
    for block in range(4):
        cache.allocate(block, MIB // 2)
    assert cache.peak == 2 * MIB
    cache.allocate("one more", 1)
    assert cache.peak == 4 * MIB


def test_medium_blocks_share_segments_of_20_mib_and_large_ones_have_their_own() -> None:
    cache = CudaCache()
    for block in range(4):
        cache.allocate(block, 5 * MIB)
    assert cache.peak == 20 * MIB
    cache.allocate("large", 10 * MIB + 1)
    assert cache.peak == 32 * MIB


def test_freed_blocks_are_reused_and_join_their_neighbours() -> None:
    cache = CudaCache()
    cache.replay([("a", 30 * MIB), ("a", 0), ("b", 12 * MIB), ("c", 12 * MIB), ("d", 6 * MIB)])
    assert cache.peak == 30 * MIB
    cache.replay([("b", 0), ("d", 0), ("c", 0), ("e", 30 * MIB)])
    assert cache.peak == 30 * MIB


def test_the_rest_of_a_hole_up_to_1_mib_stays_with_the_block() -> None:
    cache = CudaCache()
    cache.replay([("a", 20 * MIB), ("a", 0), ("b", 19 * MIB), ("c", 2 * MIB)])
    assert cache.peak == 40 * MIB


def test_segments_are_not_joined() -> None:
    cache = CudaCache()
    cache.replay([("a", 20 * MIB), ("b", 20 * MIB), ("a", 0), ("b", 0), ("c", 40 * MIB)])
    assert cache.peak == 80 * MIB


@given(strategies.lists(strategies.tuples(strategies.integers(0, 9), strategies.integers(0, 40))))
def test_the_cache_holds_at_least_what_is_allocated(calls: list[tuple[int, int]]) -> None:
    cache, taken = CudaCache(), dict[int, int]()
    for block, size in calls:
        if size and block not in taken:
            cache.allocate(block, size * MIB // 3)
            taken[block] = size * MIB // 3
        else:
            cache.free(block)
            taken.pop(block, None)
        assert cache.peak >= sum(taken.values())
    for block in taken:
        cache.free(block)
    # All segments are free again.
    free = [*cache._small.sizes.values(), *cache._large.sizes.values()]
    assert sum(free) == cache.peak


def test_the_peak_of_a_step_includes_its_optimizer_and_workspaces() -> None:
    # A parameter of 10 MiB, its gradient, two states, and one temporary of all parameters.
    made, calls = [(0, 10 * MIB)], [(1, 10 * MIB)]
    blocks = TrainingBlocks(made, [10 * MIB], 20.0 * MIB, 10.0 * MIB, calls)
    peak = cuda_peak(blocks, multiplies=False)
    assert peak == 50 * MIB
    assert cuda_peak(blocks, multiplies=True) == peak + 64 * MIB


def warmed_heap() -> GlibcHeap:
    """Return a heap from which blocks of up to 32 MiB are taken, as after a first one is freed."""
    heap = GlibcHeap()
    heap.allocate("first", 31 * MIB)
    heap.free("first")
    return heap


def test_large_blocks_are_returned_and_others_kept() -> None:
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


def test_a_freed_block_fits_no_other_of_its_size_before_it_joins_its_neighbours() -> None:
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


def test_blocks_of_one_size_are_on_the_heap_once_the_first_is_freed() -> None:
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


def test_a_training_needs_more_in_its_later_steps() -> None:
    calls = [(0, 4 * MIB), (1, 4 * MIB), (0, 0), (2, 4 * MIB), (3, 2 * MIB)]
    made = [(10, 4 * MIB), (11, 4 * MIB)]
    blocks = TrainingBlocks(made, [4 * MIB, 4 * MIB], 16.0 * MIB, 4.0 * MIB, calls)
    peaks = [GlibcHeap().train(blocks, steps=n, at_once=False) for n in (1, 4)]
    live = 8 + 16 + 4 + 4 + 2 + 4  # parameters, state, what is left of a step, and in between
    assert live * MIB < peaks[0] < peaks[1] < 3 * live * MIB
