"""A study that does not fit is rejected before it runs, and projected while it runs."""

from __future__ import annotations

from collections.abc import Callable
import logging
from pathlib import Path
import pickle
import time
from typing import Any

import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, Strategy, StudyRejected, Usage
from optuna_quota._projection.projection import ProjectedResource, Projection
from optuna_quota._records import read_record
from optuna_quota._sampler.options import OnProjected
from optuna_quota._sampler.study_projection import (
    describe_outlook,
    Outlook,
    outlook_of,
    QuotaOutlook,
)
from tests.sampler_tests.assertions import assert_nothing_left


EACH = Usage(wall_time="1min", memory="1GiB")
QUOTA = Quota(wall_time="10min", memory="3GiB")


def never(trial: optuna.Trial) -> float:
    raise AssertionError("the objective ran")


def objective(trial: optuna.Trial) -> float:
    return float(trial.suggest_int("n", 1, 10))


def by_points(params: dict[str, Any]) -> Usage:
    return Usage(wall_time=60.0 * params["n"])


def test_the_constructor_rejects_a_study_that_does_not_fit() -> None:
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
def test_the_constructor_accepts_what_fits_or_is_unknown(
    strategy: Strategy | None, footprint: Any
) -> None:
    QuotaSampler(quota=QUOTA, strategy=strategy, footprint=footprint)


def test_a_function_over_a_search_space_is_rejected() -> None:
    strategy = Strategy(n_trials=20, search_space={"n": IntDistribution(1, 10)})
    with pytest.raises(StudyRejected):
        QuotaSampler(quota=QUOTA, strategy=strategy, footprint=by_points)


def test_the_samplers_own_limits_count() -> None:
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
    ended = [trial for trial in study.trials[1:] if trial.state != TrialState.WAITING]
    # An enqueued one waits for a larger quota.
    assert len(study.trials) == 1 + len(ended) + (how == "enqueued")
    for trial in ended:
        assert trial.state == TrialState.FAIL
        record = read_record(trial)
        assert record.outcome == "rejected"
        assert record.reason == str(caught.value)


def test_catch_does_not_hide_a_rejection() -> None:
    study = study_that_used(minutes=5)
    resume(n_trials=8)(study)
    with pytest.raises(StudyRejected):
        study.optimize(never, n_trials=3, catch=(Exception,))


def test_a_resumed_study_that_still_fits_goes_on() -> None:
    study = study_that_used(minutes=5)
    resume(n_trials=5)(study)
    study.optimize(objective, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3


def test_a_resumed_study_is_judged_by_its_trials_once_they_are_enough() -> None:
    # Six seconds each, where two minutes were stated, of which five would have fit.
    study = study_that_used(minutes=1, n_trials=10)
    resume(n_trials=15, footprint=by_points)(study)
    study.optimize(objective, n_trials=1)
    assert study.trials[-1].state == TrialState.COMPLETE
    study = study_that_used(minutes=5, n_trials=10)
    resume(n_trials=40, footprint=lambda _: Usage(wall_time=1.0))(study)
    with pytest.raises(StudyRejected, match="of it used so far"):
        study.optimize(never, n_trials=1)


@pytest.mark.parametrize("on_projected", ["continue", "raise"])
def test_a_resumed_study_that_learns_is_judged_at_once(
    on_projected: OnProjected, quota_warnings: Callable[[], list[str]]
) -> None:
    study = study_that_used(minutes=5, n_trials=10)
    study.sampler = QuotaSampler(
        RandomSampler(seed=0),
        quota=QUOTA,
        strategy=Strategy(n_trials=100),
        on_projected=on_projected,
    )
    if on_projected == "raise":
        with pytest.raises(StudyRejected):
            study.optimize(never, n_trials=1)
        assert study.trials[-1].user_attrs["quota:outcome"] == "rejected"
    else:
        trial = study.ask()
        assert "The quota is likely to run out before the study ends" in quota_warnings()[0]
        study.tell(trial, 1.0)


def test_the_search_space_is_inferred_from_the_trials() -> None:
    sampler = QuotaSampler(
        RandomSampler(seed=0), quota=QUOTA, strategy=Strategy(n_trials=20), footprint=by_points
    )
    study = optuna.create_study(sampler=sampler)
    with pytest.raises(StudyRejected):
        study.optimize(objective, n_trials=20)
    assert len(study.trials) == 2
    assert_nothing_left(study)


def test_the_pruners_limits_count() -> None:
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


@pytest.mark.parametrize(
    "footprint", [pytest.param(by_branches, marks=pytest.mark.slow), always_deep]
)
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


def test_a_function_of_conditional_parameters_rejects_what_does_not_fit() -> None:
    sampler = QuotaSampler(
        RandomSampler(seed=0), quota=QUOTA, strategy=Strategy(n_trials=50), footprint=by_branches
    )
    study = optuna.create_study(sampler=sampler)
    with pytest.raises(StudyRejected, match="wall time"):
        study.optimize(branching, n_trials=50)
    # As soon as both branches were seen.
    assert {t.params.get("kind") for t in study.trials[:-1]} == {"tree", "linear"}
    assert_nothing_left(study)


def sleeping_objective(trial: optuna.Trial) -> float:
    # What the trial takes is what is measured here.
    time.sleep(0.02)
    return trial.suggest_float("x", 0.5, 1)


def study_of(n_trials: int, quota: Quota, **arguments: object) -> optuna.Study:
    strategy = Strategy(n_trials)
    sampler = QuotaSampler(RandomSampler(seed=0), quota=quota, strategy=strategy, **arguments)  # type: ignore[arg-type]
    return optuna.create_study(sampler=sampler)


def test_the_rest_is_added_to_what_was_used() -> None:
    study = study_of(40, Quota(trial_time="1h"))
    study.optimize(sleeping_objective, n_trials=10)
    projection = study.sampler.project(study)  # type: ignore[attr-defined]
    used = sum(t.user_attrs["quota:wall_time"] for t in study.trials)
    cpu_time = sum(t.user_attrs["quota:cpu_time"] for t in study.trials)
    # Without a quota on it, too.
    assert projection.table.loc["cpu_time", "used"] == pytest.approx(cpu_time, rel=1e-6)
    row = projection.table.loc["trial_time"]
    assert row["used"] == pytest.approx(used, rel=1e-6)
    assert projection.strategy.n_trials == 30
    assert row["lower"] <= row["median"] <= row["upper"]
    assert row["median"] > used + 30 * 0.015
    # The probability depends on the machine's load.
    assert 0 < row["probability"] <= 1


def test_usage_is_priced_by_this_workers_prices() -> None:
    study = study_of(3, Quota(cost=1, prices={"trial_time": 36}))
    study.add_trials([study_that_used(minutes=1).trials[0]])
    # Other workers, with another quota, run as well.
    study.set_user_attr("quota:quota", {"n_trials": 9})
    row = study.sampler.project(study).table.loc["cost"]  # type: ignore[attr-defined]
    assert row["used"] == pytest.approx(0.6)


def test_at_the_end_the_projection_is_what_was_used() -> None:
    study = study_of(3, Quota(trial_time="1h", n_trials=3))
    study.optimize(sleeping_objective, n_trials=3)
    row = study.sampler.project(study).table.loc["trial_time"]  # type: ignore[attr-defined]
    assert row["used"] == row["lower"] == row["median"] == row["upper"] > 0


@pytest.mark.parametrize(("on_projected", "n_trials"), [("continue", 12), ("stop", 9)])
def test_a_quota_that_will_run_out_is_reported_early(
    on_projected: str, n_trials: int, quota_warnings: Callable[[], list[str]]
) -> None:
    study = study_of(100_000, Quota(trial_time="5min"), on_projected=on_projected)
    study.optimize(sleeping_objective, n_trials=12)
    assert len(study.trials) == n_trials
    (warning,) = quota_warnings()
    assert warning.startswith("The quota is likely to run out before the study ends: ")
    assert ") projected, 5 min allowed (trial time). Nearest that would fit: " in warning


def projected(probability: float) -> Projection:
    # Memory fits with a probability of 90%, which is less than the required confidence.
    rows = (
        ProjectedResource("n_trials", 5, 100, 100, 100, None, None),
        ProjectedResource("trial_time", 600, 7000, 7800, 8600, 7200, probability),
        ProjectedResource("memory", 0, 2**29, 2**30, 3 * 2**30, 2 * 2**30, 0.9),
    )
    return Projection(Strategy(100), rows, probability)


@pytest.mark.parametrize(
    ("probability", "outlook", "text"),
    [
        (0.97, "fits", "(memory); probability that it fits: 97%."),
        (0.6, "uncertain", "2 h 10 min (1 h 56 min to 2 h 23 min) of 2 h (trial time), 1 GiB ("),
        (0.3, "unlikely", "2 h 10 min (1 h 56 min to 2 h 23 min) projected, 2 h allowed (trial"),
        (0.05, "hopeless", "2 h allowed (trial time). No smaller strategy would fit."),
    ],
)
def test_an_outlook_has_the_figures_of_critical_resources(
    probability: float, outlook: Outlook, text: str
) -> None:
    projection = projected(probability)
    assert outlook_of(projection) == outlook
    assert text in describe_outlook(projection, outlook, 5)


def test_an_outlook_is_logged_after_five_trials_once_in_a_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    optuna.logging.enable_propagation()
    caplog.set_level(logging.INFO, logger="optuna.quota.sampler")
    url = f"sqlite:///{tmp_path / 'study.db'}"
    messages: list[str] = []
    for n_trials, expected in ((5, 0), (3, 1), (1, 1)):
        sampler = QuotaSampler(
            RandomSampler(seed=0), quota=Quota(trial_time="1h"), strategy=Strategy(20)
        )
        # As another worker: a storage and a sampler of its own.
        study = optuna.create_study(
            storage=url, study_name="outlook", load_if_exists=True, sampler=sampler
        )
        study.optimize(sleeping_objective, n_trials=n_trials)
        records = {id(r): r for r in caplog.records}.values()
        messages = [m for r in records if "whole strategy" in (m := r.getMessage())]
        assert len(messages) == expected
    assert messages[0].startswith("After 5 trials, the whole strategy is projected to use ")
    assert messages[0].endswith("of 1 h (trial time); probability that it fits: 100%.")


def test_an_outlook_is_logged_again_for_another_plan(
    quota_warnings: Callable[[], list[str]],
) -> None:
    study, found = study_that_used(minutes=1), []
    for plan in ("5 min", "5 min", "10 min"):
        QuotaOutlook(plan).check(study, 8, lambda: projected(0.01))
        found.append(len(quota_warnings()))
    assert found == [1, 0, 1]


def test_a_worse_outlook_is_logged_again_and_acted_upon_with_enough_trials(
    quota_warnings: Callable[[], list[str]],
) -> None:
    study = study_that_used(minutes=1)
    outlook = QuotaOutlook()

    def after(n_trials: int, probability: float) -> bool:
        projection = projected(probability)
        return outlook.check(study, n_trials, lambda: projection) is projection

    assert not after(4, 0.01) and not quota_warnings()
    assert not after(5, 0.3) and len(quota_warnings()) == 1
    assert not after(7, 0.01) and not quota_warnings()
    assert not after(8, 0.9) and not quota_warnings()
    assert not after(11, 0.2) and not quota_warnings()
    assert after(20, 0.01) and len(quota_warnings()) == 1
    assert not after(40, 0.01) and not quota_warnings()


@pytest.mark.slow
def test_a_quota_that_will_run_out_can_raise() -> None:
    study = study_of(100_000, Quota(trial_time="5min"), on_projected="raise")
    with pytest.raises(StudyRejected, match="trial time") as caught:
        study.optimize(sleeping_objective, n_trials=12)
    assert not caught.value.projection.fits
    assert all(t.state.is_finished() for t in study.trials)
    assert len(study.trials) == 9


def test_a_stated_footprint_holds_until_trials_have_run() -> None:
    study = study_of(10, Quota(trial_time="1h"), footprint=Usage(wall_time=60))
    table = study.sampler.project(study).table  # type: ignore[attr-defined]
    assert table.loc["trial_time", "median"] == 600


def test_without_a_strategy_or_a_known_usage_it_raises() -> None:
    study = study_of(10, Quota(trial_time="1h"))
    with pytest.raises(ValueError, match="finished trials"):
        study.sampler.project(study)  # type: ignore[attr-defined]
    other = QuotaSampler(quota=Quota(trial_time="1h"))
    with pytest.raises(ValueError, match="strategy"):
        other.project(study)


def test_an_unknown_on_projected_is_refused() -> None:
    with pytest.raises(ValueError, match="on_projected"):
        QuotaSampler(TPESampler(), quota=Quota(n_trials=1), on_projected="other")  # type: ignore[arg-type]
