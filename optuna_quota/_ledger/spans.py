"""The clock time in which at least one trial ran (pure)."""

from __future__ import annotations

from bisect import bisect_left
from bisect import bisect_right
from collections.abc import Iterable


class Spans:
    """A union of intervals that grows; an interval costs the logarithm of what is there."""

    def __init__(self, intervals: Iterable[tuple[float, float]] = ()) -> None:
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
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self.total += end - start - self._length(first, last)
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def with_added(self, intervals: Iterable[tuple[float, float]]) -> float:
        """Return what the total would be with more intervals."""
        more = Spans(intervals)
        shared = sum(
            self._overlap(start, end) for start, end in zip(more._starts, more._ends, strict=True)
        )
        return self.total + more.total - shared

    def _touched(self, start: float, end: float) -> tuple[int, int]:
        return bisect_left(self._ends, start), bisect_right(self._starts, end)

    def _length(self, first: int, last: int) -> float:
        pairs = zip(self._starts[first:last], self._ends[first:last], strict=True)
        return sum(end - start for start, end in pairs)

    def _overlap(self, start: float, end: float) -> float:
        first, last = self._touched(start, end)
        pairs = zip(self._starts[first:last], self._ends[first:last], strict=True)
        return sum(max(0.0, min(end, e) - max(start, s)) for s, e in pairs)
