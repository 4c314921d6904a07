"""Each integration's example runs and does what it says, on the libraries themselves.

These tests form a group of their own, since the libraries are heavy: CI installs the extra
``integrations`` into an environment of its own and runs ``pytest -m integration`` there.
"""

from __future__ import annotations

from importlib.util import find_spec
import os
from pathlib import Path
import re
import subprocess
import sys

import pytest


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "integrations"

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def is_installed(name: str) -> bool:
    """Return whether a library can be imported; one that is loaded may hide its specification."""
    return name in sys.modules or find_spec(name) is not None


def run(example: str, folder: Path, *needed: str) -> str:
    """Return what an example prints; skip where a library it needs is missing."""
    missing = [name for name in needed if not is_installed(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'optuna-quota[integrations]'")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{example}.py")],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def outcomes(out: str) -> list[str]:
    """Return the outcome of each row of a printed trial table."""
    return re.findall(r"^\d+ .* (completed|pruned|terminated|rejected|failed)$", out, re.M)


def measured(out: str) -> list[float]:
    """Return the memory of each row of a printed trial table."""
    rows = re.findall(r"^\d+ +\d+ +\S+ +([\d.e+]+|NaN) +\S+ +\w+$", out, re.M)
    return [float(memory) for memory in rows]


@pytest.mark.parametrize(
    ("example", "needed", "trials"),
    [
        ("lightgbm_pruning", ("lightgbm", "optuna_integration"), 8),
        ("xgboost_pruning", ("xgboost", "optuna_integration"), 8),
        ("sklearn_search_cv", ("optuna_integration",), 10),
        ("pytorch_dataloader", ("torch",), 3),
        ("lightning_pruning", ("lightning", "optuna_integration"), 4),
        ("transformers_search", ("transformers", "torch", "accelerate"), 3),
        ("torch_distributed", ("torch", "optuna_integration"), 2),
        ("torchrun_script", ("torch",), 2),
        ("lightning_ddp", ("lightning",), 2),
        ("lightning_script", ("lightning",), 2),
        ("transformers_isolated", ("transformers", "torch", "accelerate"), 3),
    ],
)
def test_a_training_library(
    example: str, needed: tuple[str, ...], trials: int, tmp_path: Path
) -> None:
    out = run(example, tmp_path, *needed)
    found = outcomes(out)
    assert len(found) == trials
    assert "completed" in found
    assert set(found) <= {"completed", "pruned"}
    memory = measured(out)
    assert len(memory) == trials
    assert all(20e6 < m < 4e9 for m in memory)


def test_ask_and_tell(tmp_path: Path) -> None:
    out = run("ask_and_tell", tmp_path)
    assert "Ended: The quota of 8 trials is used up" in out
    found = re.findall(r"(completed|terminated)$", out, re.M)
    assert len(found) == 8


def test_ray_tune(tmp_path: Path) -> None:
    out = run("ray_tune", tmp_path, "ray")
    assert "4 trials, 0 errors" in out
    rows = re.findall(r"^ *\d+ +\S+ +(\S+) +(\S+) completed$", out, re.M)
    assert len(rows) == 4
    for memory, wall_time in rows:
        assert memory == "NaN"
        assert 0 < float(wall_time) < 120


@pytest.mark.parametrize(
    ("example", "needed"),
    [
        ("dask_workers", ("distributed", "optuna_integration")),
        ("ray_workers", ("ray",)),
        ("joblib_workers", ("joblib",)),
    ],
)
def test_workers_of_an_engine_share_one_quota(
    example: str, needed: tuple[str, ...], tmp_path: Path
) -> None:
    out = run(example, tmp_path, *needed)
    assert outcomes(out).count("completed") == 6
    assert "6 completed" in out
    assert "isolated: {'process'}" in out


def test_mlflow_gets_usage_as_tags(tmp_path: Path) -> None:
    out = run("mlflow_tracking", tmp_path, "mlflow", "optuna_integration")
    assert len(re.findall(r"^\d .* completed +\d", out, re.M)) == 4


def test_hydra_writes_the_study_by_target(tmp_path: Path) -> None:
    out = run("hydra_app", tmp_path, "hydra")
    assert outcomes(out) == ["completed"] * 5


def test_a_hydra_application_as_a_script(tmp_path: Path) -> None:
    out = run("hydra_script", tmp_path, "hydra")
    assert outcomes(out) == ["completed"] * 3
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {
        "trial-0",
        "trial-1",
        "trial-2",
    }


def test_a_shell_script(tmp_path: Path) -> None:
    out = run("shell_script", tmp_path)
    assert len(outcomes(out)) == 6
    assert set(outcomes(out)) <= {"completed", "pruned"}
    assert re.search(r'^\[trial 0\] {"step": 3, "value": ', out, re.M)


def test_workers_behind_the_grpc_proxy_share_one_quota(tmp_path: Path) -> None:
    out = run("grpc_proxy", tmp_path, "grpc")
    assert outcomes(out).count("completed") == 10
    assert "10 completed" in out
