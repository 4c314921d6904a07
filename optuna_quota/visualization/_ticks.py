"""Ends and ticks of axes."""

from __future__ import annotations

from collections.abc import Iterable
import math
import sys


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers from ``low`` to ``high`` for a log axis: 1, 2, 5 or powers of ten."""
    low, high = _finite(low), _finite(high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps: tuple[float, ...] = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [float(f"{m}e{d}") for d in decades for m in steps]
    kept = [t for t in ticks if low * 0.999 <= t <= high * 1.001 and math.isfinite(t)]
    if len(kept) >= 2:
        return kept
    return [float(f"{t:.3g}") for t in linear_ticks(low, high, 4) if t > 0] or [low]


def ends(
    values: Iterable[float], *, log: bool = False, levels: Iterable[float] = (), reach: float = 3.0
) -> tuple[float, float]:
    """Return the ends of a value axis.

    Linear axes start at zero. A level is within the ends unless it is more than ``reach`` times
    the largest value: a limit of 64 GiB must not press trials of 300 MiB into a flat line.

    Args:
        values: What stands in the panel.
        log: Whether the axis is logarithmic.
        levels: Horizontal lines.
        reach: How far above the values a level may stand.
    """
    found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    top = max(found, default=0.0)
    near = [v for v in levels if not found or v <= reach * top or top == 0]
    high = max([top, *near])
    if log and found:
        low = min([*found, *(v for v in near if v > 0)])
        return _finite(low / 1.25), _finite(high * 1.35)
    lowest = min([0.0, *found])
    return lowest, _finite(high * 1.1) if high > 0 else 1.0


def _finite(end: float) -> float:
    """Return an end of an axis where it can be drawn: neither infinite nor next to nothing."""
    return min(max(end, sys.float_info.min), sys.float_info.max)
