"""A small soak: workers killed at random while the quota holds; see ``benchmarks/soak.py``."""

from __future__ import annotations

from pathlib import Path
import subprocess
import sys

import pytest


SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_quota_holds_while_workers_are_killed() -> None:
    options = ["--storage", "journal-file", "--workers", "3", "--seconds", "2"]
    # Trials take longer on a loaded machine: a worker must be killed before the time runs out.
    options += ["--kill-every", "0.4", "--n-trials", "25", "--trial-time", "100"]
    run = subprocess.run(
        [sys.executable, str(SOAK), *options], capture_output=True, text=True, timeout=450
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "killed 0" not in run.stdout
    assert run.stdout.count(" yes ") == 5
