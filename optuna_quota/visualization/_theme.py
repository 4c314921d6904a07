"""Colours, symbols, units and axis ranges of all plots.

The colours are those of Okabe and Ito, "Color Universal Design" (2008), which people with the
common kinds of colour blindness can tell apart. Each outcome has a symbol of its own as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import math
import sys
from typing import NamedTuple

from optuna_quota._resources import get_resource


BLUE = "#0072B2"
SKY = "#56B4E9"
GREEN = "#009E73"
ORANGE = "#E69F00"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#4D4D4D"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)

TEXT = "#1F2933"
MUTED = "#5F6B76"
GRID = "#E4E7EB"
FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, sans-serif"


class OutcomeStyle(NamedTuple):
    """Colour and plotly symbol of an outcome."""

    color: str
    symbol: str


OUTCOMES: Mapping[str, OutcomeStyle] = {
    "completed": OutcomeStyle(BLUE, "circle"),
    "pruned": OutcomeStyle(SKY, "square"),
    # Pointing up, since usage of a terminated trial is a lower bound.
    "terminated": OutcomeStyle(VERMILION, "triangle-up"),
    "rejected": OutcomeStyle(ORANGE, "diamond-open"),
    "preempted": OutcomeStyle(PURPLE, "star-triangle-down"),
    "failed": OutcomeStyle(GREY, "x"),
}


class Unit(NamedTuple):
    """A unit for display: ``size`` SI base units."""

    symbol: str
    size: float

    def of(self, value: float) -> float:
        """Return an amount in this unit, to six significant digits."""
        return significant(value / self.size)

    def axis_title(self, title: str) -> str:
        """Return the title of an axis with the unit."""
        return f"{title} ({self.symbol})" if self.symbol else title


_BYTES = (Unit("MiB", 2**20), Unit("GiB", 2**30), Unit("TiB", 2**40), Unit("PiB", 2**50))
_SECONDS = (Unit("ms", 1e-3), Unit("s", 1), Unit("min", 60), Unit("h", 3600), Unit("d", 86400))
_JOULES = (Unit("J", 1), Unit("Wh", 3600), Unit("kWh", 3.6e6), Unit("MWh", 3.6e9))
_UNITS: Mapping[str, tuple[Unit, ...]] = {"B": _BYTES, "s": _SECONDS, "J": _JOULES}


def unit_for(resource: str, amounts: Iterable[float]) -> Unit:
    """Return the largest unit in which the largest amount is at least 1.5.

    Args:
        resource: Name of the resource.
        amounts: Amounts in SI base units; infinite ones are left out.
    """
    top = max((a for a in amounts if math.isfinite(a)), default=0.0)
    units = _UNITS.get(get_resource(resource).unit.symbol, (Unit("", 1),))
    return next((unit for unit in reversed(units) if top >= 1.5 * unit.size), units[0])


def resource_title(resource: str) -> str:
    """Return a resource's name with a capital, for an axis or a heading."""
    title = get_resource(resource).title
    return title[:1].upper() + title[1:]


def significant(value: float, digits: int = 6) -> float:
    """Return a number rounded to significant digits, which keeps files small."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value


def use_log_scale(amounts: Iterable[float], ratio: float = 50.0) -> bool:
    """Return whether all amounts are positive and the largest is ``ratio`` times the least."""
    finite = [a for a in amounts if math.isfinite(a)]
    return len(finite) > 1 and min(finite) > 0 and max(finite) > ratio * min(finite)


def axis_range(
    values: Iterable[float], *, log: bool = False, limit: float | None = None
) -> tuple[float, float]:
    """Return the range of a value axis.

    Linear axes start at zero. A limit is in the range unless it is over three times the largest
    value: a limit of 64 GiB must not flatten trials of 300 MiB.

    Args:
        values: The values shown.
        log: Whether the axis is logarithmic.
        limit: The limit drawn as a horizontal line.
    """
    shown = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    top = max(shown, default=0.0)
    if limit is not None and (limit <= 3 * top or top == 0):
        shown.append(limit)
    if log and top:
        return clamp(min(shown) / 1.25), clamp(max(shown) * 1.35)
    high = max([0.0, *shown])
    return min([0.0, *shown]), clamp(high * 1.1) if high > 0 else 1.0


def padded_range(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """Return the range of an axis that need not start at zero."""
    low, high = min(values), max(values)
    if log:
        pad = max(1.05, (high / low) ** 0.05)
        return low / pad, high * pad
    pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def clamp(end: float) -> float:
    """Return the end of an axis as a positive finite number."""
    return min(max(end, sys.float_info.min), sys.float_info.max)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return ticks of a log axis: the fewer digits of each power of ten, the more powers.

    Plotly labels the minor ticks of a log axis with their first digit alone.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high < 30 * low else (1, 3) if high < 1000 * low else (1,)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
    shown = [t for t in ticks if low * 0.999 <= t <= high * 1.001 and math.isfinite(t)]
    if len(shown) >= 2:
        return shown
    return [float(f"{t:.3g}") for t in linear_ticks(low, high, 4) if t > 0] or [low]
