"""``optuna-quota status`` on studies that ran."""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import pytest

from tests.cli_tests.commands import run_command, run_process


def test_the_ledger_is_printed(tuned: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_command(capsys, "status", "--storage", tuned)
    assert result.status == 0
    assert "Study 'tuned'" in result.out
    for word in ("used", "reserved", "left", "quota", "wall time", "completed", "worker"):
        assert word in result.out


def test_json_keys_are_stable(tuned: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_command(capsys, "status", "--storage", tuned, "--format", "json")
    assert result.status == 0
    assert set(result.json) == {
        "study", "exceeded", "resources", "by_worker", "by_outcome", "running", "waiting", "end",
        "projection",
    }  # fmt: skip
    rows = {row["resource"]: row for row in result.json["resources"]}
    assert set(rows["n_trials"]) == {"resource", "used", "reserved", "left", "quota", "unknown"}
    assert rows["n_trials"]["used"] == 12
    assert rows["n_trials"]["left"] == 88
    assert 0 < rows["wall_time"]["used"] < 3600
    assert rows["wall_time"]["quota"] == 3600
    assert result.json["by_outcome"]["completed"]["n_trials"] == 12


def test_a_quota_that_is_exceeded_has_status_3(
    tuned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exactly = run_command(capsys, "status", "--storage", tuned, "--quota", "n_trials=12")
    over = run_command(capsys, "status", "--storage", tuned, "--quota", "n_trials=11")
    assert (exactly.status, over.status) == (0, 3)
    assert "The quota of trials is exceeded." in over.out


def test_more_trials_are_projected(tuned: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("status", "--storage", tuned, "--quota", "n_trials=100", "--n-trials")
    few, many = (run_command(capsys, *arguments, n) for n in ("88", "89"))
    assert (few.status, many.status) == (0, 3)
    assert "Projected end" in few.out
    assert "does not fit" in many.out


def test_a_projected_trial_is_ended_by_the_study_s_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(storage=url)
    study.set_user_attr("quota:limits", {"wall_time": 5})
    study.add_trials([optuna.create_trial(value=1, user_attrs={"quota:wall_time": 10.0})] * 9)
    arguments = ("status", "--storage", url, "--n-trials", "10", "--format", "json")
    result = run_command(capsys, *arguments)
    rows = {row["resource"]: row for row in result.json["projection"]["resources"]}
    assert rows["trial_time"]["used"] == 90
    assert rows["trial_time"]["upper"] == pytest.approx(90 + 10 * 5, rel=0.01)


def test_a_study_that_ran_without_the_library_has_a_status(
    several: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("status", "--storage", str(several), "--study-name", "first")
    result = run_command(capsys, *arguments, "--format", "json")
    assert result.status == 0
    assert result.json["resources"][0]["used"] == 0


@pytest.mark.slow
def test_an_ascii_terminal_gets_a_table_too(tuned: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = run_process("status", "--storage", tuned, env=environment)
    assert result.status == 0
    assert result.err == ""
    assert "wall time" in result.out
