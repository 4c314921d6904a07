"""What trials on one host may hold together, with real threads and real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import logging
from pathlib import Path
import threading
import time
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
import pytest

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, Strategy, Usage
from optuna_quota._ledger.grant import Refusal
from optuna_quota._ledger.heartbeat import RunningTrial
from optuna_quota._ledger.ledger import Ledger
from tests.ledger_tests.test_ledger import begin, extend, finish, reserve
from tests.waiting import until


MIB = 2**20


class Crowd:
    """How many trials run at this moment, and the most there were."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = self.most = 0

    def __enter__(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self.now -= 1


def tune(objective: Callable[[optuna.Trial], float], **arguments: object) -> optuna.Study:
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), **arguments)  # type: ignore[arg-type]
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=12, n_jobs=4)
    return study


@pytest.mark.parametrize(("memory", "at_once"), [("2GiB", 2), ("1GiB", 1), ("3GiB", 3)])
def test_threads_together_hold_no_more_than_the_quota(memory: str, at_once: int) -> None:
    crowd = Crowd()

    def objective(trial: optuna.Trial) -> float:
        with crowd:
            time.sleep(0.02)
            return trial.suggest_float("x", 0, 1)

    study = tune(objective, quota=Quota(memory=memory), footprint=Usage(memory=2**30))
    assert crowd.most <= at_once
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 12


def test_a_trial_that_is_to_hold_nothing_has_a_ceiling_where_others_hold_all() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(gpu_memory="1GiB"))
    holder, other = begin(study), begin(study)
    assert isinstance(reserve(ledger, holder, {"gpu_memory": 2**30}), RunningTrial)
    assert isinstance(reserve(ledger, other, {"gpu_memory": 0.0}), RunningTrial)
    # As `on_crowded="smaller"` judges its point.
    assert Limits().tightened(ledger.room(other)).gpu_memory == pytest.approx(0, abs=1)


def test_the_trial_that_waits_longest_goes_first_though_smaller_ones_would_fit() -> None:
    study = optuna.create_study()
    quota = Quota(memory="10B")
    ledger = Ledger(study, quota)
    holder, large, small = (begin(study) for _ in range(3))
    assert isinstance(reserve(ledger, holder, {"memory": 6}), RunningTrial)
    admitted: list[int] = []

    def wait_for(trial: optuna.trial.FrozenTrial, memory: float) -> threading.Thread:
        def run() -> None:
            assert isinstance(reserve(ledger, trial, {"memory": memory}), RunningTrial)
            admitted.append(trial.number)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    first = wait_for(large, 8)
    until(lambda: "waits" in str(study.trials[1].system_attrs))
    second = wait_for(small, 3)
    until(lambda: "waits" in str(study.trials[2].system_attrs))
    assert admitted == []
    finish(study, ledger, holder, Usage(memory=6))
    first.join(30)
    assert admitted == [1]
    finish(study, ledger, large, Usage(memory=8))
    second.join(30)
    assert admitted == [1, 2]


@pytest.fixture
def another_thread() -> Iterator[None]:
    """Keep a thread running that might call `tell`."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield
    end.set()
    thread.join()


@pytest.mark.usefixtures("another_thread")
def test_a_trial_that_waits_until_its_study_has_ended_is_refused_and_holds_nothing() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(memory="10B"))
    holder, late, next_one = (begin(study) for _ in range(3))
    assert isinstance(reserve(ledger, holder, {"memory": 6}), RunningTrial)
    asked: list[bool] = []

    def is_over() -> bool:
        asked.append(len(asked) == 2)
        return asked[-1]

    refusal = ledger.reserve(late, limits=Limits(), footprint={"memory": 8}, is_over=is_over)
    assert isinstance(refusal, Refusal) and refusal.late and not refusal.final
    assert asked == [False, False, True]
    # It blocks no other trial.
    assert isinstance(reserve(ledger, next_one, {"memory": 4}), RunningTrial)


class Hourglass:
    """A clock that sleeping advances, and that calls back at a given time."""

    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.now, self.due, self.call = 0.0, due, call

    def time(self) -> float:
        return 1e9 + self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.due:
            self.due = float("inf")
            self.call()


@pytest.mark.usefixtures("another_thread")
@pytest.mark.parametrize("by_another_thread", [False, True])
def test_a_thread_that_waits_for_its_own_trials_is_warned(
    by_another_thread: bool, caplog: pytest.LogCaptureFixture
) -> None:
    study = optuna.create_study()
    first, second = begin(study), begin(study)
    clock = Hourglass(60, lambda: finish(study, ledger, first, Usage(memory=6)))
    ledger = Ledger(study, Quota(memory="10B"), clock=clock)
    if by_another_thread:
        thread = threading.Thread(target=reserve, args=(ledger, first, {"memory": 6}))
        thread.start()
        thread.join()
    else:
        reserve(ledger, first, {"memory": 6})
    caplog.set_level(logging.WARNING, logger="optuna.quota")
    assert isinstance(reserve(ledger, second, {"memory": 6}), RunningTrial)
    logged = {r.message for r in caplog.records if r.levelno == logging.WARNING}
    if by_another_thread:
        assert logged == set()
    else:
        (message,) = logged
        assert message.startswith("Trial 1 waits for memory that trial 0 holds.")


def test_a_trial_that_can_never_fit_is_refused_and_the_study_is_not_over() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(memory="10B"))
    refusal = reserve(ledger, begin(study), {"memory": 11})
    assert isinstance(refusal, Refusal) and not refusal.final and refusal.resource == "memory"
    assert isinstance(reserve(ledger, begin(study), {"memory": 10}), RunningTrial)


def test_a_limit_over_the_quota_is_no_reason_to_refuse() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(memory="10B"))
    answer = reserve(ledger, begin(study), limits=Limits(memory="100B"))
    assert isinstance(answer, RunningTrial) and answer.left["memory"] <= 10


@pytest.mark.slow
def test_an_isolated_trial_may_grow_to_all_that_is_free() -> None:
    def objective(trial: optuna.Trial) -> float:
        blocks = []
        for _ in range(5):
            block = bytearray(50 * MIB)
            block[::4096] = b"x" * len(block[::4096])
            blocks.append(block)
            time.sleep(0.1)
        return float(len(blocks))

    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(memory="480MiB"))
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=Limits(wall_time=100)))
    study.optimize(isolated(objective), n_trials=1)
    (trial,) = study.trials
    assert trial.state.name == "COMPLETE", trial.user_attrs
    assert trial.user_attrs["quota:memory"] > 250 * MIB


@pytest.mark.slow
def test_an_isolated_trial_is_ended_at_the_quota() -> None:
    def objective(trial: optuna.Trial) -> float:
        blocks = []
        for _ in range(100):
            block = bytearray(20 * MIB)
            block[::4096] = b"x" * len(block[::4096])
            blocks.append(block)
            time.sleep(0.02)
        return float(len(blocks))

    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(memory="300MiB"))
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=Limits(wall_time=100)))
    study.optimize(isolated(objective), n_trials=1)
    (trial,) = study.trials
    assert trial.user_attrs["quota:outcome"] == "terminated", trial.user_attrs
    assert trial.user_attrs["quota:breach"]["resource"] == "memory"
    assert trial.user_attrs["quota:breach"]["quota"] is True


def hold_for_a_while(trial: optuna.Trial) -> float:
    block = bytearray(trial.suggest_int("mib", 20, 80, step=4) * MIB)
    for start in range(0, len(block), 4 * MIB):
        block[start : start + 4 * MIB : 4096] = b"x" * len(range(0, 4 * MIB, 4096))
    time.sleep(0.1)
    return float(len(block))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "n_jobs"),
    [
        (Limits(memory="200MiB"), None),
        (Limits(wall_time=100), 2),
        (Limits(wall_time=100), None),
    ],
    ids=["by the limit", "an even share", "all that is free"],
)
def test_no_trial_within_its_promise_is_ended_for_the_quota(
    limits: Limits, n_jobs: int | None
) -> None:
    sampler = QuotaSampler(
        optuna.samplers.RandomSampler(seed=0),
        quota=Quota(memory="400MiB"),
        strategy=None if n_jobs is None else Strategy(14, n_jobs=n_jobs),
    )
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=limits))
    study.optimize(isolated(hold_for_a_while), n_trials=14, n_jobs=4)
    assert {trial.user_attrs["quota:outcome"] for trial in study.trials} == {"completed"}
    promised = [
        trial.system_attrs["quota:reservation"]["granted"]["memory"] for trial in study.trials
    ]
    # Once the footprint is learned, no more is held than the point needs.
    assert min(promised[10:]) < min(promised[:4])


def test_why_trials_of_unknown_needs_run_one_at_a_time_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    crowd = Crowd()

    def objective(trial: optuna.Trial) -> float:
        with crowd:
            time.sleep(0.02)
            return trial.suggest_float("x", 0, 1)

    caplog.set_level(logging.INFO, logger="optuna.quota")
    study = tune(objective, quota=Quota(cpu_cores=2))
    assert {t.state.name for t in study.trials} == {"COMPLETE"} and crowd.most == 1
    logged = [r.message for r in caplog.records if "one at a time" in r.message]
    assert len(logged) == 1 and "`Limits(cpu_cores=…)`" in logged[0]


def test_a_batch_that_is_asked_for_by_hand_does_not_wait_for_itself() -> None:
    study = optuna.create_study(
        sampler=QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(memory="1GiB")),
        pruner=QuotaPruner(limits=Limits(memory="600MiB")),
    )
    for _ in range(3):
        batch = [study.ask() for _ in range(4)]
        for trial in batch:
            trial.suggest_float("x", 0, 1)
        for trial in batch:
            study.tell(trial, 0.0)
    assert len(study.trials) == 12


def test_a_trial_that_outgrows_its_promise_is_given_what_is_free() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(memory="100B"))
    trial, other = begin(study), begin(study)
    assert isinstance(reserve(ledger, trial, {"memory": 40}), RunningTrial)
    assert isinstance(reserve(ledger, other, {"memory": 40}), RunningTrial)
    assert extend(ledger, trial, memory=55)["memory"] >= 55
    before = extend(ledger, trial, memory=55)["memory"]
    assert extend(ledger, trial, memory=61)["memory"] == before <= 60


@pytest.mark.parametrize(("on_crowded", "fits"), [("smaller", True), ("wait", False)])
def test_a_point_for_what_is_free_is_drawn_on_demand(on_crowded: Any, fits: bool) -> None:
    drawn = []
    for seed in range(12):
        sampler = QuotaSampler(
            optuna.samplers.RandomSampler(seed=seed),
            quota=Quota(memory="1000GB"),
            strategy=Strategy(12, search_space={"x": FloatDistribution(1, 1000)}),
            footprint=lambda params: Usage(memory=params["x"] * 1e9),
            on_crowded=on_crowded,
            on_veto="redraw",
        )
        study = optuna.create_study(sampler=sampler)
        first, second = study.ask(), study.ask()
        held = sum(
            trial.system_attrs["quota:reservation"]["granted"]["memory"]
            for trial in study.trials
            if trial.number == first.number
        )
        drawn.append(second.suggest_float("x", 1, 1000) <= 1000 - held / 1e9)
        for trial in (first, second):
            study.tell(trial, 0.0)
    assert all(drawn) is fits


def test_the_queue_is_served_on_a_database(tmp_path: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/held.db")
    ledger = Ledger(study, Quota(cpu_cores=1))
    first, second = begin(study), begin(study)
    assert isinstance(reserve(ledger, first), RunningTrial)
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(reserve(ledger, second)), daemon=True)
    thread.start()
    until(lambda: "waits" in str(study.trials[1].system_attrs))
    finish(study, ledger, first, Usage(cpu_time=1))
    thread.join(30)
    assert len(answers) == 1 and isinstance(answers[0], RunningTrial)
