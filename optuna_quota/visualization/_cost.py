"""What is left of each total quota, what trials of each outcome spent, and value against cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, pairwise
import math
import time
from typing import Any, NamedTuple

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _optuna
from optuna_quota._analysis.study_analysis import StudyAnalysis, trials_of
from optuna_quota._analysis.study_trials import by_outcome, FinishedTrial, StudyTrials
from optuna_quota._ledger.protocol import study_stamp
from optuna_quota._ledger.status import stored_quota
from optuna_quota._ledger.totals import QuotaTotals, read_entry
from optuna_quota._resources import CHARGED_RESOURCES, format_amount, get_resource, TOTAL_RESOURCES
from optuna_quota._units import counted
from optuna_quota._utilization.data import cost_front
from optuna_quota.visualization import _theme
from optuna_quota.visualization._theme import Figure, Point


# Fewer trials give no projection.
_MIN_TRIALS = 5
_STEPS = 24
_MAX_POINTS = 300
# Two-sided 90% of the normal distribution.
_Z90 = 1.645


class _Projected(NamedTuple):
    """Share of the quota left after ``trials`` more, from 0 to 1."""

    trials: int
    lower: float
    median: float
    upper: float


class _Curve(NamedTuple):
    """What was used of a total quota after 0, 1, 2, … trials, and what is projected."""

    resource: str
    quota: float
    used: list[float]
    ahead: list[_Projected]

    @property
    def left(self) -> list[float]:
        """Share left after 0, 1, 2, … trials; negative where the quota was exceeded."""
        return [1 - used / self.quota for used in self.used]

    @property
    def trials_left(self) -> float:
        """How many more trials the quota lasts for; infinite where that is unknown."""
        n = len(self.used) - 1
        mean = self.used[-1] / n if n >= _MIN_TRIALS else 0.0
        return (self.quota - self.used[-1]) / mean if mean > 0 else math.inf


def plot_burn_down(study: Study | StudyAnalysis) -> Figure:
    """Plot what is left of each total quota after each trial, and how long it will last.

    The projection assumes that the next trials cost what the previous ones did: after k more
    trials, usage grows by k·m with variance s²·(k + k²/n), where m and s are the mean and the
    standard deviation of the n trials so far. The band holds 90%.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_burn_down

            plot_burn_down(study).show()

    Args:
        study: The study, or its report; its quota is read from its attributes.

    Raises:
        ImportError: If plotly is not installed.
    """
    trials = trials_of(study)
    title, curves = "Quota left", quota_curves(trials)
    if not curves:
        return _theme.empty_figure(title, "No total quota is set for this study.")
    if len(curves[0].used) == 1:
        return _theme.empty_figure(title, "No trial has finished yet.")
    lowest = min(0.0, *(100 * min(curve.left) for curve in curves))
    return _theme.make_figure(
        title,
        _burn_down_finding(curves),
        [t for curve, color in zip(curves, cycle(_theme.CYCLE)) for t in _traces(curve, color)],
        _theme.axis("Trials finished"),
        _theme.axis("Left (%)", (_theme.significant(lowest * 1.1), 104)),
    )


def quota_curves(trials: StudyTrials) -> list[_Curve]:
    """Return a curve for each total quota, as the ledger counts usage."""
    quota, stamp = stored_quota(trials.study.user_attrs), study_stamp(trials.study.study_name)
    totals = QuotaTotals(quota, trials.limits)
    used = [totals.used(time.time())]
    for trial in sorted(trials.finished, key=_end):
        trial_id = _optuna.trial_id_of(trial.trial)
        totals.update([read_entry(trial.trial, trial_id, quota, study=stamp)], ())
        if trial.outcome == "rejected":
            # No trial of the plot, but it may have used something before.
            used.pop()
        used.append(totals.used(time.time()))
    amounts = quota.amounts()
    most = amounts.get("n_trials", math.inf) - used[-1]["n_trials"]
    curves = []
    for name in TOTAL_RESOURCES:
        if name in amounts:
            line = [each[name] for each in used]
            curves.append(_Curve(name, amounts[name], line, _project(line, amounts[name], most)))
    return curves


def _end(trial: FinishedTrial) -> tuple[float, int]:
    end = trial.trial.datetime_complete
    return math.inf if end is None else end.timestamp(), trial.number


def _project(used: Sequence[float], quota: float, most: float) -> list[_Projected]:
    costs = [b - a for a, b in pairwise(used)]
    n, left = len(costs), quota - used[-1]
    # Not `math.fsum` and not `**`, which raise where the result exceeds the largest float.
    mean = sum(costs) / n if n else 0.0
    if n < _MIN_TRIALS or mean <= 0 or left <= 0 or most < 1:
        return []
    deviation = math.sqrt(sum((c - mean) * (c - mean) for c in costs) / (n - 1))
    until = math.ceil(min(most, left / mean, max(20, 3 * n)))
    projected = []
    for k in sorted({round(i * until / _STEPS) for i in range(_STEPS + 1)}):
        spread = _Z90 * deviation * math.sqrt(k + k * k / n)
        bounds = (left - k * mean - spread, left - k * mean, left - max(0.0, k * mean - spread))
        projected.append(_Projected(k, *(min(1.0, max(0.0, b / quota)) for b in bounds)))
    return projected


def _traces(curve: _Curve, color: str) -> list[dict[str, Any]]:
    name, n = _theme.resource_title(curve.resource), len(curve.used) - 1
    x = np.unique(np.linspace(0, n, min(n, _MAX_POINTS) + 1).round().astype(int)).tolist()
    traces = [_theme.line(name, color, x, [_percent(curve.left[i]) for i in x])]
    if curve.ahead:
        x = [n + p.trials for p in curve.ahead]
        bounds = [(_percent(p.lower), _percent(p.upper)) for p in curve.ahead]
        medians = [_percent(p.median) for p in curve.ahead]
        band = _theme.band(f"{name}, 90%", color, x, bounds)
        median = _theme.line(f"{name}, projected", color, x, medians, dash="dot")
        traces += [{**trace, "showlegend": False} for trace in (band, median)]
    return traces


def _percent(share: float) -> float:
    return _theme.significant(100 * share, 4)


def _burn_down_finding(curves: Sequence[_Curve]) -> str:
    first = min(curves, key=lambda c: -math.inf if c.left[-1] <= 0 else c.trials_left)
    name = get_resource(first.resource).title
    used = format_amount(first.resource, first.used[-1])
    share = f"{used} of {format_amount(first.resource, first.quota)} used"
    if first.left[-1] <= 0:
        return f"used up: {name}, {share}"
    if not math.isfinite(first.trials_left):
        return f"{name}: {share}"
    trials = counted(round(first.trials_left), "trial")
    return f"first used up: {name}, in about {trials} (dotted: projected, 90% band)"


# The total of a usage over trials: that of wall times is trial time.
TOTAL_OF = {usage: total for total, usage in CHARGED_RESOURCES.items()}


class Waste(NamedTuple):
    """Trials by outcome, and amounts spent by resource and outcome."""

    trials: dict[str, int]
    spent: dict[str, dict[str, float]]

    def share(self, resource: str, outcome: str) -> float:
        """Return the share of a resource's total that an outcome took, from 0 to 1."""
        total = sum(self.spent[resource].values())
        return self.spent[resource].get(outcome, 0.0) / total if total else 0.0


def plot_waste(study: Study | StudyAnalysis) -> Figure:
    """Plot which share of time and energy went to trials of each outcome.

    The waste is that of pruned, terminated and failed trials, which gave no value.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_waste

            plot_waste(study).show()

    Args:
        study: The study, or its report.

    Raises:
        ImportError: If plotly is not installed.
    """
    trials = trials_of(study)
    title, waste = "Where the budget went", waste_of(trials)
    if not waste.spent:
        return _theme.empty_figure(title, "No finished trial has a known time.")
    x = {**_theme.axis("Share (%)", (0, 100)), "dtick": 20}
    y = {**_theme.axis(""), "autorange": "reversed", "ticks": ""}
    figure = _theme.make_figure(title, waste_finding(waste), _bars(waste), x, y)
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    return figure


def waste_of(trials: StudyTrials) -> Waste:
    """Return what trials of each outcome spent."""
    groups, spent = by_outcome(trials.finished), {}
    for name in TOTAL_OF:
        found = {o: sum(t.amounts.get(name, 0.0) for t in group) for o, group in groups.items()}
        if sum(found.values()) > 0:
            spent[name] = found
    return Waste({outcome: len(group) for outcome, group in groups.items()}, spent)


def _bars(waste: Waste) -> list[dict[str, Any]]:
    names = ["Trials", *(_theme.resource_title(TOTAL_OF[r]) for r in waste.spent)]
    count = sum(waste.trials.values())
    bars = []
    for outcome, trials in waste.trials.items():
        shares = [trials / count, *(waste.share(r, outcome) for r in waste.spent)]
        amounts = [format_amount(r, s[outcome]) for r, s in waste.spent.items()]
        edge = {"width": 1, "color": "#FFFFFF"}
        bar = {
            "type": "bar",
            "orientation": "h",
            "width": 0.6,
            "name": outcome,
            "y": names,
            "x": [_percent(share) for share in shares],
            "marker": {"color": _theme.OUTCOMES[outcome].color, "line": edge},
            "text": [f"{100 * s:.0f}%" if s >= 0.05 else "" for s in shares],
            "textangle": 0,
            "textposition": "inside",
            "insidetextanchor": "middle",
            "customdata": [f"{trials:,} of {count:,} trials", *amounts],
            "hovertemplate": f"{outcome}: %{{x:.1f}}%, %{{customdata}}<extra></extra>",
        }
        bars.append(bar)
    return bars


def waste_finding(waste: Waste) -> str:
    """Return a sentence on the share of the trial time that gave no value."""
    resource = next(iter(waste.spent))
    parts = [
        f"{100 * waste.share(resource, outcome):.0f}% on {outcome}"
        for outcome in ("terminated", "pruned", "preempted", "failed")
        if waste.share(resource, outcome) > 0
    ]
    total = format_amount(resource, sum(waste.spent[resource].values()))
    lost = f": {', '.join(parts)} trials" if parts else ", none of it wasted"
    return f"{total} of {get_resource(TOTAL_OF[resource]).title}{lost}"


class _Priced(NamedTuple):
    """A completed trial with its cost in SI base units and its value."""

    trial: FinishedTrial
    cost: float
    value: float


def plot_quality_cost(
    study: Study | StudyAnalysis,
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
        study: The study, or its report.
        resource: The cost.
        target: What to plot instead of the objective value; required with several objectives.
        target_name: The target's name on the axis.
        maximize: Whether more of the target is better; the study's direction unless given.

    Raises:
        ValueError: If ``target`` is None and the study has several objectives.
        ImportError: If plotly is not installed.
    """
    trials = trials_of(study)
    directions = trials.study.directions
    if target is None and len(directions) > 1:
        raise ValueError(
            "`target` must be given for a study of several objectives but got None: "
            "for example `target=lambda t: t.values[0]`."
        )
    target = target or partial(_value, 0)
    if maximize is None:
        maximize = directions[0].name == "MAXIMIZE"
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
    x_range = (0.0, max(costs) * 1.06 or 1.0)
    if log_cost:
        x_range = _theme.padded_range(costs, log=True)
    losses = -np.array(values) if maximize else np.array(values)
    places = cost_front(np.array([each.cost for each in priced]), losses).tolist()
    front = [priced[i] for i in places]
    others = [each for i, each in enumerate(priced) if i not in places]
    front_x = [unit.of(each.cost) for each in front] + [max(costs)]
    front_y = [_theme.significant(each.value) for each in (*front, front[-1])]
    traces = [_theme.line("best at its cost", _theme.VERMILION, front_x, front_y, shape="hv")]
    on_front = _theme.OutcomeStyle(_theme.VERMILION, "diamond")
    for label, style, group in (
        ("completed", _theme.OUTCOMES["completed"], others),
        ("on the front", on_front, front),
    ):
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
    y_title = f"{target_name} ({'more' if maximize else 'less'} is better)"
    return _theme.make_figure(
        title,
        _front_finding(resource, priced, front),
        traces,
        _theme.axis(
            unit.axis_title(f"{name[0].upper()}{name[1:]} of a trial"), x_range, log=log_cost
        ),
        _theme.axis(y_title, _theme.padded_range(values, log=log_value), log=log_value),
    )


def _value(index: int, trial: FrozenTrial) -> float:
    return float(trial.values[index])


def plot_objectives(report: StudyAnalysis) -> dict[str, Figure]:
    """Return quality against wall time by name, one figure for each objective."""
    directions = report.study.directions
    if len(directions) == 1:
        return {"quality_cost": plot_quality_cost(report)}
    return {
        f"quality_cost_{index}": plot_quality_cost(
            report,
            target=partial(_value, index),
            target_name=f"Objective {index}",
            maximize=direction.name == "MAXIMIZE",
        )
        for index, direction in enumerate(directions)
    }


def _front_finding(resource: str, priced: Sequence[_Priced], front: Sequence[_Priced]) -> str:
    best = front[-1]
    finding = f"the best, trial {best.trial.number}, took {format_amount(resource, best.cost)}"
    # Near the best: within 1% of the distance from the best to the median value.
    median = sorted(each.value for each in priced)[len(priced) // 2]
    near = next(p for p in front if abs(p.value - best.value) <= 0.01 * abs(median - best.value))
    if near is best:
        return finding
    share = near.cost / best.cost if best.cost else 1.0
    return f"{finding}; trial {near.trial.number} comes within 1% of it for {share:.0%} of that"
