"""Memory that PyTorch's CUDA allocator and glibc's malloc take from the system during a training.

Both keep freed blocks for later allocations, so they hold more than the training does. Each is
simulated over the blocks that the first training steps allocate and free.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


_KIB, _MIB = 2**10, 2**20


@dataclass(frozen=True)
class TrainingBlocks:
    """The blocks of memory that a training allocates and frees.

    Args:
        made: Blocks allocated as the model is created, as serial numbers and sizes in bytes; size
            0 frees the block.
        trained: Sizes of the parameters that the optimizer updates.
        state: Bytes of optimizer state of all parameters, a multiple of the sum of their sizes.
        temporary: Bytes that the optimizer needs during an update, a multiple of what it updates
            at a time.
        step: Blocks allocated and freed in a step, as in ``made``, with other serial numbers.
    """

    made: Sequence[tuple[int, int]]
    trained: Sequence[int]
    state: float
    temporary: float
    step: Sequence[tuple[int, int]]


class Allocator:
    """Simulates an allocator.

    Attributes:
        peak: Most bytes held from the system so far.
    """

    def __init__(self) -> None:
        self.peak = 0

    def allocate(self, block: Hashable, size: int) -> None:
        """Allocate a block of ``size`` bytes."""
        raise NotImplementedError

    def free(self, block: Hashable) -> None:
        """Free a block; an unknown one is ignored."""
        raise NotImplementedError

    def replay(self, calls: Iterable[tuple[Hashable, int]]) -> None:
        """Allocate blocks of the given sizes, and free those of size 0."""
        for block, size in calls:
            if size:
                self.allocate(block, size)
            else:
                self.free(block)

    def train(self, blocks: TrainingBlocks, *, steps: int, at_once: bool) -> int:
        """Return the peak after some training steps.

        With ``at_once`` the optimizer updates all parameters together, otherwise one by one.
        """
        trained = blocks.trained
        updated = sum(trained) if at_once else max(trained, default=1)
        states = round(blocks.state / max(1, sum(trained)))
        temporaries = round(blocks.temporary / max(1, updated))
        every = range(len(trained))
        groups: list[Sequence[int]] = [every] if at_once else [[index] for index in every]
        self.replay(blocks.made)
        for step in range(steps):
            self.replay(blocks.step)
            for group in groups:
                for index in group:
                    for each in range(states if step == 0 else 0):
                        self.allocate(("state", index, each), trained[index])
                taken = [(each, index) for each in range(temporaries) for index in group]
                for block in taken:
                    self.allocate(("temporary", *block), trained[block[1]])
                for block in taken:
                    self.free(("temporary", *block))
            # Gradients are freed before the next step, which allocates new blocks.
            for serial, _ in blocks.step:
                self.free(serial)
        return self.peak


class _Holes:
    """Free blocks, found by size and by their neighbours."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}  # by start
        self._starts: dict[int, int] = {}  # by end
        self._by_size: list[tuple[int, int]] = []  # sizes and starts, in order

    def add(self, start: int, size: int) -> None:
        self.sizes[start] = size
        self._starts[start + size] = start
        insort(self._by_size, (size, start))

    def remove(self, start: int) -> int:
        """Remove a hole and return its size."""
        size = self.sizes.pop(start)
        del self._starts[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        return size

    def take(self, size: int) -> tuple[int, int] | None:
        """Remove the smallest hole of at least ``size``; return its start and size."""
        index = bisect_left(self._by_size, (size, 0))
        if index == len(self._by_size):
            return None
        start = self._by_size[index][1]
        return start, self.remove(start)

    def join(self, start: int, size: int) -> tuple[int, int]:
        """Remove the neighbours of a free block; return start and size of them all."""
        if start + size in self.sizes:
            size += self.remove(start + size)
        if start in self._starts:
            before = self._starts[start]
            start, size = before, size + self.remove(before)
        return start, size


# PyTorch on a GPU; see c10/cuda/CUDACachingAllocator.cpp.
_CUDA_STEPS = 3
_CUDA_SMALLEST = 512
_CUDA_SMALL = _MIB  # larger blocks have a pool of their own
_SMALL_SEGMENT, _LARGE_SEGMENT = 2 * _MIB, 20 * _MIB
_CUDA_LARGE = 10 * _MIB  # from here on each block has a segment of its own size
_SEGMENT_UNIT = 2 * _MIB
# The workspaces of cuBLAS, one for the forward and one for the backward pass: on GPUs of 2022 and
# later, on earlier ones a quarter.
_WORKSPACE = 32 * _MIB


def cuda_peak(blocks: TrainingBlocks, *, multiplies: bool) -> int:
    """Return the peak of memory reserved by PyTorch's CUDA allocator in a training, in bytes.

    ``multiplies`` is whether it multiplies matrices, for which cuBLAS needs workspaces.
    """
    cache = CudaCache()
    for workspace in ("forward", "backward") if multiplies else ():
        cache.allocate(workspace, _WORKSPACE)
    return cache.train(blocks, steps=_CUDA_STEPS, at_once=True)


class CudaCache(Allocator):
    """Simulates the segments of PyTorch's CUDA allocator: it returns none to the driver."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[Hashable, tuple[int, int, _Holes]] = {}  # start, size, pool
        self._small, self._large = _Holes(), _Holes()

    def allocate(self, block: Hashable, size: int) -> None:
        """Allocate a block: in the smallest hole with room, or in a new segment."""
        size = -(-size // _CUDA_SMALLEST) * _CUDA_SMALLEST
        is_small = size <= _CUDA_SMALL
        pool = self._small if is_small else self._large
        hole = pool.take(size)
        if hole is None:
            hole = 2 * self.peak, _segment_size(size)  # segments don't touch
            self.peak += hole[1]
        start, room = hole
        rest = room - size
        # A rest that is too small for its pool stays with the block.
        if rest >= _CUDA_SMALLEST if is_small else rest > _CUDA_SMALL:
            pool.add(start + size, rest)
            room = size
        self._blocks[block] = start, room, pool

    def free(self, block: Hashable) -> None:
        """Free a block; an unknown one is ignored."""
        if block in self._blocks:
            start, size, pool = self._blocks.pop(block)
            pool.add(*pool.join(start, size))


def _segment_size(size: int) -> int:
    if size <= _CUDA_SMALL:
        return _SMALL_SEGMENT
    return _LARGE_SEGMENT if size < _CUDA_LARGE else -(-size // _SEGMENT_UNIT) * _SEGMENT_UNIT


# glibc. The heap hardly grows after this many steps.
_GLIBC_STEPS = 4
_PAGE = 4 * _KIB
# Smaller blocks come from the thread's cache.
_GLIBC_SMALLEST = _KIB
# What an aligned block needs beyond its size: the alignment, and the smallest chunk.
_ALIGNMENT = 96
# How many blocks are freed before the neighbours of one are free as well: with 8, peaks of
# transformers come out 13% too low, with 16, those of U-Nets 22% too high.
_DELAY = 12
# M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at the start, the former's DEFAULT_MMAP_THRESHOLD_MAX;
# M_TOP_PAD.
_THRESHOLD = 128 * _KIB
_MAX_THRESHOLD = 32 * _MIB
_PAD = 128 * _KIB


def glibc_peak(blocks: TrainingBlocks) -> int:
    """Return the peak of memory that glibc's malloc holds in a training on a CPU, in bytes."""
    return GlibcHeap().train(blocks, steps=_GLIBC_STEPS, at_once=False)


class GlibcHeap(Allocator):
    """Simulates glibc's heap and the blocks outside it.

    PyTorch allocates blocks aligned to 64 bytes. glibc cuts them out of larger ones, and the few
    dozen bytes that it cuts off soon hold a small object. So a freed block is too short for the
    next one of its size, and joins its neighbours only once the small objects between them are
    freed, of which the thread's cache keeps several of each size. Until then the heap grows. Seen
    in glibc 2.36 by recording each ``malloc`` and ``free`` of real steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mapped = 0  # bytes of blocks outside the heap
        self._top = self._end = 0  # of the blocks; of the heap
        self._blocks: dict[Hashable, tuple[int | None, int]] = {}  # start and size
        self._holes = _Holes()
        self._unjoined: deque[int] = deque()
        self._threshold = self._trim_threshold = _THRESHOLD

    def allocate(self, block: Hashable, size: int) -> None:
        """Allocate a block: in the smallest hole with room, at the top, or outside the heap."""
        if size < _GLIBC_SMALLEST:
            return
        needed = size + _ALIGNMENT
        hole = self._holes.take(needed)
        start: int | None
        if hole is not None:
            start, room = hole
            self._holes.add(start + size, room - size)
        elif self._end - self._top < needed >= self._threshold:
            # In whole pages: its size becomes the threshold, so the next one is on the heap.
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
        """Free a block; an unknown one is ignored."""
        start, size = self._blocks.pop(block, (None, 0))
        if start is not None:
            self._holes.add(start, size)
            self._unjoined.append(start)
            if len(self._unjoined) > _DELAY:
                self._join(self._unjoined.popleft())
            return
        self._mapped -= size
        if self._threshold < size <= _MAX_THRESHOLD:
            self._threshold, self._trim_threshold = size, 2 * size

    def _join(self, start: int) -> None:
        """Join a hole with its neighbours and with the top, which may go back to the system."""
        if start not in self._holes.sizes:
            return  # allocated again, or part of another hole
        start, size = self._holes.join(start, self._holes.remove(start))
        if start + size < self._top:
            self._holes.add(start, size)
            return
        self._top = start
        if self._end - start >= self._trim_threshold:
            self._end = start + _PAD
