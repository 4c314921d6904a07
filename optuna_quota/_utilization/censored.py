"""The fitted models as statsmodels results, for those who know them.

Without lower bounds the results are those of the Gauss-Newton regression (Davidson and MacKinnon,
Estimation and Inference in Econometrics, ch. 6): least squares of ``J θ̂ + residual`` on the
Jacobian ``J``, weighted by the scatter, returns θ̂ itself, and with it HC3 errors (MacKinnon and
White, Journal of Econometrics 29, 1985), leverage and influence. With lower bounds they are those
of maximum likelihood with a sandwich of the same kind, see
:func:`~optuna_quota._utilization.fit.robust_covariance`.
"""

from __future__ import annotations

from typing import Any
from typing import TYPE_CHECKING

import numpy as np
import statsmodels.api as sm
from statsmodels.base.model import GenericLikelihoodModel
from statsmodels.base.model import GenericLikelihoodModelResults
from statsmodels.base.model import LikelihoodModelResults

from optuna_quota._utilization.fit import Fit
from optuna_quota._utilization.fit import robust_covariance
from optuna_quota._utilization.fit import Sample
from optuna_quota._utilization.fit import slopes


if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


class CensoredPowerLaw(GenericLikelihoodModel):  # type: ignore[misc]  # statsmodels is untyped
    """A floor plus a power law with lower bounds among the observations.

    Args:
        sample: The observations.
        has_floor: Whether the first parameter is the log of a floor.
        names: Names of the parameters, ``log(sigma)`` the last.
    """

    def __init__(self, sample: Sample, has_floor: bool, names: list[str]) -> None:
        self.sample = sample
        self.has_floor = has_floor
        extra = names[: int(has_floor)] + names[-1:]
        super().__init__(sample.y, sample.x, extra_params_names=extra)
        self.data.xnames = names
        self.k_constant = 0
        self.k_extra = 0
        self.df_model = len(names)
        self.df_resid = len(sample.y) - len(names)

    def loglikeobs(self, params: Array) -> Array:
        """Return the log-likelihood of each observation, shape ``(n,)``."""
        return slopes(np.asarray(params), self.sample, self.has_floor).loglike_obs

    def loglike(self, params: Array) -> float:
        """Return the log-likelihood."""
        return float(self.loglikeobs(params).sum())

    def score_obs(self, params: Array, **_: Any) -> Array:
        """Return the slope of each observation's log-likelihood, shape ``(n, p)``."""
        return slopes(np.asarray(params), self.sample, self.has_floor).score_obs

    def score(self, params: Array) -> Array:
        """Return the slope of the log-likelihood, shape ``(p,)``."""
        total: Array = self.score_obs(params).sum(axis=0)
        return total

    def hessian(self, params: Array) -> Array:
        """Return the curvature of the log-likelihood, shape ``(p, p)``."""
        theta = np.asarray(params)
        curvature: Array = -slopes(theta, self.sample, self.has_floor, exact=True).information
        return curvature


def results_of(fit: Fit, sample: Sample, terms: list[str]) -> Any:
    """Return a fit as statsmodels results with robust errors.

    Args:
        fit: The fit.
        sample: What it was fitted to.
        terms: Names of the columns of ``sample.x``.
    """
    names = [*(["log(floor)"] if fit.has_floor else []), *terms]
    sample = sample.under(fit)
    if sample.censored.any():
        return _by_likelihood(fit, sample, [*names, "log(sigma)"])
    return _by_regression(fit, sample, names)


def _by_regression(fit: Fit, sample: Sample, names: list[str]) -> Any:
    import pandas as pd

    at_top = slopes(fit.theta, sample, fit.has_floor)
    response = at_top.jacobian @ fit.theta[:-1] + (sample.y - at_top.mean)
    model = sm.WLS(
        pd.Series(response, name="log(usage)"),
        pd.DataFrame(at_top.jacobian, columns=names),
        weights=1 / fit.scale(at_top.jacobian) ** 2,
        hasconst=True,
    )
    return model.fit(cov_type="HC3", use_t=True)


def _by_likelihood(fit: Fit, sample: Sample, names: list[str]) -> Any:
    model = CensoredPowerLaw(sample, fit.has_floor, names)
    covariance = robust_covariance(fit, sample)
    mle = LikelihoodModelResults(model, fit.theta, normalized_cov_params=covariance, scale=1.0)
    mle.mle_retvals = {"converged": fit.converged}
    mle.mle_settings = {"optimizer": "damped Newton"}
    results = GenericLikelihoodModelResults(model, mle)
    results.use_t = True
    results.df_resid_inference = model.df_resid
    results.cov_type = "HC3"
    results.cov_kwds = {"description": "Sandwich of scores over one minus leverage, as HC3"}
    return results
