"""The decision whether a trial is over a limit: pure, from figures alone."""

from __future__ import annotations

from collections.abc import Mapping
import math

from optuna_quota._resources import Breach
from optuna_quota._resources import get_resource
from optuna_quota._resources import Limits


# The rate of two busy threads reads as 1.98 to 2.03 cores: clock ticks of the scheduler and the
# loop's own time blur it. A trial is over its cores only beyond this factor.
CORES_SLACK = 1.05


def find_breach(
    amounts: Mapping[str, float], limits: Limits, left: Mapping[str, float], elapsed: float
) -> Breach | None:
    """Return the breach that is furthest over its limit, None when all is within.

    A peak may equal its limit; a total that has reached it is used up.

    Args:
        amounts: What the trial uses, by resource, in SI base units; what is missing is unknown
            and breaches nothing.
        limits: The ceilings on the trial.
        left: What is left of the study's total quotas, by resource; the tighter ceiling counts.
        elapsed: Seconds since the start of the trial.
    """
    found = breaches(amounts, ceilings(limits.amounts(), left), elapsed)
    return found[0] if found else None


def breaches(
    amounts: Mapping[str, float], in_force: Mapping[str, tuple[float, bool]], elapsed: float
) -> list[Breach]:
    """Return all breaches, the furthest first, by the ceilings that :func:`ceilings` gives."""
    known = {"wall_time": elapsed, "trial_time": elapsed, **amounts}
    found = [
        Breach(name, ceiling, known[name], elapsed, quota=quota)
        for name, (ceiling, quota) in in_force.items()
        if name in known and _is_over(name, known[name], ceiling)
    ]
    return sorted(found, key=_excess, reverse=True)


def ceilings(
    limits: Mapping[str, float], left: Mapping[str, float]
) -> dict[str, tuple[float, bool]]:
    """Return the ceiling in force by resource, and whether it is what is left of a quota."""
    tightest = {name: (limit, False) for name, limit in limits.items()}
    for name, value in left.items():
        if value < tightest.get(name, (math.inf, False))[0]:
            tightest[name] = (max(value, 0.0), True)
    return tightest


def _is_over(name: str, observed: float, ceiling: float) -> bool:
    if name == "cpu_cores":
        return observed > ceiling * CORES_SLACK
    return observed > ceiling if get_resource(name).peak else observed >= ceiling


def _excess(breach: Breach) -> float:
    return breach.observed / breach.limit if breach.limit > 0 else math.inf
