"""Publishes a study's resource usage to optuna-dashboard, once or while it runs.

The trial table shows usage by itself, from numeric attributes. This module adds a block in the
study's note, notes on terminated and rejected trials, and four small plots. Publishing again
replaces all of it and keeps what a person wrote.

Example:

    .. code-block:: python

        from optuna_quota import analyze
        from optuna_quota.dashboard import Publisher

        study.optimize(objective, n_trials=200, callbacks=[Publisher()])
        analyze(study).publish()

Notes, plots and the artifacts of finished trials are study system attributes. optuna-dashboard has
public functions for notes on studies and plots, but none for a note on a finished trial
(``save_note`` takes a running trial only) or its artifact (``upload_artifact`` writes into the
trial, which can't be changed any more). For these two the attributes are written as
optuna-dashboard 0.21 reads them; ``tests/dashboard_tests`` fails with one that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from importlib.util import find_spec
import io
import json
import logging
import math
import re
from threading import Lock
import time
from types import ModuleType
from typing import Any, TYPE_CHECKING
import uuid

from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _optuna, _records
from optuna_quota._analysis.study_analysis import follows_law, shown_for, StudyAnalysis, trials_of
from optuna_quota._analysis.study_trials import FinishedTrial, main_resource
from optuna_quota._resources import format_amount, USAGE_RESOURCES
from optuna_quota.visualization._cost import plot_burn_down, plot_objectives, plot_waste
from optuna_quota.visualization._figures import plot_best_footprint, plot_ranked_slices, thin
from optuna_quota.visualization._report_text import DRIVERS, ReportText
from optuna_quota.visualization._theme import import_optional, MISSING_PLOTLY, resource_title
from optuna_quota.visualization._usage import plot_usage, timeline_of, timeline_svg


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore
    import plotly.graph_objects as go


__all__ = ["Publisher", "publish"]

_logger = logging.getLogger("optuna.quota.dashboard")

IMAGE = "usage-over-time.svg"
# Other characters of an identifier would be markup in the note.
_ARTIFACT = re.compile(r"dashboard:artifacts:([0-9]+):([A-Za-z0-9-]+)")
# Each response of the dashboard holds all plots, so they are kept to tens of kB; notes on trials
# are study attributes, and hundreds of them slow it down.
_MAX_POINTS = 250
_MAX_TRIAL_NOTES = 100
# The largest share of the time that publishing takes.
_SHARE = 0.02
_MISSING = (
    "Publishing needs optuna-dashboard, which is not installed: "
    "pip install 'optuna-quota[dashboard]'."
)
_MAX_ENDED = 30
_MAX_ADVICE = 7

_MARKUP = re.compile(r"([\\`*_\[\]<>#|~!&$])")
# At the start of a line these begin a list, a heading's underline or a rule.
_LINE_START = re.compile(r"^(\s*)(\d*)([-+=.)])")
# GitHub's Markdown links bare URLs even where their punctuation is escaped; a word joiner, which
# has no width, breaks them up.
_URL = re.compile(r"(?i)(www|https?|ftp|mailto|xmpp)(?=[.:])|(?<=\S)(?=@\S)")
_WORD_JOINER = "\u2060"
_NBSP = "\u00a0"
_MAX_LENGTH = 300
_BAR_WIDTH = 20


def publish(
    study: Study,
    report: StudyAnalysis | None = None,
    artifact_store: ArtifactStore | None = None,
) -> None:
    """Publish a study's resource usage to optuna-dashboard.

    Adds a block with the ledger, what drives usage, advice and the trials that were terminated,
    rejected or failed to the study's note; a note with the reason, a table and, with an artifact
    store, a plot of usage over time to these trials (the latest 100); and four small plots to the
    study's page. Publishing again replaces all this. Text that a person wrote in a note, above or
    below the block, is kept.

    Example:

        .. code-block:: python

            from optuna.artifacts import FileSystemArtifactStore
            from optuna_quota.dashboard import publish

            publish(study, artifact_store=FileSystemArtifactStore("artifacts"))

    Args:
        study: The study.
        report: Its :class:`~optuna_quota.UtilizationReport`, or that of a copy of it; the study is
            analyzed unless given. The ledger, quota and limits are those of ``study``.
        artifact_store: The store that the dashboard is started with (``--artifact-dir``).

    Raises:
        ImportError: If optuna-dashboard is not installed. Without plotly the notes are written,
            and a warning in the log says what to install for the plots.
    """
    publish_report(shown_for(study, report or StudyAnalysis(study)), artifact_store)


def publish_report(
    report: StudyAnalysis,
    artifact_store: ArtifactStore | None,
    is_current: Callable[[], bool] = lambda: True,
) -> None:
    """Publish the analysis of a study, while ``is_current``: no other worker has begun to."""
    _import_dashboard()
    trials, study_id = trials_of(report), _optuna.study_id_of(report.study)
    # Slow steps first, as another worker may begin meanwhile.
    text = ReportText(report)
    note = study_note(text, f"/dashboard/studies/{study_id}/trials?numbers=")
    plots = _plots(report) if find_spec("plotly") else {}
    if not plots:
        _logger.warning(f"Published without plots. {MISSING_PLOTLY}")
    if not is_current():
        return
    dashboard = _Dashboard(report.study)
    dashboard.renew_note(note)
    for name, figure in plots.items():
        dashboard.save_plot(name, figure)
    for trial in text.ended[:_MAX_TRIAL_NOTES]:
        trial_id = _optuna.trial_id_of(trial.trial)
        image = dashboard.image_url(trial_id)
        line = timeline_of(trial, trials.limits)
        if image is None and artifact_store is not None and line.points:
            image = dashboard.save_image(artifact_store, trial_id, timeline_svg(line))
        dashboard.renew_note(trial_note(trial, trials.limits, image), trial_id)


def _plots(report: StudyAnalysis) -> dict[str, go.Figure]:
    main = main_resource(trials_of(report).finished)
    quality = next((f for f in plot_objectives(report).values() if f.data), None)
    budget = plot_burn_down(report)
    # Fixed names, so that publishing again replaces them.
    plots = {
        "optuna_quota.usage": plot_usage(report, resource=main),
        "optuna_quota.drivers": plot_ranked_slices(report, main, max_panels=2),
        "optuna_quota.quality": quality or plot_best_footprint(report, main),
        "optuna_quota.budget": budget if budget.data else plot_waste(report),
    }
    return {name: thin(figure, _MAX_POINTS) for name, figure in plots.items()}


class _Dashboard:
    """The attributes of optuna-dashboard in one study, read once."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._storage = _optuna.storage_of(study)
        self._study_id = _optuna.study_id_of(study)
        self._notes = _import_dashboard("optuna_dashboard._note")
        self._attributes: Mapping[str, Any] = self._storage.get_study_system_attrs(self._study_id)
        found = ((_ARTIFACT.fullmatch(key), value) for key, value in self._attributes.items())
        self._images = {int(m[1]): m[2] for m, value in found if m and _filename(value) == IMAGE}

    def renew_note(self, content: str, trial_id: int | None = None) -> None:
        """Replace our block in the note on the study or on a trial."""
        try:
            note = self._notes.get_note_from_system_attrs(self._attributes, trial_id)["body"]
        except (KeyError, TypeError, ValueError):
            note = ""
        body = replace_block(str(note), content)
        if body != note:
            version = self._attributes.get(self._notes.note_ver_key(trial_id))
            following = version + 1 if isinstance(version, int) else 1
            self._notes.save_note_with_version(
                self._storage, self._study_id, trial_id, following, body
            )

    def save_plot(self, name: str, figure: go.Figure) -> None:
        """Write a plot, replacing the one of that name unless it is the same."""
        prefix = f"dashboard:plot_data:{name}:"
        count = sum(key.startswith(prefix) for key in self._attributes)
        stored = "".join(str(self._attributes.get(f"{prefix}{i}", "")) for i in range(count))
        if figure.to_json() != stored:
            save = _import_dashboard().save_plotly_graph_object
            save(self._study, figure, graph_object_id=name)

    def image_url(self, trial_id: int) -> str | None:
        """Return the URL of a trial's image, None without one."""
        artifact_id = self._images.get(trial_id)
        return None if artifact_id is None else self._artifact_url(trial_id, artifact_id)

    def save_image(self, store: ArtifactStore, trial_id: int, svg: str) -> str:
        """Upload an SVG image as an artifact of a trial and return its URL."""
        artifact_id = str(uuid.uuid4())
        store.write(artifact_id, io.BytesIO(svg.encode()))
        meta = {"artifact_id": artifact_id, "filename": IMAGE, "mimetype": "image/svg+xml"}
        key = f"dashboard:artifacts:{trial_id}:{artifact_id}"
        value = json.dumps({**meta, "encoding": None})
        self._storage.set_study_system_attr(self._study_id, key, value)
        return self._artifact_url(trial_id, artifact_id)

    def _artifact_url(self, trial_id: int, artifact_id: str) -> str:
        return f"/artifacts/{self._study_id}/{trial_id}/{artifact_id}"


def _import_dashboard(module: str = "optuna_dashboard") -> ModuleType:
    return import_optional(module, _MISSING)


def _filename(value: Any) -> Any:
    # A deleted artifact is kept as the JSON text "null".
    try:
        return json.loads(value)["filename"]
    except (KeyError, TypeError, ValueError):
        return None


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
        except ImportError as error:
            _logger.warning(str(error))
            self._next = math.inf
        except Exception:
            _logger.warning("Publishing to optuna-dashboard failed.", exc_info=True)
            self._next = time.monotonic() + self._interval
        finally:
            self._lock.release()

    def _publish(self, study: Study) -> None:
        started = time.monotonic()
        is_current = _claim(study, self._interval)
        if is_current is None:
            self._next = started + self._interval
            return
        publish_report(StudyAnalysis(study), self._artifact_store, is_current)
        ended = time.monotonic()
        self._next = ended + max(self._interval, (ended - started) / _SHARE)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())


def _claim(study: Study, interval: float) -> Callable[[], bool] | None:
    """Claim to publish; None if another worker did within the interval.

    Two workers that read the storage at the same time may both write a claim, and the last one
    wins: the returned function tells whether this claim is still current.
    """
    storage, study_id = _optuna.storage_of(study), _optuna.study_id_of(study)

    def read() -> tuple[float, str]:
        match storage.get_study_system_attrs(study_id).get(_records.STUDY_PUBLISHED):
            case [moment, token]:
                return _records.number(moment) or 0.0, str(token)
        return 0.0, ""

    if 0 <= time.time() - read()[0] < interval:
        return None
    token = uuid.uuid4().hex
    storage.set_study_system_attr(study_id, _records.STUDY_PUBLISHED, [time.time(), token])
    return lambda: read()[1] == token


def escape(text: str) -> str:
    """Return text without markup or links, in one line of at most 300 characters."""
    plain = _URL.sub(lambda m: m[0] + _WORD_JOINER, _one_line(text))
    return _LINE_START.sub(r"\1\2\\\3", _MARKUP.sub(r"\\\1", plain))


def code(text: str) -> str:
    """Return text as a code span that is valid in a table cell."""
    plain = _one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{plain}{pad}{fence}".replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Return a table of cells that are Markdown already, some columns aligned to the right."""
    marks = ["---:" if i in right else ":---" for i in range(len(head))]

    def cell(i: int, text: str) -> str:
        # The dashboard's cells have no padding; Markdown keeps en spaces. Amounts don't wrap.
        kept = text if i and i not in right else text.replace(" ", _NBSP)
        return f"\u2002{kept}\u2002"

    lines = [[cell(*pair) for pair in enumerate(row)] for row in (head, *rows)]
    lines.insert(1, marks)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def bar(share: float) -> str:
    """Return a bar of block characters for a share from 0 to 1, with the percentage."""
    filled = round(_BAR_WIDTH * min(1.0, max(0.0, share)))
    return "█" * filled + "░" * (_BAR_WIDTH - filled) + f" {100 * share:.0f}%"


def _one_line(text: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= _MAX_LENGTH else shown[: _MAX_LENGTH - 1] + "…"


# Our part of a note is a block between two link definitions, which Markdown does not show;
# optuna-dashboard shows HTML comments as text. All text from the storage is escaped.
BEGIN = "[//]: # (optuna_quota: begin. Rewritten when published; write above or below.)"
END = "[//]: # (optuna_quota: end)"

_BEGIN = r"^\[//\]: # \(optuna_quota: begin[^\n]*$"
_END = r"^\[//\]: # \(optuna_quota: end\)[^\S\n]*$"
# From the last begin before an end: a begin without its end belongs to the person's text.
_BLOCK = re.compile(rf"{_BEGIN}(?:(?!{_BEGIN}).)*?{_END}", re.MULTILINE | re.DOTALL)


def replace_block(note: str, content: str) -> str:
    """Return a note with new content in our block and all other text unchanged.

    The first block is replaced in place and copies of it are removed; without one, it is appended.
    """
    block = f"{BEGIN}\n\n{content.strip()}\n\n{END}"
    if _BLOCK.search(note):
        once = iter([block])
        return _BLOCK.sub(lambda _: next(once, ""), note)
    gap = "" if not note or note.endswith("\n\n") else "\n" if note.endswith("\n") else "\n\n"
    return f"{note}{gap}{block}\n"


def study_note(text: ReportText, trial_url: str) -> str:
    """Return the note on a study; ``trial_url`` and a number are the page of that trial."""
    parts = ["### Resource usage", escape(text.headline)]
    if text.ledger:
        rows = [
            [*map(escape, line.cells), "" if line.share is None else bar(line.share)]
            for line in text.ledger
        ]
        right = range(1, len(text.ledger_head) - 1)
        parts += ["#### Ledger", table(text.ledger_head, rows, right=right)]
    if text.notes:
        parts.append(escape(" ".join(text.notes)))
    if text.drivers:
        head = ["resource", "hyperparameter", "share", "changed"]
        rows = [[d.title, code(d.driver.param), d.share, d.change] for d in text.drivers]
        parts += ["#### What drives usage", table(head, rows, right=(2, 3)), DRIVERS]
    if formulas := text.report.formulas:
        lines = [
            code(line) if follows_law(text.report, name) else escape(line)
            for name, line in formulas.items()
        ]
        parts += ["#### Fitted models", "\n".join(f"- {line}" for line in lines)]
    advice = text.advice[:_MAX_ADVICE]
    if advice:
        parts += ["#### What to change", "\n".join(f"- {escape(row.text)}" for row in advice)]
    ended = text.ended
    if ended:
        rows = [
            [f"[{row.number}]({trial_url}{row.number})", row.outcome, escape(row.reason)]
            for row in ended[:_MAX_ENDED]
        ]
        shown = table(["trial", "outcome", "reason"], rows, right=(0,))
        parts += ["#### Terminated, rejected and failed trials", shown]
    if len(ended) > _MAX_ENDED:
        parts.append(f"… and {len(ended) - _MAX_ENDED:,} earlier ones.")
    return "\n\n".join(parts)


def trial_note(row: FinishedTrial, limits: Mapping[str, float], image: str | None) -> str:
    """Return the note on a trial that was terminated or rejected, or that failed.

    ``limits`` are in SI base units, ``image`` is the URL of the plot of its usage over time.
    """
    parts = [f"**{row.outcome.capitalize()}.** {escape(row.reason)}"]
    if (breach := row.record.breach) is not None:
        limits = {**limits, breach.resource: breach.limit}
    cells = []
    for name, amount in row.amounts.items():
        limit = limits.get(name)
        shown = "" if limit is None else format_amount(name, limit)
        share = f"{amount / limit:.0%}" if limit else ""
        cells.append([escape(resource_title(name)), row.format_usage(name), shown, share])
    if cells:
        parts.append(table(["resource", "used", "limit", "share"], cells, right=(1, 2, 3)))
    if projected := row.record.footprint:
        cells = []
        for name in dict.fromkeys(n for n in (*USAGE_RESOURCES, *projected) if n in projected):
            found = projected[name]
            amounts = [format_amount(name, v) for v in (found.median, found.lower, found.upper)]
            cells.append([escape(resource_title(name)), *amounts])
        head = ["resource", "projected", "lower", "upper"]
        parts += ["Projected before it ran:", table(head, cells, right=(1, 2, 3))]
    if image is not None:
        parts.append(f"![Usage over time, with the limit]({image})")
    return "\n\n".join(parts)
