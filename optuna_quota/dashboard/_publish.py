"""Publishes a study's resource usage to optuna-dashboard, once or while it runs."""

from __future__ import annotations

from collections.abc import Callable
import logging
from threading import Lock
import time
from typing import Any
from typing import TYPE_CHECKING
import uuid

from optuna_quota import _optuna
from optuna_quota import _records
from optuna_quota.dashboard._notes import replace_block
from optuna_quota.dashboard._notes import study_note
from optuna_quota.dashboard._notes import trial_note
from optuna_quota.dashboard._storage import DashboardStorage
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
    from optuna.trial import FrozenTrial
    import plotly.graph_objects as go


IMAGE = "memory-over-time.svg"
# Each response of the dashboard holds all plots, so they are kept to tens of kB; notes on trials
# are study attributes, and hundreds of them slow it down.
_MAX_POINTS = 250
_MAX_TRIAL_NOTES = 100


def publish(study: Study, report: Any = None, artifact_store: ArtifactStore | None = None) -> None:
    """Publish a study's resource usage to optuna-dashboard.

    Adds a block with the ledger, the fitted models, advice and the terminated and rejected trials
    to the study's note; a note with the reason, a table and, with an artifact store, a plot of
    memory over time to these trials (the latest 100); and four small plots to the study's page.
    Publishing again replaces all this. Text that a person wrote in a note, above or below the
    block, is kept.

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
        report = _analyze(study)
    publish_material(material_of(study, report), report, artifact_store)


def publish_material(
    material: Material,
    report: Any,
    artifact_store: ArtifactStore | None,
    is_current: Callable[[], bool] = lambda: True,
) -> None:
    """Publish the data of a study.

    Args:
        material: The study and its trials.
        report: Its report, or None to leave out models and advice.
        artifact_store: For images.
        is_current: Called before anything is written: False if another worker has begun to
            publish.
    """
    facts = facts_of(material, report)
    plots = _plots(material)
    if not is_current():
        return
    dashboard = DashboardStorage(material.study)
    note = dashboard.note()
    renewed = replace_block(note, study_note(facts, dashboard.trial_url))
    if renewed != note:
        dashboard.save_note(renewed)
    for name, figure in plots.items():
        dashboard.save_plot(name, figure)
    ended = [row for row in material.rows if row.outcome in ("terminated", "rejected")]
    for row in ended[-_MAX_TRIAL_NOTES:]:
        _note_trial(dashboard, row, material.study, artifact_store)


def _analyze(study: Study) -> Any:
    # Not at the top: it loads statsmodels.
    import optuna_quota

    return optuna_quota.analyze(study)


def _note_trial(
    dashboard: DashboardStorage, row: Row, study: Study, store: ArtifactStore | None
) -> None:
    trial_id = _optuna.trial_id_of(row.trial)
    limits = limits_of(study)
    image = dashboard.image_url(trial_id, IMAGE)
    if image is None and store is not None and row.record.timeline:
        svg = svg_of(_timeline_chart(timeline_info(row, limits.get("memory"))))
        image = dashboard.save_image(store, trial_id, IMAGE, svg)
    note = dashboard.note(trial_id)
    renewed = replace_block(note, trial_note(row, limits, image))
    if renewed != note:
        dashboard.save_note(renewed, trial_id)


def _plots(material: Material) -> dict[str, go.Figure]:
    resources = measured(material.rows)
    main = resources[0] if resources else "memory"
    # Fixed names, so that publishing again replaces them.
    charts = {
        "optuna_quota.usage": _usage_chart(_get_usage_info(material.study, main, material.rows)),
        "optuna_quota.drivers": slice_chart(material, main, most=2),
        "optuna_quota.quality": _quality(material, main),
    }
    plots = {name: _small(chart) for name, chart in charts.items()}
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
    return figure_of(thinned(chart, _MAX_POINTS))


_logger = logging.getLogger("optuna.quota.dashboard")

# The largest share of the time that publishing takes.
_SHARE = 0.02


class Publisher:
    """Keeps a study's page in optuna-dashboard current: give it to ``study.optimize``.

    Publishes when a trial has ended and at least ``interval`` seconds have passed, then pauses for
    fifty times as long as publishing took, so that it takes at most 2% of the time. Of several
    workers, one publishes at a time. Errors are logged as warnings and fail no study.

    Example:

        .. code-block:: python

            from optuna_quota import analyze
            from optuna_quota.dashboard import Publisher

            study.optimize(objective, n_trials=200, callbacks=[Publisher()])
            analyze(study).publish()  # with the last trials

    Args:
        artifact_store: The store that the dashboard is started with, for images.
        interval: Minimum seconds between publications.

    Raises:
        ValueError: If ``interval`` is negative.
    """

    def __init__(
        self, *, artifact_store: ArtifactStore | None = None, interval: float = 30.0
    ) -> None:
        if not interval >= 0:
            raise ValueError(f"`interval` must be nonnegative but got {interval!r}.")
        self._artifact_store = artifact_store
        self._interval = interval
        self._next = 0.0
        self._lock = Lock()

    def __call__(self, study: Study, trial: FrozenTrial) -> None:
        """Publish if it is due."""
        if time.monotonic() < self._next or not self._lock.acquire(blocking=False):
            return
        try:
            self._publish(study)
        except Exception:
            _logger.warning("Publishing to optuna-dashboard failed.", exc_info=True)
            self._next = time.monotonic() + self._interval
        finally:
            self._lock.release()

    def _publish(self, study: Study) -> None:
        started = time.monotonic()
        claim = _Claim(study)
        if claim.is_taken(self._interval):
            self._next = started + self._interval
            return
        claim.take()
        report = _analyze(study)
        publish_material(material_of(study, report), report, self._artifact_store, claim.is_ours)
        ended = time.monotonic()
        self._next = ended + max(self._interval, (ended - started) / _SHARE)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())


class _Claim:
    """Which worker publishes: the last to write its claim, if none did within the interval.

    Two workers that read the storage at the same time may both write one, so each checks its claim
    again before it publishes.
    """

    def __init__(self, study: Study) -> None:
        self._storage = _optuna.storage_of(study)
        self._study_id = _optuna.study_id_of(study)
        self._token = uuid.uuid4().hex

    def is_taken(self, interval: float) -> bool:
        at = self._read()[0]
        return 0 <= time.time() - at < interval

    def take(self) -> None:
        value: list[float | str] = [time.time(), self._token]
        self._storage.set_study_system_attr(self._study_id, _records.STUDY_PUBLISHED, value)

    def is_ours(self) -> bool:
        return self._read()[1] == self._token

    def _read(self) -> tuple[float, str]:
        attributes = self._storage.get_study_system_attrs(self._study_id)
        value = attributes.get(_records.STUDY_PUBLISHED)
        if not isinstance(value, list) or len(value) != 2:
            return 0.0, ""
        return _records.number(value[0]) or 0.0, str(value[1])
