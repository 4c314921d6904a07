"""Usage against hyperparameters: slices with a model's prediction, and correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
import statistics
from typing import Any, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.study import Study

from optuna_quota._analysis.study_analysis import StudyAnalysis, trials_of
from optuna_quota._analysis.study_trials import (
    by_outcome,
    FinishedTrial,
    predict_intervals,
    StudyTrials,
)
from optuna_quota._footprint.footprint import Footprint
from optuna_quota._records import Interval
from optuna_quota._table import DataFrame
from optuna_quota._units import counted
from optuna_quota.visualization import _theme
from optuna_quota.visualization._theme import Figure, Point


_STEPS = 25
_COLUMNS = 4
_SIGNIFICANCE = 0.05


def plot_usage_slice(
    study: Study | StudyAnalysis,
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
        study: The study, or its report.
        resource: The usage to show.
        params: Hyperparameters, in the order of the panels; all that varied unless given.
        footprint: A fitted :class:`~optuna_quota.Footprint`; only trials are shown without one.

    Raises:
        ValueError: If a name in ``params`` is not a hyperparameter of a finished trial.
        ImportError: If plotly is not installed.
    """
    trials = trials_of(study)
    if params is None:
        params = varied_params(trials.with_usage(resource))
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


class _Slice(NamedTuple):
    """Trials over one hyperparameter; ``predicted`` pairs its values with the model's interval."""

    param: str
    distribution: BaseDistribution
    trials: list[FinishedTrial]
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
    trials: StudyTrials, resource: str, params: Sequence[str], footprint: Footprint | None
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
            intervals = predict_intervals(footprint, points, resource)
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
    trials: Sequence[FinishedTrial], space: Mapping[str, BaseDistribution]
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


def _traces(found: _Slice, resource: str, unit: _theme.AxisUnit) -> list[dict[str, Any]]:
    traces = []
    for outcome, group in by_outcome(found.trials).items():
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


class Cell(NamedTuple):
    """The correlation of a hyperparameter with a resource."""

    param: str
    resource: str
    rho: float
    lower: float
    upper: float
    p_adjusted: float
    n: int
    measure: str

    def __str__(self) -> str:
        sign = "" if self.measure == "epsilon2" else "+"
        rho = round(self.rho, 2) + 0.0  # without a negative zero
        return f"{rho:{sign}.2f}{'*' if self.is_significant else ''}".replace("-", "−")

    @property
    def is_significant(self) -> bool:
        """Whether it is significant over all tests of the study."""
        return self.p_adjusted <= _SIGNIFICANCE

    @property
    def shade(self) -> float:
        """How strongly to colour the cell, from -1 to 1; pale unless it is significant."""
        return _theme.significant(self.rho if self.is_significant else 0.25 * self.rho, 4)

    @property
    def label(self) -> str:
        return f"<b>{self}</b>" if self.is_significant else str(self)

    @property
    def hover(self) -> str:
        return _theme.escape(
            f"{self.param} and {self.resource}\n{self.rho:+.2f} "
            f"({self.lower:+.2f} to {self.upper:+.2f}), "
            f"adjusted p = {self.p_adjusted:.2g}, n = {self.n}"
        )


def plot_correlations(
    study: Study | StudyAnalysis, *, report: StudyAnalysis | None = None
) -> Figure:
    """Plot how usage correlates with each hyperparameter, as a heat map.

    Bold figures with a star are significant after the correction for multiple tests (adjusted p
    at most 0.05). Pale ones may be chance.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_correlations

            plot_correlations(study).show()

    Args:
        study: The study, or its report.
        report: Its :class:`~optuna_quota.UtilizationReport`, to avoid analyzing it again.

    Raises:
        ImportError: If plotly is not installed.
    """
    found = report or study
    table = (found if isinstance(found, StudyAnalysis) else StudyAnalysis(found)).correlations
    title, (resources, rows) = "Rank correlations with usage", correlation_cells(table)
    if not rows:
        return _theme.empty_figure(title, "Too few trials to compute any correlation.")
    heat_map = {
        "type": "heatmap",
        "x": [_theme.resource_title(r) for r in resources],
        "y": [_theme.escape(p) for p in rows],
        "z": [[cell and cell.shade for cell in row] for row in rows.values()],
        "text": [[cell.label if cell else "" for cell in row] for row in rows.values()],
        "customdata": [[cell.hover if cell else "" for cell in row] for row in rows.values()],
        "texttemplate": "%{text}",
        "hovertemplate": "%{customdata}<extra></extra>",
        "colorscale": [[0.0, _theme.BLUE], [0.5, "#FFFFFF"], [1.0, _theme.VERMILION]],
        "zmin": -1,
        "zmax": 1,
        "xgap": 3,
        "ygap": 3,
        "hoverongaps": False,
        "showscale": False,
    }
    names = {"type": "category", "ticks": "", "automargin": True}
    subtitle = "Spearman's, an effect size (epsilon²) for categories; * significant"
    y_axis = {**names, "autorange": "reversed"}
    figure = _theme.make_figure(title, subtitle, [heat_map], names, y_axis)
    figure.update_layout(margin={"l": 100, "r": 36, "t": 70, "b": 48})
    return figure


def correlation_cells(
    correlations: DataFrame,
) -> tuple[list[str], dict[str, list[Cell | None]]]:
    """Return the known correlations of :attr:`UtilizationReport.correlations`.

    These are the resources, and a cell for each by hyperparameter, the strongest one first.
    """
    known = correlations[np.isfinite(correlations["rho"].to_numpy(dtype=float))]
    found: dict[str, dict[str, Cell]] = {}
    for row in known.to_dict("records"):
        cell = Cell(*(row[name] for name in Cell._fields))
        found.setdefault(cell.param, {})[cell.resource] = cell
    resources = list(dict.fromkeys(known["resource"]))
    params = sorted(found, key=lambda name: -max(abs(c.rho) for c in found[name].values()))
    return resources, {name: [found[name].get(r) for r in resources] for name in params}
