"""The search for hyperparameters, and expectation propagation of lower bounds."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy.special import log_ndtr

from optuna_quota._footprint.gaussian_process import (
    _LOG_BOUND,
    _Objective,
    fit_hyperparameters,
    GaussianProcess,
    initial_sites,
    prior_mean,
    propagate,
)


@pytest.mark.parametrize("seed", range(8))
def test_hyperparameters_are_as_likely_as_those_of_l_bfgs_b(seed: int) -> None:
    from scipy.optimize import minimize

    generator = np.random.default_rng(seed)
    n, d = int(generator.integers(8, 40)), int(generator.integers(1, 5))
    columns = generator.uniform(-1, 1, (n, d))
    target = columns.sum(axis=1) + 0.3 * generator.standard_normal(n)
    target = (target - target.mean()) / target.std()
    objective, start = _Objective(columns, target, None, None), prior_mean(d)
    found = fit_hyperparameters(columns, target)
    box = [(-_LOG_BOUND, _LOG_BOUND)] * len(start)
    other = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=box)
    assert objective(found)[0] <= other.fun + 0.02


def test_hyperparameters_stay_within_their_bounds() -> None:
    columns = np.linspace(-1, 1, 12)[:, None]
    outside = np.array([40.0, -40.0, 40.0, -40.0])
    found = fit_hyperparameters(columns, np.sin(3 * columns[:, 0]), start=outside)
    assert np.isfinite(found).all()
    assert (np.abs(found) <= _LOG_BOUND).all()


def test_gradient_with_a_drift_is_that_of_differences() -> None:
    generator = np.random.default_rng(0)
    columns = generator.uniform(-1, 1, (20, 2))
    target = columns.sum(axis=1) + np.repeat([-0.5, 0.5], 10)
    objective = _Objective(columns, target, None, None, drifts=True)
    values = prior_mean(2, drifts=True) + 0.1
    steps = 1e-5 * np.eye(len(values))
    differences = [objective(values + s)[0] - objective(values - s)[0] for s in steps]
    assert objective(values)[1] == pytest.approx(np.array(differences) / 2e-5, rel=1e-4, abs=1e-4)


def test_a_drift_predicts_the_next_trial_and_forgets_old_ones() -> None:
    columns, target = np.zeros((60, 1)), np.repeat([-1.0, 1.0], 30)
    exact, noisy = np.zeros(60), np.ones(60, dtype=bool)

    def predicted(parameters: np.ndarray) -> float:
        process = GaussianProcess(columns, target, parameters, exact, noisy)
        assert process.joint(columns[:1])[0] == pytest.approx(process.predict(columns[:1])[0])
        return float(process.predict(columns[:1])[0][0])

    parameters = prior_mean(1, drifts=True)
    parameters[-1] = 2.0
    assert predicted(parameters) == pytest.approx(1.0, abs=0.1)
    assert predicted(parameters[:-1]) == pytest.approx(0.0, abs=0.05)


def test_a_drift_is_in_the_variance_and_the_covariance() -> None:
    generator = np.random.default_rng(1)
    columns, points = generator.uniform(-1, 1, (12, 2)), generator.uniform(-1, 1, (3, 2))
    target = columns.sum(axis=1) + np.repeat([-0.5, 0.5], 6)
    parameters = prior_mean(2, drifts=True)
    process = GaussianProcess(columns, target, parameters, np.zeros(12), np.ones(12, dtype=bool))

    linear, matern, noise, _, _, drift = np.exp(parameters)
    length = np.exp(parameters[3])
    every = np.concatenate([columns, points]) / length
    r = np.sqrt(5) * np.linalg.norm(every[:, None] - every, axis=2)
    kernel = 4 + linear * length**2 / 3 * every @ every.T
    kernel += matern * (1 + r + r**2 / 3) * np.exp(-r)
    # The points are all those of the next trial.
    place = np.minimum(np.arange(15), 12)
    kernel += drift * noise * np.exp(-np.abs(place[:, None] - place) / 20)
    gain = np.linalg.solve(kernel[:12, :12] + noise * np.eye(12), kernel[:12, 12:]).T
    mean, covariance = process.joint(points)
    assert mean == pytest.approx(gain @ target, abs=1e-6)
    assert covariance == pytest.approx(kernel[12:, 12:] - gain @ kernel[:12, 12:], abs=1e-6)
    found = process.predict(points)
    assert found[0] == pytest.approx(mean, abs=1e-9)
    assert found[1] == pytest.approx(np.diag(covariance), abs=1e-9)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, 6.0])
@pytest.mark.parametrize("stopped_at", [-8.0, -0.5, 2.0, 6.0])
def test_moments_of_one_stopped_trial(stopped_at: float, rate: float) -> None:
    columns, target, stopped = np.zeros((1, 1)), np.array([stopped_at]), np.array([True])
    parameters = prior_mean(1)
    sites = initial_sites(target, stopped)

    sites = propagate(columns, target, stopped, np.array([rate]), parameters, sites, rounds=100)

    process = GaussianProcess(columns, sites.target, parameters, sites.extra, ~stopped)
    (mean,), (variance,) = process.posterior()
    prior = 4.0 + math.exp(parameters[1])
    noise = math.exp(parameters[2])
    f = np.linspace(-60.0, 40.0, 400_001)
    away = f - stopped_at
    logs = -0.5 * f**2 / prior - rate * away
    logs += log_ndtr(away / math.sqrt(noise) - rate * math.sqrt(noise))
    density = np.exp(logs - logs.max())
    density /= density.sum()
    expected = float(density @ f)
    assert mean == pytest.approx(expected, abs=0.02)
    assert variance == pytest.approx(float(density @ (f - expected) ** 2), rel=0.02, abs=0.002)


def test_hundreds_of_columns_take_little_longer_than_some() -> None:
    rng = np.random.default_rng(0)

    def seconds(n_columns: int) -> float:
        columns = rng.uniform(-1, 1, (30, n_columns))
        target = columns[:, 0] + 0.1 * rng.standard_normal(30)
        began = time.process_time()
        found = fit_hyperparameters(columns, target / target.std())
        took = time.process_time() - began
        # The first column's length is the shortest.
        assert found[3 : 3 + n_columns].argmin() == 0
        return took

    # 4 times as long; 100 times by BFGS.
    assert min(seconds(400) for _ in range(3)) < 30 * min(seconds(60) for _ in range(3))
