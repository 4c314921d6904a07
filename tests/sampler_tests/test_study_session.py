"""One study in a process: the end of its quota, and the lifetime of its session."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
import gc
import os
from pathlib import Path
import sys
import threading
import time
import weakref

import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from optuna_quota import (
    _optuna,
    check,
    isolated,
    Limits,
    Quota,
    QuotaExhausted,
    QuotaPruner,
    QuotaSampler,
    status,
    Strategy,
    TrialRejected,
    Usage,
)
from optuna_quota._optuna import storage_of
from optuna_quota._records import read_record
from tests.sampler_tests.assertions import assert_nothing_left
from tests.storages import Address, KINDS, missing, storage_at


def objective(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1)


def slow(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    end = time.monotonic() + 0.1
    while time.monotonic() < end:
        time.sleep(0.01)
        check(trial)
    return x


def busy(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    start = time.process_time()
    while time.process_time() - start < 0.1:
        check(trial)
    return x


def new_study(quota: Quota, storage: str | None = None, **kwargs: object) -> optuna.Study:
    return optuna.create_study(
        study_name="quota",
        storage=storage,
        load_if_exists=True,
        sampler=QuotaSampler(RandomSampler(seed=1), quota=quota, **kwargs),  # type: ignore[arg-type]
    )


def refusing_study(quota: Quota, parameter: str, **kwargs: object) -> optuna.Study:
    """Return a study whose points are refused where a parameter is above a half."""

    def footprint(params: dict[str, float]) -> Usage:
        return Usage(memory="1GiB" if params[parameter] > 0.5 else "10MiB")

    space = {name: FloatDistribution(0, 1) for name in dict.fromkeys(("x", parameter))}
    return new_study(
        quota,
        limits=Limits(memory="500MiB"),
        footprint=footprint,
        strategy=Strategy(10, search_space=space),
        on_veto="skip",
        audits=0,
        metering="reported",
        **kwargs,
    )


def ends(study: optuna.Study) -> Counter[str | None]:
    return Counter(read_record(trial).outcome for trial in study.trials)


def test_a_rejected_trial_does_not_count_toward_a_quota_of_trials() -> None:
    # In the order of this seed, a trial is rejected after the ninth that ran.
    study = refusing_study(Quota(n_trials=10), "x")
    study.optimize(objective, n_trials=60)
    last = [read_record(trial).outcome for trial in study.trials][-2:]
    assert (ends(study)["completed"], last) == (10, ["rejected", "completed"])


@pytest.mark.parametrize("by", ["optimize", "ask"])
def test_an_enqueued_trial_waits_for_a_larger_quota(by: str) -> None:
    study = new_study(Quota(n_trials=1))
    study.optimize(objective, n_trials=1)
    study.enqueue_trial({"x": 0.25})
    if by == "ask":
        with pytest.raises(QuotaExhausted):
            study.ask()
    else:
        study.optimize(objective, n_trials=2)
    study.sampler = QuotaSampler(quota=Quota(n_trials=3))
    study.optimize(objective, n_trials=1)
    assert study.trials[-1].params == {"x": 0.25}


def test_usage_before_a_rejection_is_charged() -> None:
    def suggest_late(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        time.sleep(0.05)
        return x + trial.suggest_float("late", 0, 1)

    study = refusing_study(Quota(trial_time=60, cost=1, prices={"trial_time": 36}), "late")
    study.optimize(suggest_late, n_trials=8)
    n_rejected = ends(study)["rejected"]
    assert 0 < n_rejected < 8
    found = status(study)
    assert found.by_outcome["rejected"]["trial_time"] >= 0.05 * n_rejected
    assert found.table.loc["n_trials", "used"] == 8 - n_rejected
    used = found.table["used"]
    assert used["wall_time"] >= 8 * 0.05
    assert used["cost"] == pytest.approx(used["trial_time"] / 100)


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_trials_are_counted_exactly(n_jobs: int, quota_warnings: Callable[[], list[str]]) -> None:
    study = new_study(Quota(n_trials=7))
    study.optimize(objective, n_trials=30, n_jobs=n_jobs)
    states = [t.state for t in study.trials if read_record(t).outcome != "rejected"]
    assert states == [TrialState.COMPLETE] * 7
    assert_nothing_left(study)
    (warning,) = quota_warnings()
    assert "7" in warning


@pytest.mark.parametrize(
    ("resource", "work"), [("trial_time", slow), ("wall_time", slow), ("cpu_time", busy)]
)
def test_a_total_ends_the_study_without_overrun(
    resource: str, work: Callable[[optuna.Trial], float], quota_warnings: Callable[[], list[str]]
) -> None:
    study = new_study(Quota(**{resource: 0.35}))  # type: ignore[arg-type]
    study.optimize(work, n_trials=30)
    used = status(study).table.loc[resource, "used"]
    # A check every 10 ms, on a machine that may be busy.
    assert 0.3 < used < 0.6
    assert_nothing_left(study)
    terminated = [t for t in study.trials if read_record(t).outcome == "terminated"]
    # The last grants of so small a quota are shorter than requesting one takes.
    assert len(terminated) <= 3
    for trial in terminated:
        breach = read_record(trial).breach
        assert breach is not None and breach.quota and breach.resource == resource
        assert _optuna.constraints_of(trial) == {}
    assert len(quota_warnings()) == 1


def test_the_trial_that_exhausts_the_quota_is_the_last_row() -> None:
    study = new_study(Quota(trial_time=0.25))
    study.optimize(slow, n_trials=30)
    assert read_record(study.trials[-1]).outcome in ("completed", "terminated")


def test_limits_are_constraints_where_a_quota_runs_out() -> None:
    study = new_study(Quota(trial_time=0.05), limits=Limits(wall_time="1min"))
    study.optimize(slow, n_trials=3)
    record = read_record(study.trials[0])
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.quota
    (constraint,) = _optuna.constraints_of(study.trials[0]).values()
    assert -1 < constraint < 0


def test_a_cost_quota_holds() -> None:
    study = new_study(Quota(cost=0.35, prices={"trial_time": 3600}))
    study.optimize(slow, n_trials=30)
    used = status(study).table.loc["cost", "used"]
    assert 0.3 < used < 0.6
    assert_nothing_left(study)


@pytest.mark.slow
def test_another_worker_may_use_the_rest(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    first, second = new_study(Quota(n_trials=4), url), new_study(Quota(n_trials=4), url)
    ran = []

    def shares(trial: optuna.Trial) -> float:
        if trial.number == 0:
            second.optimize(objective, n_trials=9)
        ran.append(trial.number)
        return trial.suggest_float("x", 0, 1)

    first.optimize(shares, n_trials=9)
    outcomes = [read_record(t).outcome for t in first.trials]
    assert outcomes.count("completed") == 4
    assert set(outcomes) <= {"completed", "rejected"}
    assert ran == [0]
    assert_nothing_left(first)


@pytest.mark.parametrize("enqueued", [False, True])
def test_an_exhausted_study_runs_no_objective(
    enqueued: bool, quota_warnings: Callable[[], list[str]]
) -> None:
    study = new_study(Quota(n_trials=2))
    study.optimize(objective, n_trials=2)
    quota_warnings()
    ran = []

    def single(trial: optuna.Trial) -> float:
        x = trial.suggest_float("one", 0.5, 0.5)
        ran.append(x)
        return x

    for _ in range(2):
        if enqueued:
            study.enqueue_trial({"one": 0.5})
        study.optimize(single, n_trials=5)
    assert ran == []
    rejected = [trial for trial in study.trials[2:] if trial.state.is_finished()]
    assert len(rejected) == 2
    for trial in rejected:
        assert trial.state == TrialState.PRUNED
        assert read_record(trial).outcome == "rejected"
        assert read_record(trial).reason
        assert read_record(trial).usage.amounts() == {}
    assert len(quota_warnings()) <= 1


@pytest.mark.parametrize("asks", ["report", "should_prune", "check"])
def test_a_refused_trial_ends_at_the_first_method_that_it_calls(asks: str) -> None:
    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=1)),
        pruner=QuotaPruner(limits=Limits(memory="1TiB")),
    )
    study.optimize(objective, n_trials=1)
    came_through = []

    def other(trial: optuna.Trial) -> float:
        if asks == "check":
            with pytest.raises(TrialRejected):
                check(trial)
            check(trial)
        elif trial.should_prune():
            raise optuna.TrialPruned
        came_through.append(trial.number)
        return 0.0

    study.optimize(other, n_trials=3)
    assert came_through == []
    assert read_record(study.trials[-1]).outcome == "rejected"


def test_each_worker_ends_while_the_last_trial_runs_elsewhere() -> None:
    study = new_study(Quota(n_trials=1))
    study.ask()
    for _ in range(2):
        study.optimize(objective)
    assert [t.state for t in study.trials[1:]] == [TrialState.PRUNED] * 2


def test_an_objective_that_does_not_use_the_trial_is_not_run_either() -> None:
    study = new_study(Quota(n_trials=2))
    ran = []

    def blind(trial: optuna.Trial) -> float:
        ran.append(trial.number)
        return 0.0

    study.optimize(blind, n_trials=5)
    assert ran == [0, 1]
    with pytest.raises(QuotaExhausted):
        study.optimize(blind, n_trials=5)
    assert ran == [0, 1]
    assert_nothing_left(study)


def test_on_exhausted_raise() -> None:
    study = new_study(Quota(n_trials=2), on_exhausted="raise")
    with pytest.raises(QuotaExhausted) as caught:
        study.optimize(objective, n_trials=5)
    assert caught.value.resource == "n_trials"
    assert caught.value.quota == 2
    assert len(study.trials) == 3
    assert study.trials[-1].state == TrialState.FAIL
    assert_nothing_left(study)


def test_a_failed_trial_counts() -> None:
    study = new_study(Quota(n_trials=2))

    def fails(trial: optuna.Trial) -> float:
        raise ValueError

    study.optimize(fails, n_trials=5, catch=ValueError)
    assert [t.state for t in study.trials] == [TrialState.FAIL] * 2


def test_a_trial_that_never_ran_has_no_constraints() -> None:
    study = new_study(Quota(n_trials=1), limits=Limits(memory="1TiB"))
    study.optimize(objective, n_trials=1)
    study.optimize(objective, n_trials=1)
    assert len(study.trials) == 2
    assert _optuna.constraints_of(study.trials[-1]) == {}


@pytest.mark.slow
def test_an_isolated_objective_that_does_not_use_the_trial_ends_without_an_error() -> None:
    study = new_study(Quota(n_trials=2))
    objective = isolated(lambda trial: 0.0)
    study.optimize(objective, n_trials=5)
    study.optimize(objective, n_trials=5)
    outcomes = [read_record(t).outcome for t in study.trials]
    assert outcomes == ["completed", "completed", "rejected"]
    assert_nothing_left(study)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(params=KINDS)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Address]:
    reason = missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    with storage_at(request.param, tmp_path) as address:
        yield address


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_loading_a_study_repeatedly_leaves_nothing_open(address: Address) -> None:
    sampler = QuotaSampler(
        optuna.samplers.RandomSampler(), quota=Quota(n_trials=500, cpu_time="1h")
    )
    name = f"loaded-{os.getpid()}"
    counts = []
    for _ in range(8):
        study = optuna.create_study(
            study_name=name, storage=address.open(), load_if_exists=True, sampler=sampler
        )
        study.optimize(objective, n_trials=1)
        study.ask()
        gone = weakref.ref(storage_of(study))
        del study
        counts.append(descriptors())
        assert gone() is None
    assert counts[-1] <= counts[1] + 2


@pytest.mark.slow
def test_the_thread_of_a_deleted_study_ends() -> None:
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(cpu_time="1h"))
    study = optuna.create_study(sampler=sampler)
    before = set(threading.enumerate())
    study.ask()  # never finished
    started = set(threading.enumerate()) - before
    (own,) = (thread for thread in started if thread.name == "optuna-quota-ledger")
    del study
    gc.collect()
    deadline = time.monotonic() + 10
    while own.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_isolated_trials_keep_no_storage_alive() -> None:
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(cpu_time="1h"))
    gone = []
    for _ in range(3):
        study = optuna.create_study(
            sampler=sampler, pruner=QuotaPruner(limits=Limits(wall_time=60))
        )
        study.optimize(isolated(objective), n_trials=2, n_jobs=2)
        gone.append(weakref.ref(storage_of(study)))
        del study
    gc.collect()
    assert [each() for each in gone] == [None] * 3


def test_study_objects_on_one_storage_share_a_session() -> None:
    storage = optuna.storages.InMemoryStorage()
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=3))
    first = optuna.create_study(study_name="s", storage=storage, sampler=sampler)
    trial = first.ask()
    number = trial.number
    second = optuna.load_study(study_name="s", storage=storage, sampler=sampler)
    del first, trial
    gc.collect()
    second.tell(number, 1.0)
    second.optimize(objective)
    assert [t.state.name for t in second.trials] == ["COMPLETE"] * 3
    assert second.trials[0].user_attrs["quota:outcome"] == "completed"
