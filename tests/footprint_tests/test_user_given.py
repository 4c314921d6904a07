"""A user's footprint: calibrated on the study's trials, called once for each point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
import pickle
import time
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
import pytest

from optuna_quota import (
    Footprint,
    Limits,
    project,
    Quota,
    QuotaPruner,
    QuotaSampler,
    Strategy,
    Usage,
)
from optuna_quota._footprint import user_given
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.user_given import (
    AskedOnce,
    CalibratedFootprint,
    count_within,
    FootprintCalibrator,
    UnknownFootprintError,
    UserFootprint,
)
from optuna_quota._projection import simulation
from optuna_quota._sampler import admission
from tests.footprint_tests.test_footprint import draw_rows, truth


ROWS = draw_rows(12, seed=3, noise=0.05)
LARGE = {"width": 1024, "depth": 8, "kind": "b"}
SMALL = {"width": 8, "depth": 1, "kind": "a"}


def a_third(params: Mapping[str, Any]) -> Usage:
    usage = truth(dict(params))
    return Usage(memory=(usage.memory or 0) / 3, wall_time=(usage.wall_time or 0) / 3)


def nonsense(params: Mapping[str, Any]) -> Usage:
    jump = float(np.exp(8 * np.sin(1e4 * np.log(params["width"]))))
    return Usage(memory=1e9 * jump, wall_time=jump)


def corrected(function: Any, rows: Sequence[Observation] = ROWS) -> CalibratedFootprint:
    return FootprintCalibrator(UserFootprint(function)).calibrate(Footprint.fit(rows), rows)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [(Limits(memory=4e9), 0), (Limits(memory=4e9 - 1), 1), (Limits(wall_time=20), 1)],
)
def test_a_peak_may_equal_its_limit_and_a_total_that_reaches_it_is_used_up(
    limits: Limits, expected: float
) -> None:
    assert UserFootprint(Usage(memory=4e9, wall_time=20)).probability({}, limits) == expected


def test_a_constant_factor_is_calibrated_everywhere() -> None:
    expected = truth(LARGE)
    found = corrected(a_third).intervals(LARGE)
    for name in ("memory", "wall_time"):
        amount = expected.get(name)
        assert found[name].median == pytest.approx(amount, rel=0.15)
        assert found[name].lower < amount < found[name].upper
        assert found[name].upper < 1.5 * found[name].median
    limits = Limits(memory=(expected.memory or 0) / 2)
    assert UserFootprint(a_third).probability(LARGE, limits) == 0
    assert corrected(a_third).probability(LARGE, limits) > 0.9


def test_a_right_formula_is_right_everywhere_from_the_first_trial_on() -> None:
    # Times are expected to rise with sizes, but not their ratio to what a formula says.
    right = corrected(truth, ROWS[:1])
    for params in (SMALL, LARGE):
        expected = right.intervals(params)["wall_time"].median
        assert expected / truth(params).amounts()["wall_time"] == pytest.approx(1, abs=0.15)


def test_a_useless_formula_is_not_used() -> None:
    learned = Footprint.fit(ROWS)
    found = corrected(nonsense)
    for row in draw_rows(10, seed=4):
        assert found.intervals(row.params) == learned.intervals(row.params)


def test_draws_agree_with_the_intervals_and_feed_a_projection() -> None:
    found = corrected(a_third)
    drawn = found.draw([LARGE], 400, 0)
    assert np.median(drawn["wall_time"]) == pytest.approx(truth(LARGE).wall_time, rel=0.2)
    points = [row.params for row in draw_rows(40, seed=6)]
    total = sum(truth(dict(point)).wall_time or 0 for point in points)
    rows = {row.resource: row for row in project(Strategy(40), found, points=points).resources}
    assert rows["trial_time"].median == pytest.approx(total, rel=0.2)


def test_resources_known_to_one_side_are_kept() -> None:
    def with_energy(params: Mapping[str, Any]) -> Usage:
        return Usage(energy=7.0)

    found = corrected(with_energy)
    assert found.intervals(LARGE)["energy"].median == 7.0
    assert found.intervals(LARGE)["memory"] == Footprint.fit(ROWS).intervals(LARGE)["memory"]


def test_a_function_of_a_missing_parameter_raises() -> None:
    with pytest.raises(KeyError):
        corrected(a_third).breaches([{"depth": 2}], Limits(memory=1e9))


SPACE = {"width": FloatDistribution(0.1, 4, log=True), "depth": IntDistribution(1, 8)}


class Estimator:
    """Counts the calls for each point, and may be slow."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.calls: Counter[Any] = Counter()

    def __call__(self, params: dict[str, Any]) -> Usage:
        self.calls[tuple(sorted(params.items()))] += 1
        time.sleep(self.seconds)
        return Usage(memory=1e9 * params["width"] * params["depth"], wall_time=1)


def objective(trial: optuna.Trial) -> float:
    return trial.suggest_float("width", 0.1, 4, log=True) * trial.suggest_int("depth", 1, 8)


def study_with(footprint: Estimator) -> optuna.Study:
    sampler = QuotaSampler(
        TPESampler(seed=2),
        quota=Quota(wall_time="1h"),
        strategy=Strategy(n_trials=12, search_space=SPACE),
        footprint=footprint,
    )
    return optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=Limits(memory="3GB")))


def test_each_point_is_asked_once_in_a_whole_study() -> None:
    footprint = Estimator()
    study = study_with(footprint)
    study.optimize(objective, n_trials=7)
    assert study.sampler.project(study).fits  # type: ignore[attr-defined]
    # Points were refused and replaced.
    assert any("quota:proposed" in trial.user_attrs for trial in study.trials)
    assert len(footprint.calls) > 12
    assert set(footprint.calls.values()) == {1}


def test_a_slow_function_is_asked_for_fewer_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "_SECONDS", 0.2)
    monkeypatch.setattr(admission, "_SEARCH_SECONDS", 0.2)
    footprint = Estimator(seconds=0.01)
    strategy = Strategy(n_trials=9, search_space=SPACE)
    projection = project(strategy, footprint, quota=Quota(memory="3GB"))
    assert not projection.fits
    # 256 of a fast one, and as many for each smaller range that is tried.
    assert 16 <= footprint.calls.total() <= 20
    footprint = Estimator(seconds=0.01)
    study = study_with(footprint)
    study.optimize(objective, n_trials=8)
    # The projection's; for a trial its own point, and what may replace it.
    assert footprint.calls.total() <= 20 + 8 * (1 + 2 * 6 + 7)


def test_failures_are_remembered_and_copies_ask_again() -> None:
    calls: list[Any] = []

    def fails(params: dict[str, Any]) -> Usage:
        calls.append(params)
        raise LookupError("width")

    function = AskedOnce(fails)  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(LookupError, match="width"):
            function({"depth": 1})
    assert len(calls) == 1
    again = pickle.loads(pickle.dumps(AskedOnce(sum)))  # type: ignore[arg-type]
    assert again.seconds is None


@pytest.mark.parametrize("error", [KeyError("width"), ZeroDivisionError("width")])
def test_a_failure_in_a_study_is_logged_once_with_its_place(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(params: Mapping[str, Any]) -> Usage:
        raise error

    footprint = UserFootprint(fails, lenient=True)
    for _ in range(2):
        with pytest.raises(UnknownFootprintError, match="width"):
            footprint.intervals({"depth": 1})
    (text,) = caplog.messages
    line = fails.__code__.co_firstlineno + 1
    assert f"the point {{'depth': 1}}: {error!r} in {__file__}, line {line}." in text
    assert "run without being judged" in text


@pytest.mark.parametrize(
    ("first", "second", "n_calls"),
    [
        ({"a": 1, "b": "x"}, {"b": "x", "a": 1}, 1),
        ({"a": 1}, {"a": True}, 2),
        ({"a": [1, 2]}, {"a": [1, 2]}, 1),
        ({"a": [1, 2]}, {"a": [2, 1]}, 2),
        ({"a": None}, {}, 2),
    ],
)
def test_equal_points_are_computed_once(
    first: dict[str, Any], second: dict[str, Any], n_calls: int
) -> None:
    calls: list[Any] = []
    function = AskedOnce(lambda params: calls.append(params) or Usage(memory=1))  # type: ignore[func-returns-value]
    assert function(first) == function(second) == Usage(memory=1)
    assert len(calls) == n_calls


def test_the_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_given, "_MOST_KNOWN", 5)
    function = AskedOnce(lambda params: Usage(memory=params["a"]))
    for a in range(1, 30):
        assert function({"a": a}) == Usage(memory=a)
        assert len(function._known) <= 5


def test_a_constant_costs_no_time() -> None:
    assert count_within(UserFootprint(Usage(memory=1)), 0.0) == float("inf")


def test_a_failure_is_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([ConnectionError("away"), Usage(memory=1)])

    def function(params: Any) -> Usage:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    asked = AskedOnce(function)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            asked({"x": 1})
    monkeypatch.setattr(user_given, "_FAILURE_LASTS", 0.0)
    assert asked({"x": 1}) == asked({"x": 1}) == Usage(memory=1)
