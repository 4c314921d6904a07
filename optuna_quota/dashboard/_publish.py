"""Publishing a study's use of resources into optuna-dashboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from typing import TYPE_CHECKING

from optuna_quota import _optuna
from optuna_quota._analysis.study_analysis import StudyAnalysis
from optuna_quota._utilization.data import study_data
from optuna_quota.dashboard._block import merged
from optuna_quota.dashboard._door import Dashboard
from optuna_quota.dashboard._notes import study_note
from optuna_quota.dashboard._notes import trial_note
from optuna_quota.visualization._burn_down import _burn_down_chart
from optuna_quota.visualization._burn_down import _get_burn_down_info
from optuna_quota.visualization._chart import Chart
from optuna_quota.visualization._chart import thinned
from optuna_quota.visualization._charts import footprint_chart
from optuna_quota.visualization._charts import Material
from optuna_quota.visualization._charts import material_of
from optuna_quota.visualization._charts import quality_charts
from optuna_quota.visualization._charts import slice_chart
from optuna_quota.visualization._draw import figure_of
from optuna_quota.visualization._facts import facts_of
from optuna_quota.visualization._rows import limits_of
from optuna_quota.visualization._rows import measured
from optuna_quota.visualization._rows import Row
from optuna_quota.visualization._svg import svg_of
from optuna_quota.visualization._timeline import _timeline_chart
from optuna_quota.visualization._timeline import timeline_info
from optuna_quota.visualization._usage import _get_usage_info
from optuna_quota.visualization._usage import _usage_chart
from optuna_quota.visualization._waste import _get_waste_info
from optuna_quota.visualization._waste import waste_figure


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore
    from optuna.study import Study
    import plotly.graph_objects as go


PICTURE = "memory-over-time.svg"
# All plots travel with each answer of the dashboard, so they are kept to tens of kB; notes on
# trials are study attributes and slow it down at hundreds.
_MARKS = 250
_TRIAL_NOTES = 100


def publish(study: Study, report: Any = None, artifact_store: ArtifactStore | None = None) -> None:
    """Show a study's use of resources in optuna-dashboard.

    The study's note gets a block with the ledger, the fitted models, advice and the trials that
    were terminated or rejected; those trials (the latest 100) get a note with the reason, a table
    and, with an artifact store, a picture of their memory over time; the study's page gets four
    small plots. Publishing again replaces all this. What a person wrote in a note, above or below
    the block, stays as it is.

    Example:

        .. code-block:: python

            from optuna.artifacts import FileSystemArtifactStore
            from optuna_quota.dashboard import publish

            publish(study, artifact_store=FileSystemArtifactStore("artifacts"))

    Args:
        study: The study.
        report: Its :class:`~optuna_quota.UtilizationReport`; the study is analyzed unless given.
        artifact_store: The store that the dashboard is started with (``--artifact-dir``).

    Raises:
        ImportError: If optuna-dashboard or plotly is not installed.
    """
    if report is None:
        report = StudyAnalysis(study, study_data(study))
    publish_material(material_of(study, report), report, artifact_store)


def publish_material(
    material: Material,
    report: Any,
    artifact_store: ArtifactStore | None,
    still_ours: Callable[[], bool] = lambda: True,
) -> None:
    """Publish what was read of a study.

    Args:
        material: The study and its trials.
        report: Its report, or None to leave out models and advice.
        artifact_store: Where pictures go.
        still_ours: Asked once all is made and before anything is written: another worker may
            have begun to publish meanwhile.
    """
    facts = facts_of(material, report)
    plots = _plots(material)
    if not still_ours():
        return
    dashboard = Dashboard(material.study)
    note = dashboard.note()
    renewed = merged(note, study_note(facts, dashboard.trial_address))
    if renewed != note:
        dashboard.save_note(renewed)
    for name, figure in plots.items():
        dashboard.save_plot(name, figure)
    ended = [row for row in material.rows if row.outcome in ("terminated", "rejected")]
    for row in ended[-_TRIAL_NOTES:]:
        _note_trial(dashboard, row, material.study, artifact_store)


def _note_trial(dashboard: Dashboard, row: Row, study: Study, store: ArtifactStore | None) -> None:
    trial_id = _optuna.trial_id_of(row.trial)
    limits = limits_of(study)
    picture = dashboard.picture(trial_id, PICTURE)
    if picture is None and store is not None and row.record.timeline:
        svg = svg_of(_timeline_chart(timeline_info(row, limits.get("memory"))))
        picture = dashboard.save_picture(store, trial_id, PICTURE, svg)
    note = dashboard.note(trial_id)
    renewed = merged(note, trial_note(row, limits, picture))
    if renewed != note:
        dashboard.save_note(renewed, trial_id)


def _plots(material: Material) -> dict[str, go.Figure]:
    # Fixed names, one for each place on the page: publishing again replaces.
    resources = measured(material.rows)
    main = resources[0] if resources else "memory"
    places = {
        "optuna_quota.usage": _usage_chart(_get_usage_info(material.study, main, material.rows)),
        "optuna_quota.drivers": slice_chart(material, main, most=2),
        "optuna_quota.quality": _quality(material, main),
    }
    plots = {name: _small(chart) for name, chart in places.items()}
    plots["optuna_quota.budget"] = _budget(material)
    return plots


def _quality(material: Material, resource: str) -> Chart:
    found = next((chart for chart in quality_charts(material).values() if chart), None)
    return found if found is not None else footprint_chart(material, resource)


def _budget(material: Material) -> go.Figure:
    chart = _burn_down_chart(_get_burn_down_info(material.study, material.rows))
    if chart:
        return _small(chart)
    return waste_figure(_get_waste_info(material.study, material.rows))


def _small(chart: Chart) -> go.Figure:
    return figure_of(thinned(chart, _MARKS))
