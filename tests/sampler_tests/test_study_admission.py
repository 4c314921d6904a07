"""A study that will not fit is rejected before anything runs."""

from __future__ import annotations

from collections.abc import Callable
import pickle
from typing import Any

import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler
from optuna_quota import Strategy
from optuna_quota import StudyRejected
from optuna_quota import Usage
from optuna_quota._records import read_record
from tests.sampler_tests.test_no_row_left_running import assert_nothing_left


EACH = Usage(wall_time="1min", memory="1GiB")
QUOTA = Quota(wall_time="10min", memory="3GiB")


def never(trial: optuna.Trial) -> float:
    raise AssertionError("the objective ran")


def objective(trial: optuna.Trial) -> float:
    return float(trial.suggest_int("n", 1, 10))


def by_points(params: dict[str, Any]) -> Usage:
    return Usage(wall_time=60.0 * params["n"])


def test_the_constructor_rejects_what_it_can_decide() -> None:
    with pytest.raises(StudyRejected) as caught:
        QuotaSampler(quota=QUOTA, strategy=Strategy(n_trials=20), footprint=EACH)
    error = caught.value
    assert error.resource == "wall_time"
    assert not error.projection.fits
    assert "wall time" in str(error) and "Nearest that would fit" in str(error)
    assert error.projection.nearest == Strategy(n_trials=10)
    assert pickle.loads(pickle.dumps(error)).projection.nearest == Strategy(n_trials=10)


@pytest.mark.parametrize(
    ("strategy", "footprint"),
    [
        (Strategy(n_trials=10), EACH),
        (Strategy(n_trials=20, n_jobs=2), EACH),
        (Strategy(n_trials=20), None),
        (None, EACH),
        (Strategy(n_trials=20), by_points),
        (Strategy(n_trials=5, search_space={"n": IntDistribution(1, 2)}), by_points),
    ],
)
def test_the_constructor_takes_what_fits_or_cannot_be_told(strategy, footprint) -> None:  # type: ignore[no-untyped-def]
    QuotaSampler(quota=QUOTA, strategy=strategy, footprint=footprint)


def test_a_function_over_a_search_space_is_rejected() -> None:
    strategy = Strategy(n_trials=20, search_space={"n": IntDistribution(1, 10)})
    with pytest.raises(StudyRejected):
        QuotaSampler(quota=QUOTA, strategy=strategy, footprint=by_points)


def test_limits_of_its_own_count() -> None:
    # Terminated at one second each, 20 trials fit.
    footprint = Usage(wall_time="1min")
    limits = Limits(wall_time="1s")
    QuotaSampler(quota=QUOTA, strategy=Strategy(n_trials=20), footprint=footprint, limits=limits)


def resume(n_trials: int, footprint: Any = EACH, **kwargs: Any) -> Callable[[optuna.Study], None]:
    def change(study: optuna.Study) -> None:
        study.sampler = QuotaSampler(
            RandomSampler(seed=0),
            quota=QUOTA,
            strategy=Strategy(n_trials=n_trials, **kwargs),
            footprint=footprint,
        )

    return change


def study_that_used(minutes: float, n_trials: int = 1) -> optuna.Study:
    study = optuna.create_study()
    for _ in range(n_trials):
        study.add_trial(
            optuna.trial.create_trial(
                value=1.0,
                params={"n": 2},
                distributions={"n": IntDistribution(1, 10)},
                user_attrs={"quota:wall_time": 60 * minutes / n_trials},
            )
        )
    return study


@pytest.mark.parametrize("how", ["optimize", "threads", "ask", "enqueued"])
def test_a_resumed_study_is_rejected_with_what_it_used(how: str) -> None:
    study = study_that_used(minutes=5)
    resume(n_trials=8)(study)
    if how == "enqueued":
        study.enqueue_trial({"n": 1})
    with pytest.raises(StudyRejected) as caught:
        if how == "ask":
            study.ask()
        else:
            study.optimize(never, n_trials=3, n_jobs=2 if how == "threads" else 1, catch=())
    table = caught.value.projection.table
    assert table.loc["wall_time", "used"] == pytest.approx(300, rel=0.01)
    for trial in study.trials[1:]:
        assert trial.state == TrialState.FAIL
        record = read_record(trial)
        assert record.outcome == "rejected"
        assert record.reason == str(caught.value)
    assert_nothing_left_of_new(study)


def assert_nothing_left_of_new(study: optuna.Study) -> None:
    assert all(t.state.is_finished() for t in study.trials)


def test_catch_does_not_hide_it() -> None:
    study = study_that_used(minutes=5)
    resume(n_trials=8)(study)
    with pytest.raises(StudyRejected):
        study.optimize(never, n_trials=3, catch=(Exception,))


def test_a_resumed_study_that_still_fits_goes_on() -> None:
    study = study_that_used(minutes=5)
    resume(n_trials=5)(study)
    study.optimize(objective, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3


def test_the_search_space_may_become_known_by_the_trials() -> None:
    sampler = QuotaSampler(
        RandomSampler(seed=0), quota=QUOTA, strategy=Strategy(n_trials=20), footprint=by_points
    )
    study = optuna.create_study(sampler=sampler)
    with pytest.raises(StudyRejected):
        study.optimize(objective, n_trials=20)
    assert len(study.trials) == 2
    assert_nothing_left(study)


def test_pruner_limits_make_it_fit() -> None:
    sampler = QuotaSampler(
        RandomSampler(seed=0),
        quota=QUOTA,
        strategy=Strategy(n_trials=20),
        footprint=by_points,
        # All points run, also those that will be stopped at the limit.
        breach_probability=1,
    )
    study = optuna.create_study(
        sampler=sampler, pruner=QuotaPruner(limits=Limits(wall_time="20s"))
    )
    study.optimize(objective, n_trials=3)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3


def branching(trial: optuna.Trial) -> float:
    if trial.suggest_categorical("kind", ["tree", "linear"]) == "tree":
        trial.suggest_int("depth", 1, 10)
    return 1.0


def by_branches(params: dict[str, Any]) -> Usage:
    return Usage(wall_time=60.0 * params["depth"] if params["kind"] == "tree" else 1.0)


def always_deep(params: dict[str, Any]) -> Usage:
    return Usage(wall_time=1e-3 * params["depth"])


@pytest.mark.parametrize("footprint", [by_branches, always_deep])
def test_a_function_of_conditional_parameters_stops_no_study(
    footprint: Callable[[dict[str, Any]], Usage],
) -> None:
    quota = Quota(trial_time="10h")
    sampler = QuotaSampler(
        RandomSampler(seed=0), quota=quota, strategy=Strategy(n_trials=20), footprint=footprint
    )
    study = optuna.create_study(sampler=sampler)
    study.optimize(branching, n_trials=20)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 20


def test_a_function_of_conditional_parameters_rejects_what_will_not_fit() -> None:
    sampler = QuotaSampler(
        RandomSampler(seed=0), quota=QUOTA, strategy=Strategy(n_trials=50), footprint=by_branches
    )
    study = optuna.create_study(sampler=sampler)
    with pytest.raises(StudyRejected, match="wall time"):
        study.optimize(branching, n_trials=50)
    # As soon as both branches were seen.
    assert {t.params.get("kind") for t in study.trials[:-1]} == {"tree", "linear"}
    assert_nothing_left(study)
