"""Memory over time of one trial, with its limit and breach."""

from __future__ import annotations

from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna_quota._resources import format_amount
from optuna_quota.visualization import _style
from optuna_quota.visualization._chart import Axis
from optuna_quota.visualization._chart import Chart
from optuna_quota.visualization._chart import Line
from optuna_quota.visualization._chart import Mark
from optuna_quota.visualization._chart import Panel
from optuna_quota.visualization._chart import Points
from optuna_quota.visualization._draw import figure_of
from optuna_quota.visualization._rows import limits_of
from optuna_quota.visualization._rows import Row
from optuna_quota.visualization._rows import rows_of
from optuna_quota.visualization._ticks import ends
from optuna_quota.visualization._usage import limit_level


if TYPE_CHECKING:
    from optuna.study import Study
    import plotly.graph_objects as go

    from optuna_quota._resources import Breach


class _TimelineInfo(NamedTuple):
    number: int
    outcome: str
    seconds: list[float]
    memory: list[float]
    limit: float | None
    breach: Breach | None
    reason: str | None


def plot_timeline(study: Study, number: int) -> go.Figure:
    """Plot the memory of one trial over its time, with its limit and where it breached one.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_timeline

            plot_timeline(study, number=17).show()

    Args:
        study: The study.
        number: The trial's number.

    Raises:
        ValueError: If the study has no finished trial of that number.
        ImportError: If plotly is not installed.
    """
    return figure_of(_timeline_chart(_get_timeline_info(study, number)))


def _get_timeline_info(study: Study, number: int) -> _TimelineInfo:
    row = next((row for row in rows_of(study) if row.number == number), None)
    if row is None:
        raise ValueError(f"`number` must be that of a finished trial but got {number!r}.")
    return timeline_info(row, limits_of(study).get("memory"))


def timeline_info(row: Row, limit: float | None) -> _TimelineInfo:
    """Return what is drawn of one trial; the limit it breached counts before the study's."""
    breach = row.record.breach
    if breach is not None and breach.resource == "memory":
        limit = breach.limit
    line = list(row.record.timeline)
    # What was read once the processes were gone is not the trial's.
    while line and line[-1][1] <= 0:
        line.pop()
    seconds = [t for t, _ in line]
    memory = [m for _, m in line]
    return _TimelineInfo(
        row.number, row.outcome, seconds, memory, limit, breach, row.record.reason
    )


def _timeline_chart(info: _TimelineInfo) -> Chart:
    title = f"Memory of trial {info.number} over time"
    if not info.memory:
        return Chart(title, "This trial has no timeline recorded.")
    levels = [info.limit] if info.limit is not None else []
    observed = [*info.memory, *_observed(info)]
    unit = _style.unit_for("memory", observed)
    clock = _style.unit_for("wall_time", [*info.seconds, *_breach_time(info)])
    low, high = ends(observed, levels=levels)
    ending = 1.04 * max([*info.seconds, *_breach_time(info)]) or 1.0
    panel = Panel(
        Axis(clock.axis("Time since the start"), low=0.0, high=clock.of(ending)),
        Axis(unit.axis("Memory"), low=unit.of(low), high=unit.of(high)),
        _marks(info, unit, clock),
        tuple(limit_level("memory", v, unit) for v in levels),
    )
    return Chart(title, _said(info), (panel,))


def _observed(info: _TimelineInfo) -> list[float]:
    if info.breach is None or info.breach.resource != "memory":
        return []
    return [info.breach.observed]


def _breach_time(info: _TimelineInfo) -> list[float]:
    return [info.breach.seconds] if info.breach is not None else []


def _marks(info: _TimelineInfo, unit: _style.Unit, clock: _style.Unit) -> tuple[Mark, ...]:
    seconds, memory = list(info.seconds), list(info.memory)
    breached = _breach_place(info)
    if breached is not None and breached[0] > seconds[-1]:
        seconds.append(breached[0])
        memory.append(breached[1])
    line = Line(
        "memory", _style.BLUE, [clock.of(t) for t in seconds], [unit.of(m) for m in memory]
    )
    if breached is None:
        return (line,)
    x, y = breached
    hover = f"breach {format_amount('wall_time', x)} after the start"
    return (
        line,
        Points("breach", _style.VERMILION, "triangle-up", [clock.of(x)], [unit.of(y)], [hover]),
    )


def _breach_place(info: _TimelineInfo) -> tuple[float, float] | None:
    breach = info.breach
    if breach is None:
        return None
    if breach.resource == "memory":
        return breach.seconds, breach.observed
    # The limit of another resource: mark when, on the memory line.
    gaps = [abs(seconds - breach.seconds) for seconds in info.seconds]
    return breach.seconds, info.memory[gaps.index(min(gaps))]


def _said(info: _TimelineInfo) -> str:
    if info.reason and info.outcome == "terminated":
        return info.reason if len(info.reason) <= 110 else info.reason[:109] + "…"
    return f"{info.outcome}, peak {format_amount('memory', max(info.memory))}"
