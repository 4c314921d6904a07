"""The parts that all plotly figures are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import html
import importlib
import math
from types import ModuleType
from typing import Any, TYPE_CHECKING

from optuna_quota._resources import format_amount
from optuna_quota.visualization import _theme


if TYPE_CHECKING:
    import plotly.graph_objects as go


MISSING_PLOTLY = "Plots need plotly, which is not installed: pip install 'optuna-quota[plot]'."


def import_plotly(module: str = "plotly.graph_objects") -> ModuleType:
    """Import a module of plotly, which is optional.

    Raises:
        ImportError: If plotly is not installed; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(MISSING_PLOTLY) from error


def escape(text: str) -> str:
    """Return text that plotly shows as is: it interprets a few tags, and names may hold some."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def _escaped(values: Sequence[float | str]) -> list[float | str]:
    return [escape(v) if isinstance(v, str) else v for v in values]


def translucent(color: str, opacity: float) -> str:
    """Return ``#rrggbb`` with an opacity from 0 to 1; plotly does not know ``#rrggbbaa``."""
    red, green, blue = bytes.fromhex(color[1:])
    return f"rgba({red},{green},{blue},{opacity:g})"


def markers(
    name: str,
    style: _theme.OutcomeStyle,
    x: Sequence[float | str],
    y: Sequence[float],
    hover: Sequence[str] = (),
    bounds: Sequence[tuple[float, float]] = (),
) -> dict[str, Any]:
    """Return a trace of one marker for each trial, with vertical bars between ``bounds``."""
    open_symbol = "open" in style.symbol
    trace: dict[str, Any] = {
        # SVG draws a few thousand markers well; above that, WebGL keeps the page responsive.
        "type": "scatter" if len(x) <= 4000 else "scattergl",
        "mode": "markers",
        "name": escape(name),
        "x": _escaped(x),
        "y": list(y),
        "marker": {
            "color": style.color,
            "symbol": style.symbol,
            "line": {
                "width": 1 if open_symbol else 0.5,
                "color": style.color if open_symbol else "#FFFFFF",
            },
        },
    }
    if hover:
        trace.update(text=[escape(h) for h in hover], hovertemplate="%{text}<extra></extra>")
    if bounds:
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [
                _theme.significant(high - v) for (_, high), v in zip(bounds, y, strict=True)
            ],
            "arrayminus": [
                _theme.significant(v - low) for (low, _), v in zip(bounds, y, strict=True)
            ],
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
    """Return the layout of an axis.

    Args:
        title: What it shows, with the unit.
        limits: Its ends, in its unit.
        log: Whether it is logarithmic, for which ``limits`` must be given.
        categories: The categories in their order, for an axis of names.
    """
    layout: dict[str, Any] = {
        "title": {"text": escape(title), "standoff": 8},
        "gridcolor": _theme.GRID,
        "linecolor": _theme.GRID,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": _theme.GRID,
        "automargin": True,
    }
    if categories:
        names = [escape(c) for c in categories]
        layout.update(type="category", categoryorder="array", categoryarray=names)
    elif log and limits:
        limits = (_theme.clamp(limits[0]), _theme.clamp(limits[1]))
        ticks = _theme.log_ticks(*limits)
        layout.update(type="log", range=[math.log10(v) for v in limits])
        layout.update(tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    elif limits:
        layout["range"] = list(limits)
    return layout


def layout_of(title: str, subtitle: str = "") -> dict[str, Any]:
    """Return the layout that all figures share, without plotly's template, which adds 7 kB."""
    heading = f"<b>{escape(title)}</b>"
    if subtitle:
        heading += (
            f'<br><span style="font-size:12px;color:{_theme.MUTED}">{escape(subtitle)}</span>'
        )
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
            "font": {"size": 15, "color": _theme.TEXT},
        },
        "font": {"family": _theme.FONT, "size": 12, "color": _theme.TEXT},
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "margin": {"l": 64, "r": 36, "t": 68, "b": 56},
        # In the right margin, where it covers neither title nor legend.
        "modebar": {"orientation": "v"},
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "font": {"family": _theme.FONT}},
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
) -> go.Figure:
    """Return a figure with one pair of axes."""
    size_markers(traces)
    layout = {**layout_of(title, subtitle), "xaxis": x, "yaxis": y}
    return import_plotly().Figure({"data": list(traces), "layout": layout})


def size_markers(traces: Sequence[dict[str, Any]]) -> None:
    """Give all markers one size by their total number, so that no rare outcome stands out."""
    marked = [trace for trace in traces if trace.get("mode") == "markers"]
    count = sum(len(trace["x"]) for trace in marked)
    size = 9 if count <= 100 else 7 if count <= 500 else 5
    for trace in marked:
        trace["marker"].update(size=size, opacity=0.85 if count < 300 else 0.6)


def empty_figure(title: str, reason: str) -> go.Figure:
    """Return a figure without data that says why there is none."""
    layout = layout_of(title)
    layout["annotations"] = [
        {
            "text": escape(reason),
            "x": 0.5,
            "y": 0.5,
            "xref": "paper",
            "yref": "paper",
            "showarrow": False,
            "font": {"size": 14, "color": _theme.MUTED},
        }
    ]
    layout.update(xaxis={"visible": False}, yaxis={"visible": False})
    return import_plotly().Figure({"data": [], "layout": layout})


def add_limit(
    figure: go.Figure,
    resource: str,
    limit: float,
    unit: _theme.Unit,
    high: float,
    *,
    log: bool = False,
    panel: str = "",
    side: str = "left",
) -> None:
    """Draw a limit as a dashed line, or say that it is above the axis.

    Args:
        figure: The figure.
        resource: The resource.
        limit: In SI base units.
        unit: The unit of the axis.
        high: The upper end of the axis, in its unit.
        log: Whether the axis is logarithmic.
        panel: Number of the pair of axes, empty for the first, whose line is labelled.
        side: The end of the line that the label stands at, where fewer markers are.
    """
    y = unit.of(limit)
    above = y > high
    axes = {"xref": f"x{panel} domain", "yref": f"y{panel}"}
    if not panel:
        figure.add_annotation(
            text=f"limit {escape(format_amount(resource, limit))}{' ↑' if above else ''}",
            xref=axes["xref"],
            yref=f"y{panel} domain" if above else axes["yref"],
            x=0.01 if side == "left" else 0.99,
            y=1 if above else math.log10(y) if log else y,
            xanchor=side,
            yanchor="top" if above else "bottom",
            showarrow=False,
            font={"size": 11, "color": _theme.VERMILION},
        )
    if not above:
        style = {"color": _theme.VERMILION, "width": 1.5, "dash": "dash"}
        figure.add_shape(type="line", x0=0, x1=1, y0=y, y1=y, line=style, **axes)
