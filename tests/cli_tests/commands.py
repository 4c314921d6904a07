"""Runs commands in a process of their own, or in this one for speed."""

from __future__ import annotations

from dataclasses import dataclass
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

import pytest

from optuna_quota.cli import main


ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        def refuse(constant: str) -> Any:
            raise AssertionError(f"{constant} is no JSON")

        return json.loads(self.out, parse_constant=refuse)


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> Result:
    try:
        status = main(arguments)
    except SystemExit as end:  # argparse ends by itself for --help and for usage errors
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return Result(status, out, err)


def run_process(*arguments: str, **options: Any) -> Result:
    done = subprocess.run(
        [sys.executable, "-m", "optuna_quota", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        **options,
    )
    return Result(done.returncode, done.stdout, done.stderr)
