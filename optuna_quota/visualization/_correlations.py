"""Correlations of hyperparameters and usage as a heat map."""

from __future__ import annotations

import math
from typing import Any
from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna_quota._analysis.study_analysis import StudyAnalysis
from optuna_quota._utilization.data import study_data
from optuna_quota.visualization import _style
from optuna_quota.visualization._chart import Chart
from optuna_quota.visualization._draw import base_layout
from optuna_quota.visualization._draw import figure_of
from optuna_quota.visualization._draw import text
from optuna_quota.visualization._imports import import_plotly


if TYPE_CHECKING:
    from optuna.study import Study
    import plotly.graph_objects as go


_SCALE = [[0.0, _style.BLUE], [0.5, "#FFFFFF"], [1.0, _style.VERMILION]]
_LEVEL = 0.05


class _Cell(NamedTuple):
    param: str
    resource: str
    rho: float
    lower: float
    upper: float
    p_adjusted: float
    n: int
    measure: str = "rho"

    @property
    def certain(self) -> bool:
        """Whether the correlation stands after the correction for many tests."""
        return math.isfinite(self.rho) and self.p_adjusted <= _LEVEL


class _CorrelationsInfo(NamedTuple):
    params: list[str]
    resources: list[str]
    cells: dict[tuple[str, str], _Cell]


def plot_correlations(study: Study, *, report: Any = None) -> go.Figure:
    """Plot how usage goes with each hyperparameter, as a heat map.

    Bold figures with a star stand after the correction for many tests (adjusted p at most 0.05);
    pale ones may be chance.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_correlations

            plot_correlations(study).show()

    Args:
        study: The study.
        report: Its :class:`~optuna_quota.UtilizationReport`, to spare analyzing it again.

    Raises:
        ImportError: If plotly is not installed.
    """
    if report is None:
        report = StudyAnalysis(study, study_data(study))
    return correlations_figure(_get_correlations_info(report.correlations))


def _get_correlations_info(correlations: Any) -> _CorrelationsInfo:
    cells: dict[tuple[str, str], _Cell] = {}
    for row in correlations.to_dict("records"):
        cell = _cell(row)
        if math.isfinite(cell.rho):
            cells[cell.param, cell.resource] = cell
    params = list(dict.fromkeys(param for param, _ in cells))
    resources = list(dict.fromkeys(resource for _, resource in cells))
    strength = {p: max(abs(c.rho) for k, c in cells.items() if k[0] == p) for p in params}
    return _CorrelationsInfo(sorted(params, key=lambda p: -strength[p]), resources, cells)


def _cell(row: dict[str, Any]) -> _Cell:
    rho, lower, upper, p = (_number(row.get(k)) for k in ("rho", "lower", "upper", "p_adjusted"))
    n = _number(row.get("n"))
    count = int(n) if math.isfinite(n) else 0
    return _Cell(
        str(row["param"]),
        str(row["resource"]),
        rho,
        lower,
        upper,
        p,
        count,
        str(row.get("measure", "rho")),
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def correlations_figure(info: _CorrelationsInfo) -> go.Figure:
    """Return the heat map: hyperparameters downward, the strongest first."""
    title = "What drives the use"
    if not info.cells:
        return figure_of(Chart(title, "Too few trials to claim any correlation."))
    go = import_plotly()
    layout = base_layout(
        title, "Spearman's rank correlation, an effect size for categories; * beyond chance"
    )
    layout["margin"] = {"l": 100, "r": 24, "t": 70, "b": 48}
    layout["xaxis"] = {"side": "bottom", "ticks": "", "automargin": True, "type": "category"}
    layout["yaxis"] = {
        "autorange": "reversed",
        "ticks": "",
        "automargin": True,
        "type": "category",
    }
    return go.Figure({"data": [_heat_map(info)], "layout": layout})


def _heat_map(info: _CorrelationsInfo) -> dict[str, Any]:
    rows = [[info.cells.get((p, r)) for r in info.resources] for p in info.params]
    return {
        "type": "heatmap",
        "x": [_style.title_of(r) for r in info.resources],
        "y": [text(p) for p in info.params],
        "z": [[None if c is None else shade(c) for c in row] for row in rows],
        "text": [["" if c is None else _bold(c) for c in row] for row in rows],
        "customdata": [["" if c is None else _hover(c) for c in row] for row in rows],
        "texttemplate": "%{text}",
        "hovertemplate": "%{customdata}<extra></extra>",
        "colorscale": _SCALE,
        "zmin": -1,
        "zmax": 1,
        "xgap": 3,
        "ygap": 3,
        "hoverongaps": False,
        "colorbar": {"thickness": 12, "outlinewidth": 0, "tickvals": [-1, -0.5, 0, 0.5, 1]},
    }


def shade(cell: _Cell) -> float:
    """Return how strongly to colour a cell, from −1 to 1; pale where it may be chance."""
    return _style.significant(cell.rho if cell.certain else 0.25 * cell.rho, 4)


def said(cell: _Cell) -> str:
    """Return a cell's figure, with a star where it is beyond chance."""
    sign = "" if cell.measure == "epsilon2" else "+"
    figure = f"{cell.rho:{sign}.2f}".replace("-", "−")
    return f"{figure}*" if cell.certain else figure


def _bold(cell: _Cell) -> str:
    return f"<b>{said(cell)}</b>" if cell.certain else said(cell)


def _hover(cell: _Cell) -> str:
    return text(
        f"{cell.param} and {cell.resource}\n{cell.rho:+.2f} "
        f"({cell.lower:+.2f} to {cell.upper:+.2f}), adjusted p = {cell.p_adjusted:.2g}, "
        f"n = {cell.n}"
    )
