"""The cheapest trial that is about as good as the best."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._analysis.advice import Advice
from optuna_quota._analysis.fronts import front
from optuna_quota._analysis.fronts import signs
from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optuna_quota._analysis.report import UtilizationReport

    Array = NDArray[np.float64]


TOLERANCE = 0.01
_MIN_COMPLETED = 10
_WORTH_SAYING = 0.8
_COSTS = ("cpu_time", "wall_time", "gpu_time", "memory")


def advise_cheapest(report: UtilizationReport) -> Iterator[Advice]:
    """Say which trial within 1% of the best cost least, with the front of quality and cost."""
    best = report.best
    if "value" not in report.table or not best:
        return
    for resource in _COSTS:
        advice = _cheapest(report, resource, best[0])
        if advice is not None:
            yield advice
            return


def near_best(report: UtilizationReport, tolerance: float = TOLERANCE) -> NDArray[np.bool_]:
    """Return which trials are within a tolerance of the best, shape ``(n_trials,)``.

    That is ``|value - best| <= tolerance · |best|`` among those that violate no constraint, and
    the Pareto front where there are several objectives.

    Args:
        report: The analyzed study.
        tolerance: A share of the best value.
    """
    numbers = report.table["number"].to_numpy()
    best: NDArray[np.bool_] = np.isin(numbers, report.best)
    if "value" not in report.table or not best.any():
        return best
    values = report.table["value"].to_numpy(dtype=float)
    top = values[best][0]
    with np.errstate(invalid="ignore"):
        near = np.abs(values - top) <= tolerance * abs(top)
    near &= np.asarray(report.data.ended == "completed") & report.feasible
    best |= near
    return best


def _cheapest(report: UtilizationReport, resource: str, best: int) -> Advice | None:
    table, costs = report.table, report.table[resource].to_numpy(dtype=float)
    numbers, values = table["number"].to_numpy(), table["value"].to_numpy(dtype=float)
    done = (report.data.ended == "completed") & np.isfinite(costs) & report.feasible
    place = int(np.flatnonzero(numbers == best)[0])
    if done.sum() < _MIN_COMPLETED or not done[place] or costs[place] <= 0:
        return None
    near = np.flatnonzero(near_best(report) & done)
    least = int(near[costs[near].argmin()])
    if costs[least] > _WORTH_SAYING * costs[place]:
        return None
    losses = np.column_stack([values * signs(report.study)[0], costs])[done]
    cost, most = (format_amount(resource, float(costs[i])) for i in (least, place))
    text = (
        f"Trial {numbers[least]} is within {TOLERANCE:.0%} of the best "
        f"({values[least]:.6g} against {values[place]:.6g} of trial {best}) at "
        f"{costs[least] / costs[place]:.0%} of its {get_resource(resource).title} "
        f"({cost} against {most})."
    )
    return Advice(
        "cheapest trial",
        text,
        {
            "number": int(numbers[least]),
            "best": best,
            "resource": resource,
            "cost": float(costs[least]),
            "cost_of_best": float(costs[place]),
            "front": [int(numbers[done][i]) for i in front(losses)],
        },
    )
