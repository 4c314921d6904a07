"""The level of a machine's speed, and wall time on a machine that became slower."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from optuna.distributions import FloatDistribution, IntDistribution
import pytest

from optuna_quota import Footprint, Limits, project, Quota, Strategy, Usage
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.predictive import Predictive
from optuna_quota._footprint.resource_model import fit_resource, ResourceData
from optuna_quota._projection.projection import ProjectedResource
from tests.footprint_tests.test_footprint import draw_rows, truth


def test_noise_is_no_drift_and_a_step_is() -> None:
    generator = np.random.default_rng(0)
    columns = generator.uniform(-1, 1, (40, 2))
    quiet = np.exp(columns.sum(axis=1) + 0.1 * generator.standard_normal(40))
    slower = quiet * np.repeat([1.0, 2.0], 20)
    zero = np.zeros((1, 2))

    def expected(amounts: np.ndarray, drifts: bool = True) -> Predictive:
        data = ResourceData.exact(columns, amounts, floors=(0.0,), drifts=drifts)
        return fit_resource(data).predict(zero)

    steady, fixed = expected(quiet), expected(quiet, drifts=False)
    assert steady.quantile(0.5)[0] == pytest.approx(1.0, rel=0.1)
    assert steady.spread[0] == pytest.approx(fixed.spread[0], rel=0.2)
    assert expected(slower).quantile(0.5)[0] == pytest.approx(2.0, rel=0.1)
    assert expected(slower, drifts=False).quantile(0.5)[0] < 1.7


def test_a_slower_machine_is_forgotten_over_the_trials_ahead() -> None:
    generator = np.random.default_rng(0)
    space = {"x": FloatDistribution(1, 10, log=True)}
    xs = np.exp(generator.uniform(0, np.log(10), 60))
    seconds = xs * np.exp(0.1 * generator.standard_normal(60)) * np.repeat([1.0, 2.0], [50, 10])
    rows = [
        Observation({"x": float(x)}, space, Usage(cpu_time=float(each)))
        for x, each in zip(xs, seconds, strict=True)
    ]
    footprint = Footprint.fit(rows)
    assert footprint.intervals({"x": 3.0})["cpu_time"].median > 1.6 * 3.0

    def over_steady(n_trials: int) -> ProjectedResource:
        strategy = Strategy(n_trials=n_trials, search_space=space)
        found = project(strategy, footprint, quota=Quota(cpu_time="9h"))
        (row,) = (each for each in found.resources if each.resource == "cpu_time")
        mean = n_trials * 9 / np.log(10)
        return replace(row, lower=row.lower / mean, median=row.median / mean)

    assert over_steady(5).median > 1.5
    assert over_steady(200).median < 1.4
    assert over_steady(200).lower < 1.0


def test_wall_time_follows_a_machine_that_became_slower_and_cpu_time_does_not() -> None:
    rows = [
        replace(
            row,
            usage=Usage(
                cpu_time=row.usage.wall_time,
                wall_time=(row.usage.wall_time or 0.0) * (3.0 if i >= 20 else 1.0),
            ),
        )
        for i, row in enumerate(draw_rows(40, noise=0.05))
    ]
    footprint = Footprint.fit(rows)
    points = [row.params for row in draw_rows(50, seed=1)]
    expected = footprint.expected(points)
    ratios = expected["wall_time"].quantile(0.5) / expected["cpu_time"].quantile(0.5)

    # The mean over the trials is 1.7.
    assert np.median(ratios) == pytest.approx(3.0, rel=0.25)
    drawn = footprint.draw(points, 400, 0)
    assert np.median(drawn["wall_time"] / drawn["cpu_time"]) == pytest.approx(3.0, rel=0.3)


@pytest.mark.parametrize("limits", [None, Limits(cpu_time=2.0)], ids=["completed", "stopped"])
def test_cpu_time_follows_a_processor_that_became_slower(limits: Limits | None) -> None:
    points = [row.params for row in draw_rows(100, seed=1)]
    rows = []
    for i, row in enumerate(draw_rows(60, noise=0.05)):
        seconds = (row.usage.wall_time or 0.0) * (2.0 if i >= 40 else 1.0)
        over = limits is not None and seconds > 2.0
        rows.append(
            replace(
                row,
                usage=Usage(cpu_time=2.0 if over else seconds),
                censored=frozenset({"cpu_time"} if over else ()),
            )
        )
    now = np.array([2.0 * (truth(dict(point)).wall_time or 0.0) for point in points])
    expected = Footprint.fit(rows).expected(points)["cpu_time"]

    near = (now > 0.5) & (now < 4.0)
    assert np.median(expected.quantile(0.5)[near] / now[near]) == pytest.approx(1.0, rel=0.2)


def test_trials_that_are_all_stopped_show_a_slower_processor_too() -> None:
    limit = 0.7
    rows = draw_rows(40, noise=0.05)
    later = draw_rows(200, seed=2, noise=0.05)
    stopped = [
        replace(row, usage=Usage(cpu_time=limit), censored=frozenset({"cpu_time"}))
        for row in later
        if 2.0 * (row.usage.wall_time or 0.0) > limit
    ][:20]
    before = [
        replace(
            row,
            usage=Usage(cpu_time=min(limit, row.usage.wall_time or 0.0)),
            censored=frozenset({"cpu_time"} if (row.usage.wall_time or 0.0) > limit else ()),
        )
        for row in rows
    ]
    points = [row.params for row in draw_rows(100, seed=1)]
    now = np.array([2.0 * (truth(dict(point)).wall_time or 0.0) for point in points])
    near = (now > limit / 4) & (now < 2 * limit)
    expected = Footprint.fit([*before, *stopped]).expected(points)["cpu_time"].quantile(0.5)

    # Lower bounds show a part of it; without them it would be 0.5.
    assert np.median(expected[near] / now[near]) > 0.6


def test_larger_sizes_are_expected_to_take_longer_until_trials_say_otherwise() -> None:
    space = {name: IntDistribution(1, 1000, log=True) for name in "abc"}

    def found(n_trials: int, power: float) -> float:
        generator = np.random.default_rng(2)
        sizes = np.exp(generator.uniform(0, np.log(1000), (n_trials, 3))).round()
        seconds = np.prod(sizes, axis=1) ** power * np.exp(0.1 * generator.normal(size=n_trials))
        rows = [
            Observation(dict(zip("abc", map(int, each), strict=True)), space, Usage(cpu_time=t))
            for each, t in zip(sizes, seconds.tolist(), strict=True)
        ]
        small, large = (dict.fromkeys("abc", each) for each in (1, 1000))
        expected = Footprint.fit(rows).expected([small, large])["cpu_time"].quantile(0.5)
        return float(np.log(expected[1] / expected[0]) / np.log(1000**3))

    assert found(1, 0.3) > 0.02
    assert found(3, 0.3) > 0.05 - found(3, -0.3)
    for power in (0.3, -0.3):
        assert found(40, power) == pytest.approx(power, rel=0.1)


def test_draws_and_residuals_include_the_expected_slopes() -> None:
    generator = np.random.default_rng(0)
    columns = generator.uniform(-1, 1, (20, 2))
    amounts = 1 + np.exp(columns @ [1.0, 0.3] + 0.1 * generator.standard_normal(20))
    slopes = np.array([0.8, 0.3])
    model = fit_resource(ResourceData.exact(columns, amounts, floors=(0.9,), slopes=slopes))
    others = generator.uniform(-1, 1, (5, 2))
    drawn = np.median(model.draw(others, 4000, generator), axis=0)
    assert drawn == pytest.approx(model.predict(others).quantile(0.5), rel=0.03)
    # Residuals of the logarithm above the floor, of which the amount's moves by a share.
    above = model.scale * model.process.leave_one_out()[0]
    shares = (amounts - model.floor) / amounts
    assert model.log_leave_one_out()[0] == pytest.approx(above * shares)
