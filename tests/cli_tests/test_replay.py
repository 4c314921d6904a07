"""``optuna-quota replay`` on a study that ran."""

from __future__ import annotations

import pytest

from tests.cli_tests.commands import run_command


def test_the_summary_is_printed(tuned: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_command(capsys, "replay", "--storage", tuned, "--limit", "wall_time=1h")
    assert result.status == 0
    assert "0 trials would have been terminated" in result.out
    assert "would have completed" in result.out


def test_a_quota_that_would_have_been_used_up_has_status_3(
    tuned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_command(capsys, "replay", "--storage", tuned, "--quota", "n_trials=5")
    assert result.status == 3
    assert "7 trials would not have run" in result.out


def test_json_keys_are_stable(tuned: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--quota", "n_trials=5", "--limit", "wall_time=1h", "--format", "json")
    result = run_command(capsys, "replay", "--storage", tuned, *arguments)
    assert set(result.json) == {
        "quota", "limits", "ended_at", "ended_by", "saved", "terminated", "not_run", "lost",
        "best", "best_lives", "best_left", "notes", "trials",
    }  # fmt: skip
    assert result.json["quota"] == {"n_trials": 5}
    assert result.json["limits"] == {"wall_time": 3600}
    assert len(result.json["not_run"]) == 7
    assert result.json["trials"][0]["fate"] == "kept"
    assert isinstance(result.json["trials"][0]["lost"], bool)


def test_a_quota_or_limit_is_required(tuned: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_command(capsys, "replay", "--storage", tuned)
    assert result.status == 2
    assert "--quota or --limit" in result.err
