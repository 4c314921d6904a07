"""Charts as plain values: what is drawn, apart from who draws it.

A chart holds numbers that are already in the units of its axes. :mod:`._draw` makes a plotly
figure of it, :mod:`._svg` a picture that needs neither plotly nor a browser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        title: What it shows, with its unit.
        log: Whether it is logarithmic.
        categories: The categories it holds in their order; empty for numbers.
        low: Its lower end, None to take it from the data.
        high: Its upper end, None to take it from the data.
    """

    title: str
    log: bool = False
    categories: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Points:
    """Marks, one for each trial, told apart by colour and by symbol."""

    name: str
    color: str
    symbol: str
    x: Sequence[float | str]
    y: Sequence[float]
    hover: Sequence[str] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Line:
    """A line, straight between its points or in steps."""

    name: str
    color: str
    x: Sequence[float | str]
    y: Sequence[float]
    dash: str = "solid"
    step: bool = False
    legend: bool = True


@dataclass(frozen=True)
class Band:
    """The area between a lower and an upper bound."""

    name: str
    color: str
    x: Sequence[float | str]
    low: Sequence[float]
    high: Sequence[float]
    legend: bool = True


@dataclass(frozen=True)
class Level:
    """A horizontal line across the panel, such as a limit."""

    label: str
    color: str
    y: float


Mark = Points | Line | Band


@dataclass(frozen=True)
class Panel:
    """One pair of axes and what stands in it."""

    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    levels: tuple[Level, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A picture: panels side by side under a title.

    Attributes:
        title: What it shows, in a few words.
        subtitle: The finding, or how to read it, in one line.
        panels: Its panels; without any, the subtitle says why.
    """

    title: str
    subtitle: str = ""
    panels: tuple[Panel, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.panels)


def thinned(chart: Chart, most: int) -> Chart:
    """Return the chart with at most ``most`` marks for the trials, spread evenly, no hover text.

    Args:
        chart: Any chart.
        most: Marks over all series of a panel.
    """
    panels = tuple(
        replace(panel, marks=_thinned_marks(panel.marks, most)) for panel in chart.panels
    )
    total = max((_count(p.marks) for p in chart.panels), default=0)
    shown = max((_count(p.marks) for p in panels), default=0)
    note = f" ({shown:,} of {total:,} marks shown)" if shown < total else ""
    return replace(chart, panels=panels, subtitle=chart.subtitle + note)


def _thinned_marks(marks: tuple[Mark, ...], most: int) -> tuple[Mark, ...]:
    # Each series keeps an even share of itself, so that a rare outcome stays to be seen.
    points = [m for m in marks if isinstance(m, Points)]
    share = min(1.0, most / max(1, _count(marks)))
    floor = max(1, most // max(1, 4 * len(points)))
    return tuple(
        _every(m, max(floor, int(len(m.x) * share))) if isinstance(m, Points) else m for m in marks
    )


def _count(marks: tuple[Mark, ...]) -> int:
    return sum(len(m.x) for m in marks if isinstance(m, Points))


def _every(points: Points, keep: int) -> Points:
    n = len(points.x)
    chosen = (
        range(n) if n <= keep else [round(i * (n - 1) / max(1, keep - 1)) for i in range(keep)]
    )
    return replace(
        points,
        x=[points.x[i] for i in chosen],
        y=[points.y[i] for i in chosen],
        low=[points.low[i] for i in chosen] if points.low else (),
        high=[points.high[i] for i in chosen] if points.high else (),
        hover=(),
    )
