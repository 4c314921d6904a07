"""How closely formula and footprint predict trials that were left out of them.

Both are judged by leave-one-out errors on the log scale over the same trials: the formula's
residual over one minus its leverage, and the Gaussian process's exact ones. A formula is called
wrong where the footprint's errors are smaller by much, and by more than chance (Wilcoxon's
signed-rank test).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._utilization.fit import derivatives_at, leverage, without_numeric_warnings


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optuna_quota._footprint.footprint import Footprint
    from optuna_quota._footprint.observations import Observation
    from optuna_quota._utilization.model import UtilizationModel

    Errors = Mapping[int, float]


_MIN_TRIALS = 8
_MUCH = 1.3
# A law that errs by less than this more, or by less than this at all, is good enough.
_MATTERS = 0.01
_GOOD_ENOUGH = 0.04
_SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class PredictionError:
    """Median errors at trials left out, as shares of their usage.

    Attributes:
        formula: Of the formula.
        footprint: Of the footprint.
        n: Number of trials.
        is_wrong: Whether the formula is no law of this resource.
    """

    formula: float
    footprint: float
    n: int
    is_wrong: bool


def prediction_errors(
    models: Mapping[str, UtilizationModel],
    footprint: Footprint,
    numbers: Mapping[int, Observation],
) -> dict[str, PredictionError]:
    """Return the errors of each resource that has a formula and enough trials.

    Args:
        models: The formulas by resource.
        footprint: Fitted to the same trials.
        numbers: The footprint's trials by number.
    """
    found = {}
    for resource, model in models.items():
        with without_numeric_warnings():
            ours, theirs = _formula_errors(model), _footprint_errors(footprint, resource, numbers)
            common = sorted(ours.keys() & theirs.keys())
            if len(common) >= _MIN_TRIALS:
                pairs = np.abs([[ours[i], theirs[i]] for i in common])
                found[resource] = _compared(pairs)
    return found


def _compared(pairs: NDArray[np.float64]) -> PredictionError:
    """Compare errors, shape ``(n, 2)``, of the formula and the footprint."""
    from scipy.stats import wilcoxon

    formula, footprint = np.median(pairs, axis=0)
    much = formula > max(_MUCH * footprint, footprint + _MATTERS, _GOOD_ENOUGH)
    p_value = wilcoxon(pairs[:, 0], pairs[:, 1], alternative="greater").pvalue if much else 1.0
    one, other = np.expm1(np.minimum((formula, footprint), 20.0)).tolist()
    return PredictionError(one, other, len(pairs), bool(p_value < _SIGNIFICANCE))


def _formula_errors(model: UtilizationModel) -> Errors:
    fit, sample = model.selected.fit, model.selected.sample
    at_fit = derivatives_at(fit, sample)
    errors = (sample.y - at_fit.mean) / np.maximum(1 - leverage(at_fit), 0.05)
    rows = zip(model.numbers, errors, sample.censored, strict=True)
    return {int(number): float(error) for number, error, cut in rows if not cut}


def _footprint_errors(
    footprint: Footprint, resource: str, numbers: Mapping[int, Observation]
) -> Errors:
    model = footprint.contents.models.get(resource)
    if model is None:
        return {}
    number_of = {id(row): number for number, row in numbers.items()}
    rows = [row for row in footprint.contents.observations if row.usage.get(resource) is not None]
    errors, censored = model.log_leave_one_out()[0], model.censored
    if len(rows) != len(errors):
        return {}
    return {
        number_of[id(row)]: float(error)
        for row, error, cut in zip(rows, errors, censored, strict=True)
        if not cut
    }
