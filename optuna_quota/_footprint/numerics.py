"""Dense linear algebra in one thread.

While trials keep the processors busy, waiting for BLAS's threads takes a hundred times as long as
computing with a matrix of a few hundred rows; otherwise the threads spin for milliseconds after
each call. So products are divided into pieces below the size (m·n·k) at which OpenBLAS starts
threads, and matrices are factored in blocks of the size up to which LAPACK starts none.
"""

from __future__ import annotations

import numpy as np


_SINGLE_THREADED = 200_000
_LEAST_ROWS = 16
_BLOCK = 100
_SOLVED_BLOCK = 64  # by LU factors


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return a matrix product."""
    rows = _SINGLE_THREADED // max(right.size, 1)
    if rows >= len(left):
        return np.asarray(left @ right)
    if rows < _LEAST_ROWS and len(right) > 1:
        half = len(right) // 2
        parts = product(left[:, :half], right[:half]), product(left[:, half:], right[half:])
        return np.asarray(parts[0] + parts[1])
    rows = max(rows, 1)
    return np.concatenate([left[i : i + rows] @ right for i in range(0, len(left), rows)])


def cholesky(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower Cholesky factor of a matrix, and the factor's inverse.

    Raises:
        numpy.linalg.LinAlgError: If the matrix is not positive definite in floating point.
    """
    from scipy.linalg.lapack import dpotrf, dtrtri

    n = len(matrix)
    if n <= _BLOCK:
        factor, failed = dpotrf(matrix, lower=1, clean=1)
        if failed:
            raise np.linalg.LinAlgError("The matrix is not positive definite.")
        # The zeros above the diagonal stay.
        return factor, dtrtri(factor, lower=1)[0]
    half, factor, inverse = n // 2, np.zeros((n, n)), np.zeros((n, n))
    first, last = np.s_[:half], np.s_[half:]
    factor[first, first], inverse[first, first] = cholesky(matrix[first, first])
    below = factor[last, first] = product(matrix[last, first], inverse[first, first].T)
    rest = matrix[last, last] - product(below, below.T)
    factor[last, last], inverse[last, last] = cholesky(rest)
    inverse[last, first] = -product(product(inverse[last, last], below), inverse[first, first])
    return factor, inverse


def invert(covariance: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the inverse of a covariance and the logarithm of its determinant."""
    matrix, jitter = covariance, 0.0
    while True:
        try:
            factor, root = cholesky(matrix)
        except np.linalg.LinAlgError:
            if not np.isfinite(covariance).all():
                raise
            # Points that coincide make it singular in floating point.
            jitter = max(10 * jitter, 1e-7 * float(np.trace(covariance)) / len(covariance))
            matrix = covariance + jitter * np.eye(len(covariance))
        else:
            return product(root.T, root), 2 * float(np.log(factor.diagonal()).sum())


def solve(matrix: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the solution of a square system for each column.

    Raises:
        numpy.linalg.LinAlgError: If a block on the diagonal is singular.
    """
    half = len(matrix) // 2
    if len(matrix) <= _SOLVED_BLOCK:
        return np.asarray(np.linalg.solve(matrix, columns))
    beside = np.hstack([matrix[:half, half:], columns[:half]])
    first = solve(matrix[:half, :half], beside)
    rest = np.hstack([matrix[half:, half:], columns[half:]]) - product(matrix[half:, :half], first)
    size = len(matrix) - half
    last = solve(rest[:, :size], rest[:, size:])
    return np.concatenate([first[:, size:] - product(first[:, :size], last), last])


def orthonormal(columns: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of the columns of a tall matrix."""
    basis = columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
    try:
        for _ in range(2):  # once more, against rounding
            basis = product(basis, cholesky(product(basis.T, basis))[1].T)
    except np.linalg.LinAlgError:
        basis = np.linalg.qr(columns)[0]
    return np.asarray(basis)


def square_root(covariance: np.ndarray) -> np.ndarray:
    """Return a matrix whose product with its transpose is the covariance."""
    scale = max(float(np.trace(covariance)) / len(covariance), 1e-12)
    try:
        return cholesky(covariance + 1e-7 * scale * np.eye(len(covariance)))[0]
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))
