"""The projection of a study that runs."""

from __future__ import annotations

import time

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
import pytest

from optuna_quota import Quota
from optuna_quota import QuotaSampler
from optuna_quota import Strategy
from optuna_quota import StudyRejected
from optuna_quota import Usage
from optuna_quota._footprint.future_points import draw_future_points
from optuna_quota._footprint.observations import Observation


def objective(trial: optuna.Trial) -> float:
    # What the trial takes is what is measured here.
    time.sleep(0.02)
    return trial.suggest_float("x", 0.5, 1)


def study_of(n_trials: int, quota: Quota, **arguments: object) -> optuna.Study:
    strategy = Strategy(n_trials)
    sampler = QuotaSampler(RandomSampler(seed=0), quota=quota, strategy=strategy, **arguments)  # type: ignore[arg-type]
    return optuna.create_study(sampler=sampler)


def test_it_adds_the_rest_to_what_was_used() -> None:
    study = study_of(40, Quota(trial_time="1h"))
    study.optimize(objective, n_trials=10)
    projection = study.sampler.project(study)  # type: ignore[attr-defined]
    used = sum(t.user_attrs["quota:wall_time"] for t in study.trials)
    row = projection.table.loc["trial_time"]
    assert row["used"] == pytest.approx(used, rel=1e-6)
    assert projection.strategy.n_trials == 30
    assert row["lower"] <= row["median"] <= row["upper"]
    assert row["median"] > used + 30 * 0.015
    # How probable it is hangs on how busy the machine is: ten short trials tell little.
    assert 0 < row["probability"] <= 1


def test_at_the_end_it_is_what_was_used() -> None:
    study = study_of(3, Quota(trial_time="1h", n_trials=3))
    study.optimize(objective, n_trials=3)
    row = study.sampler.project(study).table.loc["trial_time"]  # type: ignore[attr-defined]
    assert row["used"] == row["lower"] == row["median"] == row["upper"] > 0


@pytest.mark.parametrize(("policy", "ran"), [("continue", 12), ("stop", 9)])
def test_a_quota_that_will_not_do_is_told_early(
    policy: str, ran: int, caplog: pytest.LogCaptureFixture
) -> None:
    study = study_of(100_000, Quota(trial_time="5min"), on_projected=policy)
    optuna.logging.enable_propagation()
    try:
        study.optimize(objective, n_trials=12)
    finally:
        optuna.logging.disable_propagation()
    assert len(study.trials) == ran
    told = {m for m in caplog.messages if "The quota will not do" in m}
    assert len(told) == 1
    assert "trial time: " in told.pop()


def test_a_quota_that_will_not_do_can_raise() -> None:
    study = study_of(100_000, Quota(trial_time="5min"), on_projected="raise")
    with pytest.raises(StudyRejected, match="trial time") as caught:
        study.optimize(objective, n_trials=12)
    assert not caught.value.projection.fits
    assert all(t.state.is_finished() for t in study.trials)
    assert len(study.trials) == 9


def test_a_stated_footprint_is_in_force_before_trials_tell() -> None:
    study = study_of(10, Quota(trial_time="1h"), footprint=Usage(wall_time=60))
    table = study.sampler.project(study).table  # type: ignore[attr-defined]
    assert table.loc["trial_time", "median"] == 600


def test_without_a_strategy_or_anything_known_it_says_so() -> None:
    study = study_of(10, Quota(trial_time="1h"))
    with pytest.raises(ValueError, match="finished trials"):
        study.sampler.project(study)  # type: ignore[attr-defined]
    other = QuotaSampler(quota=Quota(trial_time="1h"))
    with pytest.raises(ValueError, match="strategy"):
        other.project(study)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="on_projected"):
        QuotaSampler(TPESampler(), quota=Quota(n_trials=1), on_projected="other")  # type: ignore[arg-type]


def test_the_next_points_are_around_the_newest_ones_of_an_adaptive_sampler() -> None:
    space: dict[str, BaseDistribution] = {
        "x": FloatDistribution(1.0, 1000.0, log=True),
        "n": IntDistribution(1, 100),
        "kind": CategoricalDistribution(["a", "b"]),
    }
    old = [Observation({"x": 1.0, "n": 1, "kind": "a"}, space, Usage()) for _ in range(30)]
    new = [Observation({"x": 900.0, "n": 90, "kind": "b"}, space, Usage()) for _ in range(20)]
    staying = draw_future_points([*old, *new], 400, adaptive=True)
    spread = draw_future_points([*old, *new], 400, adaptive=False)
    assert sum(point["x"] > 300 for point in staying) > 250
    assert 80 < sum(point["x"] > 100 for point in spread) < 200
    assert {point["kind"] for point in spread} == {"a", "b"}
    for point in (*staying, *spread):
        assert 1 <= point["x"] <= 1000
        assert isinstance(point["n"], int)
        assert 1 <= point["n"] <= 100


def test_choices_that_others_hang_on_are_drawn_as_a_sampler_does_and_not_as_they_happened() -> (
    None
):
    kind = CategoricalDistribution(["tree", "net", "never"])
    tree: dict[str, BaseDistribution] = {"kind": kind, "depth": IntDistribution(1, 8)}
    net: dict[str, BaseDistribution] = {
        "kind": kind,
        "width": IntDistribution(8, 64),
        "bias": CategoricalDistribution([True, False]),
    }
    rows = [Observation({"kind": "tree", "depth": 3}, tree, Usage())] * 18
    rows += [Observation({"kind": "net", "width": 9, "bias": True}, net, Usage())] * 2
    points = draw_future_points(rows, 600, adaptive=False)
    trees = [point for point in points if point["kind"] == "tree"]
    nets = [point for point in points if point["kind"] == "net"]
    assert len(trees) + len(nets) == 600
    # A third each, and of what no trial shows mostly what came most often.
    assert 200 <= len(nets) <= 250
    assert {frozenset(point) for point in trees} == {frozenset(tree)}
    assert {frozenset(point) for point in nets} == {frozenset(net)}
    assert {point["bias"] for point in nets} == {True, False}
    assert len({point["width"] for point in nets}) > 30
