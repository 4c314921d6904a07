"""Many worker processes on every kind of storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
import time

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import Quota, status
from optuna_quota._records import amounts_object, STUDY_QUOTA
from tests.ledger_tests.workers import go_through, wait_for, working
from tests.storages import Address, missing, SHARED, storage_at, study_in, VARIABLES


@pytest.fixture(
    params=[
        pytest.param(kind, marks=pytest.mark.storage if kind in VARIABLES else ())
        for kind in SHARED
    ]
)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Address]:
    reason = missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    with storage_at(request.param, tmp_path) as found:
        yield found


def ran(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [t for t in study.trials if t.state == TrialState.COMPLETE]


@pytest.mark.slow
def test_four_processes_run_exactly_what_the_quota_allows(address: Address) -> None:
    quota = Quota(n_trials=9, cpu_time=100)
    with study_in(address) as study:
        study.set_user_attr(STUDY_QUOTA, amounts_object(quota))
        arguments = (address, study.study_name, quota, {"cpu_time": 1.0}, 0.02)
        with working(4, go_through, *arguments) as processes:
            while any(process.is_alive() for process in processes):
                for line in status(study).lines:
                    total = line.used + (line.reserved if line.resource == "cpu_time" else 0)
                    assert line.quota is None or total <= line.quota
                time.sleep(0.02)
            wait_for(processes)
        assert len(ran(study)) == 9
        assert not [t for t in study.trials if not t.state.is_finished()]
        assert status(study).table.loc["cpu_time", "used"] == 9


@pytest.mark.slow
def test_four_processes_use_up_a_total_and_never_more(tmp_path: Path) -> None:
    quota = Quota(cpu_time=10)
    with storage_at("journal-file", tmp_path) as address, study_in(address) as study:
        study.set_user_attr(STUDY_QUOTA, amounts_object(quota))
        arguments = (address, study.study_name, quota, {"cpu_time": 1.5}, 0.02)
        with working(4, go_through, *arguments) as processes:
            wait_for(processes)
        assert len(ran(study)) == 6
        table = status(study).table
        assert table.loc["cpu_time"].to_dict() == {
            "used": 9,
            "reserved": 0,
            "left": 1,
            "quota": 10,
        }
