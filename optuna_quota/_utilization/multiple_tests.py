"""Adjusts p-values of many tests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from numpy.typing import NDArray


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p-values adjusted by Holm's method; NaN stays NaN and is no test."""
    adjusted = np.full(len(p_values), math.nan)
    known = np.isfinite(p_values)
    if known.any():
        from statsmodels.stats.multitest import multipletests

        adjusted[known] = multipletests(p_values[known], method="holm")[1]
    return adjusted
