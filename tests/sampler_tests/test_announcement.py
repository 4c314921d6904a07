"""The quota and the limits in force are kept with the study; workers that disagree are told."""

from __future__ import annotations

import logging
from pathlib import Path

import optuna
from optuna.samplers import RandomSampler
import pytest

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler


def worker(path: Path, quota: Quota, limits: Limits) -> optuna.Study:
    return optuna.create_study(
        study_name="shared",
        storage=f"sqlite:///{path}/s.db",
        load_if_exists=True,
        sampler=QuotaSampler(RandomSampler(), quota=quota),
        pruner=QuotaPruner(limits=limits),
    )


def run(study: optuna.Study, n_trials: int = 1) -> None:
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=n_trials)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    optuna.logging.enable_propagation()
    caplog.set_level(logging.WARNING, logger="optuna.quota")
    return caplog


def test_they_are_plain_numbers_in_base_units(tmp_path: Path) -> None:
    quota = Quota(wall_time="2h", memory="1GiB", cost=5, prices={"cpu_time": 0.5})
    study = worker(tmp_path, quota, Limits(memory="0.5GiB"))
    run(study)
    assert study.user_attrs["quota:quota"] == {"wall_time": 7200, "memory": 2**30, "cost": 5}
    assert study.user_attrs["quota:limits"] == {"memory": 2**29}
    assert study.user_attrs["quota:prices"] == {"cpu_time": 0.5}


def test_workers_that_agree_are_not_told_anything(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        run(worker(tmp_path, Quota(n_trials=9), Limits(memory="1GiB")))
    assert told.records == []


def test_a_worker_that_differs_is_told_what_differs_and_goes_by_its_own(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    run(worker(tmp_path, Quota(n_trials=9), Limits(memory="1GiB")))
    second = worker(tmp_path, Quota(n_trials=3), Limits(memory="1GiB", wall_time="5s"))
    run(second, n_trials=9)
    assert len(second.trials) == 3
    quota, limits, *_ = (record.getMessage() for record in told.records)
    assert "n_trials 9 there, 3 here" in quota
    assert "wall_time unset there, 5 s here" in limits
    assert second.user_attrs["quota:quota"] == {"n_trials": 9}
