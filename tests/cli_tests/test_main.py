"""Help, version, errors and exit statuses."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from optuna_quota import __version__
from optuna_quota.cli import build_parser, doctor, main
from optuna_quota.cli.common import UsageError
from tests.cli_tests.commands import ROOT, run_command, run_process


def command_names() -> list[str]:
    (subparsers,) = (a for a in build_parser()._actions if a.dest == "command")
    assert isinstance(subparsers.choices, dict)
    return list(subparsers.choices)


def test_it_runs_as_a_module() -> None:
    result = run_process("--version")
    assert result.status == 0
    assert result.out == f"optuna-quota {__version__}\n"


def test_help_names_every_command_and_status() -> None:
    text = build_parser().format_help()
    for name in command_names():
        assert f"\n    {name} " in text
    for status in ("0", "1", "2", "3"):
        assert f"\n  {status}  " in text


def test_help_without_docstrings() -> None:
    commands = [[], ["doctor"], ["project"]]
    script = "import sys; from optuna_quota.cli import main; main([*sys.argv[1:], '--help'])"
    for command in commands:
        texts = [
            subprocess.run(
                [sys.executable, *options, "-c", script, *command],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for options in ([], ["-OO"])
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", command_names())
def test_a_command_explains_its_options_with_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_command(capsys, name, "--help")
    assert result.status == 0
    assert f"optuna-quota {name}" in result.out.split("examples:")[1]
    (subparsers,) = (a for a in build_parser()._actions if a.dest == "command")
    assert isinstance(subparsers.choices, dict)
    for action in subparsers.choices[name]._actions:
        assert action.help, f"{action.dest} has no help"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("project", ("--n-trials", "5", "--footprint", "memory=1GiB")),
        ("status", ("--storage",)),
        ("report", ("--storage",)),
        ("replay", ("--quota", "n_trials=100", "--storage")),
        ("doctor", ()),
    ],
)
def test_help_explains_every_json_key(
    name: str, arguments: tuple[str, ...], tuned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[-1:] == ("--storage",):
        arguments = (*arguments, tuned)
    printed = run_command(capsys, name, "--format", "json", *arguments).json
    _, _, explained = run_command(capsys, name, "--help").out.partition("JSON keys")
    keys = re.findall(r"^  ([a-z_]+) ", explained, re.MULTILINE)
    assert keys and set(keys) == set(printed)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("reprot", "unknown command 'reprot'; did you mean report?"),
        ("Status", "unknown command 'Status'; did you mean status?"),
        ("nonsense", "valid commands are project, report, replay, status, doctor."),
    ],
)
def test_an_unknown_command_is_answered_with_the_one_meant(
    given: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hint in run_command(capsys, "--debug", given).err


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("doctor", "--nonsense")])
def test_invalid_arguments_have_status_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_command(capsys, *arguments)
    assert result.status == 2
    assert "usage:" in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [(UsageError("No such\nthing."), 2), (ValueError("No such\nthing."), 1), (OSError(), 1)],
)
def test_an_error_is_one_sentence_without_a_traceback(
    error: Exception,
    status: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    result = run_command(capsys, "doctor")
    assert result.status == status
    assert "Traceback" not in result.err
    assert result.err == f"optuna-quota doctor: {'No such thing.' if str(error) else 'OSError'}\n"
    with pytest.raises(type(error)):
        main(["--debug", "doctor"])


def test_an_interrupt_has_status_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    assert run_command(capsys, "doctor").status == 130


@pytest.mark.slow
def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m optuna_quota doctor --format json | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, check=False
    )
    assert done.stdout == b"{"
    assert done.stderr == b""


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom optuna_quota.cli import build_parser\n"
        "build_parser().format_help()\n"
        "print([m for m in ('optuna', 'pandas', 'statsmodels', 'plotly', 'psutil') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
