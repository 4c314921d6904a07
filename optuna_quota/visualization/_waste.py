"""What the study spent, by outcome."""

from __future__ import annotations

from typing import Any
from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import OUTCOMES
from optuna_quota.visualization import _style
from optuna_quota.visualization._chart import Axis
from optuna_quota.visualization._chart import Chart
from optuna_quota.visualization._draw import axis_layout
from optuna_quota.visualization._draw import base_layout
from optuna_quota.visualization._draw import figure_of
from optuna_quota.visualization._imports import import_plotly
from optuna_quota.visualization._rows import Row
from optuna_quota.visualization._rows import rows_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna.study import Study
    import plotly.graph_objects as go


class _WasteInfo(NamedTuple):
    trials: dict[str, int]
    spent: dict[str, dict[str, float]]

    def share(self, resource: str, outcome: str) -> float:
        """Return the share of a resource's total that an outcome took, from 0 to 1."""
        total = sum(self.spent[resource].values())
        return self.spent[resource].get(outcome, 0.0) / total if total else 0.0


def plot_waste(study: Study) -> go.Figure:
    """Plot which share of the time and energy went to trials of each outcome.

    What pruned, terminated and failed trials took bought no value: it is the waste.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_waste

            plot_waste(study).show()

    Args:
        study: The study.

    Raises:
        ImportError: If plotly is not installed.
    """
    return waste_figure(_get_waste_info(study))


def _get_waste_info(study: Study, rows: Sequence[Row] | None = None) -> _WasteInfo:
    found = rows_of(study) if rows is None else rows
    trials: dict[str, int] = {o: sum(row.outcome == o for row in found) for o in OUTCOMES}
    spent: dict[str, dict[str, float]] = {}
    for resource in _totals(found):
        spent[resource] = {
            o: sum(row.amounts.get(resource, 0.0) for row in found if row.outcome == o)
            for o in OUTCOMES
        }
    return _WasteInfo(trials, {name: s for name, s in spent.items() if sum(s.values()) > 0})


def _totals(rows: Sequence[Row]) -> list[str]:
    known = {name for row in rows for name in row.amounts}
    usual = ("wall_time", "cpu_time", "gpu_time", "energy")
    return [name for name in usual if name in known and not get_resource(name).peak]


def waste_figure(info: _WasteInfo) -> go.Figure:
    """Return the figure: one bar for each resource and one for the number of trials."""
    title = "Where the budget went"
    if not info.spent:
        return figure_of(Chart(title, "No finished trial has its use of time recorded."))
    go = import_plotly()
    layout = base_layout(title, waste_finding(info))
    layout.update(barmode="stack", bargap=0.35)
    layout["legend"]["traceorder"] = "normal"
    layout["xaxis"] = {**axis_layout(Axis("Share (%)", low=0, high=100)), "dtick": 20}
    layout["yaxis"] = {**axis_layout(Axis("")), "autorange": "reversed", "ticks": ""}
    return go.Figure({"data": _bars(info), "layout": layout})


def _bars(info: _WasteInfo) -> list[dict[str, Any]]:
    names = ["Trials", *(label(resource) for resource in info.spent)]
    count = sum(info.trials.values())
    bars = []
    for outcome in OUTCOMES:
        if not info.trials[outcome]:
            continue
        shares = [info.trials[outcome] / count] + [info.share(r, outcome) for r in info.spent]
        amounts = [f"{info.trials[outcome]:,} of {count:,} trials"] + [
            format_amount(r, s[outcome]) for r, s in info.spent.items()
        ]
        bars.append(_bar(outcome, names, [100 * s for s in shares], amounts))
    return bars


def _bar(
    outcome: str, names: list[str], shares: list[float], amounts: list[str]
) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": outcome,
        "y": names,
        "x": [_style.significant(s, 4) for s in shares],
        "width": 0.6,
        "marker": {"color": _style.OUTCOME_COLORS[outcome], "line": {"width": 1, "color": "#FFF"}},
        "text": [f"{s:.0f}%" if s >= 5 else "" for s in shares],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "customdata": amounts,
        "hovertemplate": f"{outcome}: %{{x:.1f}}%, %{{customdata}}<extra></extra>",
    }


def label(resource: str) -> str:
    """Return what a total over the trials is called: wall times add up to trial time."""
    return "Trial time" if resource == "wall_time" else _style.title_of(resource)


def waste_finding(info: _WasteInfo) -> str:
    """Return in a sentence what went to trials that gave no value, by trial time."""
    resource = next(iter(info.spent))
    parts = [
        f"{100 * info.share(resource, o):.0f}% on {o}"
        for o in ("terminated", "pruned", "failed")
        if info.spent[resource][o] > 0
    ]
    total = format_amount(resource, sum(info.spent[resource].values()))
    what = label(resource).lower()
    return f"{total} of {what}" + (
        f": {', '.join(parts)} trials" if parts else ", none of it wasted"
    )
