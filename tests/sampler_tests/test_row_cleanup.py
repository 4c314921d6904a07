"""No error at any hook leaves a row RUNNING, and no row keeps what it copied from another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import create_trial, TrialState
import pytest

from optuna_quota import Limits, Quota, QuotaSampler, status, TrialRejected, Usage
from optuna_quota._records import BREACH_TIMELINE, PREFIX, read_record, TIMELINE
from tests.sampler_tests.assertions import assert_nothing_left


HOOKS = [
    "before_trial",
    "infer_relative_search_space",
    "sample_relative",
    "sample_independent",
    "after_trial",
]
ERRORS = [ValueError, optuna.TrialPruned, KeyboardInterrupt, SystemExit]


class Faulty(RandomSampler):
    """Raises at one of its hooks in the trial of a given number."""

    def __init__(self, hook: str, error: type[BaseException], number: int = 1) -> None:
        super().__init__(seed=0)
        self.hook = hook
        self.error = error
        self.number = number

    def _fail(self, hook: str, trial: optuna.trial.FrozenTrial) -> None:
        if hook == self.hook and trial.number == self.number:
            raise self.error("on purpose")

    def before_trial(self, study: Any, trial: Any) -> None:
        super().before_trial(study, trial)
        self._fail("before_trial", trial)

    def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
        self._fail("infer_relative_search_space", trial)
        return super().infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
        self._fail("sample_relative", trial)
        return super().sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        self._fail("sample_independent", trial)
        return super().sample_independent(study, trial, name, distribution)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        super().after_trial(study, trial, state, values)
        self._fail("after_trial", trial)


def objective(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1) + trial.suggest_float("y", 0, 1)


def by_optimize(study: optuna.Study) -> None:
    study.optimize(objective, n_trials=3)


def by_threads(study: optuna.Study) -> None:
    study.optimize(objective, n_trials=4, n_jobs=2)


def by_enqueued(study: optuna.Study) -> None:
    for x in (0.1, 0.2, 0.3):
        study.enqueue_trial({"x": x})
    study.optimize(objective, n_trials=3)


def by_ask_and_tell(study: optuna.Study) -> None:
    for _ in range(3):
        trial = study.ask()
        try:
            value = objective(trial)
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
        except BaseException:
            study.tell(trial, state=TrialState.FAIL)
            raise
        else:
            study.tell(trial, value)


def by_fixed_distributions(study: optuna.Study) -> None:
    space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    for _ in range(3):
        trial = study.ask(space)
        study.tell(trial, trial.params["x"])


WAYS = [
    by_optimize,
    pytest.param(by_threads, marks=pytest.mark.slow),
    pytest.param(by_enqueued, marks=pytest.mark.slow),
    by_ask_and_tell,
    by_fixed_distributions,
]


@contextlib.contextmanager
def anything_raised() -> Iterator[None]:
    # Optuna raises UnboundLocalError where `after_trial` is interrupted by the keyboard.
    with contextlib.suppress(BaseException):
        yield


def n_finished(study: optuna.Study) -> int:
    return sum(trial.state.is_finished() for trial in study.trials)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("hook", HOOKS)
def test_no_row_stays_running(
    hook: str, error: type[BaseException], way: Callable[[optuna.Study], None]
) -> None:
    sampler = QuotaSampler(
        Faulty(hook, error), quota=Quota(n_trials=100, trial_time="1h", cpu_time="1h")
    )
    study = optuna.create_study(sampler=sampler)
    with anything_raised():
        way(study)
    assert_nothing_left(study)
    # The study goes on.
    before = n_finished(study)
    study.optimize(objective, n_trials=2)
    assert n_finished(study) > before
    assert_nothing_left(study)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("hook", HOOKS)
def test_errors_of_the_base_sampler_are_raised(hook: str, error: type[BaseException]) -> None:
    study = optuna.create_study(
        sampler=QuotaSampler(Faulty(hook, error, number=0), quota=Quota(n_trials=9))
    )
    with pytest.raises(BaseException, match="on purpose") as caught:
        study.ask({"x": FloatDistribution(0, 1)}) if hook != "after_trial" else study.tell(
            study.ask(), 1.0
        )
    assert caught.type is error
    assert_nothing_left(study)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_enqueued_trial_that_is_interrupted_before_it_begins_is_kept(
    error: type[BaseException],
) -> None:
    sampler = QuotaSampler(Faulty("before_trial", error, 0), quota=Quota(n_trials=9))
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial({"x": 0.25})
    with pytest.raises(error, match="on purpose"):
        study.optimize(objective, n_trials=1)
    study.optimize(objective, n_trials=1)
    # A trial that can't begin now would not begin later either.
    assert (study.trials[-1].params["x"] == 0.25) == (error is KeyboardInterrupt)


def test_a_thread_is_not_taken_to_have_a_trial_that_never_began() -> None:
    # It would be refused, where it had to wait for a trial of another worker.
    sampler = QuotaSampler(Faulty("before_trial", ValueError, 0), quota=Quota(memory="1TiB"))
    study = optuna.create_study(sampler=sampler)
    with pytest.raises(ValueError, match="on purpose"):
        study.ask()
    assert not sampler._session(study).ledger._running


def test_a_trial_that_never_began_has_no_usage() -> None:
    sampler = QuotaSampler(
        Faulty("before_trial", ValueError, number=0), quota=Quota(n_trials=1, cpu_time="1h")
    )
    study = optuna.create_study(sampler=sampler)
    with pytest.raises(ValueError, match="on purpose"):
        study.ask()
    assert (status(study).table["used"] == 0).all()
    study.tell(study.ask(), 1.0)


def test_an_error_of_the_objective_is_recorded() -> None:
    study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=9)))

    def fails(trial: optuna.Trial) -> float:
        raise ValueError("no such layer")

    study.optimize(fails, n_trials=1, catch=ValueError)
    record = read_record(study.trials[0])
    assert record.outcome == "failed"
    assert record.reason == "The objective raised ValueError: no such layer."
    assert record.usage.wall_time is not None


def test_a_trial_told_by_its_number_is_recorded() -> None:
    study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=9)))
    number = study.ask().number
    study.tell(number, 1.0)
    record = read_record(study.trials[0])
    assert record.outcome == "completed"
    assert record.usage.memory is not None


SPACE = {"x": FloatDistribution(0, 1)}
COPIED = {
    "quota:outcome": "failed",
    "quota:reason": "Its worker died.",
    "quota:memory": 7,
    "quota:breach": {"resource": "memory", "limit": 1, "observed": 7, "seconds": 1.0},
    "quota:my_meter": 3,
    "other": "kept",
}


def study_with(**attributes: Any) -> optuna.Study:
    sampler = QuotaSampler(RandomSampler(seed=0), quota=Quota(n_trials=9), **attributes)
    return optuna.create_study(sampler=sampler)


def test_attributes_copied_from_a_failed_trial_are_cleared() -> None:
    study = study_with()
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            user_attrs=COPIED,
            system_attrs={
                "fixed_params": {"x": 0.5},
                TIMELINE: [[0, 7]],
                BREACH_TIMELINE: [[0, 7]],
            },
        )
    )
    trial = study.ask()
    assert trial.suggest_float("x", 0, 1) == 0.5
    assert {k: v for k, v in trial.user_attrs.items() if v is not None} == {"other": "kept"}
    study.tell(trial, 1.0)
    (row,) = study.trials
    record = read_record(row)
    assert (record.outcome, record.reason, record.breach) == ("completed", None, None)
    assert not record.usage.custom and record.usage.memory != 7
    assert not record.timeline and not record.breach_timeline


def test_a_trial_that_has_begun_keeps_its_attributes() -> None:
    study = study_with()
    trial = study.ask()
    trial.set_user_attr(f"{PREFIX}proposed", {"action": "moved"})
    again = optuna.trial.Trial(study, trial._trial_id)
    assert again.user_attrs[f"{PREFIX}proposed"] == {"action": "moved"}
    study.tell(trial, 1.0)


def test_an_enqueued_point_refused_inside_ask_leaves_no_row_running() -> None:
    study = study_with(
        limits=Limits(memory="1GiB"), footprint=lambda params: Usage(memory=4e9 * params["x"])
    )
    study.enqueue_trial({"x": 0.9})
    with pytest.raises(TrialRejected, match="Memory"):
        study.ask(SPACE)
    (row,) = study.trials
    assert row.state == TrialState.PRUNED
    assert read_record(row).outcome == "rejected"
    assert (status(study).table["reserved"] == 0).all()
    # Afterwards the caller has the trial, and finishes it.
    study.enqueue_trial({"x": 0.8})
    trial = study.ask()
    with pytest.raises(TrialRejected, match="Memory"):
        trial.suggest_float("x", 0, 1)
    assert study.trials[1].state == TrialState.RUNNING
    study.tell(trial, state=TrialState.PRUNED)
    assert read_record(study.trials[1]).outcome == "rejected"
