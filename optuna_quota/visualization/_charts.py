"""All charts of a study, those with nothing to show left out."""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna_quota.visualization._burn_down import _burn_down_chart
from optuna_quota.visualization._burn_down import _get_burn_down_info
from optuna_quota.visualization._chart import Chart
from optuna_quota.visualization._correlations import _get_correlations_info
from optuna_quota.visualization._correlations import correlations_figure
from optuna_quota.visualization._draw import figure_of
from optuna_quota.visualization._footprint import _footprint_chart
from optuna_quota.visualization._footprint import _get_footprint_info
from optuna_quota.visualization._quality import _get_quality_info
from optuna_quota.visualization._quality import _quality_chart
from optuna_quota.visualization._rows import limits_of
from optuna_quota.visualization._rows import measured
from optuna_quota.visualization._rows import Row
from optuna_quota.visualization._rows import rows_of
from optuna_quota.visualization._slice import _get_slice_info
from optuna_quota.visualization._slice import _slice_chart
from optuna_quota.visualization._slice import spread_explained
from optuna_quota.visualization._timeline import _timeline_chart
from optuna_quota.visualization._timeline import timeline_info
from optuna_quota.visualization._usage import _get_usage_info
from optuna_quota.visualization._usage import _usage_chart
from optuna_quota.visualization._waste import _get_waste_info
from optuna_quota.visualization._waste import waste_figure


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    import plotly.graph_objects as go

    from optuna_quota._footprint.footprint import Footprint


# Panels of a slice, and timelines, that a report shows.
_PANELS = 4
_TIMELINES = 2


class Material(NamedTuple):
    """What all pictures of one study share, read once.

    Attributes:
        study: The study.
        rows: Its finished trials.
        footprint: A fitted model, None where there is none.
        correlations: The report's DataFrame, None without a report.
    """

    study: Study
    rows: Sequence[Row]
    footprint: Footprint | None = None
    correlations: Any = None


def material_of(study: Study, report: Any = None) -> Material:
    """Return what the pictures of a study need, with the models of a report if there is one."""
    rows = rows_of(study)
    if report is None:
        return Material(study, rows)
    return Material(study, rows, report.footprint, report.correlations)


def figures(report: Any) -> dict[str, go.Figure]:
    """Return all pictures of a report as plotly figures, by name, in the order to read them.

    Names are those of the functions without ``plot_``, with the resource: ``usage_memory``,
    ``burn_down``, ``waste``, ``correlations``, ``usage_slice_memory``, ``footprint_memory``,
    ``quality_cost``, ``timeline_17`` and the like. What the study has no data for is left out.

    Example:

        .. code-block:: python

            report = analyze(study)
            report.figures()["usage_memory"].show()

    Args:
        report: A :class:`~optuna_quota.UtilizationReport`.

    Raises:
        ImportError: If plotly is not installed.
    """
    return figures_of(material_of(report.study, report))


def figures_of(material: Material) -> dict[str, go.Figure]:
    """Return all pictures of a study as plotly figures, by name."""
    charts = charts_of(material)
    usage = [name for name in charts if name.startswith("usage_") and "slice" not in name]
    first = [*usage, "burn_down"]
    made = {name: figure_of(charts[name]) for name in first if name in charts}
    made.update(_summaries(material))
    made.update({name: figure_of(c) for name, c in charts.items() if name not in made})
    return made


def _summaries(material: Material) -> dict[str, go.Figure]:
    found: dict[str, go.Figure] = {}
    waste = _get_waste_info(material.study, material.rows)
    if waste.spent:
        found["waste"] = waste_figure(waste)
    if material.correlations is not None:
        info = _get_correlations_info(material.correlations)
        if info.cells:
            found["correlations"] = correlations_figure(info)
    return found


def charts_of(material: Material) -> dict[str, Chart]:
    """Return all charts of a study by name, in the order to read them."""
    study, rows = material.study, material.rows
    resources = measured(rows)
    charts = {f"usage_{r}": _usage_chart(_get_usage_info(study, r, rows)) for r in resources}
    charts["burn_down"] = _burn_down_chart(_get_burn_down_info(study, rows))
    for resource in resources:
        charts[f"usage_slice_{resource}"] = slice_chart(material, resource)
    for resource in resources:
        charts[f"footprint_{resource}"] = footprint_chart(material, resource)
    charts.update(quality_charts(material))
    charts.update(timeline_charts(material))
    return {name: chart for name, chart in charts.items() if chart}


def slice_chart(material: Material, resource: str, most: int = _PANELS) -> Chart:
    """Return the slices of a resource along the hyperparameters that explain it best."""
    study, rows = material.study, material.rows
    bare = _get_slice_info(study, resource, None, None, rows)
    ranked = sorted(bare.slices, key=spread_explained, reverse=True)[:most]
    names = [found.param for found in ranked]
    return _slice_chart(_get_slice_info(study, resource, names, material.footprint, rows))


def footprint_chart(material: Material, resource: str) -> Chart:
    """Return what was projected against what was used; fitted where nothing was projected."""
    foreseen = _get_footprint_info(material.study, resource, None, material.rows)
    if foreseen.trials or material.footprint is None:
        return _footprint_chart(foreseen)
    info = _get_footprint_info(material.study, resource, material.footprint, material.rows)
    return _footprint_chart(info)


def quality_charts(material: Material) -> dict[str, Chart]:
    """Return quality against time, one chart for each objective."""
    directions = material.study.directions
    if len(directions) == 1:
        info = _get_quality_info(material.study, "wall_time", rows=material.rows)
        return {"quality_cost": _quality_chart(info)}
    return {
        f"quality_cost_{index}": _objective_chart(material, index)
        for index in range(len(directions))
    }


def _objective_chart(material: Material, index: int) -> Chart:
    def value(trial: FrozenTrial) -> float:
        return trial.values[index] if trial.values else math.nan

    upward = material.study.directions[index].name == "MAXIMIZE"
    name = f"Objective {index}"
    info = _get_quality_info(material.study, "wall_time", value, name, upward, material.rows)
    return _quality_chart(info)


def timeline_charts(material: Material, most: int = _TIMELINES) -> dict[str, Chart]:
    """Return the timelines of the trials that were terminated last."""
    limit = limits_of(material.study).get("memory")
    ended = [r for r in material.rows if r.outcome == "terminated" and r.record.timeline]
    return {
        f"timeline_{row.number}": _timeline_chart(timeline_info(row, limit))
        for row in ended[-most:]
    }
