"""Usage of each trial, and of one trial over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import statistics
import textwrap
from typing import NamedTuple

from optuna.study import Study

from optuna_quota._analysis.study_analysis import StudyAnalysis, trials_of
from optuna_quota._analysis.study_trials import by_outcome, FinishedTrial, StudyTrials
from optuna_quota._html import element, Safe
from optuna_quota._metering.breach import is_breach
from optuna_quota._resources import CLOCK_RESOURCES, format_amount, get_resource
from optuna_quota.visualization import _theme
from optuna_quota.visualization._theme import Figure, Point


_MAX_SUBTITLE = 100


def plot_usage(study: Study | StudyAnalysis, *, resource: str = "memory") -> Figure:
    """Plot the usage of each trial by outcome, with the limit in force.

    Markers of terminated trials point up: their usage is a lower bound. A rejected trial, which
    never ran, is shown at its projection, with the interval.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_usage

            plot_usage(study, resource="memory").show()

    Args:
        study: The study, or its report.
        resource: ``"memory"``, ``"wall_time"``, ``"cpu_time"``, ``"gpu_memory"``, ``"gpu_time"``,
            ``"energy"`` or the name of a custom meter.

    Raises:
        ImportError: If plotly is not installed.
    """
    trials = trials_of(study)
    name = _theme.resource_title(resource)
    title = f"{name} of each trial"
    found = {t.number: _amount(t, resource) for t in trials.finished}
    shown = [t for t in trials.finished if found[t.number] is not None]
    if not shown:
        return _theme.empty_figure(title, f"No finished trial has a known {resource}.")
    amounts = [amount for amount in found.values() if amount is not None]
    unit, limit = _theme.unit_for(resource, amounts), trials.limits.get(resource)
    near = [limit] if limit is not None and limit <= 3 * max(amounts) else []
    log = _theme.use_log_scale([*amounts, *near], 15)
    low, high = map(unit.of, _theme.axis_range(amounts, log=log, limit=limit))
    figure = _theme.make_figure(
        title,
        _usage_finding(trials, shown, resource),
        [
            _theme.markers(
                f"{outcome} ({len(group)})",
                _theme.OUTCOMES[outcome],
                [_usage_point(trial, resource, unit) for trial in group],
            )
            for outcome, group in by_outcome(shown).items()
        ],
        _theme.axis("Trial"),
        _theme.axis(unit.axis_title(name), (low, high), log=log),
    )
    if limit is not None:
        _theme.add_limit(figure, resource, limit, unit, high, log=log, beside=True)
    return figure


def _amount(trial: FinishedTrial, resource: str) -> float | None:
    """Return what a trial used, or was projected to use if it was rejected."""
    if resource in trial.amounts or trial.outcome != "rejected":
        return trial.amounts.get(resource)
    projected = trial.record.footprint.get(resource)
    return None if projected is None else projected.median


def _usage_point(trial: FinishedTrial, resource: str, unit: _theme.AxisUnit) -> Point:
    if resource in trial.amounts:
        return Point(trial.number, unit.of(trial.amounts[resource]), trial.hover(resource))
    projected = trial.record.footprint[resource]
    hover = trial.hover(resource, f"projected {format_amount(resource, projected.median)}")
    bounds = unit.of(projected.lower), unit.of(projected.upper)
    return Point(trial.number, unit.of(projected.median), hover, bounds)


def _usage_finding(trials: StudyTrials, shown: Sequence[FinishedTrial], resource: str) -> str:
    ran = [t.amounts[resource] for t in shown if resource in t.amounts]
    limit, parts = trials.limits.get(resource), []
    if ran:
        median = format_amount(resource, statistics.median_high(ran))
        parts.append(f"median {median}, maximum {format_amount(resource, max(ran))}")
        if limit is not None:
            over = sum(is_breach(resource, amount, limit) for amount in ran)
            parts.append(f"{over} of {len(ran)} over the limit")
    unknown = len(trials.finished) - len(shown)
    if unknown:
        parts.append(f"{unknown} not measured")
    return "; ".join(parts)


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


def plot_timeline(study: Study | StudyAnalysis, number: int) -> Figure:
    """Plot the usage of one trial over time, with its limit and breach.

    The resource is the one that was breached, or memory if that was a time limit or none.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_timeline

            plot_timeline(study, number=17).show()

    Args:
        study: The study, or its report.
        number: The trial's number.

    Raises:
        ValueError: If the study has no finished trial with that number.
        ImportError: If plotly is not installed.
    """
    trials = trials_of(study)
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
    """Units, upper ends in these units, and titles of the axes of a timeline."""

    usage: _theme.AxisUnit
    time: _theme.AxisUnit
    top: float
    right: float
    titles: tuple[str, str]  # of time and usage


def _axes(line: Timeline) -> _Axes:
    last, amounts = max(t for t, _ in line.points), [amount for _, amount in line.points]
    unit, clock = _theme.unit_for(line.resource, amounts), _theme.unit_for("wall_time", [last])
    _, high = _theme.axis_range(amounts, limit=line.limit)
    usage = unit.axis_title(_theme.resource_title(line.resource))
    titles = clock.axis_title("Time since the start"), usage
    return _Axes(unit, clock, unit.of(high), clock.of(1.04 * last or 1.0), titles)


def timeline_figure(line: Timeline) -> Figure:
    if not line.points:
        return _theme.empty_figure(line.title, "No timeline was recorded for this trial.")
    axes = _axes(line)
    x, y = [axes.time.of(t) for t, _ in line.points], [axes.usage.of(a) for _, a in line.points]
    traces = [_theme.line(get_resource(line.resource).title, _theme.BLUE, x, y)]
    if line.breach is not None:
        seconds, amount = line.breach
        hover = f"breach {format_amount('wall_time', seconds)} after the start"
        point = Point(axes.time.of(seconds), axes.usage.of(amount), hover)
        traces.append(_theme.markers("breach", _theme.OUTCOMES["terminated"], [point]))
    x_axis = _theme.axis(axes.titles[0], (0.0, axes.right))
    y_axis = _theme.axis(axes.titles[1], (0.0, axes.top))
    figure = _theme.make_figure(line.title, line.finding, traces, x_axis, y_axis)
    if line.limit is not None:
        _theme.add_limit(figure, line.resource, line.limit, axes.usage, axes.top)
    if line.time_limit is not None:
        style = {"color": _theme.VERMILION, "dash": "dash", "width": 1.5}
        figure.add_vline(axes.time.of(line.time_limit), line=style)
    return figure


_WIDTH, _HEIGHT = 640, 340
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 60, 624, 294
_LIMIT = {"stroke": _theme.VERMILION, "stroke_width": 1.5, "stroke_dasharray": "6 4"}


def timeline_svg(line: Timeline) -> str:
    """Return the plot as an SVG image, which optuna-dashboard can show as a trial's artifact.

    Plotly draws images in a browser only. All text is escaped and nothing is active.
    """
    axes = _axes(line)

    def x(value: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * value / axes.right, 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * value / axes.top, 1)

    middle, centre = (_LEFT + _RIGHT) / 2, (_TOP + _BOTTOM) / 2
    muted = {"fill": _theme.MUTED}
    parts = [
        element("rect", width=_WIDTH, height=_HEIGHT, fill="#FFFFFF"),
        _text(16, 22, line.title, font_size=14, font_weight="bold"),
        _text(16, 40, line.finding, **muted),
    ]
    for tick in _theme.linear_ticks(0, axes.top):
        parts.append(_path(f"M{_LEFT} {y(tick)}H{_RIGHT}", stroke=_theme.GRID))
        parts.append(_text(_LEFT - 6, y(tick) + 4, f"{tick:,.6g}", text_anchor="end"))
    for tick in _theme.linear_ticks(0, axes.right):
        parts.append(_path(f"M{x(tick)} {_BOTTOM}v4", stroke=_theme.MUTED))
        parts.append(_text(x(tick), _BOTTOM + 17, f"{tick:,.6g}", text_anchor="middle"))
    turned = f"translate(18,{centre}) rotate(-90)"
    points = [f"{x(axes.time.of(t))} {y(axes.usage.of(a))}" for t, a in line.points]
    parts += [
        _text(middle, _BOTTOM + 36, axes.titles[0], text_anchor="middle", **muted),
        _text(0, 0, axes.titles[1], text_anchor="middle", transform=turned, **muted),
        _path(f"M{'L'.join(points)}", stroke=_theme.BLUE, stroke_width=2),
    ]
    if line.breach is not None:
        left, top = x(axes.time.of(line.breach[0])), y(axes.usage.of(line.breach[1]))
        triangle = f"M{left} {top - 5}l4.6 8.6h-9.2z"
        parts.append(_path(triangle, fill=_theme.VERMILION, stroke="#FFFFFF"))
    if line.limit is not None:
        label = f"limit {format_amount(line.resource, line.limit)}"
        limit = axes.usage.of(line.limit)
        if limit <= axes.top:
            parts.append(_path(f"M{_LEFT} {y(limit)}H{_RIGHT}", **_LIMIT))
        else:
            label, limit = f"{label} ↑", axes.top
        above = max(y(limit), _TOP + 17) - 5
        parts.append(_text(_LEFT + 4, above, label, fill=_theme.VERMILION))
    if line.time_limit is not None:
        parts.append(_path(f"M{x(axes.time.of(line.time_limit))} {_TOP}V{_BOTTOM}", **_LIMIT))
    sizes = {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "width": _WIDTH, "height": _HEIGHT}
    names = {"role": "img", "aria_label": line.title, "font_family": _theme.FONT}
    return element("svg", *parts, xmlns="http://www.w3.org/2000/svg", **sizes, **names)


def _path(d: str, **style: object) -> Safe:
    return element("path", d=d, **{"fill": "none", **style})


def _text(x: float, y: float, text: str, **style: object) -> Safe:
    # XML 1.0 does not allow control characters, not even escaped.
    printable = "".join(c if c.isprintable() else " " for c in text)
    return element("text", printable, x=x, y=y, **{"font_size": 11, "fill": _theme.TEXT, **style})
