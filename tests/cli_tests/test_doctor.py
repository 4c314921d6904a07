"""What the doctor prints."""

from __future__ import annotations

import io
import os
import pty
import re
import sys

import pytest

from optuna_quota._doctor import Finding
from optuna_quota.cli import common, doctor
from tests.cli_tests.commands import run_command, run_process


FINE = Finding("stopping", "kernel memory limit", "ok", "It is enforced.")
LESS = Finding("measuring", "CPU energy", "degraded", "Found " + "word " * 30, "Less.", "Fix it.")
GONE = Finding("software", "plotly", "missing", "Not installed.", "No figures.", "pip install it")


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = doctor.lines([FINE, LESS, GONE], width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert text.index("Stopping a trial") < text.index("Measuring") < text.index("Software")
    assert "✓ kernel memory limit" in text
    assert "fix: pip install it" in text
    assert lines[-1] == "1 ok, 1 degraded, 1 missing."


def test_json_has_every_finding_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_command(capsys, "doctor", "--format", "json")
    assert result.status == 0
    assert set(result.json) == {"host", "platform", "counts", "findings"}
    for finding in result.json["findings"]:
        assert set(finding) == {"area", "check", "state", "found", "degrades", "fix"}
    assert sum(result.json["counts"].values()) == len(result.json["findings"])


@pytest.mark.parametrize(("findings", "status"), [([FINE], 0), ([FINE, LESS], 1)])
def test_strict_tells_by_the_exit_status(
    findings: list[Finding],
    status: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("optuna_quota._doctor.examine_host", lambda: findings)
    assert run_command(capsys, "doctor", "--strict").status == status
    assert run_command(capsys, "doctor").status == 0


def test_marks_are_plain_where_the_encoding_has_no_others() -> None:
    result = run_process("doctor", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.status == 0
    assert re.search(r"^  ok Python +3", result.out, re.MULTILINE)


def test_colour_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not common.has_colour()
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert common.has_colour()
        assert common.styled("x", "red") == "\x1b[31mx\x1b[0m"
        common.write_line(f"{common.styled('x', 'red')}\x1b[2J")
        terminal.flush()
        assert os.read(leader, 99) == b"\x1b[31mx\x1b[0m [2J\r\n"
        monkeypatch.setenv("NO_COLOR", "1")
        assert common.styled("x", "bold") == "x"
    os.close(leader)
