"""Computes what is left of totals for a trial, and what its point needs of them. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math
from types import MappingProxyType

from optuna_quota._ledger.grant import RELEASE_BELOW, upper_bounds
from optuna_quota._metering import extension_threshold
from optuna_quota._resources import CHARGED_RESOURCES, LIMIT_RESOURCES, Limits, Quota


# What is free by resource, and the number of other running trials, to the least that any point is
# expected to use.
Needs = Callable[[Mapping[str, float], int], Mapping[str, float]]


def no_needs(free: Mapping[str, float], n_beside: int) -> Mapping[str, float]:
    """Return that nothing is known of what points need."""
    return {}


def revise_totals(
    quota: Quota,
    limits: Limits,
    granted: Mapping[str, float],
    expected: Mapping[str, float],
    used: Mapping[str, float] = MappingProxyType({}),
) -> tuple[dict[str, float], dict[str, float]]:
    """Return what a trial releases of its slices of totals, and lacks, once its point is known.

    Args:
        quota: The study's quota.
        limits: The trial's limits.
        granted: What it was granted before.
        expected: What it is expected to use at its point, by resource.
        used: What it has used so far: it may suggest its last parameter late.
    """
    smaller, larger = {}, {}
    spent = upper_bounds(used, quota)
    needs, most = upper_bounds(expected, quota), upper_bounds(limits.amounts(), quota)
    for name in quota.totals.keys() & granted.keys() & needs.keys():
        need = max(needs[name], spent.get(name, 0.0) / extension_threshold(name))
        need = min(need, most.get(name, math.inf))
        if 0 < need < RELEASE_BELOW * granted[name]:
            smaller[name] = need
        elif need > granted[name]:
            larger[name] = need
    return smaller, larger


def left_for_trial(
    quota: Quota, granted: Mapping[str, float], free: Mapping[str, float]
) -> dict[str, float]:
    """Return what a trial may use so that no total is exceeded, by the resource that it uses.

    Args:
        quota: The study's quota.
        granted: What the trial was granted.
        free: What is neither used nor reserved, by resource.
    """
    left: dict[str, float] = {}
    for name in quota.totals.keys() & granted.keys():
        amount, used = granted[name] + free.get(name, 0.0), CHARGED_RESOURCES.get(name, name)
        if name == "cost" and len(quota.prices) == 1:
            [(priced, price)] = quota.prices.items()
            amount, used = amount / price * 3600 if price else math.inf, CHARGED_RESOURCES[priced]
        if used in LIMIT_RESOURCES and amount < left.get(used, math.inf):
            left[used] = amount
    return left
