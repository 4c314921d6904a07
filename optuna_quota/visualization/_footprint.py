"""The footprint projected for each trial against its usage."""

from __future__ import annotations

from collections.abc import Sequence
import statistics
from typing import TYPE_CHECKING

from optuna_quota._resources import format_amount, get_resource
from optuna_quota.visualization import _theme
from optuna_quota.visualization._data import (
    by_outcome,
    FinishedTrial,
    predict_intervals,
    StudyTrials,
)
from optuna_quota.visualization._theme import Point


if TYPE_CHECKING:
    from optuna.study import Study
    import plotly.graph_objects as go

    from optuna_quota._footprint.footprint import Footprint
    from optuna_quota._records import Interval


def plot_footprint(
    study: Study, *, resource: str = "memory", footprint: Footprint | None = None
) -> go.Figure:
    """Plot the footprint projected for each trial, with its interval, against its usage.

    Projections are those recorded before each trial ran. With ``footprint``, they are that model's
    for the same points: how well it fits, not how well it projected.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_footprint

            plot_footprint(study, resource="memory").show()

    Args:
        study: The study.
        resource: The resource projected.
        footprint: A fitted :class:`~optuna_quota.Footprint`.

    Raises:
        ImportError: If plotly is not installed.
    """
    return footprint_figure(StudyTrials(study), resource, footprint)


def footprint_figure(
    trials: StudyTrials, resource: str, footprint: Footprint | None = None
) -> go.Figure:
    verb = "Projected" if footprint is None else "Fitted"
    title = f"{verb} against measured {get_resource(resource).title}"
    used = trials.with_usage(resource)
    if footprint is None:
        projected = [trial.record.footprint.get(resource) for trial in used]
    else:
        projected = predict_intervals(footprint, [t.trial.params for t in used], resource)
    pairs = zip(used, projected, strict=True)
    intervals = {trial.number: found for trial, found in pairs if found is not None}
    shown = [trial for trial in used if trial.number in intervals]
    if not shown:
        reason = f"No trial has both a projected and a measured {resource}."
        return _theme.empty_figure(title, reason)
    # The upper bounds of the first trials are wide: bars may leave the frame.
    amounts = [v for t in shown for v in (t.amounts[resource], intervals[t.number].median)]
    unit, log = _theme.unit_for(resource, amounts), _theme.use_log_scale(amounts, 20)
    low, high = _theme.axis_range(amounts, log=log)
    if not log and min(amounts) > 0.4 * max(amounts):
        low = min(amounts) - 0.1 * (max(amounts) - min(amounts) or min(amounts))

    def point(trial: FinishedTrial) -> Point:
        interval = intervals[trial.number]
        lower, median, upper = (
            format_amount(resource, v) for v in (interval.lower, interval.median, interval.upper)
        )
        hover = trial.hover(resource, f"projected {median} ({lower} to {upper})")
        bounds = unit.of(interval.lower), unit.of(min(interval.upper, 4 * high))
        x, y = unit.of(trial.amounts[resource]), unit.of(interval.median)
        return Point(x, y, hover, bounds)

    frame = (unit.of(low), unit.of(high))
    traces = [_theme.line("as projected", _theme.MUTED, frame, frame, dash="dot")]
    for outcome, group in by_outcome(shown).items():
        name = f"{outcome} ({len(group)})"
        traces.append(_theme.markers(name, _theme.OUTCOMES[outcome], [point(t) for t in group]))
    known = [t for t in shown if not t.is_censored(resource)]
    return _theme.make_figure(
        title,
        _finding([(t.amounts[resource], intervals[t.number]) for t in known]),
        traces,
        _theme.axis(unit.axis_title("Measured"), frame, log=log),
        _theme.axis(unit.axis_title(verb), frame, log=log),
    )


def _finding(known: Sequence[tuple[float, Interval]]) -> str:
    if not known:
        return "bars: lower to upper bound"
    errors = [abs(interval.median - used) / used for used, interval in known if used > 0]
    error = f"median error {100 * statistics.median_high(errors):.1f}%; " if errors else ""
    held = sum(used <= interval.upper for used, interval in known)
    return f"{error}{held} of {len(known)} trials within the upper bound; bars: lower to upper"
