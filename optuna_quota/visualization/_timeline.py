"""Memory of one trial over time, with its limit and breach."""

from __future__ import annotations

import html
from typing import NamedTuple, TYPE_CHECKING

from optuna_quota._resources import format_amount
from optuna_quota.visualization import _plotly, _theme
from optuna_quota.visualization._data import finished_trials, FinishedTrial, limits_of


if TYPE_CHECKING:
    from optuna.study import Study
    import plotly.graph_objects as go


_MAX_SUBTITLE = 100


class _TimelineInfo(NamedTuple):
    """The memory of a trial.

    Attributes:
        number: The trial's number.
        finding: How it ended.
        seconds: Times since its start.
        memory: Bytes at these times.
        limit: The memory limit in bytes.
        breach: Seconds and bytes of the breach; of another resource's breach, its time and the
            memory then.
    """

    number: int
    finding: str
    seconds: list[float]
    memory: list[float]
    limit: float | None
    breach: tuple[float, float] | None


def plot_timeline(study: Study, number: int) -> go.Figure:
    """Plot the memory of one trial over time, with its limit and breach.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_timeline

            plot_timeline(study, number=17).show()

    Args:
        study: The study.
        number: The trial's number.

    Raises:
        ValueError: If the study has no finished trial with that number.
        ImportError: If plotly is not installed.
    """
    return timeline_figure(_get_timeline_info(study, number))


def _get_timeline_info(study: Study, number: int) -> _TimelineInfo:
    trial = next((t for t in finished_trials(study) if t.number == number), None)
    if trial is None:
        raise ValueError(f"`number` must be that of a finished trial but got {number!r}.")
    return timeline_info(trial, limits_of(study).get("memory"))


def timeline_info(trial: FinishedTrial, limit: float | None) -> _TimelineInfo:
    """Return what is drawn of one trial.

    Args:
        trial: The trial.
        limit: The study's memory limit, replaced by the limit that the trial breached.
    """
    timeline = list(trial.record.timeline)
    # Readings of zero at the end were taken after the processes had ended.
    while timeline and timeline[-1][1] <= 0:
        timeline.pop()
    record, place = trial.record, None
    if record.breach is not None and timeline:
        if record.breach.resource == "memory":
            limit, place = record.breach.limit, (record.breach.seconds, record.breach.observed)
        else:
            at = record.breach.seconds
            place = (at, min(timeline, key=lambda point: abs(point[0] - at))[1])
    if place is not None and place[0] > timeline[-1][0]:
        timeline.append(place)
    finding = f"{trial.outcome}, peak {format_amount('memory', _maximum(timeline))}"
    if record.reason and trial.outcome == "terminated":
        reason = record.reason
        finding = reason if len(reason) <= _MAX_SUBTITLE else f"{reason[: _MAX_SUBTITLE - 1]}…"
    seconds, memory = [t for t, _ in timeline], [m for _, m in timeline]
    return _TimelineInfo(trial.number, finding, seconds, memory, limit, place)


def _maximum(timeline: list[tuple[float, float]]) -> float | None:
    return max((memory for _, memory in timeline), default=None)


class _Axes(NamedTuple):
    memory: _theme.Unit
    time: _theme.Unit
    top: float
    right: float


def _axes(info: _TimelineInfo) -> _Axes:
    seconds, memory = list(info.seconds), list(info.memory)
    if info.breach is not None:
        seconds.append(info.breach[0])
        memory.append(info.breach[1])
    unit, clock = _theme.unit_for("memory", memory), _theme.unit_for("wall_time", seconds)
    _, high = _theme.axis_range(memory, limit=info.limit)
    return _Axes(unit, clock, unit.of(high), clock.of(1.04 * max(seconds) or 1.0))


def _title(info: _TimelineInfo) -> str:
    return f"Memory of trial {info.number} over time"


def timeline_figure(info: _TimelineInfo) -> go.Figure:
    """Return the figure of :func:`plot_timeline`."""
    if not info.memory:
        return _plotly.empty_figure(_title(info), "No timeline was recorded for this trial.")
    axes = _axes(info)
    x = [axes.time.of(t) for t in info.seconds]
    traces = [_plotly.line("memory", _theme.BLUE, x, [axes.memory.of(m) for m in info.memory])]
    if info.breach is not None:
        seconds, memory = info.breach
        hover = f"breach {format_amount('wall_time', seconds)} after the start"
        place = [axes.time.of(seconds)], [axes.memory.of(memory)]
        traces.append(_plotly.markers("breach", _theme.OUTCOMES["terminated"], *place, [hover]))
    figure = _plotly.make_figure(
        _title(info),
        info.finding,
        traces,
        _plotly.axis(axes.time.axis_title("Time since the start"), (0.0, axes.right)),
        _plotly.axis(axes.memory.axis_title("Memory"), (0.0, axes.top)),
    )
    if info.limit is not None:
        _plotly.add_limit(figure, "memory", info.limit, axes.memory, axes.top)
    return figure


_WIDTH, _HEIGHT = 640, 340
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 60, 624, 294


def timeline_svg(info: _TimelineInfo) -> str:
    """Return the plot as an SVG image, which optuna-dashboard can show as a trial's artifact.

    Plotly draws images in a browser only. All text is escaped and nothing is active.

    Args:
        info: A trial with a timeline.
    """
    axes = _axes(info)

    def x(value: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * value / axes.right, 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * value / axes.top, 1)

    parts = [
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#FFFFFF"/>',
        _svg_text(16, 22, _title(info), size=14, weight="bold"),
        _svg_text(16, 40, info.finding, color=_theme.MUTED),
    ]
    for tick in _theme.linear_ticks(0, axes.top):
        parts.append(_svg_path(f"M{_LEFT} {y(tick)}H{_RIGHT}", _theme.GRID, 1))
        parts.append(_svg_text(_LEFT - 6, y(tick) + 4, f"{tick:,.6g}", anchor="end"))
    for tick in _theme.linear_ticks(0, axes.right):
        parts.append(_svg_path(f"M{x(tick)} {_BOTTOM}v4", _theme.MUTED, 1))
        parts.append(_svg_text(x(tick), _BOTTOM + 17, f"{tick:,.6g}", anchor="middle"))
    titles = axes.time.axis_title("Time since the start"), axes.memory.axis_title("Memory")
    middle, centre = (_LEFT + _RIGHT) / 2, (_TOP + _BOTTOM) / 2
    parts += [
        _svg_text(middle, _BOTTOM + 36, titles[0], color=_theme.MUTED, anchor="middle"),
        f'<g transform="translate(18,{centre}) rotate(-90)">'
        f"{_svg_text(0, 0, titles[1], color=_theme.MUTED, anchor='middle')}</g>",
    ]
    points = [
        f"{x(axes.time.of(t))} {y(axes.memory.of(m))}"
        for t, m in zip(info.seconds, info.memory, strict=True)
    ]
    parts.append(_svg_path(f"M{'L'.join(points)}", _theme.BLUE, 2))
    if info.breach is not None:
        place = x(axes.time.of(info.breach[0])), y(axes.memory.of(info.breach[1]))
        triangle = f"M{place[0]} {place[1] - 5}l4.6 8.6h-9.2z"
        parts.append(f'<path d="{triangle}" fill="{_theme.VERMILION}" stroke="#FFFFFF"/>')
    if info.limit is not None:
        label = f"limit {format_amount('memory', info.limit)}"
        limit = axes.memory.of(info.limit)
        if limit <= axes.top:
            style = 'stroke-dasharray="6 4"'
            path = f"M{_LEFT} {y(limit)}H{_RIGHT}"
            parts.append(_svg_path(path, _theme.VERMILION, 1.5, style))
        else:
            label, limit = f"{label} ↑", axes.top
        parts.append(_svg_text(_LEFT + 4, max(y(limit), _TOP) - 5, label, color=_theme.VERMILION))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{_title(info)}" '
        f'font-family="{html.escape(_theme.FONT)}">{"".join(parts)}</svg>'
    )


def _svg_path(path: str, color: str, width: float, style: str = "") -> str:
    return f'<path d="{path}" stroke="{color}" stroke-width="{width}" fill="none" {style}/>'


def _svg_text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 11,
    weight: str = "normal",
    color: str = _theme.TEXT,
    anchor: str = "start",
) -> str:
    # XML 1.0 does not allow control characters, not even escaped.
    printable = "".join(c if c.isprintable() else " " for c in text)
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{color}" '
        f'text-anchor="{anchor}">{html.escape(printable, quote=False)}</text>'
    )
