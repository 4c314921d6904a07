from __future__ import annotations

import numpy as np
import pytest

from optuna_quota._models.descent import minimize
from optuna_quota._models.gaussian_process import _Objective
from optuna_quota._models.gaussian_process import Hyperparameters


def least(function, start, *, bound=9.0, curvature=None, max_iterations=100):  # type: ignore[no-untyped-def]
    begin = np.asarray(start, dtype=float)
    return minimize(
        function,
        begin,
        curvature=np.ones(len(begin)) if curvature is None else curvature,
        bound=bound,
        max_iterations=max_iterations,
        ftol=1e-12,
        gtol=1e-8,
    )


def bowl(point: np.ndarray) -> tuple[float, np.ndarray]:
    weights, centre = np.array([1.0, 30.0, 0.1]), np.array([1.0, -2.0, 3.0])
    away = point - centre
    return float(0.5 * away @ (weights * away)), weights * away


def rosenbrock(point: np.ndarray) -> tuple[float, np.ndarray]:
    x, y = point
    value = (1 - x) ** 2 + 100 * (y - x * x) ** 2
    return float(value), np.array([-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)])


def test_it_finds_the_bottom_of_a_bowl() -> None:
    assert least(bowl, [0, 0, 0]) == pytest.approx([1.0, -2.0, 3.0], abs=1e-5)


def test_it_follows_a_curved_valley() -> None:
    assert least(rosenbrock, [-1.2, 1.0]) == pytest.approx([1.0, 1.0], abs=1e-4)


def test_a_variable_stays_inside_of_the_box_and_the_others_go_on() -> None:
    assert least(bowl, [0, 0, 0], bound=1.5) == pytest.approx([1.0, -1.5, 1.5], abs=1e-5)


def test_a_start_outside_is_moved_inside() -> None:
    assert least(bowl, [50, -50, 50], bound=4.0) == pytest.approx([1.0, -2.0, 3.0], abs=1e-5)


def test_values_that_are_not_finite_are_stepped_back_from() -> None:
    def walled(point: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = bowl(point)
        return (np.inf, gradient) if point[0] > 2 else (value, gradient)

    far = least(walled, [0, 0, 0], curvature=np.full(3, 1e-2))
    assert far == pytest.approx([1.0, -2.0, 3.0], abs=1e-4)


def test_a_flat_function_ends_where_it_began() -> None:
    found = least(lambda point: (1.0, np.zeros(2)), [0.5, -0.5])
    assert found.tolist() == [0.5, -0.5]


def test_no_more_steps_than_asked_for() -> None:
    calls = []

    def counted(point: np.ndarray) -> tuple[float, np.ndarray]:
        calls.append(point)
        return rosenbrock(point)

    least(counted, [-1.2, 1.0], max_iterations=3)
    assert len(calls) <= 1 + 3 * 12


@pytest.mark.parametrize("seed", range(8))
def test_hyperparameters_as_likely_as_those_of_scipy(seed: int) -> None:
    from scipy.optimize import minimize as reference

    generator = np.random.default_rng(seed)
    n, d = int(generator.integers(8, 40)), int(generator.integers(1, 5))
    columns = generator.uniform(-1, 1, (n, d))
    target = columns.sum(axis=1) + 0.3 * generator.standard_normal(n)
    objective = _Objective(columns, (target - target.mean()) / target.std(), None, None)
    start = Hyperparameters.prior(d).values
    ours = minimize(
        objective,
        start,
        curvature=objective.curvature(),
        bound=9.0,
        max_iterations=200,
        ftol=1e-9,
        gtol=1e-5,
    )
    theirs = reference(
        objective, start, jac=True, method="L-BFGS-B", bounds=[(-9, 9)] * len(start)
    )
    assert objective(ours)[0] <= theirs.fun + 1e-3
