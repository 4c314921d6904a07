"""Plotly figures of charts."""

from __future__ import annotations

from collections.abc import Sequence
import html
import math
from typing import Any
from typing import TYPE_CHECKING

from optuna_quota.visualization import _style
from optuna_quota.visualization._chart import Axis
from optuna_quota.visualization._chart import Band
from optuna_quota.visualization._chart import Chart
from optuna_quota.visualization._chart import Level
from optuna_quota.visualization._chart import Line
from optuna_quota.visualization._chart import Mark
from optuna_quota.visualization._chart import Panel
from optuna_quota.visualization._chart import Points
from optuna_quota.visualization._imports import import_plotly
from optuna_quota.visualization._ticks import log_ticks


if TYPE_CHECKING:
    import plotly.graph_objects as go


_GAP = 0.09
_COLUMNS = 4


def figure_of(chart: Chart) -> go.Figure:
    """Return a plotly figure of a chart; one that says why where there is nothing to draw."""
    go = import_plotly()
    layout = base_layout(chart.title, chart.subtitle)
    traces: list[dict[str, Any]] = []
    named: set[str] = set()
    columns = min(_COLUMNS, len(chart.panels))
    rows = math.ceil(len(chart.panels) / _COLUMNS)
    if rows > 1:
        layout["height"] = 100 + 300 * rows
    for index, panel in enumerate(chart.panels):
        suffix = "" if index == 0 else str(index + 1)
        traces += _traces(panel, suffix, named)
        layout.update(_axes(panel, suffix, divmod(index, columns), (rows, columns)))
        for level in panel.levels:
            _add_level(layout, level, panel, suffix)
    if not chart.panels:
        layout.update(_empty(chart.subtitle))
    return go.Figure({"data": traces, "layout": layout})


def text(value: str) -> str:
    """Return text that plotly shows as it is: it reads a few tags, names could hold some."""
    return html.escape(value, quote=False).replace("\n", "<br>")


def _x(values: Sequence[float | str]) -> list[float | str]:
    # Names of categories are read as text with tags too.
    return [text(v) if isinstance(v, str) else v for v in values]


def base_layout(title: str, subtitle: str) -> dict[str, Any]:
    """Return what all figures have in common; no template, which would add 7 kB to each."""
    heading = f"<b>{text(title)}</b>"
    if subtitle:
        heading += f'<br><span style="font-size:12px;color:{_style.QUIET}">{text(subtitle)}</span>'
    return {
        "template": {},
        "title": {
            "text": heading,
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 16},
            "font": {"size": 15, "color": _style.INK},
        },
        "font": {"family": _style.FONT, "size": 12, "color": _style.INK},
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "margin": {"l": 64, "r": 24, "t": 100, "b": 56},
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "font": {"family": _style.FONT}},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.01,
            "xanchor": "left",
            "yanchor": "bottom",
            "font": {"size": 11},
            "itemsizing": "constant",
        },
    }


def _empty(reason: str) -> dict[str, Any]:
    said = {
        "text": text(reason),
        "x": 0.5,
        "y": 0.5,
        "xref": "paper",
        "yref": "paper",
        "showarrow": False,
        "font": {"size": 14, "color": _style.QUIET},
    }
    return {"annotations": [said], "xaxis": {"visible": False}, "yaxis": {"visible": False}}


def _traces(panel: Panel, suffix: str, named: set[str]) -> list[dict[str, Any]]:
    axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    traces: list[dict[str, Any]] = []
    # All outcomes have marks of one size: a rare one must not look the most important.
    count = sum(len(mark.x) for mark in panel.marks if isinstance(mark, Points))
    for mark in panel.marks:
        shown = mark.name not in named and (isinstance(mark, Points) or mark.legend)
        legend = {"legendgroup": mark.name, "showlegend": shown}
        named.add(mark.name)
        for trace in _trace(mark, count):
            traces.append({**trace, **axes, **legend})
            legend = {**legend, "showlegend": False}
    return traces


def _trace(mark: Mark, count: int) -> list[dict[str, Any]]:
    if isinstance(mark, Points):
        return [_points(mark, count)]
    if isinstance(mark, Line):
        return [_line(mark)]
    return [_band(mark)]


def _points(mark: Points, count: int) -> dict[str, Any]:
    # SVG draws a few thousand marks well; above that WebGL keeps the page quick.
    trace: dict[str, Any] = {
        "type": "scatter" if len(mark.x) <= 4000 else "scattergl",
        "mode": "markers",
        "name": text(mark.name),
        "x": _x(mark.x),
        "y": list(mark.y),
        "marker": {
            "color": mark.color,
            "symbol": mark.symbol,
            "size": _size(count),
            "opacity": 0.85 if count < 300 else 0.6,
            "line": {"width": 1 if "open" in mark.symbol else 0.5, "color": _edge(mark)},
        },
    }
    if mark.hover:
        trace["text"] = [text(h) for h in mark.hover]
        trace["hovertemplate"] = "%{text}<extra></extra>"
    if mark.low:
        trace["error_y"] = _error(mark)
    return trace


def _edge(mark: Points) -> str:
    return mark.color if "open" in mark.symbol else "#FFFFFF"


def _size(count: int) -> int:
    return 9 if count <= 100 else 7 if count <= 500 else 5


def _error(mark: Points) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [_style.significant(h - y) for h, y in zip(mark.high, mark.y, strict=True)],
        "arrayminus": [_style.significant(y - w) for w, y in zip(mark.low, mark.y, strict=True)],
        "thickness": 1,
        "width": 0,
        "color": translucent(mark.color, 0.5),
    }


def translucent(color: str, opacity: float) -> str:
    """Return a colour that lets through what lies below; plotly knows no ``#rrggbbaa``.

    Args:
        color: As ``#rrggbb``.
        opacity: From 0 to 1.
    """
    red, green, blue = bytes.fromhex(color[1:])
    return f"rgba({red},{green},{blue},{opacity:g})"


def _line(mark: Line) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": text(mark.name),
        "x": _x(mark.x),
        "y": list(mark.y),
        "line": {
            "color": mark.color,
            "width": 2,
            "dash": mark.dash,
            "shape": "hv" if mark.step else "linear",
        },
    }


def _band(mark: Band) -> dict[str, Any]:
    # One closed outline rather than two traces filled to each other: half the legend's trouble.
    return {
        "type": "scatter",
        "mode": "lines",
        "name": text(mark.name),
        "x": [*_x(mark.x), *reversed(_x(mark.x))],
        "y": [*mark.high, *reversed(mark.low)],
        "line": {"width": 0, "color": mark.color},
        "fill": "toself",
        "fillcolor": translucent(mark.color, 0.18),
        "hoverinfo": "skip",
    }


def _axes(
    panel: Panel, suffix: str, place: tuple[int, int], shape: tuple[int, int]
) -> dict[str, Any]:
    x, y = axis_layout(panel.x), axis_layout(panel.y)
    x.update(domain=_domain(place[1], shape[1], _GAP), anchor=f"y{suffix}")
    # Rows are counted from the top, plotly's domains from the bottom.
    y.update(domain=_domain(shape[0] - 1 - place[0], shape[0], 1.8 * _GAP), anchor=f"x{suffix}")
    return {f"xaxis{suffix}": x, f"yaxis{suffix}": y}


def _domain(index: int, count: int, gap: float) -> list[float]:
    gap = gap if count < 4 else gap * 3 / count
    width = (1 - gap * (count - 1)) / count
    left = index * (width + gap)
    return [round(left, 4), round(min(1, left + width), 4)]


def axis_layout(axis: Axis) -> dict[str, Any]:
    """Return plotly's layout of an axis."""
    layout: dict[str, Any] = {
        "title": {"text": text(axis.title), "standoff": 8},
        "gridcolor": _style.GRID,
        "linecolor": _style.GRID,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": _style.GRID,
        "automargin": True,
    }
    if axis.categories:
        order = [text(c) for c in axis.categories]
        layout.update(type="category", categoryorder="array", categoryarray=order)
    elif axis.log:
        layout.update(type="log", dtick="D2", exponentformat="none")
        _log_ticks(layout, axis)
    if not axis.categories and (axis.low is not None or axis.high is not None):
        layout["range"] = _range(axis)
    return layout


def _log_ticks(layout: dict[str, Any], axis: Axis) -> None:
    if axis.low is not None and axis.high is not None:
        ticks = log_ticks(axis.low, axis.high)
        layout.pop("dtick")
        layout.update(tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])


def _range(axis: Axis) -> list[float | None]:
    if not axis.log:
        return [axis.low, axis.high]
    return [None if v is None or v <= 0 else math.log10(v) for v in (axis.low, axis.high)]


def _add_level(layout: dict[str, Any], level: Level, panel: Panel, suffix: str) -> None:
    top = panel.y.high
    over = top is not None and level.y > top
    layout.setdefault("annotations", []).append(
        {
            "text": text(f"{level.label} ↑" if over else level.label),
            "xref": f"x{suffix} domain",
            "yref": f"y{suffix} domain" if over else f"y{suffix}",
            "x": 0.01,
            "y": 1 if over else math.log10(level.y) if panel.y.log else level.y,
            "xanchor": "left",
            "yanchor": "top" if over else "bottom",
            "showarrow": False,
            "font": {"size": 11, "color": level.color},
            "bgcolor": "rgba(255,255,255,0.7)",
        }
    )
    if not over:
        layout.setdefault("shapes", []).append(
            {
                "type": "line",
                "xref": f"x{suffix} domain",
                "yref": f"y{suffix}",
                "x0": 0,
                "x1": 1,
                "y0": level.y,
                "y1": level.y,
                "line": {"color": level.color, "width": 1.5, "dash": "dash"},
            }
        )
