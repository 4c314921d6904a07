"""A small soak: workers killed at random while the quota holds; see ``benchmarks/soak.py``."""

from __future__ import annotations

from pathlib import Path
import subprocess
import sys

import pytest


SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_the_quota_holds_while_workers_are_killed() -> None:
    options = ["--storage", "journal-file", "--workers", "3", "--seconds", "2"]
    options += ["--kill-every", "0.4", "--n-trials", "25"]
    run = subprocess.run(
        [sys.executable, str(SOAK), *options], capture_output=True, text=True, timeout=110
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "killed 0" not in run.stdout
    assert run.stdout.count(" yes ") == 4
