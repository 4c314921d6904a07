"""A worker killed while it holds the lock of a journal file: the others wait, then go on."""

from __future__ import annotations

from collections.abc import Sequence
import os
from pathlib import Path
import time
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState
import pytest

from optuna_quota import Quota, QuotaSampler, status
from tests.ledger_tests.workers import start
from tests.storages import Address, study_in


Moment = Literal["before its write", "after its write"]

QUOTA = Quota(n_trials=6, trial_time="1h")
# The least that Optuna finds long enough to break a lock.
GRACE = 3


class HangingLock(JournalFileSymlinkLock):
    """A lock that its holder never releases once it is armed."""

    def __init__(self, path: str, moment: Moment, marker: Path) -> None:
        super().__init__(path)
        self.armed = False
        self._moment = moment
        self._marker = marker

    def acquire(self) -> bool:
        got = super().acquire()
        self._hang_at("before its write")
        return got

    def release(self) -> None:
        self._hang_at("after its write")
        super().release()

    def _hang_at(self, moment: Moment) -> None:
        if self.armed and moment == self._moment:
            self._marker.touch()
            time.sleep(600)


class HangingBackend(JournalFileBackend):
    """Arms its lock when the third trial is about to be stored as complete."""

    def __init__(self, path: str, lock: HangingLock) -> None:
        super().__init__(path, lock_obj=lock)
        self._hanging = lock

    def append_logs(self, logs: Sequence[dict[str, Any]]) -> None:
        self._hanging.armed = any(
            log["trial_id"] == 2 and log["state"] == TrialState.COMPLETE
            for log in logs
            if "state" in log and "trial_id" in log
        )
        super().append_logs(list(logs))


def objective(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1)


def tune(storage: JournalStorage, name: str) -> None:
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=QUOTA)
    study = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    study.optimize(objective)


def tune_and_hang(path: str, name: str, moment: Moment, marker: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    lock = HangingLock(path, moment, marker)
    tune(JournalStorage(HangingBackend(path, lock)), name)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before its write", "after its write"])
def test_a_worker_killed_with_the_lock_holds_the_others_up_for_its_grace(
    moment: Moment, tmp_path: Path
) -> None:
    path, marker = tmp_path / "study.log", tmp_path / "held"
    address = Address("journal-file", str(path), lock_grace=GRACE)
    with study_in(address) as study:
        process = start(tune_and_hang, str(path), study.study_name, moment, marker)
        try:
            deadline = time.monotonic() + 60
            while not marker.exists():
                assert process.is_alive() and time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()
            process.join()
        assert os.path.islink(f"{path}.lock")
        before = study.trials
        began = time.monotonic()
        tune(address.open(), study.study_name)
        assert time.monotonic() - began >= GRACE
        assert not os.path.islink(f"{path}.lock")
        rows = study.trials
        # No finished result is lost.
        assert [(r.values, r.params) for r in rows[:2]] == [
            (r.values, r.params) for r in before[:2]
        ]
        if moment == "after its write":
            assert rows[2].state == TrialState.COMPLETE
        else:
            assert rows[2].state == TrialState.FAIL
            assert "died" in rows[2].user_attrs["quota:reason"]
        # Nothing is counted twice or forgotten.
        assert status(study).table.loc["n_trials"].to_dict() == {
            "used": 6,
            "reserved": 0,
            "left": 0,
            "quota": 6,
        }
        assert all(row.state.is_finished() for row in rows)
        assert sum(row.state == TrialState.COMPLETE for row in rows) == (
            6 if moment == "after its write" else 5
        )
