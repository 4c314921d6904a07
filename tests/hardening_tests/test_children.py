"""Child processes of a process that has used the library can use it as well."""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys

import pytest


SCRIPT = """
import multiprocessing
import sys

import optuna

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler
from optuna_quota import status
from optuna_quota._metering import metering_loop


def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    trial.report(x, 0)
    assert not trial.should_prune()
    return x


def new_study():
    return optuna.create_study(
        sampler=QuotaSampler(optuna.samplers.RandomSampler(seed=0), quota=Quota(n_trials=5)),
        pruner=QuotaPruner(optuna.pruners.NopPruner(), limits=Limits(memory="1TiB")),
    )


def child(known=None):
    # A fork continues the parent's study; a spawned process has only its own.
    for study in filter(None, (known, new_study())):
        before = len(study.trials)
        study.optimize(objective, n_trials=2)
        rows = study.trials[before:]
        assert len(rows) == 2
        for row in rows:
            assert row.state == optuna.trial.TrialState.COMPLETE, row
            assert row.user_attrs["quota:memory"] > 0, row
            assert row.user_attrs["quota:isolation"] == "thread", row
        finished = sum(row.state.is_finished() for row in study.trials)
        assert status(study).table.loc["n_trials", "used"] == finished


def main():
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    how = sys.argv[1]
    study = new_study()
    study.optimize(objective, n_trials=1)
    # A trial is metered while the child starts, so that threads may hold their locks.
    watch = metering_loop().monitor((1, 1), limits=Limits(memory="1TiB"))
    context = multiprocessing.get_context(how)
    process = context.Process(target=child, args=(study,) if how == "fork" else ())
    process.start()
    process.join(100)
    if process.is_alive():
        process.kill()
        process.join()
        raise SystemExit("the child hung")
    assert process.exitcode == 0, process.exitcode
    assert watch.close().memory
    # The child's trials are not in the parent's study.
    study.optimize(objective, n_trials=1)
    assert status(study).table.loc["n_trials", "used"] == 2
    print("done")


if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_child_of_a_process_with_trials(how: str, tmp_path: Path) -> None:
    if how == "fork" and not hasattr(os, "fork"):
        pytest.skip("needs fork")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), how],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.stdout.strip() == "done", done.stderr
