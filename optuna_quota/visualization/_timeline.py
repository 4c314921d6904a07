"""Usage of one trial over time, with its limit and breach."""

from __future__ import annotations

from collections.abc import Mapping
import html
import textwrap
from typing import NamedTuple

from optuna.study import Study

from optuna_quota._resources import CLOCK_RESOURCES, format_amount, get_resource
from optuna_quota.visualization import _theme
from optuna_quota.visualization._data import FinishedTrial, StudyTrials
from optuna_quota.visualization._theme import Figure


_MAX_SUBTITLE = 100


class Timeline(NamedTuple):
    """The usage of a trial over time.

    Attributes:
        title: The plot's title.
        resource: The resource that was breached where its usage was recorded, or else memory.
        finding: How the trial ended.
        points: Pairs of seconds since its start and usage.
        limit: The resource's limit.
        time_limit: The limit on time, in seconds, where that was breached.
        breach: Seconds and usage of the breach; of another resource's breach, its time and the
            usage then.
    """

    title: str
    resource: str
    finding: str
    points: list[tuple[float, float]]
    limit: float | None
    time_limit: float | None
    breach: tuple[float, float] | None


def plot_timeline(study: Study, number: int) -> Figure:
    """Plot the usage of one trial over time, with its limit and breach.

    The resource is the one that was breached, or memory if that was a time limit or none.

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
    trials = StudyTrials(study)
    trial = next((t for t in trials.finished if t.number == number), None)
    if trial is None:
        raise ValueError(f"`number` must be that of a finished trial but got {number!r}.")
    return timeline_figure(timeline_of(trial, trials.limits))


def timeline_of(trial: FinishedTrial, limits: Mapping[str, float]) -> Timeline:
    """Return the data of one trial's plot; the breached limit replaces one of the study."""
    record, breach = trial.record, trial.record.breach
    resource, points = "memory", list(record.timeline)
    if breach is not None and record.breach_timeline:
        resource, points = breach.resource, list(record.breach_timeline)
    # Readings of zero at the end were taken after the processes had ended.
    while points and points[-1][1] <= 0:
        points.pop()
    limit, time_limit, place = limits.get(resource), None, None
    if breach is not None and points:
        place = (breach.seconds, breach.observed)
        if breach.resource == resource:
            limit = breach.limit
        else:
            place = (breach.seconds, min(points, key=lambda p: abs(p[0] - breach.seconds))[1])
            time_limit = breach.limit if breach.resource in CLOCK_RESOURCES else None
        points = sorted({*points, place})
    if record.reason and trial.outcome == "terminated":
        finding = textwrap.shorten(record.reason, _MAX_SUBTITLE, placeholder="…")
    else:
        most = max((amount for _, amount in points), default=None)
        finding = f"{trial.outcome}, peak {format_amount(resource, most)}"
    title = f"{_theme.resource_title(resource)} of trial {trial.number} over time"
    return Timeline(title, resource, finding, points, limit, time_limit, place)


class _Axes(NamedTuple):
    usage: _theme.AxisUnit
    time: _theme.AxisUnit
    top: float
    right: float

    def titles(self, resource: str) -> tuple[str, str]:
        usage = self.usage.axis_title(_theme.resource_title(resource))
        return self.time.axis_title("Time since the start"), usage


def _axes(line: Timeline) -> _Axes:
    last, amounts = max(t for t, _ in line.points), [amount for _, amount in line.points]
    unit, clock = _theme.unit_for(line.resource, amounts), _theme.unit_for("wall_time", [last])
    _, high = _theme.axis_range(amounts, limit=line.limit)
    return _Axes(unit, clock, unit.of(high), clock.of(1.04 * last or 1.0))


def timeline_figure(line: Timeline) -> Figure:
    if not line.points:
        return _theme.empty_figure(line.title, "No timeline was recorded for this trial.")
    axes = _axes(line)
    x, y = [axes.time.of(t) for t, _ in line.points], [axes.usage.of(a) for _, a in line.points]
    traces = [_theme.line(get_resource(line.resource).title, _theme.BLUE, x, y)]
    if line.breach is not None:
        seconds, amount = line.breach
        hover = f"breach {format_amount('wall_time', seconds)} after the start"
        point = _theme.Point(axes.time.of(seconds), axes.usage.of(amount), hover)
        traces.append(_theme.markers("breach", _theme.OUTCOMES["terminated"], [point]))
    titles = axes.titles(line.resource)
    figure = _theme.make_figure(
        line.title,
        line.finding,
        traces,
        _theme.axis(titles[0], (0.0, axes.right)),
        _theme.axis(titles[1], (0.0, axes.top)),
    )
    if line.limit is not None:
        _theme.add_limit(figure, line.resource, line.limit, axes.usage, axes.top)
    if line.time_limit is not None:
        at, style = axes.time.of(line.time_limit), {"color": _theme.VERMILION, "dash": "dash"}
        figure.add_vline(at, line={**style, "width": 1.5})
    return figure


_WIDTH, _HEIGHT = 640, 340
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 60, 624, 294


def timeline_svg(line: Timeline) -> str:
    """Return the plot as an SVG image, which optuna-dashboard can show as a trial's artifact.

    Plotly draws images in a browser only. All text is escaped and nothing is active.
    """
    axes = _axes(line)

    def x(value: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * value / axes.right, 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * value / axes.top, 1)

    parts = [
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#FFFFFF"/>',
        _svg_text(16, 22, line.title, size=14, weight="bold"),
        _svg_text(16, 40, line.finding, color=_theme.MUTED),
    ]
    for tick in _theme.linear_ticks(0, axes.top):
        parts.append(_svg_path(f"M{_LEFT} {y(tick)}H{_RIGHT}", _theme.GRID, 1))
        parts.append(_svg_text(_LEFT - 6, y(tick) + 4, f"{tick:,.6g}", anchor="end"))
    for tick in _theme.linear_ticks(0, axes.right):
        parts.append(_svg_path(f"M{x(tick)} {_BOTTOM}v4", _theme.MUTED, 1))
        parts.append(_svg_text(x(tick), _BOTTOM + 17, f"{tick:,.6g}", anchor="middle"))
    titles = axes.titles(line.resource)
    middle, centre = (_LEFT + _RIGHT) / 2, (_TOP + _BOTTOM) / 2
    parts += [
        _svg_text(middle, _BOTTOM + 36, titles[0], color=_theme.MUTED, anchor="middle"),
        f'<g transform="translate(18,{centre}) rotate(-90)">'
        f"{_svg_text(0, 0, titles[1], color=_theme.MUTED, anchor='middle')}</g>",
    ]
    points = [f"{x(axes.time.of(t))} {y(axes.usage.of(a))}" for t, a in line.points]
    parts.append(_svg_path(f"M{'L'.join(points)}", _theme.BLUE, 2))
    if line.breach is not None:
        place = x(axes.time.of(line.breach[0])), y(axes.usage.of(line.breach[1]))
        triangle = f"M{place[0]} {place[1] - 5}l4.6 8.6h-9.2z"
        parts.append(f'<path d="{triangle}" fill="{_theme.VERMILION}" stroke="#FFFFFF"/>')
    if line.limit is not None:
        label = f"limit {format_amount(line.resource, line.limit)}"
        limit = axes.usage.of(line.limit)
        if limit <= axes.top:
            parts.append(_svg_limit(f"M{_LEFT} {y(limit)}H{_RIGHT}"))
        else:
            label, limit = f"{label} ↑", axes.top
        parts.append(
            _svg_text(_LEFT + 4, max(y(limit), _TOP + 17) - 5, label, color=_theme.VERMILION)
        )
    if line.time_limit is not None:
        parts.append(_svg_limit(f"M{x(axes.time.of(line.time_limit))} {_TOP}V{_BOTTOM}"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{html.escape(line.title)}" '
        f'font-family="{html.escape(_theme.FONT)}">{"".join(parts)}</svg>'
    )


def _svg_path(path: str, color: str, width: float, style: str = "") -> str:
    return f'<path d="{path}" stroke="{color}" stroke-width="{width}" fill="none" {style}/>'


def _svg_limit(path: str) -> str:
    return _svg_path(path, _theme.VERMILION, 1.5, 'stroke-dasharray="6 4"')


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
