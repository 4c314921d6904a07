"""Correlations of hyperparameters and usage as a heat map."""

from __future__ import annotations

import math
from typing import NamedTuple, TYPE_CHECKING

from optuna_quota._analysis.study_analysis import StudyAnalysis
from optuna_quota._utilization.data import study_data
from optuna_quota.visualization import _plotly, _theme


if TYPE_CHECKING:
    from optuna.study import Study
    import pandas as pd
    import plotly.graph_objects as go


_SCALE = [[0.0, _theme.BLUE], [0.5, "#FFFFFF"], [1.0, _theme.VERMILION]]
_SIGNIFICANCE = 0.05


class _Cell(NamedTuple):
    rho: float
    lower: float
    upper: float
    p_adjusted: float
    n: int
    measure: str

    @property
    def is_significant(self) -> bool:
        return self.p_adjusted <= _SIGNIFICANCE


class _CorrelationsInfo(NamedTuple):
    """Cells by hyperparameter and resource; the strongest hyperparameter first."""

    params: list[str]
    resources: list[str]
    cells: dict[tuple[str, str], _Cell]


def plot_correlations(study: Study, *, report: StudyAnalysis | None = None) -> go.Figure:
    """Plot how usage correlates with each hyperparameter, as a heat map.

    Bold figures with a star are significant after the correction for multiple tests (adjusted p
    at most 0.05). Pale ones may be chance.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_correlations

            plot_correlations(study).show()

    Args:
        study: The study.
        report: Its :class:`~optuna_quota.UtilizationReport`, to avoid analyzing it again.

    Raises:
        ImportError: If plotly is not installed.
    """
    analysis = StudyAnalysis(study, study_data(study)) if report is None else report
    return correlations_figure(_get_correlations_info(analysis.correlations))


def _get_correlations_info(correlations: pd.DataFrame) -> _CorrelationsInfo:
    cells = {
        (str(row["param"]), str(row["resource"])): _Cell(*(row[name] for name in _Cell._fields))
        for row in correlations.to_dict("records")
        if math.isfinite(row["rho"])
    }
    strength: dict[str, float] = {}
    for (param, _), cell in cells.items():
        strength[param] = max(strength.get(param, 0.0), abs(cell.rho))
    params = sorted(strength, key=lambda param: -strength[param])
    return _CorrelationsInfo(params, list(dict.fromkeys(r for _, r in cells)), cells)


def correlations_figure(info: _CorrelationsInfo) -> go.Figure:
    """Return the figure of :func:`plot_correlations`."""
    title = "Rank correlations with usage"
    if not info.cells:
        return _plotly.empty_figure(title, "Too few trials to compute any correlation.")
    rows = [[info.cells.get((p, r)) for r in info.resources] for p in info.params]
    hovers = [[_hover(info, p, r) for r in info.resources] for p in info.params]
    heat_map = {
        "type": "heatmap",
        "x": [_theme.resource_title(r) for r in info.resources],
        "y": [_plotly.escape(p) for p in info.params],
        "z": [[None if cell is None else cell_shade(cell) for cell in row] for row in rows],
        "text": [["" if cell is None else _label(cell) for cell in row] for row in rows],
        "customdata": hovers,
        "texttemplate": "%{text}",
        "hovertemplate": "%{customdata}<extra></extra>",
        "colorscale": _SCALE,
        "zmin": -1,
        "zmax": 1,
        "xgap": 3,
        "ygap": 3,
        "hoverongaps": False,
        "showscale": False,
    }
    names = {"type": "category", "ticks": "", "automargin": True}
    figure = _plotly.make_figure(
        title,
        "Spearman's, an effect size (epsilon²) for categories; * significant",
        [heat_map],
        names,
        {**names, "autorange": "reversed"},
    )
    figure.update_layout(margin={"l": 100, "r": 36, "t": 70, "b": 48})
    return figure


def cell_shade(cell: _Cell) -> float:
    """Return how strongly to colour a cell, from -1 to 1; pale unless it is significant."""
    return _theme.significant(cell.rho if cell.is_significant else 0.25 * cell.rho, 4)


def format_cell(cell: _Cell) -> str:
    """Return a cell's figure, with a star where it is significant."""
    sign = "" if cell.measure == "epsilon2" else "+"
    rho = round(cell.rho, 2) + 0.0  # without a negative zero
    figure = f"{rho:{sign}.2f}".replace("-", "−")
    return f"{figure}*" if cell.is_significant else figure


def _label(cell: _Cell) -> str:
    return f"<b>{format_cell(cell)}</b>" if cell.is_significant else format_cell(cell)


def _hover(info: _CorrelationsInfo, param: str, resource: str) -> str:
    cell = info.cells.get((param, resource))
    if cell is None:
        return ""
    return _plotly.escape(
        f"{param} and {resource}\n{cell.rho:+.2f} ({cell.lower:+.2f} to {cell.upper:+.2f}), "
        f"adjusted p = {cell.p_adjusted:.2g}, n = {cell.n}"
    )
