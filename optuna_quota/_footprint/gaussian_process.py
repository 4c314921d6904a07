"""A small Gaussian process with analytic gradients.

Kernel on columns scaled to [-1, 1] and a standardised target (Rasmussen and Williams, Gaussian
Processes for Machine Learning, 2006, sections 2.2, 2.7, 4.2 and 5.4):

    k(x, x') = 4 + a·(x/l)·(x'/l)·m²/3 + b·Matérn5/2(x, x'; l) + (noise + extra)·[x is x']
               + c·noise·exp(-|t - t'| / 20)

The linear term models power laws of sizes, which are linear after the logarithm; the Matérn term
models deviations from them. Both share the lengths l of the columns (m is their prior mean): a
column that hardly matters affects neither, and few trials show which columns those are. ``extra``
is an additional variance of each point, used for censored ones. The last term is the level of a
machine whose speed drifts, an Ornstein-Uhlenbeck process over the positions t of the trials in
their order; predictions are for the next trial. It is fitted together with the rest, so that drift
and effects of the columns are separated.

Hyperparameters are an array of logarithms: linear variance, Matérn variance, noise variance, the
length of each column, and where the machine drifts c, shape ``(3 + n_columns,)`` or one more.

A trial that was stopped at z used more than z. Its likelihood under a Gaussian observation is
Φ((f - z) / σ). One that something else stopped at a share s of its run used z = f + e + log s:
-log s is taken as exponential, of rate 1 where s is uniform and more where trials end late, and
the likelihood is that of a stochastic frontier (Meeusen and van den Broeck, International Economic
Review 18, 1977),

    r · exp(-r (f - z) + r² σ² / 2) · Φ((f - z) / σ - r σ)

with r the rate times the scale of the logarithm, as z is standardised, and r = 0 for a plain
bound. Expectation propagation (Minka, 2001; Rasmussen and Williams, section 3.6) replaces it by a
Gaussian observation of f with its own mean and variance: a bound far below the prediction of the
other trials has almost no weight, one far above it has much.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
import math

import numpy as np

from optuna_quota._footprint.numerics import invert, product


_CONSTANT = 4.0
_JITTER = 1e-8
_SQRT5 = 5.0**0.5
_LOG_BOUND = 9.0
_PENALTY = 100.0
_MOST_BY_BFGS = 64  # hyperparameters
# Prior mean of the logarithm of the noise's variance, in units of the target's own.
NOISE = -2.5
# Prior of the Matérn term and of the lengths: means of their logarithms, and deviation of the
# latter. With 0.3, 0.7 and 0.65, fourteen workloads were predicted 1.4% better, but columns
# without effect made bounds after eight trials 23% wider.
_MATERN = -0.7
_LENGTH = 0.9
_LENGTH_SD = 0.8
# Prior of the variance of the machine's level over that of the noise, likewise, and the number of
# trials over which the level is forgotten.
_DRIFT = -1.0
_DRIFT_SD = 2.0
_DRIFT_TRIALS = 20.0

# Candidate rates of the share of its run at which a trial was stopped: uniform, or a median of 79%
# or 93%. That with the best leave-one-out density is used.
LATENESS = (1.0, 3.0, 10.0)
_WIDEST = 1e4
_NARROWEST = 1e-6


def prior_mean(n_columns: int, noise: float = NOISE, drifts: bool = False) -> np.ndarray:
    """Return the mode of the prior of the hyperparameters, good enough for a few points."""
    lengths = np.full(n_columns, _prior_length(n_columns))
    return np.concatenate([[0.0, _MATERN, noise], lengths, [_DRIFT] * drifts])


def _prior_length(n_columns: int) -> float:
    # Log-normal priors on the lengths that widen with the number of columns: Hvarfner et al.,
    # Vanilla Bayesian Optimization Performs Great in High Dimensions, 2024.
    return _LENGTH + 0.25 * math.log(max(n_columns, 1))


def _prior_precision(n_columns: int, drifts: bool) -> np.ndarray:
    lengths = np.full(n_columns, _LENGTH_SD)
    sd = np.concatenate([[1.5, 1.5, 1.2], lengths, [_DRIFT_SD] * drifts])
    return np.asarray(sd**-2.0)


@lru_cache(maxsize=8)
def _nearness(n_trials: int) -> np.ndarray:
    """Return the correlations of the machine's levels, those of the next trial in the last row."""
    places = np.arange(n_trials + 1)
    return np.asarray(np.exp(-np.abs(places[:, None] - places) / _DRIFT_TRIALS))


def mean_nearness(ahead: int) -> tuple[float, float]:
    """Return the mean correlation of the levels ahead with the next one, and with each other."""
    r = math.exp(-1 / _DRIFT_TRIALS)
    reached = 1 - r**ahead
    with_next = reached / (ahead * (1 - r))
    return with_next, (1 + r - 2 * r * with_next) / (ahead * (1 - r))


class GaussianProcess:
    """The posterior at given hyperparameters.

    Args:
        columns: Points, shape ``(n_points, n_columns)``, oldest first where the machine drifts.
        target: Standardised observations, shape ``(n_points,)``.
        hyperparameters: Of the kernel, shape ``(3 + n_columns,)``, one more if it drifts.
        extra: Additional variance of each observation.
        noisy: True where the common noise applies.

    Attributes:
        drift: Variance of the machine's level.
    """

    def __init__(
        self,
        columns: np.ndarray,
        target: np.ndarray,
        hyperparameters: np.ndarray,
        extra: np.ndarray,
        noisy: np.ndarray,
    ) -> None:
        self.hyperparameters = hyperparameters
        linear, matern = np.exp(hyperparameters[:2])
        self._variances = float(linear) * _linear_unit(columns.shape[1]), float(matern)
        n, d = columns.shape
        self._inverse_lengths = np.exp(-hyperparameters[3 : 3 + d])
        drifts = len(hyperparameters) > 3 + d
        self.drift = float(np.exp(hyperparameters[-1])) * self.noise if drifts else 0.0
        levels = self.drift * _nearness(n)
        self._next_level = levels[-1, :-1]
        self._scaled = columns * self._inverse_lengths
        self._scaled_squares = np.einsum("ij,ij->i", self._scaled, self._scaled)
        self._prior = self._kernel(columns) + levels[:-1, :-1]
        self._noisy = self.noise * noisy + _JITTER
        self._observe(target, extra)

    def _observe(self, target: np.ndarray, extra: np.ndarray) -> None:
        self.target = target
        self._own = self._noisy + extra  # variance of each observation
        covariance = self._prior.copy()
        covariance.ravel()[:: len(covariance) + 1] += self._own
        self._inverse = invert(covariance)[0]
        self._alpha = self._inverse @ target

    def given(self, sites: Sites) -> GaussianProcess:
        """Return the posterior of the same process given other observations."""
        other = copy.copy(self)
        other._observe(sites.target, sites.extra)
        return other

    @property
    def noise(self) -> float:
        """Variance of the noise."""
        return float(np.exp(self.hyperparameters[2]))

    def predict(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of the noiseless function at points."""
        cross = self._kernel(columns) + self._next_level
        a, b = self._variances
        scaled = columns * self._inverse_lengths
        prior = _CONSTANT + a * np.einsum("ij,ij->i", scaled, scaled) + b + self.drift
        variance = prior - np.einsum("ij,ij->i", product(cross, self._inverse), cross)
        return cross @ self._alpha, np.maximum(variance, 1e-12)

    def joint(self, columns: np.ndarray, ahead: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and covariance of the noiseless function at points.

        The level is the mean over the trials ``ahead``: which of them runs at which point is
        unknown, and sums over all of them matter.
        """
        with_next, with_each_other = mean_nearness(ahead)
        cross = self._kernel(columns) + with_next * self._next_level
        covariance = self._kernel(columns, columns) + with_each_other * self.drift
        covariance -= product(product(cross, self._inverse), cross.T)
        return cross @ self._alpha, covariance

    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of the noiseless function at the points themselves."""
        own = self._own
        mean = self.target - own * self._alpha
        return mean, np.maximum(own - own**2 * np.diag(self._inverse), 1e-12)

    def leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Return residual and deviation of each observation under all the others.

        r = [K⁻¹y]ᵢ / (K⁻¹)ᵢᵢ and s = (K⁻¹)ᵢᵢ^(-1/2) (Rasmussen and Williams, equation 5.12).
        """
        diagonal = np.diag(self._inverse)
        return self._alpha / diagonal, diagonal**-0.5

    def _kernel(self, left: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
        """Return the covariances of points with others, or with the process's own."""
        a, b = self._variances
        left = left * self._inverse_lengths
        left_squares = np.einsum("ij,ij->i", left, left)
        if right is None:
            right, right_squares = self._scaled, self._scaled_squares
        else:
            right = right * self._inverse_lengths
            right_squares = np.einsum("ij,ij->i", right, right)
        products = product(left, right.T)
        squares = left_squares[:, None] + right_squares - 2 * products
        r = _SQRT5 * np.sqrt(np.maximum(squares, 0.0))
        return np.asarray(_CONSTANT + a * products + b * (1 + r + r * r / 3) * np.exp(-r))


def _linear_unit(n_columns: int) -> float:
    return math.exp(2 * _prior_length(n_columns)) / 3


def fit_hyperparameters(
    columns: np.ndarray,
    target: np.ndarray,
    *,
    start: np.ndarray | None = None,
    extra: np.ndarray | None = None,
    noisy: np.ndarray | None = None,
    noise: float = NOISE,
    drifts: bool = False,
) -> np.ndarray:
    """Return the hyperparameters of largest posterior density.

    They are searched by BFGS from ``start``, or the mode of the prior, whose mean of the logarithm
    of the noise's variance is ``noise``; the other arguments are those of
    :class:`GaussianProcess`. L-BFGS-B calls LAPACK at each step, which wakes BLAS's threads for a
    few numbers: on two busy processors it took 74 ms of CPU for 20 points and 76 ms for 100, BFGS
    4 and 18 ms (medians of 30 fits each, to the same density). With many columns BFGS multiplies
    matrices of their number, and conjugate gradients take 0.04 s instead of 1.5 s for 300.
    """
    from scipy.optimize import minimize

    objective = _Objective(columns, target, extra, noisy, noise, drifts)
    first = prior_mean(columns.shape[1], noise, drifts) if start is None else start
    unit = objective.curvature() ** -0.5

    def inside(steps: np.ndarray) -> tuple[float, np.ndarray]:
        # Steps are in units of similar curvature. Beyond the bounds, a quadratic penalty.
        wanted = first + unit * steps
        if float(np.abs(wanted).max()) <= _LOG_BOUND:
            density, gradient = objective(wanted)
            return density, unit * gradient
        values = np.clip(wanted, -_LOG_BOUND, _LOG_BOUND)
        beyond = wanted - values
        density, gradient = objective(values)
        gradient = np.where(beyond == 0, gradient, _PENALTY * beyond)
        return density + 0.5 * _PENALTY * float(beyond @ beyond), unit * gradient

    found = minimize(
        inside,
        np.zeros(len(unit)),
        jac=True,
        method="BFGS" if len(unit) <= _MOST_BY_BFGS else "CG",
        options={"maxiter": 40, "gtol": 0.02},
    )
    return np.asarray(np.clip(first + unit * found.x, -_LOG_BOUND, _LOG_BOUND), dtype=float)


class _Objective:
    """Negative log posterior of the hyperparameters, with its gradient."""

    def __init__(
        self,
        columns: np.ndarray,
        target: np.ndarray,
        extra: np.ndarray | None,
        noisy: np.ndarray | None,
        noise: float = NOISE,
        drifts: bool = False,
    ) -> None:
        n, d = columns.shape
        self._columns = columns
        self._target = target
        self._extra = np.zeros(n) if extra is None else extra
        self._noisy = np.ones(n) if noisy is None else noisy.astype(float)
        self._unit = _linear_unit(d)
        self._mean, self._precision = prior_mean(d, noise, drifts), _prior_precision(d, drifts)
        self._nearness = _nearness(n)[:-1, :-1] if drifts else None

    def curvature(self) -> np.ndarray:
        """Return roughly the second derivative along each hyperparameter."""
        information = np.zeros(len(self._precision))
        # Of n observations about the logarithm of a variance; about the others it is small.
        information[2] = len(self._target) / 4
        return np.asarray(self._precision + information)

    def __call__(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        a, b, noise = np.exp(values[:3])
        a *= self._unit
        end = 3 + self._columns.shape[1]
        scaled = self._columns * np.exp(-values[3:end])
        products = product(scaled, scaled.T)
        norms = products.diagonal()
        r = np.sqrt(np.maximum(5 * (norms[:, None] + norms - 2 * products), 0.0))
        decay = np.exp(-r)
        slope = (1 + r) * decay
        matern = slope + r * r / 3 * decay
        covariance = _CONSTANT + a * products + b * matern
        if self._nearness is not None:
            levels = noise * math.exp(values[-1]) * self._nearness
            covariance += levels
        covariance.ravel()[:: len(covariance) + 1] += noise * self._noisy + self._extra + _JITTER
        inverse, log_determinant = invert(covariance)
        alpha = inverse @ self._target
        # d(-log likelihood)/dθ = ½ tr((K⁻¹ - αα') dK/dθ)
        weight = 0.5 * (inverse - alpha[:, None] * alpha)
        linear = a * weight
        # dK/d(log length) of the Matérn term is this times the square of the columns' difference.
        pairs = (5 / 3) * b * weight * slope
        gradient = np.empty(len(values))
        # Not by `np.vdot`, which starts threads for more than 100 trials.
        gradient[0] = np.einsum("ij,ij->", linear, products)
        gradient[1] = b * np.einsum("ij,ij->", weight, matern)
        gradient[2] = noise * (weight.diagonal() @ self._noisy)
        pulled = pairs.sum(axis=1)[:, None] * scaled - product(pairs + linear, scaled)
        gradient[3:end] = 2 * np.einsum("id,id->d", scaled, pulled)
        if self._nearness is not None:
            gradient[-1] = np.einsum("ij,ij->", weight, levels)
            gradient[2] += gradient[-1]
        away = values - self._mean
        value = 0.5 * (self._target @ alpha + log_determinant + away @ (self._precision * away))
        return float(value), gradient + self._precision * away


@dataclass(frozen=True)
class Sites:
    """Gaussian observations in place of the real ones: means, and variances beyond the noise."""

    target: np.ndarray
    extra: np.ndarray


def initial_sites(target: np.ndarray, censored: np.ndarray) -> Sites:
    """Return sites half a deviation above the bound of each censored trial."""
    return Sites(target + 0.5 * censored, 0.5 * censored)


def stop_rates(
    logs: np.ndarray, censored: np.ndarray, partial: np.ndarray, lateness: float
) -> np.ndarray:
    """Return the rate of the logarithm of each trial's share of its run, 0 for other trials.

    It is ``lateness``, where 1 stands for uniform shares. If trials ended early, such as in their
    first second, uniform shares would be so unlikely that the fit would treat completed trials as
    noise: then the rate is one over the mean logarithm, as estimated from the others. Many such
    trials together weigh no more than the others.
    """
    if not partial.any() or censored.all():
        return lateness * partial
    short = float(logs[~censored].mean() - logs[partial].mean())
    weight = min(1.0, float((~censored).sum() / partial.sum()))
    return np.asarray((1 / short if short > 1.0 else lateness) * weight * partial)


def propagate(
    columns: np.ndarray,
    target: np.ndarray,
    censored: np.ndarray,
    rate: np.ndarray,
    hyperparameters: np.ndarray,
    sites: Sites,
    *,
    rounds: int = 8,
) -> Sites:
    """Return the sites after expectation propagation with a damping of a half.

    Where ``censored``, the target is a lower bound, and ``rate`` is its r: 0 where the trial's own
    limit stopped it.
    """
    if not censored.any():
        return Sites(target, np.zeros(len(target)))
    process = GaussianProcess(columns, sites.target, hyperparameters, sites.extra, ~censored)
    for _ in range(rounds):
        fresh = _refined(process, target, censored, rate, sites)
        moved = float(np.max(np.abs(fresh.target - sites.target)[censored], initial=0.0))
        sites = fresh
        if moved < 1e-3:
            break
        process = process.given(sites)
    return sites


def _refined(
    process: GaussianProcess,
    bound: np.ndarray,
    censored: np.ndarray,
    rate: np.ndarray,
    sites: Sites,
) -> Sites:
    from scipy.special import log_ndtr

    rate = rate[censored]
    mean, variance = (part[censored] for part in process.posterior())
    old_precision = 1 / np.maximum(sites.extra[censored], _NARROWEST)
    old_shift = old_precision * sites.target[censored]
    # The cavity: the prediction of all the others for this point.
    precision = np.maximum(1 / variance - old_precision, 1 / _WIDEST)
    cavity_mean = (mean / variance - old_shift) / precision
    cavity = 1 / precision
    total = cavity + process.noise
    w = (cavity_mean - bound[censored]) / np.sqrt(total) - rate * np.sqrt(total)
    ratio = np.exp(-0.5 * w * w - 0.5 * np.log(2 * np.pi) - log_ndtr(w))
    tilted_mean = cavity_mean + cavity * (ratio / np.sqrt(total) - rate)
    tilted = cavity - cavity**2 * ratio * (w + ratio) / total
    new_precision = np.clip(1 / tilted - precision, 1 / _WIDEST, 1 / _NARROWEST)
    new_shift = tilted_mean * (precision + new_precision) - cavity_mean * precision
    mixed = 0.5 * (old_precision + new_precision)
    extra, target = sites.extra.copy(), sites.target.copy()
    extra[censored] = 1 / mixed
    target[censored] = 0.5 * (old_shift + new_shift) / mixed
    return Sites(target, extra)
