"""What is left of each total quota and for how long; what trials of each outcome spent."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
import math
import time
from typing import Any, NamedTuple

from optuna.study import Study

from optuna_quota import _optuna
from optuna_quota._ledger.protocol import study_stamp
from optuna_quota._ledger.status import stored_quota
from optuna_quota._ledger.totals import QuotaTotals, read_entry
from optuna_quota._resources import CHARGED_RESOURCES, format_amount, get_resource, TOTAL_RESOURCES
from optuna_quota._units import counted
from optuna_quota.visualization import _theme
from optuna_quota.visualization._data import by_outcome, FinishedTrial, StudyTrials
from optuna_quota.visualization._theme import Figure


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


def plot_burn_down(study: Study) -> Figure:
    """Plot what is left of each total quota after each trial, and how long it will last.

    The projection assumes that the next trials cost what the previous ones did: after k more
    trials, usage grows by k·m with variance s²·(k + k²/n), where m and s are the mean and the
    standard deviation of the n trials so far. The band holds 90%.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_burn_down

            plot_burn_down(study).show()

    Args:
        study: The study; its quota is read from its attributes.

    Raises:
        ImportError: If plotly is not installed.
    """
    return burn_down_figure(StudyTrials(study))


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


def burn_down_figure(trials: StudyTrials) -> Figure:
    title, curves = "Quota left", quota_curves(trials)
    if not curves:
        return _theme.empty_figure(title, "No total quota is set for this study.")
    if len(curves[0].used) == 1:
        return _theme.empty_figure(title, "No trial has finished yet.")
    lowest = min(0.0, *(100 * min(curve.left) for curve in curves))
    return _theme.make_figure(
        title,
        _finding(curves),
        [trace for i, curve in enumerate(curves) for trace in _traces(curve, i)],
        _theme.axis("Trials finished"),
        _theme.axis("Left (%)", (_theme.significant(lowest * 1.1), 104)),
    )


def _traces(curve: _Curve, index: int) -> list[dict[str, Any]]:
    color = _theme.CYCLE[index % len(_theme.CYCLE)]
    name = _theme.resource_title(curve.resource)
    n, left = len(curve.used) - 1, curve.left
    steps = min(n, _MAX_POINTS)
    x = sorted({round(i * n / max(1, steps)) for i in range(steps + 1)})
    traces = [_theme.line(name, color, x, [_percent(left[i]) for i in x])]
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


def _finding(curves: Sequence[_Curve]) -> str:
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


def plot_waste(study: Study) -> Figure:
    """Plot which share of time and energy went to trials of each outcome.

    The waste is that of pruned, terminated and failed trials, which gave no value.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_waste

            plot_waste(study).show()

    Args:
        study: The study.

    Raises:
        ImportError: If plotly is not installed.
    """
    return waste_figure(StudyTrials(study))


def waste_of(trials: StudyTrials) -> Waste:
    """Return what trials of each outcome spent."""
    groups = by_outcome(trials.finished)
    spent = {
        name: {o: sum(t.amounts.get(name, 0.0) for t in group) for o, group in groups.items()}
        for name in TOTAL_OF
    }
    counts = {outcome: len(group) for outcome, group in groups.items()}
    return Waste(counts, {name: s for name, s in spent.items() if sum(s.values()) > 0})


def waste_figure(trials: StudyTrials) -> Figure:
    """Return the figure of :func:`plot_waste`: a bar for the trials and one for each resource."""
    title, waste = "Where the budget went", waste_of(trials)
    if not waste.spent:
        return _theme.empty_figure(title, "No finished trial has a known time.")
    x = {**_theme.axis("Share (%)", (0, 100)), "dtick": 20}
    y = {**_theme.axis(""), "autorange": "reversed", "ticks": ""}
    figure = _theme.make_figure(title, waste_finding(waste), _bars(waste), x, y)
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    return figure


def _bars(waste: Waste) -> list[dict[str, Any]]:
    names = ["Trials", *(_theme.resource_title(TOTAL_OF[r]) for r in waste.spent)]
    count = sum(waste.trials.values())
    bars = []
    for outcome, trials in waste.trials.items():
        shares = [trials / count, *(waste.share(r, outcome) for r in waste.spent)]
        amounts = [format_amount(r, s[outcome]) for r, s in waste.spent.items()]
        bars.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": outcome,
                "y": names,
                "x": [_theme.significant(100 * s, 4) for s in shares],
                "width": 0.6,
                "marker": {
                    "color": _theme.OUTCOMES[outcome].color,
                    "line": {"width": 1, "color": "#FFFFFF"},
                },
                "text": [f"{100 * s:.0f}%" if s >= 0.05 else "" for s in shares],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textangle": 0,
                "customdata": [f"{trials:,} of {count:,} trials", *amounts],
                "hovertemplate": f"{outcome}: %{{x:.1f}}%, %{{customdata}}<extra></extra>",
            }
        )
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
