"""Trials that run where the sampler's process can't measure them (``metering=False``)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import pickle
import threading
import time
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from optuna_quota import (
    _optuna,
    analyze,
    isolated,
    Limits,
    Quota,
    QuotaExhausted,
    QuotaPruner,
    QuotaSampler,
    status,
    trial_table,
    Usage,
)
from optuna_quota._records import read_record
from optuna_quota.testing import fake_metering


SPACE = {"x": optuna.distributions.FloatDistribution(0, 1)}
GIB = 2**30


def study_of(quota: Quota, limits: Limits | None = None, metering: Any = False) -> optuna.Study:
    sampler = QuotaSampler(RandomSampler(seed=1), quota=quota, metering=metering)
    return optuna.create_study(
        sampler=sampler, pruner=None if limits is None else QuotaPruner(limits=limits)
    )


def test_usage_of_this_process_is_not_recorded() -> None:
    study = study_of(Quota(trial_time="1h"))
    with fake_metering() as metering:
        metering.tree.memory = 5 * GIB
        for _ in range(3):
            trial = study.ask(SPACE)
            metering.tree.cpu_time = (metering.tree.cpu_time or 0) + 7
            metering.advance(60)
            study.tell(trial, 1.0)
    for row in study.trials:
        record = read_record(row)
        assert record.usage.amounts() == {"wall_time": 60}
        assert record.outcome == "completed"
        assert record.isolation is None
    table = trial_table(study)
    assert table["memory"].isna().all() and table["cpu_time"].isna().all()
    assert status(study).table.loc["trial_time", "used"] == 180


def test_concurrent_trials_have_their_own_clocks() -> None:
    study = study_of(Quota(trial_time=100, wall_time=1000, n_trials=5))
    with fake_metering() as metering:
        first, second = study.ask(SPACE), study.ask(SPACE)
        metering.advance(10)
        study.tell(first, 1.0)
        metering.advance(20)
        study.tell(second, 1.0)
    used = [read_record(t).usage.wall_time for t in study.trials]
    assert used == [10, 30]


def test_totals_still_end_the_study() -> None:
    study = study_of(Quota(trial_time=100))
    with fake_metering() as metering:
        for _ in range(2):
            trial = study.ask(SPACE)
            metering.advance(50)
            study.tell(trial, 1.0)
        with pytest.raises(QuotaExhausted):
            study.ask(SPACE)
    counted = study_of(Quota(n_trials=1))
    counted.tell(counted.ask(SPACE), 1.0)
    with pytest.raises(QuotaExhausted):
        counted.ask(SPACE)


def test_a_trial_may_report_its_own_usage() -> None:
    study = study_of(Quota(cpu_time=100), Limits(memory=GIB, wall_time=600), "reported")
    for memory, cpu_time in ((GIB // 2, 30), (2 * GIB, 60)):
        trial = study.ask(SPACE)
        trial.set_user_attr("quota:memory", memory)
        trial.set_user_attr("quota:cpu_time", cpu_time)
        study.tell(trial, 1.0)
    small, large = study.trials
    assert read_record(small).usage.memory == GIB // 2
    assert read_record(small).breach is None
    breach = read_record(large).breach
    assert breach is not None and breach.resource == "memory" and breach.observed == 2 * GIB
    memory, wall_time = _optuna.constraints_of(large).values()
    assert memory > 0 > wall_time
    assert status(study).table.loc["cpu_time", "used"] == 90


@pytest.mark.parametrize("name", ["cpu_time", "energy", "memory"])
def test_a_quota_on_what_is_not_measured_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=rf'"quota:{name}" before `tell`.*"reported"'):
        study_of(Quota(n_trials=5, **{name: GIB}))
    cost = {"cost": 5, "prices": {"cpu_time": 1.0}}
    with pytest.raises(ValueError, match="must be of n_trials, wall_time or trial_time"):
        study_of(Quota(**cost))
    study_of(Quota(**{**cost, "prices": {"trial_time": 1.0}}))


def study_of_two_at_once() -> optuna.Study:
    """Return a study that has room for two trials of at most 10 s, and for more once they end."""
    quota, usage = Quota(trial_time=25), Usage(wall_time=10)
    sampler = QuotaSampler(RandomSampler(seed=1), quota=quota, footprint=usage, metering=False)
    return optuna.create_study(sampler=sampler)


def test_an_enqueued_trial_that_would_have_to_wait_is_given_to_a_later_ask() -> None:
    study = study_of_two_at_once()
    with fake_metering():
        first, _ = study.ask(SPACE), study.ask(SPACE)
        study.enqueue_trial({"x": 0.25})
        with pytest.raises(QuotaExhausted, match="hold what is left"):
            study.ask(SPACE)
        study.tell(first, 1.0)
        assert study.ask(SPACE).params == {"x": 0.25}


def test_a_thread_that_has_to_tell_does_not_wait_in_ask() -> None:
    study = study_of_two_at_once()
    with fake_metering() as metering:
        first, second = study.ask(SPACE), study.ask(SPACE)
        with pytest.raises(
            QuotaExhausted, match=r"Running trials \(0, 1\) hold what is left"
        ) as e:
            study.ask(SPACE)
        assert e.value.temporary and e.value.resource == "trial_time"
        assert read_record(study.trials[-1]).outcome == "rejected"
        metering.advance(9)
        study.tell(first, 1.0)
        # Another thread may tell, but so far this one has.
        other = threading.Event()
        thread = threading.Thread(target=other.wait)
        thread.start()
        with pytest.raises(QuotaExhausted) as e:
            study.ask(SPACE)
        assert e.value.temporary
        other.set()
        thread.join()
        study.tell(second, 1.0)
        with pytest.raises(QuotaExhausted, match="7 s left") as e:
            study.ask(SPACE)
        assert not e.value.temporary
        again = pickle.loads(pickle.dumps(e.value))
        assert again.temporary is False and str(again) == str(e.value)


def test_a_thread_waits_in_ask_for_another_one_that_tells() -> None:
    study = study_of_two_at_once()
    executor = ThreadPoolExecutor(1)
    executor.submit(study.tell, study.ask(SPACE), 1.0).result()
    first, second = study.ask(SPACE), study.ask(SPACE)

    def tell_once_one_waits() -> None:
        while not any(
            (t.system_attrs.get("quota:reservation") or {}).get("waits") for t in study.trials
        ):
            time.sleep(0.01)
        study.tell(first, 1.0)

    told = executor.submit(tell_once_one_waits)
    third = study.ask(SPACE)
    told.result()
    assert third.number == 3
    for trial in (second, third):
        study.tell(trial, 1.0)
    executor.shutdown()


def test_a_time_limit_holds() -> None:
    study = study_of(Quota(n_trials=5), Limits(wall_time=10))
    with fake_metering() as metering:
        trial = study.ask(SPACE)
        assert not trial.should_prune()
        metering.advance(11)
        assert trial.should_prune()
        study.tell(trial, state=TrialState.PRUNED)
    assert read_record(study.trials[0]).outcome == "terminated"


@pytest.mark.parametrize("value", ["1e9", None, -5, [1], {"a": 1}, True, 10**400])
def test_a_malformed_report_is_ignored(value: object) -> None:
    study = study_of(Quota(n_trials=5), Limits(memory=GIB))
    trial = study.ask(SPACE)
    trial.set_user_attr("quota:memory", value)
    study.tell(trial, 1.0)
    record = read_record(study.trials[0])
    assert record.usage.memory is None and record.breach is None
    assert study.trials[0].state == TrialState.COMPLETE


def test_an_isolated_trial_is_measured_all_the_same() -> None:
    study = study_of(Quota(n_trials=5), Limits(memory=GIB))
    study.optimize(isolated(lambda trial: trial.suggest_float("x", 0, 1)), n_trials=1)
    record = read_record(study.trials[0])
    assert record.isolation == "process"
    assert record.usage.memory is not None and record.usage.memory > 1e6


def test_a_study_without_measured_memory_can_be_analyzed() -> None:
    study = study_of(Quota(n_trials=30))
    with fake_metering() as metering:
        for _ in range(20):
            trial = study.ask(SPACE)
            metering.advance(1 + trial.params["x"])
            study.tell(trial, trial.params["x"])
    report = analyze(study)
    assert "wall_time" in report.models
    assert "memory" not in report.models
