"""The HTML report is self-contained and safe, with plotly or without."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
import re
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
import pytest

from optuna_quota import analyze, Limits, Quota, Usage, visualization
from optuna_quota._html import prose
from optuna_quota._records import TrialRecord
from optuna_quota._usage import Breach
from optuna_quota.visualization import _html_report, _theme
from optuna_quota.visualization._report_text import ReportText
from tests.browser import chromium, faults, wait_for
from tests.utilization_tests.test_formula import flawed_study
from tests.visualization_tests.studies import add_row, empty_study, made_study


GIB = 2**30
HOSTILE = "</script><img src=x onerror='window.hacked=1'>&\u2028\x07"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href") or k.startswith("on")]


def test_a_quota_that_is_used_up_has_nothing_left() -> None:
    study = empty_study(quota=Quota(n_trials=1, cpu_time=10))
    add_row(study, TrialRecord(Usage(cpu_time=4, wall_time=5), "completed"))
    text = ReportText(analyze(study))
    cells = {row.cells[0]: list(row.cells[1:]) for row in text.ledger}
    assert cells["Trials"] == ["1", "0", "1"]
    assert cells["Wall time"] == ["5 s", "–", "–"]
    assert cells["CPU time"] == ["4 s", "6 s", "10 s"]


def tags_of(page: str) -> Tags:
    parser = Tags()
    parser.feed(page)
    return parser


@pytest.fixture(scope="module")
def report() -> Any:
    return analyze(made_study(40, name="a study"))


def hostile_study() -> optuna.Study:
    name = f"p {HOSTILE}"
    space = {name: FloatDistribution(0.1, 1)}
    study = empty_study(name=f"s {HOSTILE}", limits=Limits(memory="1GiB"))
    breach = Breach("memory", GIB, 2 * GIB, 1.0)
    for n in range(25):
        usage = Usage(memory=GIB * (0.1 + n / 40), wall_time=1 + n)
        add_row(study, TrialRecord(usage, "completed"), params={name: 0.1 + n / 40}, space=space)
    line = ((0.0, 1e8), (1.0, 2e9))
    usage = Usage(memory=2 * GIB)
    record = TrialRecord(usage, "terminated", HOSTILE, breach, host=HOSTILE, timeline=line)
    add_row(study, record, params={name: 1.0}, space=space)
    return study


@pytest.mark.slow
def test_figures_are_in_reading_order(report: Any) -> None:
    figures = report.figures()
    assert list(figures)[:3] == ["usage_memory", "usage_wall_time", "usage_cpu_time"]
    expected = {"burn_down", "waste", "correlations", "usage_slice_memory", "footprint_memory"}
    assert expected | {"quality_cost"} <= set(figures)
    assert any(name.startswith("timeline_") for name in figures)


@pytest.mark.slow
def test_the_file_is_self_contained(report: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    visualization.to_html(report, path)
    page = path.read_text(encoding="utf-8")
    assert page.count("plotly.js v") <= 2 and 4e6 < len(page) < 7e6
    assert not tags_of(re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)).addresses
    for heading in ("Ledger", "What drives usage", "Fitted models", "Terminated, rejected and"):
        assert heading in page
    # What drives memory; no column of the ledger is all dashes.
    assert re.search(r"Memory</td><td[^>]*>width</td>.*?\d% \(\d+ to \d+%\).*?doubled: × \d", page)
    assert ">left</th>" in page and "reserved" not in page.partition("<script>")[0]


def test_a_file_without_plots_has_tables_and_no_script(report: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    visualization.to_html(report, path, interactive=False)
    page = path.read_text(encoding="utf-8")
    found = tags_of(page)
    assert "script" not in found.tags and not found.addresses
    assert "Where the budget went" in page and "rank correlations" in page
    assert len(page) < 50_000


def test_without_plotly_the_file_has_tables_and_names_the_extra(
    report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_html_report, "find_spec", lambda name: None)
    path = tmp_path / "report.html"
    report.to_html(path)
    page = path.read_text(encoding="utf-8")
    assert "optuna-quota[plot]" in page and "Where the budget went" in page
    assert "script" not in tags_of(page).tags


def test_what_stands_between_backticks_is_code() -> None:
    page = analyze(flawed_study("bend"))._repr_html_()
    assert "Use <code>report.footprint.predict(params)</code>." in page and "`" not in page
    assert prose("a `<b>` & `c") == "a <code>&lt;b&gt;</code> &amp; `c"


def test_a_notebook_shows_texts_and_tables_without_script(report: Any) -> None:
    page = report._repr_html_()
    found = tags_of(page)
    assert "script" not in found.tags and "table" in found.tags
    assert "report.figures()" in page and len(page) < 50_000


@pytest.mark.parametrize("n_trials", [0, 1])
def test_studies_with_hardly_any_trials_have_a_report(n_trials: int, tmp_path: Path) -> None:
    study = made_study(n_trials) if n_trials else empty_study()
    path = tmp_path / "report.html"
    analyze(study).to_html(path)
    assert "Resource usage of" in path.read_text(encoding="utf-8")
    assert "Ledger" in analyze(study)._repr_html_()


def test_a_report_shows_the_study_as_of_its_analysis(tmp_path: Path) -> None:
    study = made_study(12)
    report = analyze(study)
    add_row(study, TrialRecord(Usage(memory=9e9, wall_time=1), outcome="completed"))
    path = tmp_path / "report.html"
    visualization.to_html(report, path, interactive=False)
    assert "12 trials finished" in path.read_text(encoding="utf-8")
    shown = [len(trace.x) for trace in report.figures()["usage_memory"].data]
    assert sum(shown) == len(report.table[report.table["memory"].notna()])


def test_the_best_value_is_that_of_a_trial_that_violates_no_constraint() -> None:
    study = empty_study(name="constrained")
    for value, violated in ((1.0, 1.0), (2.0, 0.0)):
        attributes = {"constraints": [violated]}
        study.add_trial(optuna.trial.create_trial(value=value, system_attrs=attributes))
    text = ReportText(analyze(study))
    assert "The best value, 2, is that of trial 1." in text.headline
    assert ("2", "best value, trial 1") in text.tiles


@pytest.mark.slow
def test_names_and_reasons_are_escaped(tmp_path: Path) -> None:
    report = analyze(hostile_study())
    path = tmp_path / "report.html"
    for interactive in (True, False):
        visualization.to_html(report, path, interactive=interactive)
        found = tags_of(path.read_text(encoding="utf-8"))
        assert "img" not in found.tags and not found.addresses
        assert found.tags.count("script") == (2 if interactive else 0)


def test_without_plotly_a_plot_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(_theme.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"optuna-quota\[plot\]"):
        visualization.plot_usage(made_study(3))


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_draws_the_report_offline_without_errors(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report = analyze(hostile_study())
    visualization.to_html(report, path)
    with chromium() as driver:
        driver.get(path.as_uri())
        drawn = wait_for(
            driver,
            """const plots = [...document.querySelectorAll(".plot")];
               return plots.every(p => p.querySelector(".main-svg")) ? plots.length : null;""",
        )
        assert drawn == len(visualization.figures(report))
        script = "return performance.getEntriesByType('resource').map(e => e.name);"
        assert driver.execute_script(script) == []
        assert driver.execute_script("return window.hacked === undefined;")
        width = "return document.documentElement.scrollWidth - window.innerWidth;"
        assert driver.execute_script(width) <= 0
        assert not faults(driver)
        # On a narrow screen a table scrolls, instead of breaking within words.
        driver.set_window_size(500, 2400)
        assert driver.execute_script(width) <= 0
        height = "return document.querySelector('tbody td').clientHeight;"  # "Trials"
        assert 0 < driver.execute_script(height) < 40
