"""A small Gaussian process with analytic gradients.

Kernel on columns scaled to [-1, 1] and a standardised target (Rasmussen and Williams, Gaussian
Processes for Machine Learning, 2006, sections 2.2, 2.7, 4.2 and 5.4):

    k(x, x') = 4 + a·x·x'/3 + b·Matérn5/2(x, x'; lengths) + (noise + extra)·[x is x']

The linear term is what power laws of sizes become after the logarithm; the Matérn term is what
departs from them. ``extra`` is a variance of each point's own, used for censored ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


_CONSTANT = 4.0
_JITTER = 1e-8
_SQRT5 = 5.0**0.5
_LOG_BOUND = 9.0
_WALL = 100.0


@dataclass(frozen=True)
class Hyperparameters:
    """Logarithms: linear variance, Matérn variance, noise variance, and length of each column."""

    values: np.ndarray

    @classmethod
    def prior(cls, n_columns: int) -> Hyperparameters:
        """Return the mode of the prior, good enough for a handful of points."""
        return cls(_prior_mean(n_columns).copy())


def _prior_mean(n_columns: int) -> np.ndarray:
    # Log-normal priors on the lengths that widen with the number of columns: Hvarfner et al.,
    # Vanilla Bayesian Optimization Performs Great in High Dimensions, 2024.
    lengths = np.full(n_columns, 0.9 + 0.25 * np.log(max(n_columns, 1)))
    return np.concatenate([[0.0, -0.7, -2.5], lengths])


def _prior_precision(n_columns: int) -> np.ndarray:
    sd = np.concatenate([[1.5, 1.5, 1.2], np.full(n_columns, 0.8)])
    return np.asarray(sd**-2.0)


class GaussianProcess:
    """The posterior at given hyperparameters.

    Args:
        columns: Points, shape ``(n_points, n_columns)``.
        target: Standardised observations, shape ``(n_points,)``.
        hyperparameters: Of the kernel.
        extra: Variance of each observation beyond the common noise; ``noisy`` False takes the
            common noise away.
        noisy: Whether the common noise applies to a point.
    """

    def __init__(
        self,
        columns: np.ndarray,
        target: np.ndarray,
        hyperparameters: Hyperparameters,
        extra: np.ndarray | None = None,
        noisy: np.ndarray | None = None,
    ) -> None:
        self.columns = columns
        self.target = target
        self.hyperparameters = hyperparameters
        n = len(target)
        self.extra = np.zeros(n) if extra is None else extra
        self.noisy = np.ones(n) if noisy is None else noisy.astype(float)
        linear, matern = np.exp(hyperparameters.values[:2])
        self._variances = float(linear), float(matern)
        self._inverse_lengths = np.exp(-hyperparameters.values[3:])
        self._scaled = columns * self._inverse_lengths
        self._scaled_squares = np.einsum("ij,ij->i", self._scaled, self._scaled)
        covariance = self._kernel(columns)
        covariance[np.diag_indices(n)] += self.noise * self.noisy + self.extra + _JITTER
        self._inverse = _invert(covariance)[0]
        self._alpha = self._inverse @ target

    @property
    def noise(self) -> float:
        """Variance of the noise."""
        return float(np.exp(self.hyperparameters.values[2]))

    def predict(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of the noiseless function at points."""
        cross = self._kernel(columns)
        a, b = self._variances
        prior = _CONSTANT + a / 3 * np.einsum("ij,ij->i", columns, columns) + b
        variance = prior - np.einsum("ij,ij->i", _product(cross, self._inverse), cross)
        return cross @ self._alpha, np.maximum(variance, 1e-12)

    def joint(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and covariance of the noiseless function at points."""
        cross = self._kernel(columns)
        covariance = self._kernel(columns, columns)
        covariance -= _product(_product(cross, self._inverse), cross.T)
        return cross @ self._alpha, covariance

    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of the noiseless function at the points themselves."""
        own = self.noise * self.noisy + self.extra + _JITTER
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
        scaled_left = left * self._inverse_lengths
        if right is None:
            right, scaled_right, right_squares = self.columns, self._scaled, self._scaled_squares
        else:
            scaled_right = right * self._inverse_lengths
            right_squares = np.einsum("ij,ij->i", scaled_right, scaled_right)
        left_squares = np.einsum("ij,ij->i", scaled_left, scaled_left)
        square = left_squares[:, None] + right_squares - 2 * scaled_left @ scaled_right.T
        r = _SQRT5 * np.sqrt(np.maximum(square, 0.0))
        return np.asarray(
            _CONSTANT + a / 3 * left @ right.T + b * (1 + r + r * r / 3) * np.exp(-r)
        )


def fit_hyperparameters(
    columns: np.ndarray,
    target: np.ndarray,
    *,
    start: Hyperparameters | None = None,
    extra: np.ndarray | None = None,
    noisy: np.ndarray | None = None,
    max_iterations: int = 40,
) -> Hyperparameters:
    """Return the hyperparameters of largest posterior density, by BFGS from ``start``.

    L-BFGS-B calls LAPACK at each step, which wakes BLAS's threads for a few numbers: on two busy
    processors it took 74 ms of CPU for 20 points and 76 ms for 100, BFGS 4 and 18 ms (medians of
    30 fits each, to the same density).
    """
    from scipy.optimize import minimize

    objective = _Objective(columns, target, extra, noisy)
    first = Hyperparameters.prior(columns.shape[1]) if start is None else start
    unit = objective.curvature() ** -0.5

    def inside(steps: np.ndarray) -> tuple[float, np.ndarray]:
        # In units in which all curvatures are about 1; beyond the bounds it rises.
        wanted = first.values + unit * steps
        values = np.clip(wanted, -_LOG_BOUND, _LOG_BOUND)
        beyond = wanted - values
        density, gradient = objective(values)
        gradient = np.where(beyond == 0, gradient, _WALL * beyond)
        return density + 0.5 * _WALL * float(beyond @ beyond), unit * gradient

    found = minimize(
        inside,
        np.zeros(len(unit)),
        jac=True,
        method="BFGS",
        options={"maxiter": max_iterations, "gtol": 0.02},
    )
    values = np.clip(first.values + unit * found.x, -_LOG_BOUND, _LOG_BOUND)
    return Hyperparameters(np.asarray(values, dtype=float))


class _Objective:
    """Negative log posterior of the hyperparameters, with its gradient."""

    def __init__(
        self,
        columns: np.ndarray,
        target: np.ndarray,
        extra: np.ndarray | None,
        noisy: np.ndarray | None,
    ) -> None:
        n, d = columns.shape
        self._target = target
        self._extra = np.zeros(n) if extra is None else extra
        self._noisy = np.ones(n) if noisy is None else noisy.astype(float)
        self._linear = columns @ columns.T / 3
        # Pairs below the diagonal only: half the work of the full matrix.
        self._rows, self._cols = np.tril_indices(n, -1)
        self._squares = (columns[self._rows] - columns[self._cols]).T ** 2
        self._mean, self._precision = _prior_mean(d), _prior_precision(d)

    def curvature(self) -> np.ndarray:
        """Return roughly the second derivative along each hyperparameter."""
        told = np.zeros(len(self._precision))
        # What n observations say of the logarithm of a variance; of the others they say little.
        told[2] = len(self._target) / 4
        return np.asarray(self._precision + told)

    def __call__(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        a, b, noise = np.exp(values[:3])
        inverse_squares = np.exp(-2 * values[3:])
        n = len(self._target)
        r = _SQRT5 * np.sqrt(np.einsum("d,dp->p", inverse_squares, self._squares))
        decay = np.exp(-r)
        matern = np.empty((n, n))
        matern[self._rows, self._cols] = matern[self._cols, self._rows] = (
            1 + r + r * r / 3
        ) * decay
        diagonal = np.arange(n)
        matern[diagonal, diagonal] = 1.0
        covariance = _CONSTANT + a * self._linear + b * matern
        covariance[diagonal, diagonal] += noise * self._noisy + self._extra + _JITTER
        inverse, log_determinant = _invert(covariance)
        alpha = inverse @ self._target
        # d(-log likelihood)/dθ = ½ tr((K⁻¹ - αα') dK/dθ)
        weight = 0.5 * (inverse - np.outer(alpha, alpha))
        pairs = weight[self._rows, self._cols] * (5 / 3) * b * (1 + r) * decay
        gradient = np.concatenate(
            [
                [
                    a * np.sum(weight * self._linear),
                    b * np.sum(weight * matern),
                    noise * np.diag(weight) @ self._noisy,
                ],
                2 * np.einsum("dp,p->d", self._squares, pairs) * inverse_squares,
            ]
        )
        away = values - self._mean
        value = 0.5 * (self._target @ alpha + log_determinant + away @ (self._precision * away))
        return float(value), gradient + self._precision * away


def _invert(covariance: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the inverse of a covariance and the logarithm of its determinant."""
    from scipy.linalg.lapack import dpotrf
    from scipy.linalg.lapack import dtrtri

    jitter = 0.0
    while True:
        factor, failed = dpotrf(covariance + jitter * np.eye(len(covariance)), lower=1)
        if not failed:
            break
        if not np.isfinite(covariance).all():
            raise np.linalg.LinAlgError("A covariance must be finite.")
        # Points that coincide make it singular in floating point.
        jitter = max(10 * jitter, 1e-7 * float(np.trace(covariance)) / len(covariance))
    root = np.tril(dtrtri(factor, lower=1)[0])
    return _product(root.T, root), 2 * float(np.sum(np.log(np.diag(factor))))


# Where the processors are busy with trials, waiting for BLAS's threads takes a hundred times as
# long as a product this small, so it is cut into pieces below the size (of m·n·k) at which
# OpenBLAS starts threads. For the same reason the inverse is not LAPACK's `dpotri`.
_SINGLE_THREADED = 200_000


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return a matrix product, computed in one thread."""
    rows = max(_SINGLE_THREADED // max(right.size, 1), 1)
    if rows >= len(left):
        return np.asarray(left @ right)
    return np.concatenate([left[i : i + rows] @ right for i in range(0, len(left), rows)])
