"""Limits as Optuna constraints, so that samplers learn the feasible region: pure."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
import math
from typing import Any

from optuna_quota._resources import Breach
from optuna_quota._resources import Limits


# What an unknown usage says: neither within the limit nor over it.
NEUTRAL = 0.0


def limit_constraints(
    limits: Limits, amounts: Mapping[str, float], breach: Breach | None = None
) -> dict[str, float]:
    """Return observed / limit - 1 for each limited resource, sorted by the resource's name.

    Every trial of a study gets the same list of resources in the same order: GPSampler mixes the
    columns up otherwise, or raises.

    Args:
        limits: The limits on the trial, not what was left of a quota.
        amounts: What it used, by resource, in SI base units; what is missing is neutral.
        breach: What it was stopped for; a forecast counts as observed.
    """
    observed = dict(amounts)
    if breach is not None and not breach.quota:
        observed[breach.resource] = max(breach.observed, observed.get(breach.resource, 0.0))
    ceilings = sorted(limits.amounts().items())
    return {name: _ratio(observed.get(name), limit) for name, limit in ceilings}


def joined_constraints(existing: Any, own: Iterable[float]) -> list[float]:
    """Return a base sampler's list of constraints, if it wrote one, followed by our own."""
    theirs = existing if isinstance(existing, (list, tuple)) else ()
    return [*(float(value) for value in theirs), *own]


def clashes(n_constraints: int, attributes: Mapping[str, Any], prefix: str) -> bool:
    """Return whether a key that the user set names an item of a list of constraints.

    Optuna calls the items of the list "0", "1", and so on.
    """
    return any(f"{prefix}:{index}" in attributes for index in range(n_constraints))


def _ratio(observed: float | None, limit: float) -> float:
    if observed is None or not math.isfinite(observed):
        return NEUTRAL
    return observed / limit - 1.0
