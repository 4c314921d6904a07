"""The clock time in which trials ran, without the longer pauses between them (pure)."""

from __future__ import annotations

from bisect import bisect_left
from bisect import bisect_right
from collections.abc import Hashable
from collections.abc import Iterable


Interval = tuple[float, float]

# Seconds: where a worker runs no trial for longer than this, its clock stands still. What it does
# between trials, such as to draw a point, takes less and counts.
LONGEST_GAP = 10.0


class Spans:
    """A union of intervals that grows; an interval costs the logarithm of what is there.

    Args:
        intervals: The first ones.
        gap: Intervals no further apart than this are one, with what is between them.
    """

    def __init__(self, intervals: Iterable[Interval] = (), gap: float = 0.0) -> None:
        self._gap = gap
        self._starts: list[float] = []
        self._ends: list[float] = []
        self.total = 0.0
        for start, end in intervals:
            self.add(start, end)

    def add(self, start: float, end: float) -> None:
        """Add an interval; one that ends before it starts is empty."""
        if end <= start:
            return
        first, last = self._touched(start, end)
        start, end = self._joined(start, end, first, last)
        self.total += end - start - self._length(first, last)
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def joined(self, start: float, end: float) -> Interval:
        """Return an interval with those that it would become one with, without adding it."""
        return self._joined(start, end, *self._touched(start, end))

    def _joined(self, start: float, end: float, first: int, last: int) -> Interval:
        if first >= last:
            return start, end
        return min(start, self._starts[first]), max(end, self._ends[last - 1])

    def with_added(self, intervals: Iterable[Interval]) -> float:
        """Return what the total would be with more intervals."""
        more = Spans(intervals)
        shared = sum(
            self._overlap(start, end) for start, end in zip(more._starts, more._ends, strict=True)
        )
        return self.total + more.total - shared

    def _touched(self, start: float, end: float) -> tuple[int, int]:
        gap = self._gap
        return bisect_left(self._ends, start - gap), bisect_right(self._starts, end + gap)

    def _length(self, first: int, last: int) -> float:
        pairs = zip(self._starts[first:last], self._ends[first:last], strict=True)
        return sum(end - start for start, end in pairs)

    def _overlap(self, start: float, end: float) -> float:
        first, last = self._touched(start, end)
        pairs = zip(self._starts[first:last], self._ends[first:last], strict=True)
        return sum(max(0.0, min(end, e) - max(start, s)) for s, e in pairs)


class WorkerSpans:
    """The clock time of all workers: each from trial to trial, those at once counted once."""

    def __init__(self) -> None:
        self._own: dict[Hashable, Spans] = {}
        self._all = Spans()

    def add(self, worker: Hashable, start: float, end: float) -> None:
        """Add a trial of a worker."""
        own = self._own.setdefault(worker, Spans(gap=LONGEST_GAP))
        own.add(start, end)
        if end > start:
            self._all.add(*own.joined(start, end))

    @property
    def total(self) -> float:
        """The clock time of all trials that were added."""
        return self._all.total

    def with_running(self, running: Iterable[tuple[Hashable, float, float]]) -> float:
        """Return the total with what workers do now, from a start until the given time."""
        joined = []
        for worker, start, now in running:
            own = self._own.get(worker)
            joined.append((start, now) if own is None else own.joined(start, now))
        return self._all.with_added(joined)
