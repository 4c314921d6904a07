"""The one rule for what is a breach (pure): metering, stops, deaths and forecasts all ask here."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import NamedTuple

from optuna_quota._resources import Breach
from optuna_quota._resources import get_resource


# The rate of two busy threads reads as 1.98 to 2.03 cores, blurred by the scheduler's clock ticks
# and the loop's own time. A trial breaches `cpu_cores` only beyond this factor.
CORES_SLACK = 1.05

# Allocations are rounded up, and what native code last asked for is unknown when it ends the
# process instead of raising: a failure this close to a limit is a failure at the limit.
AT_LIMIT = 0.95


class Ceiling(NamedTuple):
    """The most that a trial may use of one resource, in SI base units.

    Attributes:
        limit: The amount.
        quota: Whether it is what is left of a quota of the study, not a limit of the trial.
    """

    limit: float
    quota: bool = False


# Plain pairs will do as well.
Ceilings = Mapping[str, tuple[float, bool]]


def tightest_ceilings(
    limits: Mapping[str, float], left: Mapping[str, float]
) -> dict[str, Ceiling]:
    """Return the ceiling in force by resource: the limit or what is left of the quota."""
    ceilings = {name: Ceiling(limit) for name, limit in limits.items()}
    for name, amount in left.items():
        if name not in ceilings or amount < ceilings[name].limit:
            ceilings[name] = Ceiling(max(amount, 0.0), quota=True)
    return ceilings


def is_breach(resource: str, amount: float, limit: float) -> bool:
    """Return whether an amount breaches a limit.

    A peak may equal its limit; a total that has reached it is used up.
    """
    if resource == "cpu_cores":
        return amount > limit * CORES_SLACK
    return amount > limit if get_resource(resource).peak else amount >= limit


def find_breaches(
    amounts: Mapping[str, float | None],
    ceilings: Ceilings,
    elapsed: float,
    *,
    forecast: bool = False,
) -> list[Breach]:
    """Return all breaches, the furthest over its limit first.

    Args:
        amounts: What the trial uses by resource, in SI base units; missing or None is unknown and
            breaches nothing.
        ceilings: The ceilings in force.
        elapsed: Seconds since the start of the trial.
        forecast: Whether the amounts are what the trial is heading for.
    """
    found = [
        Breach(name, limit, amount, elapsed, quota=quota, forecast=forecast)
        for name, (limit, quota) in ceilings.items()
        if (amount := amounts.get(name)) is not None and is_breach(name, amount, limit)
    ]
    return sorted(found, key=_ratio, reverse=True)


def find_refused_breach(
    resource: str,
    wanted: float,
    ceilings: Ceilings,
    elapsed: float,
    *,
    share: float = AT_LIMIT,
    refused: bool = True,
) -> Breach | None:
    """Return the breach of a trial that was refused what it wanted, None when it was not near.

    Args:
        resource: The resource.
        wanted: What it held and asked for, as far as that is known.
        ceilings: The ceilings in force.
        elapsed: Seconds since the start of the trial.
        share: The share of the limit from which the limit is taken for the reason; 0 where it
            surely is.
        refused: Whether the reason says "asked for" instead of "used".
    """
    if resource not in ceilings:
        return None
    limit, quota = ceilings[resource]
    if wanted < share * limit:
        return None
    # What was refused is not known more closely than that it was over the limit.
    observed = max(wanted, limit * (1 + 1e-6) + 1)
    return Breach(resource, limit, observed, elapsed, quota=quota, refused=refused)


def _ratio(breach: Breach) -> float:
    return breach.observed / breach.limit if breach.limit > 0 else math.inf
