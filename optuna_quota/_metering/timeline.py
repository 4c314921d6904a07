"""A trial's memory over time in a few points, thinned while it runs."""

from __future__ import annotations


MOST_POINTS = 60


class Timeline:
    """Keeps at most 60 points whatever the number of samples, and every bucket's maximum.

    Time is cut into buckets of equal width, each represented by its highest sample. When there
    are too many, neighbours are merged and the width doubles: a peak is never thinned away.

    Args:
        most: The most points to keep; even.
        width: Seconds of the first buckets.
    """

    __slots__ = ("_most", "_points", "_width")

    def __init__(self, most: int = MOST_POINTS, width: float = 0.05) -> None:
        self._most = most
        self._width = width
        self._points: dict[int, tuple[float, float]] = {}

    def add(self, seconds: float, value: float) -> None:
        """Add a sample, in seconds since the start."""
        bucket = int(seconds / self._width)
        known = self._points.get(bucket)
        if known is None or value > known[1]:
            self._points[bucket] = (seconds, value)
        while len(self._points) > self._most:
            self._widen()

    def _widen(self) -> None:
        self._width *= 2
        points, self._points = self._points, {}
        for seconds, value in points.values():
            self.add(seconds, value)

    def points(self) -> tuple[tuple[float, float], ...]:
        """Return pairs of seconds and value, in order."""
        return tuple(sorted(self._points.values()))
