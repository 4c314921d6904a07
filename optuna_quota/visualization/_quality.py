"""Quality against cost."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna_quota._resources import format_amount
from optuna_quota.visualization import _style
from optuna_quota.visualization._chart import Axis
from optuna_quota.visualization._chart import Chart
from optuna_quota.visualization._chart import Line
from optuna_quota.visualization._chart import Panel
from optuna_quota.visualization._chart import Points
from optuna_quota.visualization._draw import figure_of
from optuna_quota.visualization._rows import check_target
from optuna_quota.visualization._rows import hover_of
from optuna_quota.visualization._rows import Row
from optuna_quota.visualization._rows import rows_of


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    import plotly.graph_objects as go


class _Priced(NamedTuple):
    number: int
    cost: float
    value: float
    hover: str


class _QualityInfo(NamedTuple):
    resource: str
    target_name: str
    maximize: bool
    trials: list[_Priced]
    front: list[_Priced]


def plot_quality_cost(
    study: Study,
    *,
    resource: str = "wall_time",
    target: Callable[[FrozenTrial], float] | None = None,
    target_name: str = "Objective value",
    maximize: bool | None = None,
) -> go.Figure:
    """Plot each completed trial's value against what it cost, with the front of the best.

    A trial on the front (Pareto front) is one that no cheaper trial equals or betters.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_quality_cost

            plot_quality_cost(study, resource="cpu_time").show()

    Args:
        study: The study.
        resource: The cost.
        target: What to plot of a trial in place of its value; needed with several objectives.
        target_name: What it is called on the axis.
        maximize: Whether more of the target is better; the study's direction unless given.

    Raises:
        ValueError: If ``target`` is None and the study has several objectives.
        ImportError: If plotly is not installed.
    """
    check_target(study, target)
    info = _get_quality_info(study, resource, target, target_name, maximize)
    return figure_of(_quality_chart(info))


def _get_quality_info(
    study: Study,
    resource: str,
    target: Callable[[FrozenTrial], float] | None = None,
    target_name: str = "Objective value",
    maximize: bool | None = None,
    rows: Sequence[Row] | None = None,
) -> _QualityInfo:
    found = rows_of(study) if rows is None else rows
    value_of = target if target is not None else _value
    priced = [_priced(row, resource, value_of) for row in found if row.outcome == "completed"]
    trials = [p for p in priced if p is not None]
    upward = study.directions[0].name == "MAXIMIZE" if maximize is None else maximize
    return _QualityInfo(resource, target_name, upward, trials, front_of(trials, upward))


def _value(trial: FrozenTrial) -> float:
    return trial.values[0] if trial.values else math.nan


def _priced(row: Row, resource: str, target: Callable[[FrozenTrial], float]) -> _Priced | None:
    cost = row.amounts.get(resource)
    value = float(target(row.trial))
    if cost is None or not math.isfinite(value):
        return None
    return _Priced(row.number, cost, value, f"{hover_of(row, resource)}\nvalue {value:.6g}")


def front_of(trials: Sequence[_Priced], maximize: bool) -> list[_Priced]:
    """Return the trials that no cheaper one equals or betters, the cheapest first."""
    sign = -1.0 if maximize else 1.0
    front: list[_Priced] = []
    for trial in sorted(trials, key=lambda t: (t.cost, sign * t.value, t.number)):
        if not front or sign * trial.value < sign * front[-1].value:
            front.append(trial)
    return front


def _quality_chart(info: _QualityInfo) -> Chart:
    what = _style.title_of(info.resource).replace("Wall time", "Time")
    title = (
        f"Quality against {what[0].lower()}{what[1:]}"
        if what != "Time"
        else "Quality against time"
    )
    if not info.trials:
        return Chart(title, f"No completed trial has both a value and its {info.resource}.")
    costs = [t.cost for t in info.trials]
    values = [t.value for t in info.trials]
    unit = _style.unit_for(info.resource, costs)
    better = "more is better" if info.maximize else "less is better"
    panel = Panel(
        _cost_axis(unit.axis(f"{what} of a trial"), [unit.of(c) for c in costs]),
        _value_axis(f"{info.target_name} ({better})", values),
        (_front_line(info, unit, max(costs)), *_points(info, unit)),
    )
    return Chart(title, _finding(info), (panel,))


def _cost_axis(title: str, costs: Sequence[float]) -> Axis:
    if _style.spreads(costs, 20):
        return Axis(title, log=True, low=min(costs) / 1.2, high=max(costs) * 1.2)
    return Axis(title, low=0.0, high=max(costs) * 1.06 or 1.0)


def _value_axis(title: str, values: Sequence[float]) -> Axis:
    if _style.spreads(values, 50):
        return Axis(title, log=True, low=min(values) / 1.3, high=max(values) * 1.3)
    pad = (max(values) - min(values)) * 0.06 or abs(max(values)) * 0.1 or 1.0
    return Axis(title, low=min(values) - pad, high=max(values) + pad)


def _front_line(info: _QualityInfo, unit: _style.Unit, most: float) -> Line:
    xs = [unit.of(t.cost) for t in info.front] + [unit.of(most)]
    ys = [_style.significant(t.value) for t in info.front]
    return Line("best for its cost", _style.VERMILION, xs, [*ys, ys[-1]], step=True)


def _points(info: _QualityInfo, unit: _style.Unit) -> tuple[Points, ...]:
    leaders = {t.number for t in info.front}
    groups = (
        ("completed", _style.BLUE, "circle", [t for t in info.trials if t.number not in leaders]),
        ("on the front", _style.VERMILION, "diamond", info.front),
    )
    return tuple(
        Points(
            f"{name} ({len(trials)})",
            color,
            symbol,
            [unit.of(t.cost) for t in trials],
            [_style.significant(t.value) for t in trials],
            [t.hover for t in trials],
        )
        for name, color, symbol, trials in groups
        if trials
    )


def _finding(info: _QualityInfo) -> str:
    best = info.front[-1]
    cost = format_amount(info.resource, best.cost)
    said = f"the best, trial {best.number}, took {cost}"
    if len(info.front) < 2:
        return said
    near = _near(info)
    if near is None or near.number == best.number:
        return said
    share = near.cost / best.cost if best.cost else 1.0
    return f"{said}; trial {near.number} comes within 1% of it for {100 * share:.0f}% of that"


def _near(info: _QualityInfo) -> _Priced | None:
    # Within 1% of the distance between the best and the median value of all trials.
    best = info.front[-1].value
    middle = sorted(t.value for t in info.trials)[len(info.trials) // 2]
    allowed = 0.01 * abs(middle - best)
    return next((t for t in info.front if abs(t.value - best) <= allowed), None)
