"""Usage of each trial by outcome, with the limit."""

from __future__ import annotations

from collections.abc import Sequence
import statistics
from typing import NamedTuple, TYPE_CHECKING

from optuna_quota._metering.breach import is_breach
from optuna_quota._records import Interval
from optuna_quota._resources import format_amount
from optuna_quota.visualization import _plotly, _theme
from optuna_quota.visualization._data import finished_trials, FinishedTrial, limits_of


if TYPE_CHECKING:
    from optuna.study import Study
    import plotly.graph_objects as go


class _Use(NamedTuple):
    number: int
    outcome: str
    amount: float
    hover: str
    projected: Interval | None = None


class _UsageInfo(NamedTuple):
    resource: str
    uses: list[_Use]
    limit: float | None
    n_trials: int


def plot_usage(study: Study, *, resource: str = "memory") -> go.Figure:
    """Plot the usage of each trial by outcome, with the limit in force.

    Markers of terminated trials point up: their usage is a lower bound. A rejected trial, which
    never ran, is shown at its projection, with the interval.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_usage

            plot_usage(study, resource="memory").show()

    Args:
        study: The study.
        resource: ``"memory"``, ``"wall_time"``, ``"cpu_time"``, ``"gpu_memory"``, ``"gpu_time"``,
            ``"energy"`` or the name of a custom meter.

    Raises:
        ImportError: If plotly is not installed.
    """
    return usage_figure(_get_usage_info(study, resource))


def _get_usage_info(
    study: Study, resource: str, trials: Sequence[FinishedTrial] | None = None
) -> _UsageInfo:
    found = finished_trials(study) if trials is None else trials
    uses = [use for use in (_use(trial, resource) for trial in found) if use is not None]
    return _UsageInfo(resource, uses, limits_of(study).get(resource), len(found))


def _use(trial: FinishedTrial, resource: str) -> _Use | None:
    if resource in trial.amounts:
        amount = trial.amounts[resource]
        return _Use(trial.number, trial.outcome, amount, trial.hover(resource))
    projected = trial.record.footprint.get(resource)
    if trial.outcome != "rejected" or projected is None:
        return None
    hover = trial.hover(resource, f"projected {format_amount(resource, projected.median)}")
    return _Use(trial.number, trial.outcome, projected.median, hover, projected)


def usage_figure(info: _UsageInfo) -> go.Figure:
    """Return the figure of :func:`plot_usage`."""
    name = _theme.resource_title(info.resource)
    title = f"{name} of each trial"
    if not info.uses:
        return _plotly.empty_figure(title, f"No finished trial has a known {info.resource}.")
    amounts = [use.amount for use in info.uses]
    unit = _theme.unit_for(info.resource, amounts)
    near = [v for v in (info.limit,) if v is not None and v <= 3 * max(amounts)]
    log = _theme.use_log_scale([*amounts, *near], 15)
    low, high = map(unit.of, _theme.axis_range(amounts, log=log, limit=info.limit))
    groups = {o: [use for use in info.uses if use.outcome == o] for o in _theme.OUTCOMES}
    figure = _plotly.make_figure(
        title,
        _finding(info),
        [_markers(outcome, uses, unit) for outcome, uses in groups.items() if uses],
        _plotly.axis("Trial"),
        _plotly.axis(unit.axis_title(name), (low, high), log=log),
    )
    if info.limit is not None:
        # Breaches come early: later points that would breach are replaced.
        limit = (info.resource, info.limit, unit, high)
        _plotly.add_limit(figure, *limit, log=log, side="right")
    return figure


def _markers(outcome: str, uses: Sequence[_Use], unit: _theme.Unit) -> dict[str, object]:
    bounds = [use.projected or Interval(use.amount, use.amount, use.amount) for use in uses]
    return _plotly.markers(
        f"{outcome} ({len(uses)})",
        _theme.OUTCOMES[outcome],
        [use.number for use in uses],
        [unit.of(use.amount) for use in uses],
        [use.hover for use in uses],
        [(unit.of(b.lower), unit.of(b.upper)) for b in bounds] if outcome == "rejected" else (),
    )


def _finding(info: _UsageInfo) -> str:
    ran = [use.amount for use in info.uses if use.projected is None]
    parts = []
    if ran:
        median = format_amount(info.resource, statistics.median_high(ran))
        parts.append(f"median {median}, maximum {format_amount(info.resource, max(ran))}")
        if info.limit is not None:
            over = sum(is_breach(info.resource, amount, info.limit) for amount in ran)
            parts.append(f"{over} of {len(ran)} over the limit")
    unknown = info.n_trials - len(info.uses)
    if unknown:
        parts.append(f"{unknown} not measured")
    return "; ".join(parts)
