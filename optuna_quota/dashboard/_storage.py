"""Reads and writes what optuna-dashboard keeps in a study.

Notes, plots and the artifacts of finished trials are study system attributes. optuna-dashboard has
public functions for notes on studies and plots, but none for a note on a finished trial
(``save_note`` takes a running trial only) or its artifact (``upload_artifact`` writes into the
trial, which can't be changed any more). For these two the attributes are written as
optuna-dashboard 0.21 reads them. ``tests/dashboard_tests`` fails when a later one reads them
differently.
"""

from __future__ import annotations

from collections.abc import Mapping
import importlib
import io
import json
from types import ModuleType
from typing import Any, TYPE_CHECKING
import uuid

from optuna_quota import _optuna


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore
    from optuna.study import Study
    import plotly.graph_objects as go


_PLOT = "dashboard:plot_data:"


class DashboardStorage:
    """The notes, plots and artifacts of one study, read once.

    Args:
        study: The study.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._storage = _optuna.storage_of(study)
        self._study_id = _optuna.study_id_of(study)
        self._notes = import_dashboard("optuna_dashboard._note")
        self._attributes: Mapping[str, Any] = self._storage.get_study_system_attrs(self._study_id)

    def note(self, trial_id: int | None = None) -> str:
        """Return the note on the study or on a trial, empty if it is missing or malformed."""
        try:
            note = self._notes.get_note_from_system_attrs(self._attributes, trial_id)
        except (KeyError, TypeError, ValueError):
            return ""
        return str(note["body"])

    def save_note(self, body: str, trial_id: int | None = None) -> None:
        """Write the next version of the note on the study or on a trial."""
        version = self._attributes.get(self._notes.note_ver_key(trial_id))
        before = version if isinstance(version, int) else 0
        self._notes.save_note_with_version(
            self._storage, self._study_id, trial_id, before + 1, body
        )

    def save_plot(self, name: str, figure: go.Figure) -> None:
        """Write a plot, replacing the one of that name unless it is the same."""
        if figure.to_json() != self._plot(name):
            dashboard = import_dashboard()
            dashboard.save_plotly_graph_object(self._study, figure, graph_object_id=name)

    def _plot(self, name: str) -> str:
        prefix = f"{_PLOT}{name}:"
        count = sum(key.startswith(prefix) for key in self._attributes)
        return "".join(str(self._attributes.get(f"{prefix}{i}", "")) for i in range(count))

    def image_url(self, trial_id: int, filename: str) -> str | None:
        """Return the URL of a trial's artifact of that name, None without one."""
        prefix = _artifact_prefix(trial_id)
        for key, value in self._attributes.items():
            if key.startswith(prefix):
                meta, artifact_id = _artifact(value), key.removeprefix(prefix)
                # Other characters would be markup in the note.
                plain = artifact_id.replace("-", "").isalnum() and artifact_id.isascii()
                if meta is not None and meta.get("filename") == filename and plain:
                    return self._artifact_url(trial_id, artifact_id)
        return None

    def save_image(self, store: ArtifactStore, trial_id: int, filename: str, svg: str) -> str:
        """Upload an SVG image as an artifact of a trial and return its URL."""
        artifact_id = str(uuid.uuid4())
        store.write(artifact_id, io.BytesIO(svg.encode()))
        meta = {
            "artifact_id": artifact_id,
            "filename": filename,
            "mimetype": "image/svg+xml",
            "encoding": None,
        }
        key = _artifact_prefix(trial_id) + artifact_id
        self._storage.set_study_system_attr(self._study_id, key, json.dumps(meta))
        return self._artifact_url(trial_id, artifact_id)

    def trial_url(self, number: int) -> str:
        """Return the URL of a trial's page."""
        return f"/dashboard/studies/{self._study_id}/trials?numbers={number}"

    def _artifact_url(self, trial_id: int, artifact_id: str) -> str:
        return f"/artifacts/{self._study_id}/{trial_id}/{artifact_id}"


def import_dashboard(module: str = "optuna_dashboard") -> ModuleType:
    """Return a module of optuna-dashboard.

    Raises:
        ImportError: If it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "Publishing needs optuna-dashboard, which is not installed: "
            "pip install 'optuna-quota[dashboard]'."
        ) from error


def _artifact_prefix(trial_id: int) -> str:
    return f"dashboard:artifacts:{trial_id}:"


def _artifact(value: Any) -> dict[str, Any] | None:
    # A deleted artifact is kept as the JSON text "null".
    try:
        meta = json.loads(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return meta if isinstance(meta, dict) else None
