"""Colours, symbols and units of all pictures.

The colours are those of Okabe and Ito, "Color Universal Design" (2008), which people with any of
the common kinds of colour blindness tell apart; each outcome has a symbol of its own as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
import math
from typing import NamedTuple

from optuna_quota._resources import get_resource
from optuna_quota._resources import OUTCOMES


BLUE = "#0072B2"
SKY = "#56B4E9"
GREEN = "#009E73"
ORANGE = "#E69F00"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#4D4D4D"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)

INK = "#1F2933"
QUIET = "#5F6B76"
GRID = "#E4E7EB"
FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, sans-serif"

OUTCOME_COLORS: Mapping[str, str] = {
    "completed": BLUE,
    "pruned": SKY,
    "terminated": VERMILION,
    "rejected": ORANGE,
    "failed": GREY,
}
# Symbols as plotly names them; a terminated trial points up, since its usage is a lower bound.
OUTCOME_SYMBOLS: Mapping[str, str] = {
    "completed": "circle",
    "pruned": "square",
    "terminated": "triangle-up",
    "rejected": "diamond-open",
    "failed": "x",
}
assert set(OUTCOME_COLORS) == set(OUTCOMES) == set(OUTCOME_SYMBOLS)


class Unit(NamedTuple):
    """A unit that a person reads: SI base units divided by ``size``."""

    symbol: str
    size: float

    def of(self, value: float) -> float:
        """Return an amount in this unit, to six significant digits."""
        return significant(value / self.size)

    def axis(self, title: str) -> str:
        """Return the title of an axis, with the unit."""
        return f"{title} ({self.symbol})" if self.symbol else title


_BYTES = (Unit("MiB", 2**20), Unit("GiB", 2**30), Unit("TiB", 2**40), Unit("PiB", 2**50))
_SECONDS = (Unit("ms", 1e-3), Unit("s", 1), Unit("min", 60), Unit("h", 3600), Unit("d", 86400))
_JOULES = (Unit("J", 1), Unit("Wh", 3600), Unit("kWh", 3.6e6), Unit("MWh", 3.6e9))
_PLAIN = (Unit("", 1),)
_FAMILIES: Mapping[str, tuple[Unit, ...]] = {
    "memory": _BYTES,
    "gpu_memory": _BYTES,
    "wall_time": _SECONDS,
    "trial_time": _SECONDS,
    "cpu_time": _SECONDS,
    "gpu_time": _SECONDS,
    "energy": _JOULES,
}


def unit_for(resource: str, amounts: Iterable[float]) -> Unit:
    """Return the largest unit in which the largest amount is at least 1.5.

    Args:
        resource: Name of the resource.
        amounts: Amounts in SI base units; what is not finite is left out.
    """
    top = max((a for a in amounts if math.isfinite(a)), default=0.0)
    family = _FAMILIES.get(resource, _PLAIN)
    fitting = [unit for unit in family if top >= 1.5 * unit.size]
    return fitting[-1] if fitting else family[0]


def title_of(resource: str) -> str:
    """Return a resource's name for an axis or a heading, with a capital."""
    title = get_resource(resource).title
    return title[:1].upper() + title[1:]


def significant(value: float, digits: int = 6) -> float:
    """Return a number rounded to significant digits: pictures need no more, files get smaller."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value


def spreads(amounts: Iterable[float], times: float = 50.0) -> bool:
    """Return whether amounts are all positive and so far apart that a log axis reads better."""
    found = [a for a in amounts if math.isfinite(a)]
    return len(found) > 1 and min(found) > 0 and max(found) > times * min(found)
