"""What an objective carries is held once in its trial."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.isolation_tests.scripts import run_script


CARRIED = """
import numpy as np

MIB = 2**20
CARRIED = {
    "text": "x" * (40 * MIB),
    "bytes": bytes(40 * MIB),
    "records": np.zeros(40 * MIB // 8, [("a", "f8")]).view(np.recarray),
    "columns": np.ones((40 * MIB // 8, 2))[:, 1],
}
found = {}
for name, value in CARRIED.items():
    def objective(trial, value=value):
        return float(len(value) > 0)
    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=1)
    found[name] = study.trials[0].user_attrs["quota:memory"] / (40 * MIB)
say(**found)
"""


@pytest.mark.slow
def test_data_that_an_objective_carries_is_held_once(tmp_path: Path) -> None:
    found = run_script(tmp_path, CARRIED)
    assert set(found) == {"text", "bytes", "records", "columns"}
    # The interpreter with its modules is half of it at most.
    assert all(1.0 <= share < 1.9 for share in found.values()), found
