"""A study's rows as the ledger reads them."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.storages import get_storage
import pytest

from optuna_quota import Limits, Quota
from optuna_quota._ledger.grant import Refusal
from optuna_quota._ledger.heartbeat import RunningTrial
from optuna_quota._ledger.ledger import Ledger


@pytest.mark.slow
def test_a_row_that_the_cache_lacks_for_a_moment_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another thread of this process creates a trial while this one reads, and another process
    # one before that: Optuna's cache then has the second row and not the first.
    url, quota = f"sqlite:///{tmp_path}/study.db", Quota(cpu_time=10)
    cache, elsewhere = get_storage(url), get_storage(url)
    study = optuna.create_study(storage=cache, study_name="study")
    study.ask()
    here = Ledger(study, quota)
    there = Ledger(optuna.load_study(storage=elsewhere, study_name="study"), quota)
    here.exhausted()
    read, created = cache._read_trials_from_remote_storage, []  # type: ignore[attr-defined]

    def read_and_create(study_id: int) -> None:
        read(study_id)
        monkeypatch.undo()
        created.append(elsewhere.create_new_trial(study_id))
        created.append(cache.create_new_trial(study_id))

    monkeypatch.setattr(cache, "_read_trials_from_remote_storage", read_and_create)
    here._state.read()
    assert [trial.number for trial in here.trials] == [0]

    first, second = (cache.get_trial(trial_id) for trial_id in created)
    footprint = {"cpu_time": 8.0}
    assert isinstance(there.reserve(first, limits=Limits(), footprint=footprint), RunningTrial)
    refusal = here.reserve(second, limits=Limits(), footprint=footprint, is_over=lambda: True)
    assert isinstance(refusal, Refusal)
    assert refusal.reserved == 8.0
    assert [trial.number for trial in here.trials] == [0, 1, 2]
