"""Products, factors and inverses in pieces are those of numpy."""

from __future__ import annotations

import numpy as np
import pytest

from optuna_quota._footprint.numerics import (
    cholesky,
    invert,
    orthonormal,
    product,
    solve,
    square_root,
)


def covariance(n: int) -> np.ndarray:
    root = np.random.default_rng(n).standard_normal((n, n))
    return np.asarray(root @ root.T + n * np.eye(n))


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(0, 3, 4), (3, 0, 4), (5, 7, 3), (300, 700, 40), (1, 5000, 300), (13, 9000, 13)],
)
def test_product(m: int, k: int, n: int) -> None:
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal((m, k)), generator.standard_normal((k, n))
    assert product(left, right) == pytest.approx(left @ right, abs=1e-9)


@pytest.mark.parametrize("n", [1, 100, 101, 333])
def test_factor_inverse_and_determinant(n: int) -> None:
    matrix = covariance(n)
    factor, root = cholesky(matrix)
    assert factor == pytest.approx(np.linalg.cholesky(matrix), abs=1e-9)
    assert factor @ root == pytest.approx(np.eye(n), abs=1e-9)
    inverse, log_determinant = invert(matrix)
    assert inverse @ matrix == pytest.approx(np.eye(n), abs=1e-9)
    assert log_determinant == pytest.approx(np.linalg.slogdet(matrix)[1])


@pytest.mark.parametrize("n", [1, 64, 65, 250])
def test_a_system_is_solved_where_the_last_direction_has_the_wrong_sign(n: int) -> None:
    matrix, columns = covariance(n), np.random.default_rng(0).standard_normal((n, 2))
    matrix[-1, -1] = -matrix[-1, -1]
    assert matrix @ solve(matrix, columns) == pytest.approx(columns, abs=1e-9)


@pytest.mark.parametrize("n", [40, 240])
def test_points_that_coincide(n: int) -> None:
    half = covariance(n // 2)
    twice = np.block([[half, half], [half, half]])
    with pytest.raises(np.linalg.LinAlgError):
        cholesky(twice - 1e-9 * np.eye(n))
    inverse, _ = invert(twice)
    assert twice @ inverse @ twice == pytest.approx(twice, rel=1e-4, abs=1e-4)
    root = square_root(twice)
    assert root @ root.T == pytest.approx(twice, abs=1e-4)


def test_no_jitter_is_tried_on_what_is_not_finite() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        invert(np.diag([-1.0, np.nan]))


def test_the_root_of_what_rounding_made_indefinite() -> None:
    matrix = covariance(30)
    values, vectors = np.linalg.eigh(matrix)
    values[:3] = -1e-3
    root = square_root(vectors * values @ vectors.T)
    assert root @ root.T == pytest.approx(vectors * np.maximum(values, 0) @ vectors.T, abs=1e-6)


@pytest.mark.parametrize("beside", [1.0, 1e-5, 0.0])
def test_an_orthonormal_basis_of_columns_that_are_nearly_or_fully_alike(beside: float) -> None:
    columns = np.random.default_rng(0).standard_normal((3000, 6)) * [1, 1e6, 1, 1, 1e-6, 1]
    columns[:, 3] = columns[:, 2] + beside * columns[:, 3]
    basis = orthonormal(columns)
    assert basis.T @ basis == pytest.approx(np.eye(6), abs=1e-9)
    assert basis @ (basis.T @ columns) == pytest.approx(columns, abs=1e-6)
