"""What is left of each total quota after each trial, and how long it will last."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
import math
import time
from typing import Any, NamedTuple, TYPE_CHECKING

from optuna_quota import _optuna
from optuna_quota._ledger import stored_quota
from optuna_quota._ledger.protocol import study_stamp
from optuna_quota._ledger.totals import QuotaTotals, read_entry
from optuna_quota._resources import format_amount, get_resource, TOTAL_RESOURCES
from optuna_quota._units import counted
from optuna_quota.visualization import _theme
from optuna_quota.visualization._data import FinishedTrial, StudyTrials


if TYPE_CHECKING:
    from optuna.study import Study
    import plotly.graph_objects as go


# Fewer trials say too little about the next ones.
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


def plot_burn_down(study: Study) -> go.Figure:
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
    ran = sorted((t for t in trials.finished if t.outcome != "rejected"), key=_end)
    totals = QuotaTotals(quota, trials.limits)
    used = [totals.used(time.time())]
    for trial in ran:
        trial_id = _optuna.trial_id_of(trial.trial)
        totals.update([read_entry(trial.trial, trial_id, quota, study=stamp)], ())
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


def burn_down_figure(trials: StudyTrials) -> go.Figure:
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
