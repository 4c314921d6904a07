"""The footprint projected for each trial against its usage."""

from __future__ import annotations

from collections.abc import Sequence
import statistics
from typing import NamedTuple, TYPE_CHECKING

from optuna_quota._records import Interval
from optuna_quota._resources import format_amount
from optuna_quota.visualization import _plotly, _theme
from optuna_quota.visualization._data import finished_trials, FinishedTrial, predict_interval


if TYPE_CHECKING:
    from optuna.study import Study
    import plotly.graph_objects as go

    from optuna_quota._footprint.footprint import Footprint


class _Projected(NamedTuple):
    outcome: str
    used: float
    projected: Interval
    hover: str
    censored: bool


class _FootprintInfo(NamedTuple):
    resource: str
    trials: list[_Projected]
    beforehand: bool

    @property
    def held(self) -> tuple[int, int]:
        """How many upper bounds held, and of how many trials with a known usage."""
        known = [t for t in self.trials if not t.censored]
        return sum(t.used <= t.projected.upper for t in known), len(known)


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
    return footprint_figure(_get_footprint_info(study, resource, footprint))


def _get_footprint_info(
    study: Study,
    resource: str,
    footprint: Footprint | None = None,
    trials: Sequence[FinishedTrial] | None = None,
) -> _FootprintInfo:
    projected = []
    for trial in finished_trials(study) if trials is None else trials:
        used = trial.amounts.get(resource)
        if trial.outcome == "rejected" or used is None:
            continue
        interval = (
            trial.record.footprint.get(resource)
            if footprint is None
            else predict_interval(footprint, trial.trial.params, resource)
        )
        if interval is not None:
            projected.append(_projected(trial, used, interval, resource))
    return _FootprintInfo(resource, projected, footprint is None)


def _projected(trial: FinishedTrial, used: float, interval: Interval, resource: str) -> _Projected:
    lower, median, upper = (
        format_amount(resource, v) for v in (interval.lower, interval.median, interval.upper)
    )
    hover = trial.hover(resource, f"projected {median} ({lower} to {upper})")
    return _Projected(trial.outcome, used, interval, hover, trial.is_censored(resource))


def footprint_figure(info: _FootprintInfo) -> go.Figure:
    """Return the figure of :func:`plot_footprint`."""
    name = _theme.resource_title(info.resource)
    verb = "Projected" if info.beforehand else "Fitted"
    title = f"{verb} against measured {name if name[1].isupper() else name[0].lower() + name[1:]}"
    if not info.trials:
        reason = f"No trial has both a projected and a measured {info.resource}."
        return _plotly.empty_figure(title, reason)
    # The upper bounds of the first trials are wide: bars may leave the frame.
    shown = [v for t in info.trials for v in (t.used, t.projected.median)]
    unit = _theme.unit_for(info.resource, shown)
    log = _theme.use_log_scale(shown, 20)
    low, high = _theme.axis_range(shown, log=log)
    if not log and min(shown) > 0.4 * max(shown):
        low = min(shown) - 0.1 * (max(shown) - min(shown) or min(shown))
    frame = (unit.of(low), unit.of(high))
    traces = [_plotly.line("as projected", _theme.MUTED, frame, frame, dash="dot")]
    for outcome, style in _theme.OUTCOMES.items():
        trials = [t for t in info.trials if t.outcome == outcome]
        if trials:
            uppers = [min(t.projected.upper, 4 * high) for t in trials]
            traces.append(
                _plotly.markers(
                    f"{outcome} ({len(trials)})",
                    style,
                    [unit.of(t.used) for t in trials],
                    [unit.of(t.projected.median) for t in trials],
                    [t.hover for t in trials],
                    [
                        (unit.of(t.projected.lower), unit.of(upper))
                        for t, upper in zip(trials, uppers, strict=True)
                    ],
                )
            )
    return _plotly.make_figure(
        title,
        _finding(info),
        traces,
        _plotly.axis(unit.axis_title("Measured"), frame, log=log),
        _plotly.axis(unit.axis_title(verb), frame, log=log),
    )


def _finding(info: _FootprintInfo) -> str:
    held, known = info.held
    if not known:
        return "bars: lower to upper bound"
    errors = [
        abs(t.projected.median - t.used) / t.used
        for t in info.trials
        if t.used > 0 and not t.censored
    ]
    error = f"median error {100 * statistics.median_high(errors):.1f}%; " if errors else ""
    return f"{error}{held} of {known} trials within the upper bound; bars: lower to upper"
