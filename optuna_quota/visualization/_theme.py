"""Colours, units and axes of all plots, and the parts that plotly figures are made of.

The colours are those of Okabe and Ito, "Color Universal Design" (2008), which people with the
common kinds of colour blindness can tell apart. Each outcome has a symbol of its own as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import html
import importlib
import math
import sys
from types import ModuleType
from typing import Any, NamedTuple, TYPE_CHECKING, TypeAlias

from optuna_quota._resources import format_amount, get_resource


if TYPE_CHECKING:
    import plotly.graph_objects as go


# Here alone, as plotly is imported with the first figure.
Figure: TypeAlias = "go.Figure"
MISSING_PLOTLY = "Plots need plotly, which is not installed: pip install 'optuna-quota[plot]'."

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


class AxisUnit(NamedTuple):
    """A unit for display: ``size`` SI base units."""

    symbol: str
    size: float

    def of(self, value: float) -> float:
        """Return an amount in this unit, to six significant digits."""
        return significant(value / self.size)

    def axis_title(self, title: str) -> str:
        """Return the title of an axis with the unit."""
        return f"{title} ({self.symbol})" if self.symbol else title


# By SI base unit, from the smallest on.
_SHOWN: Mapping[str, tuple[str, ...]] = {
    "B": ("MiB", "GiB", "TiB", "PiB"),
    "s": ("ms", "s", "min", "h", "d"),
    "J": ("J", "Wh", "kWh", "MWh"),
}


def unit_for(resource: str, amounts: Iterable[float]) -> AxisUnit:
    """Return the largest unit in which the largest finite amount is at least 1.5."""
    top = max((a for a in amounts if math.isfinite(a)), default=0.0)
    known = get_resource(resource).unit
    units = [AxisUnit(symbol, known.units[symbol]) for symbol in _SHOWN.get(known.symbol, ())]
    units = units or [AxisUnit("", 1)]
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
    """
    shown = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    top = max(shown, default=0.0)
    if limit is not None and (limit <= 3 * top or top == 0):
        shown.append(limit)
    if log and top:
        return clamp(min(shown) / 1.25), clamp(max(shown) * 1.35)
    high = max([0.0, *shown])
    return min([0.0, *shown]), clamp(high * 1.1) if high > 0 else 1.0


def padded_range(values: Sequence[float], *, log: bool) -> tuple[float, float]:
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


def import_plotly(module: str = "plotly.graph_objects") -> ModuleType:
    return import_optional(module, MISSING_PLOTLY)


def import_optional(module: str, missing: str) -> ModuleType:
    """Import a module, or raise an ImportError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(missing) from error


def escape(text: str) -> str:
    """Escape text for plotly, which interprets a few tags that names may contain."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def _escaped(values: Sequence[float | str]) -> list[float | str]:
    return [escape(v) if isinstance(v, str) else v for v in values]


def translucent(color: str, opacity: float) -> str:
    """Return ``#rrggbb`` with an opacity from 0 to 1; plotly does not know ``#rrggbbaa``."""
    red, green, blue = bytes.fromhex(color[1:])
    return f"rgba({red},{green},{blue},{opacity:g})"


class Point(NamedTuple):
    """A marker: its coordinates, its hover text, and the ends of a vertical bar."""

    x: float | str
    y: float
    hover: str = ""
    bounds: tuple[float, float] | None = None


def markers(name: str, style: OutcomeStyle, points: Sequence[Point]) -> dict[str, Any]:
    """Return a trace of markers."""
    open_symbol = "open" in style.symbol
    trace: dict[str, Any] = {
        # SVG draws a few thousand markers well; above that, WebGL keeps the page responsive.
        "type": "scatter" if len(points) <= 4000 else "scattergl",
        "mode": "markers",
        "name": escape(name),
        "x": _escaped([p.x for p in points]),
        "y": [p.y for p in points],
        "marker": {
            "color": style.color,
            "symbol": style.symbol,
            "line": {
                "width": 1 if open_symbol else 0.5,
                "color": style.color if open_symbol else "#FFFFFF",
            },
        },
    }
    if any(p.hover for p in points):
        trace["text"] = [escape(p.hover) for p in points]
        trace["hovertemplate"] = "%{text}<extra></extra>"
    if any(p.bounds for p in points):
        ends = [(p.y, *(p.bounds or (p.y, p.y))) for p in points]
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [significant(high - y) for y, _, high in ends],
            "arrayminus": [significant(y - low) for y, low, _ in ends],
            "thickness": 1,
            "width": 0,
            "color": translucent(style.color, 0.5),
        }
    return trace


def line(
    name: str, color: str, x: Sequence[float | str], y: Sequence[float], **style: str
) -> dict[str, Any]:
    """Return a trace of a line; ``style`` has plotly's ``dash`` and ``shape``."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": escape(name),
        "x": _escaped(x),
        "y": list(y),
        "line": {"color": color, "width": 2, **style},
    }


def band(
    name: str,
    color: str,
    x: Sequence[float | str],
    bounds: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """Return a trace of the area between lower and upper bounds, as one closed outline."""
    lower, upper = zip(*bounds, strict=True)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": escape(name),
        "x": [*_escaped(x), *reversed(_escaped(x))],
        "y": [*upper, *reversed(lower)],
        "line": {"width": 0, "color": color},
        "fill": "toself",
        "fillcolor": translucent(color, 0.18),
        "hoverinfo": "skip",
    }


def axis(
    title: str,
    limits: tuple[float, float] | None = None,
    *,
    log: bool = False,
    categories: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the layout of an axis; a logarithmic one needs ``limits``, its ends in its unit."""
    layout: dict[str, Any] = {
        "title": {"text": escape(title), "standoff": 8},
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": GRID,
        "automargin": True,
    }
    if categories:
        names = [escape(c) for c in categories]
        layout.update(type="category", categoryorder="array", categoryarray=names)
    elif log and limits:
        limits = (clamp(limits[0]), clamp(limits[1]))
        ticks = log_ticks(*limits)
        layout.update(type="log", range=[math.log10(v) for v in limits])
        layout.update(tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    elif limits:
        layout["range"] = list(limits)
    return layout


def layout_of(title: str, subtitle: str = "") -> dict[str, Any]:
    """Return the layout that all figures share, without plotly's template, which adds 7 kB."""
    heading = f"<b>{escape(title)}</b>"
    if subtitle:
        heading += f'<br><span style="font-size:12px;color:{MUTED}">{escape(subtitle)}</span>'
    return {
        "template": {},
        "title": {
            "text": heading,
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 20, "l": 16},
            "font": {"size": 15, "color": TEXT},
        },
        "font": {"family": FONT, "size": 12, "color": TEXT},
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "margin": {"l": 64, "r": 36, "t": 68, "b": 56},
        # In the right margin, so that it covers neither title nor legend.
        "modebar": {"orientation": "v"},
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "font": {"family": FONT}},
        "legend": {
            "orientation": "h",
            # Below the plot, where it covers no title however many lines it takes.
            "x": 0,
            "y": 0,
            "yref": "container",
            "xanchor": "left",
            "yanchor": "bottom",
            "font": {"size": 11},
        },
    }


def make_figure(
    title: str,
    subtitle: str,
    traces: Sequence[dict[str, Any]],
    x: Mapping[str, Any],
    y: Mapping[str, Any],
) -> Figure:
    """Return a figure with one pair of axes."""
    size_markers(traces)
    layout = {**layout_of(title, subtitle), "xaxis": x, "yaxis": y}
    return import_plotly().Figure({"data": list(traces), "layout": layout})


def size_markers(traces: Sequence[dict[str, Any]]) -> None:
    """Set one size for all markers by their number, so that rare outcomes don't stand out."""
    marked = [trace for trace in traces if trace.get("mode") == "markers"]
    count = sum(len(trace["x"]) for trace in marked)
    size = 9 if count <= 100 else 7 if count <= 500 else 5
    for trace in marked:
        trace["marker"].update(size=size, opacity=0.85 if count < 300 else 0.6)


def empty_figure(title: str, reason: str) -> Figure:
    """Return a figure without data that says why there is none."""
    shown = {
        "text": escape(reason),
        "x": 0.5,
        "y": 0.5,
        "xref": "paper",
        "yref": "paper",
        "showarrow": False,
        "font": {"size": 14, "color": MUTED},
    }
    hidden = {"visible": False}
    layout = {**layout_of(title), "annotations": [shown], "xaxis": hidden, "yaxis": hidden}
    return import_plotly().Figure({"layout": layout})


_MODEBAR_WIDTH = 36


def add_limit(
    figure: Figure,
    resource: str,
    limit: float,
    unit: AxisUnit,
    high: float,
    *,
    log: bool = False,
    panel: str = "",
    beside: bool = False,
) -> None:
    """Draw a limit as a dashed line, or say that it is above the axis.

    ``limit`` is in SI base units, ``high`` the upper end of the axis in its ``unit``. Of several
    pairs of axes the first is labelled, whose number (``panel``) is empty. The label stands on the
    line, or ``beside`` the plot, where it covers no marker.
    """
    y = unit.of(limit)
    above = y > high
    axes = {"xref": f"x{panel} domain", "yref": f"y{panel}"}
    if not panel:
        text = f"limit {format_amount(resource, limit)}{' ↑' if above else ''}"
        if beside:
            # Left of the buttons, which the dashboard shows at all times.
            figure.update_layout(margin_r=_MODEBAR_WIDTH + 8 + 6 * len(text))
        figure.add_annotation(
            text=escape(text),
            xref=axes["xref"],
            yref="y domain" if above else axes["yref"],
            x=1.01 if beside else 0.01,
            y=1 if above else math.log10(y) if log else y,
            xanchor="left",
            yanchor="top" if above else "middle" if beside else "bottom",
            showarrow=False,
            font={"size": 11, "color": VERMILION},
        )
    if not above:
        style = {"color": VERMILION, "width": 1.5, "dash": "dash"}
        figure.add_shape(type="line", x0=0, x1=1, y0=y, y1=y, line=style, **axes)
