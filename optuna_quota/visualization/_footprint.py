"""What was projected for each trial against what it used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna_quota._records import Interval
from optuna_quota._resources import format_amount
from optuna_quota.visualization import _style
from optuna_quota.visualization._chart import Axis
from optuna_quota.visualization._chart import Chart
from optuna_quota.visualization._chart import Line
from optuna_quota.visualization._chart import Mark
from optuna_quota.visualization._chart import Panel
from optuna_quota.visualization._chart import Points
from optuna_quota.visualization._draw import figure_of
from optuna_quota.visualization._predict import predict
from optuna_quota.visualization._rows import hover_of
from optuna_quota.visualization._rows import Row
from optuna_quota.visualization._rows import rows_of
from optuna_quota.visualization._ticks import ends


if TYPE_CHECKING:
    from optuna.study import Study
    import plotly.graph_objects as go

    from optuna_quota._footprint.footprint import Footprint


class _Projected(NamedTuple):
    number: int
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
        """How many upper bounds held, of how many trials that were not terminated."""
        known = [t for t in self.trials if not t.censored]
        return sum(t.used <= t.projected.upper for t in known), len(known)


def plot_footprint(
    study: Study, *, resource: str = "memory", footprint: Footprint | None = None
) -> go.Figure:
    """Plot what was projected for each trial, with its interval, against what it used.

    The projections are those recorded before each trial ran. With ``footprint``, they are what
    that model says of the same points now: how well it fits, not how well it foresaw.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_footprint

            plot_footprint(study, resource="memory").show()

    Args:
        study: The study.
        resource: What was projected.
        footprint: A fitted :class:`~optuna_quota.Footprint`.

    Raises:
        ImportError: If plotly is not installed.
    """
    return figure_of(_footprint_chart(_get_footprint_info(study, resource, footprint)))


def _get_footprint_info(
    study: Study,
    resource: str,
    footprint: Footprint | None = None,
    rows: Sequence[Row] | None = None,
) -> _FootprintInfo:
    found = [r for r in (rows_of(study) if rows is None else rows) if r.outcome != "rejected"]
    trials = []
    for row in found:
        interval = (
            row.record.footprint.get(resource)
            if footprint is None
            else predict(footprint, row.params, resource)
        )
        used = row.amounts.get(resource)
        if interval is not None and used is not None:
            trials.append(_projected(row, used, interval, resource))
    return _FootprintInfo(resource, trials, footprint is None)


def _projected(row: Row, used: float, interval: Interval, resource: str) -> _Projected:
    said = (
        f"projected {format_amount(resource, interval.median)} "
        f"({format_amount(resource, interval.lower)} to "
        f"{format_amount(resource, interval.upper)})"
    )
    hover = f"{hover_of(row, resource)}\n{said}"
    return _Projected(row.number, row.outcome, used, interval, hover, row.censored(resource))


def _footprint_chart(info: _FootprintInfo) -> Chart:
    name = _style.title_of(info.resource)
    verb = "Projected" if info.beforehand else "Fitted"
    title = (
        f"{verb} against measured {name[0].lower() if name[1].islower() else name[0]}{name[1:]}"
    )
    if not info.trials:
        return Chart(title, f"No trial has both a projected and a measured {info.resource}.")
    used = [t.used for t in info.trials]
    medians = [t.projected.median for t in info.trials]
    unit = _style.unit_for(info.resource, [*used, *medians])
    log = _style.spreads([*used, *medians], 20)
    low, high = _frame(info, log)
    frame = (unit.of(low), unit.of(high))
    diagonal = Line("as projected", _style.QUIET, frame, frame, dash="dot")
    panel = Panel(
        Axis(unit.axis("Measured"), log, (), *frame),
        Axis(unit.axis(verb), log, (), *frame),
        (diagonal, *_marks(info, unit, high)),
    )
    return Chart(title, _finding(info), (panel,))


def _frame(info: _FootprintInfo, log: bool) -> tuple[float, float]:
    # Wide first intervals must not press the rest into a corner: bars may leave the frame.
    shown = [v for t in info.trials for v in (t.used, t.projected.median)]
    low, high = ends(shown, log=log)
    if not log and min(shown) > 0.4 * max(shown):
        low = min(shown) - 0.1 * (max(shown) - min(shown) or min(shown))
    return low, high


def _marks(info: _FootprintInfo, unit: _style.Unit, most: float) -> tuple[Mark, ...]:
    groups = {o: [t for t in info.trials if t.outcome == o] for o in _style.OUTCOME_COLORS}
    return tuple(
        Points(
            f"{outcome} ({len(trials)})",
            _style.OUTCOME_COLORS[outcome],
            _style.OUTCOME_SYMBOLS[outcome],
            [unit.of(t.used) for t in trials],
            [unit.of(t.projected.median) for t in trials],
            [t.hover for t in trials],
            [unit.of(t.projected.lower) for t in trials],
            [unit.of(min(t.projected.upper, 4 * most)) for t in trials],
        )
        for outcome, trials in groups.items()
        if trials
    )


def _finding(info: _FootprintInfo) -> str:
    held, known = info.held
    if not known:
        return "bars: lower to upper bound"
    errors = sorted(
        abs(t.projected.median - t.used) / t.used
        for t in info.trials
        if t.used > 0 and not t.censored
    )
    middle = f"median error {100 * errors[len(errors) // 2]:.1f}%; " if errors else ""
    return f"{middle}{held} of {known} trials within the upper bound; bars: lower to upper"
