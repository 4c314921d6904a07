"""Maximum likelihood for a floor plus a power law, with lower bounds among the observations.

The model of a usage ``u`` with features ``x``, shape ``(n_trials, n_terms)``, is

    ``log u = m + σ · g · e``,  ``m = log(exp(γ) + exp(x·β))``,  ``e`` standard normal

or ``m = x·β`` without a floor. A floor often repeats to a thousandth while the law above it
scatters: ``g² = ε² + (1 - ε²) · s²`` with the law's share ``s = exp(x·β - m)`` of the usage lets
the scatter go with the law (ε near 0) or with the whole (ε = 1). ``g`` is held while θ is fitted
and renewed until both converge, as in iteratively reweighted least squares.

A trial that its limit ended contributes the probability of being above its usage: on the log scale
this is Tobit's model (Econometrica 26, 1958) for memory and the log-normal accelerated failure
time model for time. The likelihood is maximized by Newton's method with Gauss and Newton's
approximation of the curvature of ``m``, damped after Levenberg and Marquardt. scipy's trust-region
method (or statsmodels' ``fit``, which calls it) finds the same maxima at twice the time, and takes
as many lines, because of the bound on σ.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from dataclasses import dataclass, replace
import math
import warnings

import numpy as np
from numpy.typing import NDArray

from optuna_quota._footprint.numerics import orthonormal, product, solve


Array = NDArray[np.float64]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_MAX_STEPS = 100
# If a law fits exactly, σ would go to 0 and the likelihood to infinity.
_MIN_LOG_SIGMA = math.log(1e-6)
# Floors to start from, as shares of the least usage: the likelihood may have two maxima.
_FLOOR_STARTS = (0.2, 0.7, 0.95, 0.995)
_START_STEPS = 25
_START_ROWS = 1000
# Below a tenth, the smallest trials, which follow a power law least, would decide the exponents.
_EPSILONS = (0.3, 0.1)
_MAX_ROUNDS = 8
_PRIOR_SPREAD = 4.0
_MAX_LEVERAGE = 0.95


@dataclass(frozen=True)
class Sample:
    """The observations that a model is fitted to."""

    y: Array  # log of the usage, shape (n,)
    x: Array  # features with a leading column of ones, shape (n, k)
    censored: NDArray[np.bool_]  # where y is only a lower bound
    scale: Array | None = None  # g, shape (n,); None where it is 1

    def thinned(self, most: int) -> Sample:
        step = -(-len(self.y) // most)
        return Sample(self.y[::step], self.x[::step], self.censored[::step])

    def with_scale(self, fit: Fit) -> Sample:
        _, jacobian = mean_and_jacobian(fit.theta, self.x, fit.has_floor)
        return replace(self, scale=fit.scale(jacobian))


@dataclass(frozen=True)
class Fit:
    """A maximum of the likelihood."""

    beta: Array  # shape (k,)
    gamma: float  # log of the floor; minus infinity without one
    log_sigma: float
    loglike: float
    converged: bool
    epsilon: float = 1.0  # scatter of the floor as a share of the law's

    def scale(self, jacobian: Array) -> Array:
        """Return ``g``, shape ``(n,)``, from ∂m/∂(γ, β) at the same observations."""
        if self.epsilon == 1.0 or not self.has_floor:
            return np.ones(len(jacobian))
        share = 1 - jacobian[:, 0]
        return np.asarray(np.sqrt(self.epsilon**2 + (1 - self.epsilon**2) * share**2))

    @property
    def theta(self) -> Array:
        """γ where there is a floor, β, then log σ: shape ``(k + 1,)`` or ``(k + 2,)``."""
        head = [self.gamma] if self.has_floor else []
        return np.array([*head, *self.beta, self.log_sigma])

    @property
    def has_floor(self) -> bool:
        return math.isfinite(self.gamma)

    @property
    def sigma(self) -> float:
        """Standard deviation of the log of the usage around its mean."""
        return math.exp(self.log_sigma)


@dataclass(frozen=True)
class Derivatives:
    """Derivatives of the log-likelihood at one θ."""

    loglike_obs: Array  # shape (n,)
    score_obs: Array  # shape (n, p)
    information: Array  # minus the curvature, shape (p, p)
    mean: Array  # m, shape (n,)
    jacobian: Array  # ∂m/∂θ without log σ, shape (n, p - 1)
    weight: Array  # -∂²l/∂m², shape (n,)


@contextlib.contextmanager
def without_numeric_warnings() -> Iterator[None]:
    """Suppress warnings of statsmodels and numpy, which a user can't act on.

    The diagnostics report their causes, such as collinear terms.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def mean_and_jacobian(theta: Array, x: Array, has_floor: bool) -> tuple[Array, Array]:
    """Return ``m`` and ∂m/∂(γ, β); ``theta`` ends in log σ."""
    if not has_floor:
        return x @ theta[:-1], x
    eta = x @ theta[1:-1]
    mean = np.logaddexp(theta[0], eta)
    share = np.exp(eta - mean)
    return mean, np.column_stack([1 - share, share[:, None] * x])


def derivatives(
    theta: Array, sample: Sample, has_floor: bool, *, exact: bool = False
) -> Derivatives:
    """Return the log-likelihood and its derivatives.

    ``exact`` adds the curvature of ``m`` to the information.

    With ``z = (y - m) / σ``: an observed usage has ``l = -z²/2 - log σ - log(2π)/2``, a lower
    bound ``l = log Φ(-z)``, whose slope is the inverse Mills ratio ``λ = φ(z) / Φ(-z)``.
    """
    from scipy.special import log_ndtr

    scale_obs = np.ones(len(sample.y)) if sample.scale is None else sample.scale
    sigma = math.exp(theta[-1]) * scale_obs
    mean, jacobian = mean_and_jacobian(theta, sample.x, has_floor)
    z = (sample.y - mean) / sigma
    cut = sample.censored
    log_upper = log_ndtr(-z)
    mills = np.exp(np.minimum(-0.5 * z**2 - _HALF_LOG_2PI - log_upper, 700.0))
    bend = mills * (mills - z)
    loglike = np.where(cut, log_upper, -0.5 * z**2 - np.log(sigma) - _HALF_LOG_2PI)
    by_mean = np.where(cut, mills, z) / sigma
    by_scale = np.where(cut, mills * z, z**2 - 1)
    weight = np.where(cut, bend, 1.0) / sigma**2
    cross = np.where(cut, bend * z + mills, 2 * z) / sigma
    scale = np.where(cut, z * (mills + bend * z), 2 * z**2)
    block = product(jacobian.T * weight, jacobian)
    if exact and has_floor:
        # ∂²m/∂θ² = w (1 - w) v v' with v = (1, -x) and w the floor's share of the usage.
        floor_share = jacobian[:, 0]
        bent = np.column_stack([np.ones(len(z)), -sample.x])
        block = block - product(bent.T * (by_mean * floor_share * (1 - floor_share)), bent)
    information = np.empty((len(theta), len(theta)))
    information[:-1, :-1] = block
    information[:-1, -1] = information[-1, :-1] = cross @ jacobian
    information[-1, -1] = scale.sum()
    score = np.column_stack([by_mean[:, None] * jacobian, by_scale])
    return Derivatives(loglike, score, information, mean, jacobian, weight)


def derivatives_at(fit: Fit, sample: Sample) -> Derivatives:
    """Return the log-likelihood of a fit, with its scatter, and its derivatives."""
    return derivatives(fit.theta, sample.with_scale(fit), fit.has_floor)


def fit(sample: Sample, *, has_floor: bool) -> Fit:
    """Return the highest maximum of the likelihood that is found."""
    if not has_floor:
        return maximize(_start(sample, -math.inf), sample, has_floor=False)
    some = sample.thinned(_START_ROWS)
    seen = sample.y[~sample.censored] if not sample.censored.all() else sample.y
    starts = [_start(some, float(seen.min()) + math.log(share)) for share in _FLOOR_STARTS]
    maxima = [maximize(s, some, has_floor=True, steps=_START_STEPS) for s in starts]
    best = max(maxima, key=lambda each: each.loglike)
    # A thousand trials show how the scatter is shared as well as all.
    uneven = max((_reweighted(best, some, e) for e in _EPSILONS), key=lambda each: each.loglike)
    needed = 0.5 * math.log(max(2, len(some.y))) + math.log(len(_EPSILONS))  # extended BIC
    if uneven.loglike - best.loglike > needed:
        return _reweighted(uneven, sample, uneven.epsilon)
    return maximize(best.theta, sample, has_floor=True)


def fit_with_largest_floor(sample: Sample, plain: Fit) -> Fit | None:
    """Return the fit with the largest floor that the observations do not exclude, if there is one.

    That is one whose profile likelihood is within the 95% confidence region around the fit without
    a floor: a loss of at most ``n/2 · log(1 + t²/df)`` (Venzon and Moolgavkar, Applied Statistics
    37, 1988, with Student's t as the spread is estimated).
    """
    from scipy.special import stdtrit

    seen = sample.y[~sample.censored]
    df = max(1, len(seen) - len(plain.theta))
    loss = 0.5 * len(seen) * math.log1p(float(stdtrit(df, 0.975)) ** 2 / df)
    for share in reversed(_FLOOR_STARTS):
        start = _start(sample, float(seen.min()) + math.log(share))
        found = maximize(start, sample, has_floor=True, floor_held=True)
        if found.loglike > plain.loglike - loss:
            return found
    return None


def _reweighted(start: Fit, sample: Sample, epsilon: float) -> Fit:
    """Return the fit at which ``g`` and θ agree, loosely, as ε is a rough figure."""
    found = replace(start, epsilon=epsilon)
    for _ in range(_MAX_ROUNDS):
        last = found
        found = maximize(last.theta, sample.with_scale(last), has_floor=True)
        found = replace(found, epsilon=epsilon)
        if np.abs(found.theta - last.theta).max() < 1e-4:
            break
    return found


def leverage(at_fit: Derivatives) -> Array:
    """Return the share of each observation in its own mean, shape ``(n,)``."""
    weighted = at_fit.jacobian * np.sqrt(np.maximum(at_fit.weight, 0.0))[:, None]
    return np.asarray(np.minimum((orthonormal(weighted) ** 2).sum(axis=1), 1.0))


def robust_covariance(fit: Fit, sample: Sample) -> Array:
    """Return the covariance of θ by a sandwich like HC3's, shape ``(p, p)``.

    ``A⁻¹ Σ sᵢ sᵢ' / (1 − hᵢ)² A⁻¹`` with the scores ``s``, the information ``A`` and the leverage
    ``h``; for least squares that is HC3 itself (MacKinnon and White, Journal of Econometrics 29,
    1985). With lower bounds, no variance is below that of the likelihood: the scores of few bounds
    say little about the spread.
    """
    sample = sample.with_scale(fit)
    prior = np.diag(_prior_precision(sample, fit.has_floor))
    at_fit = derivatives(fit.theta, sample, fit.has_floor, exact=True)
    if not sample.censored.any() or np.linalg.eigvalsh(at_fit.information + prior)[0] <= 0:
        at_fit = derivatives(fit.theta, sample, fit.has_floor)
    # A lower bound says little of the spread: the trials observed to their end count.
    n, p = int((~sample.censored).sum()), at_fit.score_obs.shape[1]
    bread = np.linalg.pinv(at_fit.information + prior)
    scores = at_fit.score_obs / (1 - np.minimum(leverage(at_fit), _MAX_LEVERAGE))[:, None]
    # As a sum of squares, so that rounding makes no variance negative.
    half = np.vstack([scores, np.sqrt(prior)]) @ bread
    robust: Array = product(half.T, half)
    if not sample.censored.any():
        return robust
    by_likelihood = np.abs(np.diag(bread)) * n / max(n - p, 1)
    grow = np.sqrt(np.maximum(1.0, by_likelihood / np.maximum(np.diag(robust), 1e-300)))
    return robust * np.outer(grow, grow)


def intervals(fit: Fit, sample: Sample, level: float = 0.95) -> Array:
    """Return estimate, lower, upper and p-value of θ without log σ, shape ``(p - 1, 4)``."""
    from scipy.special import stdtr, stdtrit

    theta, censored = fit.theta[:-1], sample.censored
    # Without lower bounds σ does not depend on the others.
    df = max(1, int((~censored).sum()) - len(theta) - int(censored.any()))
    errors = np.sqrt(np.diag(robust_covariance(fit, sample))[:-1])
    half = float(stdtrit(df, (1 + level) / 2)) * errors
    p_values = 2 * stdtr(df, -np.abs(theta) / np.maximum(errors, 1e-300))
    return np.column_stack([theta, theta - half, theta + half, p_values])


def maximize(
    theta: Array,
    sample: Sample,
    *,
    has_floor: bool,
    steps: int = _MAX_STEPS,
    floor_held: bool = False,
) -> Fit:
    """Return the maximum of the likelihood, with the prior, that is reached from ``theta``."""
    prior = _prior_precision(sample, has_floor)
    damping, here = 1e-3, derivatives(theta, sample, has_floor)
    height, converged = _height(theta, here, prior), False
    for _ in range(steps):
        further = theta + _step(theta, here, prior, damping, floor_held)
        further[-1] = max(further[-1], _MIN_LOG_SIGMA)
        with np.errstate(all="ignore"):  # a step too far is taken back below
            there = derivatives(further, sample, has_floor)
            gain = _height(further, there, prior) - height
        # At the top, rounding may make a gain negative.
        converged = abs(gain) < 1e-9 * (1 + abs(height)) and damping < 1
        if converged:
            break
        if not math.isfinite(gain) or gain < 0:
            damping *= 8
            if damping > 1e10:
                break
            continue
        theta, here, height, damping = further, there, height + gain, damping / 8
    # There it is rounding alone that moves the likelihood.
    converged |= theta[-1] <= _MIN_LOG_SIGMA
    gamma, beta = (float(theta[0]), theta[1:-1]) if has_floor else (-math.inf, theta[:-1])
    return Fit(beta, gamma, float(theta[-1]), float(here.loglike_obs.sum()), converged)


def _prior_precision(sample: Sample, has_floor: bool) -> Array:
    """Return one over the prior variance of each of θ; 0 where there is no prior.

    If lower bounds hide everything above the floor, the likelihood grows with the exponents
    without limit. A normal prior then keeps the effect of one standard deviation of a feature on
    the log of the law within 0 ± 4 (a factor of 50 either way); it does not move what the data
    determine.
    """
    precision = np.zeros(sample.x.shape[1] + 1 + has_floor)
    if has_floor and sample.censored.any():
        precision[2:-1] = (sample.x[:, 1:].std(axis=0) / _PRIOR_SPREAD) ** 2
    return precision


def _height(theta: Array, here: Derivatives, prior: Array) -> float:
    return float(here.loglike_obs.sum() - 0.5 * (prior * theta**2).sum())


def _step(theta: Array, here: Derivatives, prior: Array, damping: float, held: bool) -> Array:
    gradient = here.score_obs.sum(axis=0) - prior * theta
    curvature = here.information + np.diag(prior)
    if held:
        gradient[0], curvature[0, 1:], curvature[1:, 0] = 0.0, 0.0, 0.0
    # Far from a maximum the curvature along log σ can have the wrong sign.
    scale = np.abs(np.diag(curvature)) + 1e-12
    damped = curvature + damping * np.diag(scale)
    step = gradient / (scale * (1 + damping))
    with contextlib.suppress(np.linalg.LinAlgError):
        solved = solve(damped, gradient[:, None])[:, 0]
        step = step if solved @ gradient < 0 else solved
    # Beyond a few e-folds the approximation does not hold.
    return np.asarray(step / max(1.0, float(np.abs(step).max()) / 5.0))


def _start(sample: Sample, gamma: float) -> Array:
    """Return θ by least squares of ``log(u - floor)``, with lower bounds taken as values."""
    above = sample.y
    if math.isfinite(gamma):
        above = sample.y + np.log(np.maximum(-np.expm1(gamma - sample.y), 1e-3))
    gram = product(sample.x.T, sample.x)
    beta = np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ (sample.x.T @ above)
    theta = np.array([gamma, *beta, 0.0]) if math.isfinite(gamma) else np.array([*beta, 0.0])
    mean, _ = mean_and_jacobian(theta, sample.x, math.isfinite(gamma))
    spread = float(np.sqrt(np.mean((sample.y - mean) ** 2)))
    theta[-1] = math.log(max(spread, 1e-6))
    return theta
