"""One quota for workers that joblib starts, each of which isolates its trials."""

from __future__ import annotations

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

from optuna_quota._isolation.linux import can_supervise


ROOT = Path(__file__).parents[2]

# From the standard input: the workers have no main module to import.
SCRIPT = """
import json, multiprocessing, os, sys
import joblib, optuna
from optuna_quota import *

optuna.logging.set_verbosity(optuna.logging.ERROR)

class Holder:
    def __init__(self, mib):
        self.data = bytearray(mib * 2**20)
        self.data[::4096] = b"x" * len(self.data[::4096])

def objective(trial):
    return float(len(Holder(trial.suggest_int("mib", 1, 400)).data))

def work(storage):
    study = optuna.load_study(
        study_name="shared",
        storage=storage,
        sampler=QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=6)),
        pruner=QuotaPruner(limits=Limits(memory="200MiB")),
    )
    study.optimize(isolated(objective))
    return os.getpid(), multiprocessing.current_process().daemon

backend, storage = sys.argv[1:]
study = optuna.create_study(study_name="shared", storage=storage)
for mib in (400, 1, 2, 3, 4, 5):
    study.enqueue_trial({"mib": mib})
workers = joblib.Parallel(n_jobs=2, backend=backend)([joblib.delayed(work)(storage)] * 2)
table = trial_table(study)
ran = table[table["outcome"] != "rejected"]
print(json.dumps({
    "daemons": [daemon for _, daemon in workers],
    "outcomes": list(ran["outcome"]),
    "isolation": list(ran["isolation"]),
    "used": status(study).table.loc["n_trials", "used"],
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not can_supervise(), reason="needs Linux with pidfds")
@pytest.mark.parametrize("backend", ["loky", "multiprocessing"])
def test_workers_isolate_their_trials_and_share_a_quota(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    done = subprocess.run(
        [sys.executable, "-", backend, f"sqlite:///{tmp_path}/shared.db"],
        input=SCRIPT,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # A daemonic process may have no children of multiprocessing's.
    assert found["daemons"] == [backend == "multiprocessing"] * 2
    assert sorted(found["outcomes"]) == ["completed"] * 5 + ["terminated"]
    assert found["isolation"] == ["process"] * 6
    assert found["used"] == 6
