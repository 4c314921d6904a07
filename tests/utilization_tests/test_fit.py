"""The likelihood of a floor plus a power law, and its maximum."""

from __future__ import annotations

import math

import numpy as np
import pytest

from optuna_quota._utilization.fit import derivatives, fit, maximize, robust_covariance, Sample


def sample_of(n: int = 40, cut: float = 0.3, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    x = np.column_stack([np.ones(n), rng.uniform(-2, 2, n), rng.uniform(-1, 1, n)])
    y = np.logaddexp(1.0, x @ [0.5, 1.5, 0.3]) + 0.1 * rng.standard_normal(n)
    limit = np.quantile(y, 1 - cut)
    return Sample(np.minimum(y, limit), x, y > limit)


@pytest.mark.parametrize("has_floor", [True, False])
@pytest.mark.parametrize("cut", [0.0, 0.4])
def test_derivatives_equal_finite_differences(has_floor: bool, cut: float) -> None:
    sample = sample_of(cut=cut)
    theta = np.array([0.8, 0.4, 1.2, 0.2, -1.0] if has_floor else [0.4, 1.2, 0.2, -1.0])
    exact = derivatives(theta, sample, has_floor, exact=True)
    for i in range(len(theta)):
        step = np.zeros(len(theta))
        step[i] = 1e-5
        above, below = (derivatives(theta + s, sample, has_floor) for s in (step, -step))
        by_difference = (above.loglike_obs - below.loglike_obs) / 2e-5
        curvature = -(above.score_obs - below.score_obs).sum(axis=0) / 2e-5
        assert exact.score_obs[:, i] == pytest.approx(by_difference, abs=1e-5)
        assert exact.information[i] == pytest.approx(curvature, rel=1e-4, abs=1e-3)


def test_without_floor_or_lower_bounds_it_is_least_squares_with_hc3() -> None:
    import statsmodels.api as sm

    sample = sample_of(cut=0.0)
    expected = sm.OLS(sample.y, sample.x).fit(cov_type="HC3")

    found = fit(sample, has_floor=False)

    assert found.beta == pytest.approx(expected.params)
    errors = np.sqrt(np.diag(robust_covariance(found, sample)))[:-1]
    assert errors == pytest.approx(expected.bse)


@pytest.mark.parametrize("seed", range(5))
def test_an_exact_power_law_is_found_and_converges(seed: int) -> None:
    x = sample_of(n=12, seed=seed).x
    exact = Sample(np.logaddexp(1.0, x @ [0.5, 1.5, 0.3]), x, np.zeros(len(x), dtype=bool))

    found = fit(exact, has_floor=True)

    assert found.beta == pytest.approx([0.5, 1.5, 0.3], abs=1e-4)
    assert found.converged


def test_the_gradient_is_zero_at_the_maximum() -> None:
    sample = sample_of(cut=0.0)

    found = fit(sample, has_floor=True)

    assert found.converged and found.epsilon == 1.0
    assert derivatives(found.theta, sample, True).score_obs.sum(axis=0) == pytest.approx(
        0, abs=1e-2
    )
    again = maximize(found.theta, sample, has_floor=True)
    assert again.loglike == pytest.approx(found.loglike)


def test_rounding_at_the_maximum_does_not_hide_it() -> None:
    for seed in range(20):
        found = fit(sample_of(cut=0.0, seed=seed), has_floor=True)
        again = maximize(found.theta, sample_of(cut=0.0, seed=seed), has_floor=True)
        assert found.converged and again.converged, seed


def test_a_law_hidden_by_lower_bounds_stays_finite() -> None:
    rng = np.random.default_rng(2)
    rows = rng.uniform(math.log(100), math.log(10_000), 60)
    y = np.log(3e8 + 1e-2 * np.exp(2 * rows)) + 0.1 * rng.standard_normal(60)
    limit = float(np.quantile(y, 0.5))
    x = np.column_stack([np.ones(60), rows - rows.mean()])
    sample = Sample(np.minimum(y, limit), x, y > limit)

    found = fit(sample, has_floor=True)

    assert np.abs(found.beta[1:]).max() < 10
    assert np.isfinite(robust_covariance(found, sample)).all()


def test_scatter_of_the_law_alone_is_detected() -> None:
    rng = np.random.default_rng(3)
    rows = rng.uniform(math.log(100), math.log(10_000), 100)
    law = np.exp(2 * rows + 0.3 * rng.standard_normal(100))
    x = np.column_stack([np.ones(100), rows - rows.mean()])
    sample = Sample(np.log(3e8 + 10 * law), x, np.zeros(100, dtype=bool))

    found = fit(sample, has_floor=True)

    assert found.epsilon < 0.2
    error = math.sqrt(robust_covariance(found, sample)[2, 2])
    assert abs(found.beta[1] - 2.0) < 2.5 * error and error < 0.15
    assert 0.15 < found.sigma < 0.4
