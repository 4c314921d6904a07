"""The search for hyperparameters."""

from __future__ import annotations

import numpy as np
import pytest

from optuna_quota._footprint.gaussian_process import (
    _LOG_BOUND,
    _Objective,
    fit_hyperparameters,
    prior_mean,
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
