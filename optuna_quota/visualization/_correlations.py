"""Correlations of hyperparameters and usage as a heat map."""

from __future__ import annotations

import math
from typing import NamedTuple

from optuna.study import Study

from optuna_quota._analysis.study_analysis import StudyAnalysis
from optuna_quota._table import DataFrame
from optuna_quota._utilization.data import study_data
from optuna_quota.visualization import _theme
from optuna_quota.visualization._theme import Figure


_SCALE = [[0.0, _theme.BLUE], [0.5, "#FFFFFF"], [1.0, _theme.VERMILION]]
_SIGNIFICANCE = 0.05


class Cell(NamedTuple):
    """The correlation of a hyperparameter with a resource."""

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


class Cells(NamedTuple):
    """Cells by hyperparameter and resource; the strongest hyperparameter first."""

    params: list[str]
    resources: list[str]
    by_place: dict[tuple[str, str], Cell]

    @property
    def rows(self) -> list[list[Cell | None]]:
        """The cells of each hyperparameter, by resource."""
        return [[self.by_place.get((p, r)) for r in self.resources] for p in self.params]


def plot_correlations(study: Study, *, report: StudyAnalysis | None = None) -> Figure:
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
    return correlations_figure(analysis.correlations)


def correlation_cells(correlations: DataFrame) -> Cells:
    """Return the known correlations of :attr:`UtilizationReport.correlations`."""
    cells = {
        (str(row["param"]), str(row["resource"])): Cell(*(row[name] for name in Cell._fields))
        for row in correlations.to_dict("records")
        if math.isfinite(row["rho"])
    }
    strength: dict[str, float] = {}
    for (param, _), cell in cells.items():
        strength[param] = max(strength.get(param, 0.0), abs(cell.rho))
    params = sorted(strength, key=lambda param: -strength[param])
    return Cells(params, list(dict.fromkeys(r for _, r in cells)), cells)


def correlations_figure(correlations: DataFrame) -> Figure:
    title, cells = "Rank correlations with usage", correlation_cells(correlations)
    if not cells.params:
        return _theme.empty_figure(title, "Too few trials to compute any correlation.")
    heat_map = {
        "type": "heatmap",
        "x": [_theme.resource_title(r) for r in cells.resources],
        "y": [_theme.escape(p) for p in cells.params],
        "z": [[None if cell is None else cell.shade for cell in row] for row in cells.rows],
        "text": [[_label(cell) for cell in row] for row in cells.rows],
        "customdata": [[_hover(cells, p, r) for r in cells.resources] for p in cells.params],
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
    figure = _theme.make_figure(
        title,
        "Spearman's, an effect size (epsilon²) for categories; * significant",
        [heat_map],
        names,
        {**names, "autorange": "reversed"},
    )
    figure.update_layout(margin={"l": 100, "r": 36, "t": 70, "b": 48})
    return figure


def _label(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"<b>{cell}</b>" if cell.is_significant else str(cell)


def _hover(cells: Cells, param: str, resource: str) -> str:
    cell = cells.by_place.get((param, resource))
    if cell is None:
        return ""
    return _theme.escape(
        f"{param} and {resource}\n{cell.rho:+.2f} ({cell.lower:+.2f} to {cell.upper:+.2f}), "
        f"adjusted p = {cell.p_adjusted:.2g}, n = {cell.n}"
    )
