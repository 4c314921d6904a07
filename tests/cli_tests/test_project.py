"""``optuna-quota project`` with stated and learned footprints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli_tests.commands import run_command, run_process


STATED = ("project", "--n-trials", "200", "--footprint", "memory=2GiB,wall_time=90s")


def test_a_strategy_that_fits_has_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_command(capsys, *STATED, "--quota", "wall_time=6h")
    assert result.status == 0
    assert result.out.startswith("Fits: 200 trials; probability 100%")
    assert "Nearest" not in result.out


def test_a_strategy_that_does_not_fit_has_status_3_and_a_nearest_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = run_command(capsys, *STATED, "--n-jobs", "2", "--quota", "wall_time=2h,memory=8GiB")
    assert result.status == 3
    assert "Does not fit: 200 trials with 2 at once;" in result.out
    assert "Nearest that would fit: 160 trials instead of 200." in result.out
    assert max(map(len, result.out.splitlines())) <= 80


def test_counts_are_written_alike_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--n-trials", "2000", "--footprint", "wall_time=1s", "--quota", "n_trials=3000")
    out = run_command(capsys, "project", *arguments).out
    assert "2,000 trials" in out and "3,000" in out
    assert "2000" not in out and "3000" not in out


def test_a_quota_on_an_unknown_usage_is_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = run_command(capsys, *STATED, "--quota", "gpu_time=1h,wall_time=6h,cpu_time=1h")
    assert result.status == 0
    last = result.out.splitlines()[-1]
    assert last == "Unknown usage, not judged: CPU time, GPU time."
    known = run_command(capsys, *STATED, "--quota", "wall_time=6h")
    assert "known" not in known.out


def test_nothing_smaller_fits_either(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_command(capsys, *STATED, "--quota", "memory=1GiB")
    assert result.status == 3
    assert "No smaller strategy would fit." in result.out


def test_json_keys_are_stable(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--quota", "wall_time=2h", "--quota", "gpu_time=1h", "--limit", "memory=1GiB")
    result = run_command(capsys, *STATED, *arguments, "--format", "json")
    assert result.status == 3
    assert set(result.json) == {
        "fits", "probability", "confidence", "strategy", "nearest", "quota", "limits", "resources",
    }  # fmt: skip
    assert result.json["fits"] is False
    assert result.json["strategy"] == {"n_trials": 200, "n_jobs": 1}
    assert result.json["quota"] == {"wall_time": 7200, "gpu_time": 3600}
    assert result.json["limits"] == {"memory": 2**30}
    rows = {row["resource"]: row for row in result.json["resources"]}
    assert rows["wall_time"]["median"] == 18000
    assert rows["memory"]["upper"] == 2**30  # a trial is ended at its limit
    assert rows["gpu_time"]["median"] is None  # unknown


def test_a_footprint_is_learned_from_an_earlier_study(
    tuned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("project", "--n-trials", "1000", "--storage", tuned, "--format", "json")
    little = run_command(capsys, *arguments, "--quota", "memory=1MiB")
    plenty = run_command(capsys, *arguments, "--quota", "memory=1TiB")
    assert (little.status, plenty.status) == (3, 0)
    rows = {row["resource"]: row for row in plenty.json["resources"]}
    # Each trial sleeps for a millisecond at the least; how long it takes is the machine's affair.
    assert 1 < rows["trial_time"]["lower"] < rows["trial_time"]["upper"]
    assert rows["memory"]["median"] > 2**20


@pytest.mark.slow
def test_a_footprint_is_read_from_a_file(
    tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "learned.json"
    assert run_command(capsys, "report", "--storage", tuned, "--footprint", str(path)).status == 0
    arguments = ("project", "--n-trials", "100", "--quota", "memory=1TiB", "--format", "json")
    from_file = run_command(capsys, *arguments, "--footprint", str(path))
    from_study = run_command(capsys, *arguments, "--storage", tuned)
    assert from_file.status == 0
    assert from_file.json == from_study.json


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": -1}', "\0"])
def test_a_file_that_is_no_footprint_is_a_usage_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(text, encoding="utf-8")
    result = run_command(capsys, "project", "--n-trials", "5", "--footprint", str(path))
    assert result.status == 2
    assert result.err.startswith("optuna-quota project: --footprint: ")


def test_a_study_without_usage_is_a_usage_error(
    several: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_command(
        capsys, "project", "--n-trials", "5", "--storage", str(several), "--study-name", "first"
    )
    assert result.status == 2
    assert "--footprint" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--n-trials", "0"),
        ("--n-trials", "many"),
        ("--n-trials", "²"),
        ("--n-trials", "5", "--n-jobs", "-1"),
        (),
        ("--n-trials", "5", "--confidence", "1", "--footprint", "memory=1GiB"),
        ("--n-trials", "5", "--footprint", "memory=1"),
        ("--n-trials", "5", "--footprint", "nowhere.json"),
        ("--n-trials", "5"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    result = run_command(capsys, "project", *arguments)
    assert result.status == 2
    assert result.out == ""
    assert "Traceback" not in result.err


@pytest.mark.slow
def test_it_can_gate_a_ci_job() -> None:
    result = run_process(*STATED, "--quota", "wall_time=2h", "--format", "json")
    assert result.status == 3
    assert result.json["nearest"]["n_trials"] == 80
    assert result.err == ""
