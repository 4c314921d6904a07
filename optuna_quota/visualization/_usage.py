"""Usage of each trial: in their order, and against each hyperparameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
import statistics
from typing import Any, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.study import Study

from optuna_quota._footprint.footprint import Footprint
from optuna_quota._metering.breach import is_breach
from optuna_quota._records import Interval
from optuna_quota._resources import format_amount
from optuna_quota._units import counted
from optuna_quota.visualization import _data, _theme
from optuna_quota.visualization._theme import Figure, Point


_STEPS = 25
_COLUMNS = 4


def plot_usage(study: Study, *, resource: str = "memory") -> Figure:
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
    return usage_figure(_data.StudyTrials(study), resource)


def usage_figure(trials: _data.StudyTrials, resource: str) -> Figure:
    name = _theme.resource_title(resource)
    title = f"{name} of each trial"
    shown = [t for t in trials.finished if _amount(t, resource) is not None]
    if not shown:
        return _theme.empty_figure(title, f"No finished trial has a known {resource}.")
    amounts = [_amount(t, resource) or 0.0 for t in shown]
    unit, limit = _theme.unit_for(resource, amounts), trials.limits.get(resource)
    near = [limit] if limit is not None and limit <= 3 * max(amounts) else []
    log = _theme.use_log_scale([*amounts, *near], 15)
    low, high = map(unit.of, _theme.axis_range(amounts, log=log, limit=limit))
    figure = _theme.make_figure(
        title,
        _finding(trials, shown, resource),
        [
            _theme.markers(
                f"{outcome} ({len(group)})",
                _theme.OUTCOMES[outcome],
                [_usage_point(trial, resource, unit) for trial in group],
            )
            for outcome, group in _data.by_outcome(shown).items()
        ],
        _theme.axis("Trial"),
        _theme.axis(unit.axis_title(name), (low, high), log=log),
    )
    if limit is not None:
        # Breaches come early: later points that would breach are replaced.
        _theme.add_limit(figure, resource, limit, unit, high, log=log, side="right")
    return figure


def _amount(trial: _data.FinishedTrial, resource: str) -> float | None:
    """Return what a trial used, or was projected to use if it was rejected."""
    if resource in trial.amounts or trial.outcome != "rejected":
        return trial.amounts.get(resource)
    projected = trial.record.footprint.get(resource)
    return None if projected is None else projected.median


def _usage_point(trial: _data.FinishedTrial, resource: str, unit: _theme.AxisUnit) -> Point:
    if resource in trial.amounts:
        return Point(trial.number, unit.of(trial.amounts[resource]), trial.hover(resource))
    projected = trial.record.footprint[resource]
    hover = trial.hover(resource, f"projected {format_amount(resource, projected.median)}")
    bounds = unit.of(projected.lower), unit.of(projected.upper)
    return Point(trial.number, unit.of(projected.median), hover, bounds)


def _finding(
    trials: _data.StudyTrials, shown: Sequence[_data.FinishedTrial], resource: str
) -> str:
    ran = [t.amounts[resource] for t in shown if resource in t.amounts]
    limit, parts = trials.limits.get(resource), []
    if ran:
        median = format_amount(resource, statistics.median_high(ran))
        parts.append(f"median {median}, maximum {format_amount(resource, max(ran))}")
        if limit is not None:
            over = sum(is_breach(resource, amount, limit) for amount in ran)
            parts.append(f"{over} of {len(ran)} over the limit")
    unknown = len(trials.finished) - len(shown)
    if unknown:
        parts.append(f"{unknown} not measured")
    return "; ".join(parts)


def plot_usage_slice(
    study: Study,
    *,
    resource: str = "memory",
    params: Sequence[str] | None = None,
    footprint: Footprint | None = None,
) -> Figure:
    """Plot usage against each hyperparameter, with a model's prediction and its 90% band.

    The predictions vary one hyperparameter and hold the others at their median or most frequent
    value over the trials that ran.

    Example:

        .. code-block:: python

            from optuna_quota import analyze
            from optuna_quota.visualization import plot_usage_slice

            plot_usage_slice(study, params=["width"], footprint=analyze(study).footprint).show()

    Args:
        study: The study.
        resource: The usage to show.
        params: Hyperparameters, in the order of the panels; all that varied unless given.
        footprint: A fitted :class:`~optuna_quota.Footprint`; only trials are shown without one.

    Raises:
        ValueError: If a name in ``params`` is not a hyperparameter of a finished trial.
        ImportError: If plotly is not installed.
    """
    trials = _data.StudyTrials(study)
    if params is None:
        params = varied_params(trials.with_usage(resource))
    return usage_slice_figure(trials, resource, params, footprint)


def varied_params(trials: Sequence[_data.FinishedTrial]) -> list[str]:
    """Return the hyperparameters that had more than one value."""
    seen: dict[str, set[str]] = {}
    for trial in trials:
        for name, value in trial.trial.params.items():
            seen.setdefault(name, set()).add(_key(value))
    return [name for name, values in seen.items() if len(values) > 1]


def _key(value: Any) -> str:
    # 1, 1.0 and True are different choices but equal keys of a dictionary.
    return f"{type(value).__name__}:{value!r}"


class _Slice(NamedTuple):
    """Trials over one hyperparameter; ``predicted`` pairs its values with the model's interval."""

    param: str
    distribution: BaseDistribution
    trials: list[_data.FinishedTrial]
    predicted: list[tuple[Any, Interval]]

    @property
    def choices(self) -> Sequence[Any]:
        """The choices of a categorical hyperparameter; empty for others."""
        return getattr(self.distribution, "choices", ())

    def x(self, value: Any) -> Any:
        """Return a value of the hyperparameter as a coordinate."""
        return str(value) if self.choices else value

    def axis(self) -> dict[str, Any]:
        """Return the layout of the horizontal axis."""
        if self.choices:
            return _theme.axis(self.param, categories=list(dict.fromkeys(map(str, self.choices))))
        numbers = [float(t.trial.params[self.param]) for t in self.trials]
        log = getattr(self.distribution, "log", False) and min(numbers) > 0
        return _theme.axis(self.param, _theme.padded_range(numbers, log=log), log=log)


def _slices(
    trials: _data.StudyTrials, resource: str, params: Sequence[str], footprint: Footprint | None
) -> list[_Slice]:
    space = {name: d for t in trials.finished for name, d in t.trial.distributions.items()}
    unknown = [name for name in params if name not in space]
    if unknown:
        raise ValueError(
            f"`params` must name hyperparameters of finished trials but got {unknown[0]!r}; "
            f"known are {', '.join(sorted(space)) or 'none'}."
        )
    used = trials.with_usage(resource)
    typical = _typical_params(used, space)
    slices = []
    for name in params:
        found = _Slice(name, space[name], [t for t in used if name in t.trial.params], [])
        if found.trials and footprint is not None:
            values = found.choices or _grid(found)
            points = [{**typical, name: value} for value in values]
            intervals = _data.predict_intervals(footprint, points, resource)
            pairs = zip(values, intervals, strict=True)
            found.predicted.extend((value, each) for value, each in pairs if each is not None)
        slices.append(found)
    return [found for found in slices if found.trials]


def _grid(found: _Slice) -> list[float]:
    values = [t.trial.params[found.param] for t in found.trials]
    low, high = float(min(values)), float(max(values))
    log = getattr(found.distribution, "log", False) and low > 0
    with np.errstate(over="ignore", invalid="ignore"):
        space = (np.geomspace if log else np.linspace)(low, high, _STEPS)
        grid = [float(x) for x in space if np.isfinite(x)]
    whole = all(float(v).is_integer() for v in values)
    return list(dict.fromkeys(round(x) for x in grid)) if whole else grid


def _typical_params(
    trials: Sequence[_data.FinishedTrial], space: Mapping[str, BaseDistribution]
) -> dict[str, Any]:
    """Return the median or most frequent value of each parameter that half of the trials have."""
    typical = {}
    for name, distribution in space.items():
        values = [t.trial.params[name] for t in trials if name in t.trial.params]
        if not values or 2 * len(values) < len(trials):
            continue
        if hasattr(distribution, "choices"):
            by_key = {_key(value): value for value in values}
            typical[name] = by_key[statistics.mode(map(_key, values))]
        else:
            typical[name] = sorted(values)[len(values) // 2]
    return typical


def usage_slice_figure(
    trials: _data.StudyTrials, resource: str, params: Sequence[str], footprint: Footprint | None
) -> Figure:
    """Return the figure of :func:`plot_usage_slice`: up to four panels in a row."""
    slices = _slices(trials, resource, params, footprint)
    name = _theme.resource_title(resource)
    title = f"{name} by hyperparameter"
    if not slices:
        reason = f"No hyperparameter varied over trials with a known {resource}."
        return _theme.empty_figure(title, reason)
    amounts = [t.amounts[resource] for s in slices for t in s.trials]
    unit, limit = _theme.unit_for(resource, amounts), trials.limits.get(resource)
    log = _theme.use_log_scale(amounts)
    low, high = map(unit.of, _theme.axis_range(amounts, log=log, limit=limit))
    rows, columns = math.ceil(len(slices) / _COLUMNS), min(_COLUMNS, len(slices))
    layout = _theme.layout_of(title, _subtitle(slices))
    layout["grid"] = {"rows": rows, "columns": columns, "pattern": "independent", "xgap": 0.1}
    if rows > 1:
        layout["height"] = 100 + 300 * rows
    panels = [str(index + 1) if index else "" for index in range(len(slices))]
    traces: list[dict[str, Any]] = []
    for index, (panel, found) in enumerate(zip(panels, slices, strict=True)):
        first = index % _COLUMNS == 0
        y = _theme.axis(unit.axis_title(name) if first else "", (low, high), log=log)
        # One scale for all, named once a row.
        y.update(showticklabels=first, **({"matches": "y"} if index else {}))
        layout.update({f"xaxis{panel}": found.axis(), f"yaxis{panel}": y})
        for trace in _traces(found, resource, unit):
            label = trace["name"]
            trace.update(xaxis=f"x{panel}", yaxis=f"y{panel}", legendgroup=label)
            trace["showlegend"] = all(label != other["name"] for other in traces)
            traces.append(trace)
    figure = _theme.import_plotly().Figure({"data": traces, "layout": layout})
    if limit is not None:
        for panel in panels:
            _theme.add_limit(figure, resource, limit, unit, high, log=log, panel=panel)
    return figure


def _traces(found: _Slice, resource: str, unit: _theme.AxisUnit) -> list[dict[str, Any]]:
    traces = []
    for outcome, group in _data.by_outcome(found.trials).items():
        points = [
            Point(
                found.x(t.trial.params[found.param]),
                unit.of(t.amounts[resource]),
                t.hover(resource, params=[found.param]),
            )
            for t in group
        ]
        traces.append(_theme.markers(outcome, _theme.OUTCOMES[outcome], points))
    x = [_theme.significant(x) if isinstance(x, float) else found.x(x) for x, _ in found.predicted]
    y = [unit.of(interval.median) for _, interval in found.predicted]
    bounds = [(unit.of(i.lower), unit.of(i.upper)) for _, i in found.predicted]
    if found.predicted and found.choices:
        style = _theme.OutcomeStyle(_theme.GREEN, "diamond")
        points = [Point(a, b, "", ends) for a, b, ends in zip(x, y, bounds, strict=True)]
        traces.append(_theme.markers("model", style, points))
    elif found.predicted:
        # The line is above the markers, which would hide it, and the band below them.
        traces.insert(0, _theme.band("model, 90%", _theme.GREEN, x, bounds))
        traces.append(_theme.line("model", _theme.GREEN, x, y))
    _theme.size_markers(traces)
    return traces


def _subtitle(slices: Sequence[_Slice]) -> str:
    if any(s.predicted for s in slices):
        return "model: the other hyperparameters at their median or most frequent value"
    return counted(max(len(s.trials) for s in slices), "trial")
