"""Usage against each hyperparameter, with what the footprint model predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy as np

from optuna_quota._records import Interval
from optuna_quota.visualization import _plotly, _theme
from optuna_quota.visualization._data import (
    finished_trials,
    FinishedTrial,
    limits_of,
    predict_interval,
)


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    import plotly.graph_objects as go

    from optuna_quota._footprint.footprint import Footprint


_STEPS = 25
_COLUMNS = 4


class _Slice(NamedTuple):
    """Trials over one hyperparameter; ``predicted`` pairs its values with the model's interval."""

    param: str
    log: bool
    categories: tuple[str, ...]
    trials: list[FinishedTrial]
    predicted: list[tuple[Any, Interval]]

    def x(self, value: Any) -> Any:
        """Return a value of the hyperparameter as a coordinate."""
        return str(value) if self.categories else value


class _SliceInfo(NamedTuple):
    resource: str
    limit: float | None
    slices: list[_Slice]


def plot_usage_slice(
    study: Study,
    *,
    resource: str = "memory",
    params: Sequence[str] | None = None,
    footprint: Footprint | None = None,
) -> go.Figure:
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
    return usage_slice_figure(_get_slice_info(study, resource, params, footprint))


def _get_slice_info(
    study: Study,
    resource: str,
    params: Sequence[str] | None = None,
    footprint: Footprint | None = None,
    trials: Sequence[FinishedTrial] | None = None,
) -> _SliceInfo:
    found = finished_trials(study) if trials is None else trials
    space = {name: d for t in found for name, d in t.trial.distributions.items()}
    unknown = [name for name in params or () if name not in space]
    if unknown:
        raise ValueError(
            f"`params` must name hyperparameters of finished trials but got {unknown[0]!r}; "
            f"known are {', '.join(sorted(space)) or 'none'}."
        )
    used = [t for t in found if resource in t.amounts and t.outcome != "rejected"]
    names = varied_params(used) if params is None else params
    typical = _typical_params(used, space) if footprint is not None else {}
    slices = []
    for name in names:
        having = [t for t in used if name in t.trial.params]
        choices = getattr(space[name], "choices", None)
        categories = () if choices is None else tuple(dict.fromkeys(map(str, choices)))
        log = bool(getattr(space[name], "log", False))
        predicted: list[tuple[Any, Interval]] = []
        if footprint is not None and having:
            values = [t.trial.params[name] for t in having]
            grid = list(choices) if choices is not None else _grid(values, log=log)
            intervals = (predict_interval(footprint, {**typical, name: x}, resource) for x in grid)
            predicted = [(x, i) for x, i in zip(grid, intervals, strict=True) if i is not None]
        slices.append(_Slice(name, log, categories, having, predicted))
    return _SliceInfo(resource, limits_of(study).get(resource), slices)


def varied_params(trials: Sequence[FinishedTrial]) -> list[str]:
    """Return the hyperparameters that had more than one value."""
    seen: dict[str, set[str]] = {}
    for trial in trials:
        for name, value in trial.trial.params.items():
            seen.setdefault(name, set()).add(_key(value))
    return [name for name, values in seen.items() if len(values) > 1]


def _key(value: Any) -> str:
    # 1, 1.0 and True are different choices but equal keys of a dictionary.
    return f"{type(value).__name__}:{value!r}"


def _grid(values: Sequence[float], *, log: bool) -> list[float]:
    low, high = float(min(values)), float(max(values))
    space = np.geomspace if log and low > 0 else np.linspace
    with np.errstate(over="ignore", invalid="ignore"):
        grid = [float(x) for x in space(low, high, _STEPS) if np.isfinite(x)]
    whole = all(float(v).is_integer() for v in values)
    return list(dict.fromkeys(round(x) for x in grid)) if whole else grid


def _typical_params(
    trials: Sequence[FinishedTrial], space: Mapping[str, BaseDistribution]
) -> dict[str, Any]:
    """Return the median or most frequent value of each parameter that half of the trials have."""
    typical = {}
    for name, distribution in space.items():
        values = [t.trial.params[name] for t in trials if name in t.trial.params]
        if not values or 2 * len(values) < len(trials):
            continue
        if hasattr(distribution, "choices"):
            keys = [_key(value) for value in values]
            typical[name] = values[max(range(len(keys)), key=lambda i: keys.count(keys[i]))]
        else:
            typical[name] = sorted(values)[len(values) // 2]
    return typical


def usage_slice_figure(info: _SliceInfo) -> go.Figure:
    """Return the figure of :func:`plot_usage_slice`: up to four panels in a row."""
    name = _theme.resource_title(info.resource)
    title = f"{name} by hyperparameter"
    slices = [s for s in info.slices if s.trials]
    if not slices:
        reason = f"No hyperparameter varied over trials with a known {info.resource}."
        return _plotly.empty_figure(title, reason)
    amounts = [t.amounts[info.resource] for s in slices for t in s.trials]
    unit = _theme.unit_for(info.resource, amounts)
    log = _theme.use_log_scale(amounts)
    low, high = map(unit.of, _theme.axis_range(amounts, log=log, limit=info.limit))
    rows, columns = math.ceil(len(slices) / _COLUMNS), min(_COLUMNS, len(slices))
    layout = _plotly.layout_of(title, _subtitle(slices))
    layout["grid"] = {"rows": rows, "columns": columns, "pattern": "independent", "xgap": 0.1}
    if rows > 1:
        layout["height"] = 100 + 300 * rows
    traces: list[dict[str, Any]] = []
    named: set[str] = set()
    for index, found in enumerate(slices):
        panel, first = _panel(index), index % _COLUMNS == 0
        y = _plotly.axis(unit.axis_title(name) if first else "", (low, high), log=log)
        # One scale for all, named once a row.
        y.update(showticklabels=first, **({"matches": "y"} if index else {}))
        layout.update({f"xaxis{panel}": _x_axis(found), f"yaxis{panel}": y})
        for trace in _traces(found, info.resource, unit):
            shown = trace["name"] not in named
            trace.update(xaxis=f"x{panel}", yaxis=f"y{panel}", showlegend=shown)
            traces.append({**trace, "legendgroup": trace["name"]})
            named.add(trace["name"])
    figure = _plotly.import_plotly().Figure({"data": traces, "layout": layout})
    if info.limit is not None:
        for index in range(len(slices)):
            _plotly.add_limit(
                figure, info.resource, info.limit, unit, high, log=log, panel=_panel(index)
            )
    return figure


def _panel(index: int) -> str:
    return "" if index == 0 else str(index + 1)


def _x_axis(found: _Slice) -> dict[str, Any]:
    if found.categories:
        return _plotly.axis(found.param, categories=found.categories)
    numbers = [float(t.trial.params[found.param]) for t in found.trials]
    log = found.log and min(numbers) > 0
    return _plotly.axis(found.param, _theme.padded_range(numbers, log=log), log=log)


def _traces(found: _Slice, resource: str, unit: _theme.Unit) -> list[dict[str, Any]]:
    traces = []
    for outcome, style in _theme.OUTCOMES.items():
        trials = [t for t in found.trials if t.outcome == outcome]
        if trials:
            x = [found.x(t.trial.params[found.param]) for t in trials]
            y = [unit.of(t.amounts[resource]) for t in trials]
            hover = [t.hover(resource, params=[found.param]) for t in trials]
            traces.append(_plotly.markers(outcome, style, x, y, hover))
    x = [_theme.significant(x) if isinstance(x, float) else found.x(x) for x, _ in found.predicted]
    y = [unit.of(interval.median) for _, interval in found.predicted]
    bounds = [(unit.of(i.lower), unit.of(i.upper)) for _, i in found.predicted]
    if found.predicted and found.categories:
        style = _theme.OutcomeStyle(_theme.GREEN, "diamond")
        traces.append(_plotly.markers("model", style, x, y, (), bounds))
    elif found.predicted:
        # The line is above the markers, which would hide it, and the band below them.
        traces.insert(0, _plotly.band("model, 90%", _theme.GREEN, x, bounds))
        traces.append(_plotly.line("model", _theme.GREEN, x, y))
    _plotly.size_markers(traces)
    return traces


def _subtitle(slices: Sequence[_Slice]) -> str:
    if any(s.predicted for s in slices):
        return "model: the other hyperparameters at their median or most frequent value"
    count = max(len(s.trials) for s in slices)
    return f"{count:,} trials" if count != 1 else "1 trial"
