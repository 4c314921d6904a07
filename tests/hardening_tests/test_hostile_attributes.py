"""Hostile attributes in the storage run nothing, crash nothing and lift no limit.

Each attribute that this library reads is replaced by hostile JSON, and read in all ways.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
from datetime import timedelta
from html.parser import HTMLParser
import io
import json
from pathlib import Path
import tempfile
from typing import Any

from hypothesis import given, settings, strategies as st
import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import (
    analyze,
    dashboard,
    Footprint,
    Limits,
    project,
    Quota,
    QuotaPruner,
    QuotaSampler,
    replay,
    status,
    Strategy,
    trial_table,
    Usage,
)
from optuna_quota._optuna import storage_of, study_id_of
from optuna_quota._records import OUTCOME
from optuna_quota.cli import main
from tests.hardening_tests import hostile


ROWS = 12

hostile_rows = st.lists(
    st.tuples(hostile.trial_attributes, hostile.system_attributes), min_size=1, max_size=4
)


pytestmark = pytest.mark.usefixtures("quiet")


def fuzz(examples: int) -> settings:
    """Return settings under which every run tries the same."""
    return settings(max_examples=examples, derandomize=True, database=None)


def study_of(
    rows: list[tuple[dict[str, Any], dict[str, Any]]],
    attributes: Mapping[str, Any],
    system: Mapping[str, Any] | None = None,
    storage: str | None = None,
) -> optuna.Study:
    study = optuna.create_study(storage=storage)
    given_rows = [*rows, *[({}, {})] * (ROWS - len(rows))]
    study.add_trials([hostile.row(i, *pair) for i, pair in enumerate(given_rows)])
    for key, value in attributes.items():
        study.set_user_attr(key, value)
    for key, value in (system or {}).items():
        storage_of(study).set_study_system_attr(study_id_of(study), key, value)
    return study


@pytest.mark.slow
@fuzz(30)
@given(hostile_rows, hostile.study_attributes)
def test_tables_ledger_and_replay(rows: Any, attributes: Any) -> None:
    study = study_of(rows, attributes)
    assert len(trial_table(study)) == ROWS
    found = status(study)
    assert str(found) and (found.table["used"].dropna() >= 0).all()
    report = replay(study, quota=Quota(trial_time=10), limits=Limits(memory="150MB"))
    assert str(report)


@pytest.mark.slow
@fuzz(3)
@given(hostile_rows, hostile.study_attributes)
def test_sampler_and_pruner_keep_the_limits(rows: Any, attributes: Any) -> None:
    study = study_of(rows, attributes)
    study.sampler = QuotaSampler(
        optuna.samplers.TPESampler(n_startup_trials=1, seed=0), quota=Quota(n_trials=ROWS + 2)
    )
    study.pruner = QuotaPruner(limits=Limits(memory="1GiB", wall_time=1e-6))
    ran = []

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 2)
        trial.suggest_categorical("kind", ["a", "b"])
        ran.append(x)
        if trial.should_prune():
            raise optuna.TrialPruned
        return x

    study.optimize(objective, n_trials=3)
    new = study.trials[ROWS:]
    assert all(trial.state.is_finished() for trial in new)
    # The limit holds: a microsecond is breached by any trial that ran.
    assert {t.user_attrs.get(OUTCOME) for t in new} <= {"terminated", "rejected"}
    completed = sum(t.state == TrialState.COMPLETE for t in study.trials[:ROWS])
    assert len(ran) <= ROWS + 2 - completed


class Elements(HTMLParser):
    """The elements, event handlers and links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]


def markup_of(study: optuna.Study, folder: Path) -> Elements:
    page = folder / "page.html"
    analyze(study).to_html(str(page))
    elements = Elements()
    elements.feed(page.read_text(encoding="utf-8"))
    return elements


@pytest.mark.slow
@fuzz(3)
@given(hostile_rows, hostile.study_attributes, hostile.study_system_attributes)
def test_a_report_has_no_markup_of_attributes(rows: Any, attributes: Any, system: Any) -> None:
    plain = study_of([], {})
    study = study_of(rows, attributes, system)
    with tempfile.TemporaryDirectory() as folder:
        harmless, found = (markup_of(each, Path(folder)) for each in (plain, study))
    assert not found.handlers
    assert not [link for link in found.links if not link.startswith(("#", "data:image/"))]
    assert not found.tags & {"iframe", "img", "object", "embed", "base", "form"}
    assert ("script" in found.tags) <= ("script" in harmless.tags)


@pytest.mark.slow
@fuzz(4)
@given(hostile_rows, hostile.study_attributes, hostile.study_system_attributes)
def test_published_notes_have_no_markup(rows: Any, attributes: Any, system: Any) -> None:
    study = study_of(rows, attributes, system)
    analyze(study).publish()
    notes = [
        str(value)
        for key, value in storage_of(study).get_study_system_attrs(study_id_of(study)).items()
        if "note" in key and "quota" not in key
    ]
    assert notes
    for note in notes:
        for line in note.splitlines():
            # Text in code spans is not rendered.
            bare = "".join(line.split("`")[::2])
            assert "<script" not in bare and "](javascript" not in bare


@pytest.mark.parametrize("text", hostile.MARKUP)
def test_escaped_text_is_one_line_without_signs_of_markup(text: str) -> None:
    shown = dashboard.escape(text)
    assert "\n" not in shown and "\x1b" not in shown
    assert not shown.replace("\\<", "").count("<")


COMMANDS = (
    ("status",),
    ("status", "--format", "json"),
    ("report", "--format", "json"),
    ("replay", "--limit", "memory=150MB"),
    ("project", "--n-trials", "5", "--quota", "trial_time=1h"),
)


@pytest.mark.slow
@fuzz(2)
@given(hostile_rows, hostile.study_attributes)
def test_the_command_line_prints_no_escape_and_no_traceback(rows: Any, attributes: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/a.db"
        study_of(rows, attributes, storage=url)
        for command, *arguments in COMMANDS:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([command, "--storage", url, *arguments])
            assert code in (0, 3), (command, err.getvalue())
            assert "\x1b" not in out.getvalue()
            assert "Traceback" not in out.getvalue() + err.getvalue()


@fuzz(60)
@given(hostile.values)
def test_a_footprint_from_hostile_json_is_a_value_error(value: Any) -> None:
    for text in (json.dumps(value), str(value)):
        with contextlib.suppress(ValueError):  # the documented one; nothing else
            Footprint.from_json(text)


def test_a_study_with_wrong_usage_in_all_rows_can_be_projected() -> None:
    rows = [({"quota:memory": 10**400, "quota:footprint": hostile.nested(60)}, {})] * 6
    study = study_of(rows, {})
    footprint = analyze(study).footprint
    assert str(project(Strategy(5), footprint, quota=Quota(trial_time="1h")))
    assert str(project(Strategy(5), Usage(wall_time=1), quota=Quota(trial_time="1h")))


def test_a_completed_row_marked_as_rejected_is_charged() -> None:
    rows = [hostile.row(i, {OUTCOME: "rejected"}, {}) for i in range(ROWS)]
    for row in rows:
        if row.datetime_start is not None:
            # A row without duration counts as added, not as run.
            row.datetime_start -= timedelta(seconds=1)
    study = optuna.create_study()
    study.add_trials(rows)
    study.sampler = QuotaSampler(quota=Quota(n_trials=ROWS))
    completed = sum(t.state == TrialState.COMPLETE for t in study.trials)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 2), n_trials=2 * ROWS)
    ran = sum(t.state == TrialState.COMPLETE for t in study.trials) - completed
    assert ran == ROWS - completed
