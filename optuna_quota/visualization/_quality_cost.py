"""Objective value against cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
from typing import NamedTuple, TYPE_CHECKING

from optuna_quota._resources import format_amount
from optuna_quota.visualization import _plotly, _theme
from optuna_quota.visualization._data import finished_trials, FinishedTrial


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
    """Plot the value of each completed trial against its cost, with the Pareto front.

    A trial is on the front when every trial that costs as little or less is worse.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_quality_cost

            plot_quality_cost(study, resource="cpu_time").show()

    Args:
        study: The study.
        resource: The cost.
        target: What to plot instead of the objective value; required with several objectives.
        target_name: The target's name on the axis.
        maximize: Whether more of the target is better; the study's direction unless given.

    Raises:
        ValueError: If ``target`` is None and the study has several objectives.
        ImportError: If plotly is not installed.
    """
    if target is None and len(study.directions) > 1:
        raise ValueError(
            "`target` must be given for a study of several objectives but got None: "
            "for example `target=lambda t: t.values[0]`."
        )
    return quality_cost_figure(_get_quality_info(study, resource, target, target_name, maximize))


def _get_quality_info(
    study: Study,
    resource: str,
    target: Callable[[FrozenTrial], float] | None = None,
    target_name: str = "Objective value",
    maximize: bool | None = None,
    trials: Sequence[FinishedTrial] | None = None,
) -> _QualityInfo:
    priced = []
    for trial in finished_trials(study) if trials is None else trials:
        cost = trial.amounts.get(resource)
        if trial.outcome != "completed" or cost is None:
            continue
        value = float(target(trial.trial)) if target else _first_value(trial.trial)
        if math.isfinite(value):
            hover = trial.hover(resource, f"value {value:.6g}")
            priced.append(_Priced(trial.number, cost, value, hover))
    upward = study.directions[0].name == "MAXIMIZE" if maximize is None else maximize
    return _QualityInfo(resource, target_name, upward, priced, _front(priced, upward))


def _first_value(trial: FrozenTrial) -> float:
    """Return the first objective value, NaN where there is none."""
    return trial.values[0] if trial.values else math.nan


def _front(trials: Sequence[_Priced], maximize: bool) -> list[_Priced]:
    """Return the Pareto front, the cheapest first, one trial of those that are equal."""
    sign = -1.0 if maximize else 1.0
    front: list[_Priced] = []
    for trial in sorted(trials, key=lambda t: (t.cost, sign * t.value, t.number)):
        if not front or sign * trial.value < sign * front[-1].value:
            front.append(trial)
    return front


def quality_cost_figure(info: _QualityInfo) -> go.Figure:
    """Return the figure of :func:`plot_quality_cost`."""
    name = "Time" if info.resource == "wall_time" else _theme.resource_title(info.resource)
    title = f"Quality against {name if name[1].isupper() else name[0].lower() + name[1:]}"
    if not info.trials:
        reason = f"No completed trial has both a value and a known {info.resource}."
        return _plotly.empty_figure(title, reason)
    unit = _theme.unit_for(info.resource, [t.cost for t in info.trials])
    costs = [unit.of(t.cost) for t in info.trials]
    log_cost = _theme.use_log_scale(costs, 20)
    cost_range = (
        _theme.padded_range(costs, log=True) if log_cost else (0.0, max(costs) * 1.06 or 1.0)
    )
    values = [t.value for t in info.trials]
    log_value = _theme.use_log_scale(values)
    front_x = [unit.of(t.cost) for t in info.front] + [max(costs)]
    front_y = [_theme.significant(t.value) for t in info.front]
    on_front = {t.number for t in info.front}
    groups = {
        ("completed", _theme.OUTCOMES["completed"]): [
            t for t in info.trials if t.number not in on_front
        ],
        ("on the front", _theme.OutcomeStyle(_theme.VERMILION, "diamond")): info.front,
    }
    traces = [
        _plotly.line(
            "best at its cost", _theme.VERMILION, front_x, [*front_y, front_y[-1]], shape="hv"
        )
    ]
    traces += [
        _plotly.markers(
            f"{label} ({len(trials)})",
            style,
            [unit.of(t.cost) for t in trials],
            [_theme.significant(t.value) for t in trials],
            [t.hover for t in trials],
        )
        for (label, style), trials in groups.items()
        if trials
    ]
    better = "more is better" if info.maximize else "less is better"
    return _plotly.make_figure(
        title,
        _finding(info),
        traces,
        _plotly.axis(unit.axis_title(f"{name} of a trial"), cost_range, log=log_cost),
        _plotly.axis(
            f"{info.target_name} ({better})",
            _theme.padded_range(values, log=log_value),
            log=log_value,
        ),
    )


def _finding(info: _QualityInfo) -> str:
    best = info.front[-1]
    finding = f"the best, trial {best.number}, took {format_amount(info.resource, best.cost)}"
    # Near the best: within 1% of the distance from the best to the median value.
    median = sorted(t.value for t in info.trials)[len(info.trials) // 2]
    near = next(
        t for t in info.front if abs(t.value - best.value) <= 0.01 * abs(median - best.value)
    )
    if near.number == best.number:
        return finding
    share = near.cost / best.cost if best.cost else 1.0
    return f"{finding}; trial {near.number} comes within 1% of it for {100 * share:.0f}% of that"
