"""Minimises a smooth function of a few variables inside a box, in one thread.

SciPy's L-BFGS-B asks LAPACK at each step, which wakes BLAS's threads for triangles of five rows:
where the processors are busy with trials, waiting for those threads took most of a fit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]

# Armijo's condition: a step must bring this share of what its slope promises.
_SUFFICIENT = 1e-4
_MOST_TRIES = 12
# Nothing is known of the curvature at the first step: it is no longer than this.
_FIRST_STEP = 2.0


def minimize(
    objective: Objective,
    start: np.ndarray,
    *,
    curvature: np.ndarray,
    bound: float,
    max_iterations: int,
    ftol: float,
    gtol: float,
) -> np.ndarray:
    """Return where a function is least, by BFGS steps that are projected into a box.

    A variable that stands at its bound and would go on is left out of a step (Nocedal and Wright,
    Numerical Optimization, 2006, sections 6.1 and 16.7).

    Args:
        objective: Value and gradient at a point.
        start: Where to begin, shape ``(n,)``.
        curvature: Roughly the second derivative along each variable, to begin with.
        bound: Each variable stays between its negative and itself.
        max_iterations: Of steps.
        ftol: Ends when a step brings less than this share of the value.
        gtol: Ends when no free component of the gradient is larger.
    """
    point = np.clip(start, -bound, bound)
    value, gradient = objective(point)
    first = np.diag(1 / curvature)
    inverse: np.ndarray | None = None
    for _ in range(max_iterations):
        free = ~((np.abs(point) >= bound) & (point * gradient < 0))
        slope = np.where(free, gradient, 0.0)
        if np.abs(slope).max() <= gtol:
            break
        direction = _direction(first, inverse, slope, free)
        found = _search(objective, point, value, gradient, direction, bound)
        if found is None:
            if inverse is None:
                break
            # The curvature learned so far misleads: begin anew from the gradient alone.
            inverse = None
            continue
        step, change = found[0] - point, found[2] - gradient
        gain = value - found[1]
        inverse = _updated(first, inverse, step, change)
        point, value, gradient = found
        if gain <= ftol * max(abs(value), abs(value + gain), 1.0):
            break
    return np.asarray(point)


def _direction(
    first: np.ndarray, inverse: np.ndarray | None, slope: np.ndarray, free: np.ndarray
) -> np.ndarray:
    if inverse is None:
        direction = -(first @ slope)
        return np.asarray(direction * min(1.0, _FIRST_STEP / float(np.linalg.norm(direction))))
    direction = np.where(free, -(inverse @ slope), 0.0)
    return np.asarray(direction if direction @ slope < 0 else -slope)


def _search(
    objective: Objective,
    point: np.ndarray,
    value: float,
    gradient: np.ndarray,
    direction: np.ndarray,
    bound: float,
) -> tuple[np.ndarray, float, np.ndarray] | None:
    """Return a point far enough below, with value and gradient; None when there is none."""
    length = 1.0
    for _ in range(_MOST_TRIES):
        tried = np.clip(point + length * direction, -bound, bound)
        promised = float(gradient @ (tried - point))
        if promised >= 0:
            return None
        there, slope = objective(tried)
        if there <= value + _SUFFICIENT * promised:
            return tried, there, slope
        # The least of the parabola through both values and the slope at the start.
        rise = there - value - promised
        shrink = -promised / (2 * rise) if np.isfinite(rise) else 0.1
        length *= min(max(shrink, 0.1), 0.5)
    return None


def _updated(
    first: np.ndarray, inverse: np.ndarray | None, step: np.ndarray, change: np.ndarray
) -> np.ndarray | None:
    """Return the inverse of the curvature after a step (equations 6.17 and 6.20)."""
    curvature = float(step @ change)
    if curvature <= 1e-10 * float(np.linalg.norm(step) * np.linalg.norm(change)):
        return inverse
    if inverse is None:
        inverse = first * (curvature / float(change @ first @ change))
    moved = inverse @ change
    outer = np.outer(step, moved)
    scale = (curvature + float(change @ moved)) / curvature**2
    return np.asarray(inverse + scale * np.outer(step, step) - (outer + outer.T) / curvature)
