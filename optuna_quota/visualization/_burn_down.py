"""Ledger burn-down: what is left of each total quota, and how long it will last."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from itertools import pairwise
import math
from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna_quota._ledger.totals import WorkerTime
from optuna_quota._resources import format_amount
from optuna_quota._resources import TOTAL_RESOURCES
from optuna_quota.visualization import _style
from optuna_quota.visualization._chart import Axis
from optuna_quota.visualization._chart import Band
from optuna_quota.visualization._chart import Chart
from optuna_quota.visualization._chart import Line
from optuna_quota.visualization._chart import Mark
from optuna_quota.visualization._chart import Panel
from optuna_quota.visualization._draw import figure_of
from optuna_quota.visualization._rows import prices_of
from optuna_quota.visualization._rows import quota_of
from optuna_quota.visualization._rows import Row
from optuna_quota.visualization._rows import rows_of


if TYPE_CHECKING:
    from optuna.study import Study
    import plotly.graph_objects as go


_FEWEST = 5
_STEPS = 24
# Two-sided 90% of the normal distribution.
_Z = 1.645


class _Ahead(NamedTuple):
    """Share of the quota left after so many more trials, from 0 to 1."""

    trials: int
    lower: float
    median: float
    upper: float


class _BurnDown(NamedTuple):
    resource: str
    quota: float
    used: list[float]
    ahead: list[_Ahead]

    @property
    def left(self) -> list[float]:
        """Share left after 0, 1, 2, … trials; below zero where the quota was overdrawn."""
        return [1 - u / self.quota for u in self.used]


class _BurnDownInfo(NamedTuple):
    n_trials: int
    curves: list[_BurnDown]


def plot_burn_down(study: Study) -> go.Figure:
    """Plot what is left of each total quota after each trial, and how long it will last.

    The projection takes the coming trials to cost what those so far did: after k more of them the
    total has the mean k·m and the variance s²·(k + k²/n), with m and s the mean and the deviation
    of the n trials so far; the band holds 90%.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_burn_down

            plot_burn_down(study).show()

    Args:
        study: The study; its quota is read from its attributes.

    Raises:
        ImportError: If plotly is not installed.
    """
    return figure_of(_burn_down_chart(_get_burn_down_info(study)))


def _get_burn_down_info(study: Study, rows: Sequence[Row] | None = None) -> _BurnDownInfo:
    quota = quota_of(study)
    ran = [r for r in (rows_of(study) if rows is None else rows) if r.outcome != "rejected"]
    ran.sort(key=lambda r: (r.end is None, r.end.timestamp() if r.end else 0.0, r.number))
    prices = prices_of(study)
    curves = [
        _curve(name, quota, used_after(name, ran, prices), len(ran))
        for name in TOTAL_RESOURCES
        if name in quota
    ]
    return _BurnDownInfo(len(ran), curves)


def used_after(resource: str, ran: Sequence[Row], prices: Mapping[str, float]) -> list[float]:
    """Return what was used of a total after 0, 1, 2, … trials, in the order they ended.

    Args:
        resource: The total.
        ran: The trials that ran, in the order they ended.
        prices: Price per hour, for ``"cost"``.
    """
    if resource == "wall_time":
        return _clock(ran)
    used = [0.0]
    for row in ran:
        used.append(used[-1] + _spent(resource, row, prices))
    return used


def _spent(resource: str, row: Row, prices: Mapping[str, float]) -> float:
    if resource == "n_trials":
        return 1.0
    if resource == "cost":
        hours = ((price, _spent(name, row, prices) / 3600) for name, price in prices.items())
        return sum(price * h for price, h in hours)
    return row.amounts.get("wall_time" if resource == "trial_time" else resource, 0.0)


def _clock(ran: Sequence[Row]) -> list[float]:
    # As the ledger does, but that rows tell of a worker only on which host it ran.
    clock, used = WorkerTime(), [0.0]
    for row in ran:
        span = _span(row)
        if span is not None:
            clock.add(row.record.host, *span)
        used.append(clock.total)
    return used


def _span(row: Row) -> tuple[float, float] | None:
    # What was measured counts, as in the ledger: a row may be closed long after its trial ended.
    seconds = row.amounts.get("wall_time", 0.0)
    if row.start is None or seconds <= 0:
        return None
    start = row.start.timestamp()
    return start, start + seconds


def _curve(resource: str, quota: Mapping[str, float], used: list[float], n: int) -> _BurnDown:
    allowed = quota[resource]
    more = quota["n_trials"] - n if "n_trials" in quota else math.inf
    return _BurnDown(resource, allowed, used, _look_ahead(used, allowed, more))


def _look_ahead(used: Sequence[float], quota: float, most: float) -> list[_Ahead]:
    costs = [b - a for a, b in pairwise(used)]
    n, left = len(costs), quota - used[-1]
    # Not `math.fsum` and not `**`: they raise where a sum or a square is beyond all numbers.
    mean = sum(costs) / n if n else 0.0
    if n < _FEWEST or mean <= 0 or left <= 0 or most < 1:
        return []
    deviation = math.sqrt(sum((c - mean) * (c - mean) for c in costs) / (n - 1))
    until = math.ceil(min(most, left / mean, max(20, 3 * n)))
    steps = sorted({round(i * until / _STEPS) for i in range(_STEPS + 1)})
    return [_after(k, n, mean, deviation, left, quota) for k in steps]


def _after(k: int, n: int, mean: float, deviation: float, left: float, quota: float) -> _Ahead:
    spread = _Z * deviation * math.sqrt(k + k * k / n)
    bounds = (left - k * mean - spread, left - k * mean, left - max(0.0, k * mean - spread))
    lower, median, upper = (min(1.0, max(0.0, b / quota)) for b in bounds)
    return _Ahead(k, lower, median, upper)


def _burn_down_chart(info: _BurnDownInfo) -> Chart:
    title = "What is left of the quota"
    if not info.curves:
        return Chart(title, "No total quota is set for this study.")
    if not info.n_trials:
        return Chart(title, "No trial has finished yet.")
    lowest = min(0.0, *(100 * min(curve.left) for curve in info.curves))
    panel = Panel(
        Axis("Trials finished"),
        Axis("Left (%)", low=_style.significant(lowest * 1.1), high=104),
        tuple(mark for i, curve in enumerate(info.curves) for mark in _marks(curve, i)),
    )
    return Chart(title, _finding(info), (panel,))


def _marks(curve: _BurnDown, index: int) -> list[Mark]:
    color = _style.CYCLE[index % len(_style.CYCLE)]
    name = _style.title_of(curve.resource)
    n = len(curve.used) - 1
    keep = sorted({round(i * n / 300) for i in range(301)}) if n > 300 else list(range(n + 1))
    left = [_style.significant(100 * curve.left[i], 4) for i in keep]
    marks: list[Mark] = [Line(name, color, keep, left)]
    if curve.ahead:
        x = [n + a.trials for a in curve.ahead]
        shares = [[_style.significant(100 * v, 4) for v in a[1:]] for a in curve.ahead]
        lows, highs = [s[0] for s in shares], [s[2] for s in shares]
        marks.append(Band(f"{name}, 90%", color, x, lows, highs, legend=False))
        marks.append(
            Line(f"{name}, projected", color, x, [s[1] for s in shares], "dot", legend=False)
        )
    return marks


def _finding(info: _BurnDownInfo) -> str:
    first = min(info.curves, key=lambda c: (c.left[-1] <= 0) * -1e18 or _lasts(c))
    name = _style.title_of(first.resource)
    used = format_amount(first.resource, first.used[-1])
    share = f"{used} of {format_amount(first.resource, first.quota)} used"
    if first.left[-1] <= 0:
        return f"{name} is used up: {share}"
    lasts = _lasts(first)
    if not math.isfinite(lasts):
        return f"{name}: {share}"
    trials = "1 trial" if round(lasts) == 1 else f"{lasts:,.0f} trials"
    return f"{name} ends first, in about {trials} (dotted: projected, 90% band)"


def _lasts(curve: _BurnDown) -> float:
    n = len(curve.used) - 1
    mean = curve.used[-1] / n if n >= _FEWEST else 0.0
    return (curve.quota - curve.used[-1]) / mean if mean > 0 else math.inf
