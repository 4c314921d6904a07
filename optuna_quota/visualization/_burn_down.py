"""What is left of each total quota after each trial, and how long it will last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
import math
from typing import Any, NamedTuple, TYPE_CHECKING

from optuna_quota import _optuna, _records
from optuna_quota._ledger.reservation import parse_reservation
from optuna_quota._ledger.totals import WorkerTime
from optuna_quota._resources import CHARGED_RESOURCES, format_amount, get_resource, TOTAL_RESOURCES
from optuna_quota.visualization import _plotly, _theme
from optuna_quota.visualization._data import finished_trials, FinishedTrial


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


class _BurnDownInfo(NamedTuple):
    n_trials: int
    curves: list[_Curve]


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
    return burn_down_figure(_get_burn_down_info(study))


def _get_burn_down_info(
    study: Study, trials: Sequence[FinishedTrial] | None = None
) -> _BurnDownInfo:
    quota = _records.read_amounts(study.user_attrs.get(_records.STUDY_QUOTA))
    prices = _records.read_amounts(study.user_attrs.get(_records.STUDY_PRICES))
    found = finished_trials(study) if trials is None else trials
    ran = sorted((t for t in found if t.outcome != "rejected"), key=_end)
    most = quota["n_trials"] - len(ran) if "n_trials" in quota else math.inf
    curves = []
    for name in TOTAL_RESOURCES:
        if name in quota:
            used = _used_after(name, ran, prices)
            curves.append(_Curve(name, quota[name], used, _project(used, quota[name], most)))
    return _BurnDownInfo(len(ran), curves)


def _end(trial: FinishedTrial) -> tuple[float, int]:
    end = trial.trial.datetime_complete
    return math.inf if end is None else end.timestamp(), trial.number


def _used_after(
    resource: str, ran: Sequence[FinishedTrial], prices: Mapping[str, float]
) -> list[float]:
    """Return what was used of a total after 0, 1, 2, … trials."""
    if resource == "wall_time":
        return _clock_after(ran)
    used = [0.0]
    for trial in ran:
        used.append(used[-1] + _spent(resource, trial, prices))
    return used


def _spent(resource: str, trial: FinishedTrial, prices: Mapping[str, float]) -> float:
    if resource == "n_trials":
        return 1.0
    if resource == "cost":
        hours = ((price, _spent(name, trial, prices) / 3600) for name, price in prices.items())
        return sum(price * h for price, h in hours)
    return trial.amounts.get(CHARGED_RESOURCES.get(resource, resource), 0.0)


def _clock_after(ran: Sequence[FinishedTrial]) -> list[float]:
    # As in the ledger. A trial may be closed long after it ended, so its measured time counts.
    clock, used = WorkerTime(), [0.0]
    for trial in ran:
        row, seconds = trial.trial, trial.amounts.get("wall_time", 0.0)
        held = parse_reservation(
            row.system_attrs.get(_records.RESERVATION), _optuna.trial_id_of(row)
        )
        start, worker = (None, None) if held is None else (held.began, held.worker)
        if start is None and row.datetime_start is not None:
            start = row.datetime_start.timestamp()
        if start is not None and seconds > 0:
            clock.add(worker or trial.record.host, start, start + seconds)
        used.append(clock.total)
    return used


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


def burn_down_figure(info: _BurnDownInfo) -> go.Figure:
    """Return the figure of :func:`plot_burn_down`."""
    title = "Quota left"
    if not info.curves:
        return _plotly.empty_figure(title, "No total quota is set for this study.")
    if not info.n_trials:
        return _plotly.empty_figure(title, "No trial has finished yet.")
    lowest = min(0.0, *(100 * min(curve.left) for curve in info.curves))
    return _plotly.make_figure(
        title,
        _finding(info),
        [trace for i, curve in enumerate(info.curves) for trace in _traces(curve, i)],
        _plotly.axis("Trials finished"),
        _plotly.axis("Left (%)", (_theme.significant(lowest * 1.1), 104)),
    )


def _traces(curve: _Curve, index: int) -> list[dict[str, Any]]:
    color = _theme.CYCLE[index % len(_theme.CYCLE)]
    name = _theme.resource_title(curve.resource)
    n, left = len(curve.used) - 1, curve.left
    steps = min(n, _MAX_POINTS)
    x = sorted({round(i * n / max(1, steps)) for i in range(steps + 1)})
    traces = [_plotly.line(name, color, x, [_percent(left[i]) for i in x])]
    if curve.ahead:
        x = [n + p.trials for p in curve.ahead]
        bounds = [(_percent(p.lower), _percent(p.upper)) for p in curve.ahead]
        medians = [_percent(p.median) for p in curve.ahead]
        band = _plotly.band(f"{name}, 90%", color, x, bounds)
        median = _plotly.line(f"{name}, projected", color, x, medians, dash="dot")
        traces += [{**trace, "showlegend": False} for trace in (band, median)]
    return traces


def _percent(share: float) -> float:
    return _theme.significant(100 * share, 4)


def _finding(info: _BurnDownInfo) -> str:
    first = min(info.curves, key=lambda c: -math.inf if c.left[-1] <= 0 else c.trials_left)
    name = get_resource(first.resource).title
    used = format_amount(first.resource, first.used[-1])
    share = f"{used} of {format_amount(first.resource, first.quota)} used"
    if first.left[-1] <= 0:
        return f"used up: {name}, {share}"
    if not math.isfinite(first.trials_left):
        return f"{name}: {share}"
    trials = "1 trial" if round(first.trials_left) == 1 else f"{first.trials_left:,.0f} trials"
    return f"first used up: {name}, in about {trials} (dotted: projected, 90% band)"
