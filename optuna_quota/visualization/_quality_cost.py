"""Objective value against cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
import math
from typing import NamedTuple

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota._analysis.pareto import cost_front
from optuna_quota._resources import format_amount, get_resource
from optuna_quota.visualization import _theme
from optuna_quota.visualization._data import FinishedTrial, StudyTrials
from optuna_quota.visualization._theme import Figure, Point


class _Priced(NamedTuple):
    """A completed trial with its cost in SI base units and its value."""

    trial: FinishedTrial
    cost: float
    value: float


def plot_quality_cost(
    study: Study,
    *,
    resource: str = "wall_time",
    target: Callable[[FrozenTrial], float] | None = None,
    target_name: str = "Objective value",
    maximize: bool | None = None,
) -> Figure:
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
    trials = StudyTrials(study)
    if maximize is None:
        maximize = study.directions[0].name == "MAXIMIZE"
    target = target or partial(_value, 0)
    return quality_cost_figure(trials, resource, target, target_name, maximize)


def _value(index: int, trial: FrozenTrial) -> float:
    return float(trial.values[index])


def quality_cost_figures(trials: StudyTrials) -> dict[str, Figure]:
    """Return quality against wall time by name, one figure for each objective."""
    directions, made = trials.study.directions, {}
    several = len(directions) > 1
    for index, direction in enumerate(directions):
        made[f"quality_cost_{index}" if several else "quality_cost"] = quality_cost_figure(
            trials,
            "wall_time",
            partial(_value, index),
            f"Objective {index}" if several else "Objective value",
            direction.name == "MAXIMIZE",
        )
    return made


def quality_cost_figure(
    trials: StudyTrials,
    resource: str,
    target: Callable[[FrozenTrial], float],
    target_name: str,
    maximize: bool,
) -> Figure:
    name = "time" if resource == "wall_time" else get_resource(resource).title
    title = f"Quality against {name}"
    priced = [
        _Priced(trial, trial.amounts[resource], target(trial.trial))
        for trial in trials.finished
        if trial.outcome == "completed" and resource in trial.amounts and trial.trial.values
    ]
    priced = [each for each in priced if math.isfinite(each.value)]
    if not priced:
        reason = f"No completed trial has both a value and a known {resource}."
        return _theme.empty_figure(title, reason)
    unit = _theme.unit_for(resource, [each.cost for each in priced])
    costs, values = [unit.of(each.cost) for each in priced], [each.value for each in priced]
    log_cost, log_value = _theme.use_log_scale(costs, 20), _theme.use_log_scale(values)
    cost_range = (
        _theme.padded_range(costs, log=True) if log_cost else (0.0, max(costs) * 1.06 or 1.0)
    )
    sign = -1.0 if maximize else 1.0
    places = cost_front(np.array([p.cost for p in priced]), sign * np.array(values))
    front = [priced[i] for i in places]
    on_front = {each.trial.number for each in front}
    others = [each for each in priced if each.trial.number not in on_front]
    groups = {
        ("completed", _theme.OUTCOMES["completed"]): others,
        ("on the front", _theme.OutcomeStyle(_theme.VERMILION, "diamond")): front,
    }
    front_x = [unit.of(each.cost) for each in front] + [max(costs)]
    front_y = [_theme.significant(each.value) for each in (*front, front[-1])]
    traces = [_theme.line("best at its cost", _theme.VERMILION, front_x, front_y, shape="hv")]
    for (label, style), group in groups.items():
        points = [
            Point(
                unit.of(cost),
                _theme.significant(value),
                trial.hover(resource, f"value {value:.6g}"),
            )
            for trial, cost, value in group
        ]
        if points:
            traces.append(_theme.markers(f"{label} ({len(points)})", style, points))
    better = "more is better" if maximize else "less is better"
    return _theme.make_figure(
        title,
        _finding(resource, priced, front),
        traces,
        _theme.axis(
            unit.axis_title(f"{name[:1].upper()}{name[1:]} of a trial"), cost_range, log=log_cost
        ),
        _theme.axis(
            f"{target_name} ({better})",
            _theme.padded_range(values, log=log_value),
            log=log_value,
        ),
    )


def _finding(resource: str, priced: Sequence[_Priced], front: Sequence[_Priced]) -> str:
    best = front[-1]
    finding = f"the best, trial {best.trial.number}, took {format_amount(resource, best.cost)}"
    # Near the best: within 1% of the distance from the best to the median value.
    median = sorted(each.value for each in priced)[len(priced) // 2]
    near = next(p for p in front if abs(p.value - best.value) <= 0.01 * abs(median - best.value))
    if near is best:
        return finding
    share = near.cost / best.cost if best.cost else 1.0
    return f"{finding}; trial {near.trial.number} comes within 1% of it for {share:.0%} of that"
