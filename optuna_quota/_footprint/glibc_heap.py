"""What glibc's heap takes for blocks that come and go.

A training step holds less than the heap that it leaves. Torch asks for blocks that are aligned to
64 bytes; glibc cuts them out of larger ones, and what it cuts off, some dozens of bytes, is soon
taken by a small object. So a freed block is too short for the next one of its size, and joins its
neighbours only once the small objects between them are gone, of which the thread's cache keeps
several of each size. Until then the heap grows. Seen in glibc 2.36 by recording every
call of ``malloc`` and ``free`` of real steps.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Hashable, Iterable, Sequence


# A training loop is followed for so many steps; what the heap takes grows little after them.
_HEAP_STEPS = 4
_KIB = 1024
_PAGE = 4 * _KIB
# The thread's cache takes smaller blocks.
_SMALLEST = _KIB
# What an aligned block needs more than its size: the alignment, and the smallest chunk.
_ALIGNMENT = 96
# Blocks that are freed before the ends of one are free as well: with 8, peaks of graph networks
# come out 15% too low, with 24, those of residual networks 13% too high.
_DELAY = 16
# M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at the start, the former's DEFAULT_MMAP_THRESHOLD_MAX;
# M_TOP_PAD.
_THRESHOLD = 128 * _KIB
_MAX_THRESHOLD = 32 * _KIB**2
_PAD = 128 * _KIB


def heap_peak(
    made: Sequence[tuple[int, int]],
    trained: Sequence[int],
    state: float,
    temporary: float,
    calls: Sequence[tuple[int, int]],
) -> int:
    """Return the most that glibc has from the system over some steps, in bytes.

    Args:
        made: Blocks taken as the model is made, as serial numbers and sizes, and freed, with
            size 0.
        trained: Sizes of the parameters that the optimizer updates, one after the other.
        state: What it keeps of all, in bytes, a multiple of their sum.
        temporary: What it needs in between, in bytes, a multiple of the largest.
        calls: Blocks taken and freed in a step, likewise; no serial number is one of ``made``.
    """
    heap = GlibcHeap()
    states = round(state / max(1, sum(trained)))
    temporaries = round(temporary / max([1, *trained]))
    heap.replay(made)
    for step in range(_HEAP_STEPS):
        heap.replay(calls)
        for index, size in enumerate(trained):
            for each in range(states if step == 0 else 0):
                heap.allocate(("state", index, each), size)
            for each in range(temporaries):
                heap.allocate(("temporary", each), size)
            for each in range(temporaries):
                heap.free(("temporary", each))
        # Gradients are freed before the next step; of others that are left, the next step's are.
        for serial, _ in calls:
            heap.free(serial)
    return heap.peak


class GlibcHeap:
    """Follows the memory that glibc has from the system: its heap and the blocks outside it.

    Attributes:
        peak: The most so far, in bytes.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._mapped = 0  # bytes of blocks outside the heap
        self._top = self._end = 0  # of the blocks; of the heap
        self._blocks: dict[Hashable, tuple[int | None, int]] = {}  # start and size
        self._holes: dict[int, int] = {}  # sizes by start
        self._starts: dict[int, int] = {}  # of the holes, by end
        self._by_size: list[tuple[int, int]] = []
        self._unjoined: deque[int] = deque()
        self._threshold = self._trim_threshold = _THRESHOLD

    def replay(self, calls: Iterable[tuple[Hashable, int]]) -> None:
        """Take blocks of the given sizes, and give back those of size 0."""
        for block, size in calls:
            if size:
                self.allocate(block, size)
            else:
                self.free(block)

    def allocate(self, block: Hashable, size: int) -> None:
        """Take a block: from the smallest hole that has room, the top, or the system."""
        if size < _SMALLEST:
            return
        needed = size + _ALIGNMENT
        index = bisect_left(self._by_size, (needed, 0))
        start: int | None
        if index < len(self._by_size):
            room, start = self._by_size[index]
            self._remove_hole(start)
            self._add_hole(start + size, room - size)
        elif self._end - self._top < needed >= self._threshold:
            # In whole pages: by its size as the new threshold, the next alike is of the heap.
            start, size = None, -(-(needed + 1) // _PAGE) * _PAGE
            self._mapped += size
        else:
            start = self._top
            if self._end - start < needed:
                self._end = start + needed + _PAD
            self._top += size
        self._blocks[block] = start, size
        self.peak = max(self.peak, self._end + self._mapped)

    def free(self, block: Hashable) -> None:
        """Give a block back; one that was not taken, or is not known, is none."""
        start, size = self._blocks.pop(block, (None, 0))
        if start is not None:
            self._add_hole(start, size)
            self._unjoined.append(start)
            if len(self._unjoined) > _DELAY:
                self._join(self._unjoined.popleft())
            return
        self._mapped -= size
        if self._threshold < size <= _MAX_THRESHOLD:
            self._threshold, self._trim_threshold = size, 2 * size

    def _join(self, start: int) -> None:
        """Join a hole with its neighbours, and with the top, which may go back to the system."""
        if start not in self._holes:
            return  # it is taken again, or part of another
        end = start + self._remove_hole(start)
        if start in self._starts:
            start = self._starts[start]
            self._remove_hole(start)
        if end in self._holes:
            end += self._remove_hole(end)
        if end < self._top:
            self._add_hole(start, end - start)
            return
        self._top = start
        if self._end - start >= self._trim_threshold:
            self._end = start + _PAD

    def _add_hole(self, start: int, size: int) -> None:
        self._holes[start] = size
        self._starts[start + size] = start
        insort(self._by_size, (size, start))

    def _remove_hole(self, start: int) -> int:
        size = self._holes.pop(start)
        del self._starts[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        return size
