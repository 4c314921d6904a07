"""Hostile names of studies, parameters, categories and attributes are shown as text."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial, TrialState
import pytest

from optuna_quota import analyze
from optuna_quota.cli import main
from optuna_quota.cli.common import harmless
from tests.hardening_tests import hostile
from tests.hardening_tests.test_hostile_attributes import Elements


# Half of a surrogate pair: JSON keeps it, UTF-8 can't.
LONE = "a\ud800b"
# Each makes a report of 5 MB.
TEXTS = (hostile.MARKUP[1], hostile.MARKUP[3], hostile.MARKUP[8], LONE)


def study_named(text: str, storage: str | None = None) -> optuna.Study:
    """Return a study that has a text for all of its names and values."""
    # Databases store keys as UTF-8.
    key = text.replace(LONE, "lone")
    study = optuna.create_study(study_name=key.replace("\x00", ""), storage=storage)
    study.set_metric_names([text])
    number, kind = f"n {key}", f"k {key}"
    distributions: dict[str, BaseDistribution] = {
        number: FloatDistribution(0, 2),
        kind: CategoricalDistribution([text, "other"]),
    }
    for index in range(14):
        x = index / 7 + 0.01
        state = TrialState.PRUNED if index % 5 == 4 else TrialState.COMPLETE
        attributes = {
            "quota:memory": 1e8 * (1 + x),
            "quota:wall_time": 1 + x,
            "quota:cpu_time": 1 + 2 * x + index % 2,
            "quota:outcome": "terminated" if state == TrialState.PRUNED else "completed",
            "quota:reason": text,
            "quota:host": text,
            f"quota:{key}": x,
            key: (text, "other", "third")[index % 3],
        }
        study.add_trial(
            create_trial(
                state=state,
                value=x if state == TrialState.COMPLETE else None,
                params={number: x, kind: (text, "other")[index % 2]},
                distributions=distributions,
                user_attrs=attributes,
            )
        )
    study.set_user_attr(key, text)
    study.set_user_attr("quota:limits", {"memory": 3e8, text: 7})
    return study


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_report_from_the_command_line_holds_no_markup_of_others(
    text: str, tmp_path: Path
) -> None:
    url, page = f"sqlite:///{tmp_path}/a.db", tmp_path / "page.html"
    study = study_named(text, url)
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    errors = io.StringIO()
    arguments = [
        "--storage",
        url,
        "--study-name",
        study.study_name,
        "--user-attr",
        text.replace(LONE, "lone"),
    ]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main(["report", *arguments, "--html", str(page)])
        for form in ("table", "json"):
            assert main(["status", "--storage", url, "--format", form]) == 0
    assert code == 0, errors.getvalue()
    printed.flush()
    shown = printed.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "\x1b" not in shown + errors.getvalue()
    elements = Elements()
    elements.feed(page.read_text(encoding="utf-8"))
    assert not elements.handlers
    assert not [link for link in elements.links if not link.startswith(("#", "data:image/"))]
    assert not elements.tags & {"iframe", "img", "object", "embed", "base", "form", "link"}


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_figures_have_no_markup_of_names(text: str) -> None:
    report = analyze(study_named(text), user_attrs=[text.replace(LONE, "lone")])
    for name, figure in report.figures().items():
        # Plotly renders some HTML in its texts, such as links.
        for sign in ("<script", "<svg", "<a ", "<img", "<iframe"):
            assert sign not in figure.to_json(), name
    assert "<script" not in report._repr_html_().replace("<style", "")
    analyze(study_named(text)).publish()


def test_printed_text_has_no_control_characters() -> None:
    assert harmless("a\x1b[2Jb\x07\r\u202e\nc\u2002d") == "a [2Jb   \nc\u2002d"
