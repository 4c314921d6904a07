"""Charts as SVG text: pictures that need neither plotly nor a browser to be made.

They are used where a script can't run: as an artifact in optuna-dashboard and in a notebook.
Nothing in them is active, and every text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
import html
import math

from optuna_quota.visualization import _style
from optuna_quota.visualization._chart import Axis
from optuna_quota.visualization._chart import Band
from optuna_quota.visualization._chart import Chart
from optuna_quota.visualization._chart import Level
from optuna_quota.visualization._chart import Line
from optuna_quota.visualization._chart import Mark
from optuna_quota.visualization._chart import Panel
from optuna_quota.visualization._chart import Points
from optuna_quota.visualization._ticks import ends
from optuna_quota.visualization._ticks import linear_ticks
from optuna_quota.visualization._ticks import log_ticks


_TOP = 74
_BOTTOM = 46
_LEFT = 62
_RIGHT = 16
_GAP = 58
_DASHES = {"solid": "", "dash": "6 4", "dot": "2 3"}


def svg_of(chart: Chart, *, width: int = 640, height: int = 340) -> str:
    """Return a chart as the text of an SVG picture.

    Args:
        chart: The chart.
        width: In pixels.
        height: In pixels.
    """
    body = [f'<rect width="{width}" height="{height}" fill="#FFFFFF"/>']
    body.append(_text(16, 22, chart.title, size=14, weight="bold"))
    body.append(_text(16, 40, chart.subtitle, size=11, color=_style.QUIET))
    body += _legend(chart)
    count = max(1, len(chart.panels))
    each = (width - _LEFT - _RIGHT - _GAP * (count - 1)) / count
    for index, panel in enumerate(chart.panels):
        box = _Box(_LEFT + index * (each + _GAP), _TOP, each, height - _TOP - _BOTTOM)
        body += _panel(panel, box)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{_quoted(chart.title)}" '
        f'font-family="{_quoted(_style.FONT)}">' + "".join(body) + "</svg>"
    )


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class _Scale:
    """Maps an axis onto pixels from ``start`` to ``stop``."""

    axis: Axis
    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float | str) -> float | None:
        """Return where a value stands, None where it has no place."""
        if isinstance(value, str):
            if value not in self.axis.categories:
                return None
            position = (self.axis.categories.index(value) + 0.5) / len(self.axis.categories)
        else:
            share = self._share(value)
            if share is None:
                return None
            position = share
        return self.start + position * (self.stop - self.start)

    def _share(self, value: float) -> float | None:
        if not math.isfinite(value) or (self.axis.log and value <= 0):
            return None
        if self.axis.log:
            span = math.log(self.high / self.low)
            return math.log(value / self.low) / span if span else 0.5
        span = self.high - self.low
        return (value - self.low) / span if span else 0.5

    def ticks(self) -> list[tuple[float | str, str]]:
        if self.axis.categories:
            return [(c, c if len(c) <= 14 else c[:13] + "…") for c in self.axis.categories]
        made = log_ticks if self.axis.log else linear_ticks
        return [(t, f"{t:,.6g}") for t in made(self.low, self.high)]


def _panel(panel: Panel, box: _Box) -> Iterator[str]:
    x = _scale(panel.x, _x_values(panel), box.left, box.left + box.width, from_zero=False)
    y = _scale(panel.y, _y_values(panel), box.top + box.height, box.top, from_zero=True)
    yield from _grid(panel, x, y, box)
    # An inner picture clips what leaves the panel; marks at its edge stay whole.
    frame = f"{box.left:.1f} {box.top:.1f} {box.width:.1f} {box.height:.1f}"
    left, top, width, height = frame.split()
    yield (
        f'<svg x="{left}" y="{top}" width="{width}" height="{height}" viewBox="{frame}" '
        'overflow="hidden">'
    )
    for mark in sorted(panel.marks, key=lambda m: isinstance(m, Line)):
        yield from _areas(mark, x, y)
    yield "</svg>"
    for mark in panel.marks:
        if isinstance(mark, Points):
            yield from _symbols(mark, x, y)
    for level in panel.levels:
        yield from _level(level, y, box)


def _scale(
    axis: Axis, values: list[float], start: float, stop: float, *, from_zero: bool
) -> _Scale:
    if axis.categories:
        return _Scale(axis, 0, 1, start, stop)
    found = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)] or [0.0, 1.0]
    low, high = ends(found, log=axis.log)
    if not axis.log and not from_zero:
        pad = (max(found) - min(found)) * 0.04 or 0.5
        low, high = min(found) - pad, max(found) + pad
    low = axis.low if axis.low is not None else low
    high = axis.high if axis.high is not None else high
    return _Scale(axis, low, high, start, stop)


def _x_values(panel: Panel) -> list[float]:
    return [v for mark in panel.marks for v in mark.x if not isinstance(v, str)]


def _y_values(panel: Panel) -> list[float]:
    values: list[float] = []
    for mark in panel.marks:
        if isinstance(mark, Band):
            values += [*mark.low, *mark.high]
        else:
            values += list(mark.y)
            values += [*mark.low, *mark.high] if isinstance(mark, Points) else []
    return values


def _grid(panel: Panel, x: _Scale, y: _Scale, box: _Box) -> Iterator[str]:
    bottom, right = box.top + box.height, box.left + box.width
    for value, label in y.ticks():
        at = y(value)
        if at is not None:
            yield _stroke(box.left, at, right, at, _style.GRID)
            yield _text(box.left - 6, at + 4, label, anchor="end")
    for value, label in x.ticks():
        at = x(value)
        if at is not None:
            yield _stroke(at, bottom, at, bottom + 4, _style.GRID)
            yield _text(at, bottom + 17, label, anchor="middle")
    yield _stroke(box.left, bottom, right, bottom, "#B8C0C8")
    middle = box.left + box.width / 2
    yield _text(middle, bottom + 36, panel.x.title, anchor="middle", color=_style.QUIET)
    centre = box.top + box.height / 2
    yield (
        f'<text transform="translate({box.left - 46:.1f},{centre:.1f}) rotate(-90)" '
        f'text-anchor="middle" font-size="11" fill="{_style.QUIET}">{_safe(panel.y.title)}</text>'
    )


def _areas(mark: Mark, x: _Scale, y: _Scale) -> Iterator[str]:
    if isinstance(mark, Points):
        yield from _bars(mark, x, y)
    elif isinstance(mark, Line):
        places = _places(list(mark.x), list(mark.y), x, y)
        yield (
            f'<path d="{_path(places, step=mark.step)}" fill="none" stroke="{mark.color}" '
            f'stroke-width="2" stroke-dasharray="{_DASHES.get(mark.dash, "")}"/>'
        )
    else:
        xs = [*mark.x, *reversed(mark.x)]
        places = _places(xs, [*mark.high, *reversed(mark.low)], x, y)
        yield f'<path d="{_path(places)}Z" fill="{mark.color}" fill-opacity="0.18"/>'


def _symbols(mark: Points, x: _Scale, y: _Scale) -> Iterator[str]:
    for a, b in zip(mark.x, mark.y, strict=True):
        px, py = x(a), y(b)
        if px is not None and py is not None:
            yield _symbol(mark.symbol, mark.color, px, py)


def _bars(mark: Points, x: _Scale, y: _Scale) -> Iterator[str]:
    for a, bottom, top in zip(mark.x, mark.low, mark.high, strict=False):
        px, low, high = x(a), y(bottom), y(top)
        if px is not None and low is not None and high is not None:
            yield _stroke(px, low, px, high, mark.color, opacity=0.5)


def _places(
    xs: list[float | str], ys: list[float], x: _Scale, y: _Scale
) -> list[tuple[float, float]]:
    found = ((x(a), y(b)) for a, b in zip(xs, ys, strict=True))
    return [(px, py) for px, py in found if px is not None and py is not None]


def _path(places: list[tuple[float, float]], *, step: bool = False) -> str:
    if not places:
        return "M0 0"
    parts = [f"M{places[0][0]:.1f} {places[0][1]:.1f}"]
    for px, py in places[1:]:
        parts.append(f"H{px:.1f}V{py:.1f}" if step else f"L{px:.1f} {py:.1f}")
    return "".join(parts)


def _symbol(symbol: str, color: str, px: float, py: float) -> str:
    paint = f'fill="{color}" stroke="#FFFFFF" stroke-width="0.6"'
    if "open" in symbol:
        paint = f'fill="#FFFFFF" stroke="{color}" stroke-width="1.6"'
    if symbol.startswith("circle"):
        return f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" {paint}/>'
    if symbol.startswith("square"):
        return f'<rect x="{px - 3.5:.1f}" y="{py - 3.5:.1f}" width="7" height="7" {paint}/>'
    shapes = {
        "triangle-up": ((0, -5), (4.6, 3.6), (-4.6, 3.6)),
        "diamond": ((0, -5), (5, 0), (0, 5), (-5, 0)),
    }
    corners = shapes.get(symbol.removesuffix("-open"))
    if corners is not None:
        points = " ".join(f"{px + dx:.1f},{py + dy:.1f}" for dx, dy in corners)
        return f'<polygon points="{points}" {paint}/>'
    cross = f"M{px - 3.5:.1f} {py - 3.5:.1f}l7 7m0 -7l-7 7"
    return f'<path d="{cross}" stroke="{color}" stroke-width="2.2" fill="none"/>'


def _level(level: Level, y: _Scale, box: _Box) -> Iterator[str]:
    right = box.left + box.width
    over = level.y > y.high
    at = y(level.y)
    if at is not None and not over:
        yield _stroke(box.left, at, right, at, level.color, dash="6 4", width=1.5)
        yield _text(box.left + 4, at - 5, level.label, color=level.color)
    elif over:
        yield _text(box.left + 4, box.top + 10, f"{level.label} ↑", color=level.color)


def _legend(chart: Chart) -> Iterator[str]:
    seen: dict[str, Mark] = {}
    for panel in chart.panels:
        for mark in panel.marks:
            if isinstance(mark, Points) or mark.legend:
                seen.setdefault(mark.name, mark)
    left = 20.0
    for name, mark in seen.items():
        symbol = mark.symbol if isinstance(mark, Points) else "square"
        if isinstance(mark, Line):
            yield _stroke(left - 6, 56, left + 6, 56, mark.color, width=2)
        else:
            yield _symbol(symbol, mark.color, left, 56)
        yield _text(left + 10, 60, name)
        left += 26 + 6.1 * len(name)


def _stroke(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    color: str,
    *,
    dash: str = "",
    width: float = 1,
    opacity: float = 1,
) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
        f'stroke-width="{width}" stroke-dasharray="{dash}" stroke-opacity="{opacity}"/>'
    )


def _text(
    x: float,
    y: float,
    value: str,
    *,
    size: int = 11,
    color: str = _style.INK,
    anchor: str = "start",
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" '
        f'text-anchor="{anchor}" font-weight="{weight}">{_safe(value)}</text>'
    )


def _safe(value: str) -> str:
    # XML 1.0 has no place for control characters, not even escaped.
    return html.escape("".join(c if c.isprintable() else " " for c in value), quote=False)


def _quoted(value: str) -> str:
    return html.escape("".join(c if c.isprintable() else " " for c in value))
