"""Use of each trial by outcome, with the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna_quota._resources import format_amount
from optuna_quota.visualization import _style
from optuna_quota.visualization._chart import Axis
from optuna_quota.visualization._chart import Chart
from optuna_quota.visualization._chart import Level
from optuna_quota.visualization._chart import Mark
from optuna_quota.visualization._chart import Panel
from optuna_quota.visualization._chart import Points
from optuna_quota.visualization._draw import figure_of
from optuna_quota.visualization._rows import hover_of
from optuna_quota.visualization._rows import limits_of
from optuna_quota.visualization._rows import Row
from optuna_quota.visualization._rows import rows_of
from optuna_quota.visualization._ticks import ends


if TYPE_CHECKING:
    from optuna.study import Study
    import plotly.graph_objects as go


class _Use(NamedTuple):
    number: int
    outcome: str
    amount: float
    hover: str
    low: float | None = None
    high: float | None = None


class _UsageInfo(NamedTuple):
    resource: str
    uses: list[_Use]
    limit: float | None
    n_trials: int


def plot_usage(study: Study, *, resource: str = "memory") -> go.Figure:
    """Plot what each trial used, by outcome, with the limit in force.

    A terminated trial points up: its usage is a lower bound. A rejected one, which never ran,
    stands at what was projected, with its interval.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_usage

            plot_usage(study, resource="memory").show()

    Args:
        study: The study.
        resource: What to show: ``"memory"``, ``"wall_time"``, ``"cpu_time"``, ``"gpu_memory"``,
            ``"gpu_time"``, ``"energy"`` or the name of a meter of one's own.

    Raises:
        ImportError: If plotly is not installed.
    """
    return figure_of(_usage_chart(_get_usage_info(study, resource)))


def _get_usage_info(study: Study, resource: str, rows: Sequence[Row] | None = None) -> _UsageInfo:
    found = rows_of(study) if rows is None else rows
    uses = [use for use in (_use(row, resource) for row in found) if use is not None]
    return _UsageInfo(resource, uses, limits_of(study).get(resource), len(found))


def _use(row: Row, resource: str) -> _Use | None:
    if resource in row.amounts:
        return _Use(row.number, row.outcome, row.amounts[resource], hover_of(row, resource))
    projected = row.record.footprint.get(resource)
    if row.outcome != "rejected" or projected is None:
        return None
    hover = hover_of(row, resource).replace(
        "not run", f"projected {format_amount(resource, projected.median)}", 1
    )
    return _Use(row.number, row.outcome, projected.median, hover, projected.lower, projected.upper)


def _usage_chart(info: _UsageInfo) -> Chart:
    title = f"{_style.title_of(info.resource)} of each trial"
    if not info.uses:
        return Chart(title, f"No finished trial has its {info.resource} recorded.")
    levels = [info.limit] if info.limit is not None else []
    amounts = [use.amount for use in info.uses]
    unit = _style.unit_for(info.resource, amounts)
    log = _style.spreads([*amounts, *(v for v in levels if v <= 3 * max(amounts))], 15)
    low, high = ends(amounts, log=log, levels=levels)
    axis = Axis(
        unit.axis(_style.title_of(info.resource)), log=log, low=unit.of(low), high=unit.of(high)
    )
    panel = Panel(
        Axis("Trial"),
        axis,
        _marks(info, unit),
        tuple(limit_level(info.resource, v, unit) for v in levels),
    )
    return Chart(title, _finding(info), (panel,))


def _marks(info: _UsageInfo, unit: _style.Unit) -> tuple[Mark, ...]:
    return tuple(
        _points(outcome, [use for use in info.uses if use.outcome == outcome], unit)
        for outcome in _style.OUTCOME_COLORS
        if any(use.outcome == outcome for use in info.uses)
    )


def _points(outcome: str, uses: list[_Use], unit: _style.Unit) -> Points:
    ranged = outcome == "rejected"
    return Points(
        f"{outcome} ({len(uses)})",
        _style.OUTCOME_COLORS[outcome],
        _style.OUTCOME_SYMBOLS[outcome],
        [use.number for use in uses],
        [unit.of(use.amount) for use in uses],
        [use.hover for use in uses],
        [unit.of(use.amount if use.low is None else use.low) for use in uses] if ranged else (),
        [unit.of(use.amount if use.high is None else use.high) for use in uses] if ranged else (),
    )


def limit_level(resource: str, limit: float, unit: _style.Unit) -> Level:
    """Return the line of a limit, labelled with it."""
    return Level(f"limit {format_amount(resource, limit)}", _style.VERMILION, unit.of(limit))


def _finding(info: _UsageInfo) -> str:
    ran = [use.amount for use in info.uses if use.outcome != "rejected"]
    parts = []
    if ran:
        most = max(ran)
        parts.append(
            f"median {format_amount(info.resource, sorted(ran)[len(ran) // 2])}, "
            f"most {format_amount(info.resource, most)}"
        )
        if info.limit is not None:
            over = sum(amount > info.limit for amount in ran)
            parts.append(f"{over} of {len(ran)} over the limit")
    unknown = info.n_trials - len(info.uses)
    if unknown:
        parts.append(f"{unknown} without a measurement")
    return "; ".join(parts)
