"""Trials in threads of one process: one sampler, and memory that can't be attributed."""

from __future__ import annotations

import threading
import time

import numpy as np
import optuna
from optuna.pruners import HyperbandPruner
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState
import psutil
import pytest

from optuna_quota import (
    _optuna,
    Limits,
    Quota,
    QuotaExhausted,
    QuotaPruner,
    QuotaSampler,
    status,
    Usage,
)
from optuna_quota._records import read_record, RESERVATION
from tests.sampler_tests.assertions import assert_nothing_left


def study_with(quota: Quota, limits: Limits) -> optuna.Study:
    return optuna.create_study(
        sampler=QuotaSampler(RandomSampler(seed=0), quota=quota),
        pruner=QuotaPruner(limits=limits),
    )


@pytest.mark.slow
def test_memory_that_cannot_be_attributed_is_no_breach() -> None:
    # Enough for the one that begins alone: until then its memory can be attributed.
    limit = psutil.Process().memory_info().rss + 100 * 2**20
    study = study_with(Quota(n_trials=2), Limits(memory=limit, wall_time="1h"))
    together = threading.Barrier(2, timeout=60)

    def objective(trial: optuna.Trial) -> float:
        together.wait()
        block = np.ones(200 * 2**20 // 8)
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            assert not trial.should_prune()
            time.sleep(0.01)
        together.wait()
        return float(block[0])

    study.optimize(objective, n_trials=2, n_jobs=2)
    for trial in study.trials:
        record = read_record(trial)
        assert trial.state == TrialState.COMPLETE
        assert record.isolation == "shared"
        assert record.usage.memory is None
        assert record.usage.wall_time is not None
        # Neither the unknown memory nor the time is over its limit.
        assert _optuna.constraints_of(trial) == {}


def test_the_quota_holds_across_threads() -> None:
    study = study_with(Quota(trial_time=1.0), Limits())

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        end = time.monotonic() + 0.15
        while time.monotonic() < end:
            time.sleep(0.01)
            if trial.should_prune():
                raise optuna.TrialPruned
        return x

    study.optimize(objective, n_trials=40, n_jobs=3)
    used = status(study).table.loc["trial_time", "used"]
    assert 0.8 < used < 1.6
    assert_nothing_left(study)


@pytest.mark.slow
def test_hyperband_beside_the_sampler_in_threads() -> None:
    study = optuna.create_study(
        sampler=QuotaSampler(RandomSampler(seed=0), quota=Quota(n_trials=12)),
        pruner=QuotaPruner(HyperbandPruner(max_resource=9), limits=Limits(memory="1TiB")),
    )

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        for step in range(9):
            trial.report(x, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return x

    study.optimize(objective, n_trials=30, n_jobs=2)
    ran = [t for t in study.trials if read_record(t).outcome != "rejected"]
    assert len(ran) == 12
    assert_nothing_left(study)


def test_ask_and_tell_in_threads() -> None:
    study = study_with(Quota(n_trials=21), Limits(wall_time="1h"))
    raised: list[BaseException] = []

    def work() -> None:
        while True:
            try:
                trial = study.ask()
            except QuotaExhausted:
                return
            except BaseException as error:  # noqa: BLE001 - asserted below
                raised.append(error)
                return
            x = trial.suggest_float("x", 0, 1)
            trial.report(x, 0)
            assert not trial.should_prune()
            study.tell(trial, x)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads)
    assert not raised
    ran = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert len(ran) == status(study).table.loc["n_trials", "used"] == 21
    assert all(read_record(t).usage.wall_time is not None for t in ran)
    assert_nothing_left(study)


def read_waits(trial: FrozenTrial) -> bool:
    return bool(trial.system_attrs.get(RESERVATION, {}).get("waits"))


def test_a_trial_that_waits_when_the_study_stops_is_not_run() -> None:
    ran = []

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        ran.append(trial.number)
        deadline = time.monotonic() + 60
        # The other trial waits for memory.
        while not any(read_waits(t) for t in study.get_trials(deepcopy=False)):
            assert time.monotonic() < deadline, "no other trial came, or it did not wait"
            time.sleep(0.01)
        study.stop()
        return 0.0

    study = optuna.create_study(
        sampler=QuotaSampler(
            RandomSampler(seed=0), quota=Quota(memory="1GiB"), footprint=Usage(memory="1GiB")
        )
    )
    study.optimize(objective, n_jobs=2)
    assert len(ran) == 1
    by_outcome = {t.user_attrs["quota:outcome"]: t for t in study.trials}
    assert by_outcome.keys() == {"completed", "rejected"}
    assert "waited for memory" in by_outcome["rejected"].user_attrs["quota:reason"]
    assert status(study).table.loc["memory", "reserved"] == 0
    assert_nothing_left(study)
