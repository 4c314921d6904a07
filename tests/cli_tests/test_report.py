"""``optuna-quota report`` on a study that ran."""

from __future__ import annotations

import os
from pathlib import Path
import pty
import subprocess
import sys

import optuna
import pytest

from tests.cli_tests.commands import ROOT, run_command
from tests.cli_tests.conftest import run_study


def test_the_summary_is_printed(tuned: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_command(capsys, "report", "--storage", tuned)
    assert result.status == 0
    assert "Study 'tuned': 12 trials finished" in result.out
    assert "wall time" in result.out
    assert result.err == ""


def test_json_keys_are_stable(tuned: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_command(capsys, "report", "--storage", tuned, "--format", "json")
    assert result.status == 0
    assert set(result.json) == {
        "study", "n_trials", "best", "quota", "limits", "outcomes", "usage", "correlations",
        "drivers", "cheaper_space", "front", "models", "missing_models", "advice",
    }  # fmt: skip
    assert result.json["outcomes"] == {"completed": 12}
    assert result.json["usage"]["wall_time"]["n"] == 12
    assert {"param", "resource", "rho", "p_adjusted", "n"} <= set(result.json["correlations"][0])
    for model in result.json["models"].values():
        assert {"formula", "kind", "coefficients", "diagnostics"} <= set(model)
        assert {"term", "estimate", "lower", "upper"} <= set(model["coefficients"][0])
    for advice in result.json["advice"]:
        assert set(advice) == {"topic", "text", "figures", "snippets"}


@pytest.mark.slow
def test_it_is_written_as_html_and_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna_dashboard")
    url = f"sqlite:///{tmp_path}/tuning.db"
    run_study(url, "shown", n_trials=5)
    page = tmp_path / "report.html"
    result = run_command(capsys, "report", "--storage", url, "--html", str(page), "--publish")
    assert result.status == 0
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    storage = optuna.storages.RDBStorage(url)
    attributes = storage.get_study_system_attrs(storage.get_study_id_from_name("shown"))
    assert any("note" in key for key in attributes)


def test_without_optuna_dashboard_the_report_is_printed_all_the_same(
    tuned: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("optuna_dashboard", "optuna_dashboard._note"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run_command(capsys, "report", "--storage", tuned, "--publish")
    assert result.status == 1
    assert "trials finished" in result.out
    assert "pip install 'optuna-quota[dashboard]'" in " ".join(result.err.split())


def test_a_study_without_trials_has_a_report(
    several: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("report", "--storage", str(several), "--study-name", "first")
    assert "no trial has finished" in run_command(capsys, *arguments).out
    assert run_command(capsys, *arguments, "--format", "json").json["n_trials"] == 0


def test_an_attribute_that_no_trial_has_is_refused(
    tuned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_command(capsys, "report", "--storage", tuned, "--user-attr", "quota:hots")
    assert result.status == 2
    assert "--user-attr: no trial has 'quota:hots'; did you mean quota:host?" in result.err
    assert run_command(capsys, "report", "--storage", tuned, "--user-attr", "quota:host").err == ""


@pytest.mark.parametrize("option", ["--html", "--footprint"])
def test_a_file_that_cannot_be_written_is_an_error_of_one_sentence(
    option: str, tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_command(capsys, "report", "--storage", tuned, option, str(tmp_path / "no" / "x"))
    assert result.status == 1
    error = " ".join(result.err.split())
    assert error.startswith(f"optuna-quota report: {option}: ")
    assert error.endswith(f"there is no folder '{tmp_path / 'no'}'.")
    assert "Traceback" not in error and "Errno" not in error


@pytest.mark.slow
def test_progress_is_shown_on_a_terminal_and_wiped(tuned: str) -> None:
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "optuna_quota", "report", "--storage", tuned],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=follower,
        check=True,
    )
    os.close(follower)
    shown = os.read(leader, 10_000).decode()
    os.close(leader)
    assert "fitting models …" in shown
    assert shown.endswith("\r\x1b[K")
    assert b"fitting" not in done.stdout
