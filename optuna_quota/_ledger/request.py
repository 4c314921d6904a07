"""What a trial asks of each quota before it runs, and what more while it runs (pure).

Where a footprint is known, a trial asks for its upper bound, all or nothing. Of a total of which
only a limit is known, or nothing, a fixed reservation would either starve the others or not bound
the trial, so it asks for a slice of what is left and for further slices as it uses them up; a
slice is never more than the limit. Slices shrink with what is left, so that little is still
reserved when a quota runs out.

What is held at one moment is promised as a whole, since a trial that has to end for it has run in
vain: the upper bound of the footprint, or the limit, or else an even share of the quota. Where
nothing is known, the trial is alone with the quota until its footprint is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from optuna_quota._ledger.protocol import Want
from optuna_quota._metering import extension_threshold
from optuna_quota._resources import HELD_RESOURCES
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota


Asked = Literal["by optimize", "by hand", "in a batch"]

# A slice below this share of a quota is not worth running for: the quota counts as used up.
LEAST_SHARE = 1e-3
# Of what is held at one moment, a trial of unknown needs starts with no less than this share.
LEAST_HELD_SHARE = 1 / 8
# What is held is given back once the point is known, where it is promised so much less.
WORTH_GIVING_BACK = 0.9


def upper_bounds(amounts: Mapping[str, float], quota: Quota) -> dict[str, float]:
    """Return bounds by the quota's resources from bounds by a trial's: its time and its cost."""
    bounds = dict(amounts)
    if "wall_time" in amounts:
        bounds["trial_time"] = amounts["wall_time"]
    if quota.prices and all(name in bounds for name in quota.prices):
        bounds["cost"] = quota.price(bounds)
    return bounds


def first_wants(
    quota: Quota,
    limits: Limits,
    footprint: Mapping[str, float],
    free: Mapping[str, float],
    running: int,
    *,
    bounds: Mapping[str, float] = MappingProxyType({}),
    n_jobs: int | None = None,
    asked: Asked = "by optimize",
) -> dict[str, Want]:
    """Return what a trial asks for before it runs.

    Args:
        quota: The study's quota.
        limits: The trial's limits.
        footprint: Upper bounds of what it will use, where the user stated them.
        free: What is neither used nor reserved, by resource, as last read.
        running: The number of other trials that run, as last read.
        bounds: Upper bounds of what it will hold at one moment, where they were learned.
        n_jobs: Trials that run at once, where that is known: each is promised an even share of
            what may be held at one moment, if nothing else is known of it.
        asked: By whom. Who asks by hand may ask for several before it tells any: what is unknown
            takes no more than a part of what is free then, and in a batch, where to wait for the
            others could be to wait for ever, less than the bound will do.
    """
    ceilings = upper_bounds(limits.amounts(), quota)
    expected = upper_bounds(footprint, quota)
    wants: dict[str, Want] = {}
    for resource, total in quota.amounts().items():
        if resource == "n_trials":
            wants[resource] = Want(1, 1)
        elif resource == "wall_time":
            # Trials that overlap share it: nothing to divide, see `Spans`.
            continue
        elif resource in expected:
            bound = min(expected[resource], ceilings.get(resource, expected[resource]))
            wants[resource] = Want(bound, bound)
        elif resource in HELD_RESOURCES:
            share = total if n_jobs is None else total / n_jobs
            known = [k[resource] for k in (ceilings, bounds) if resource in k] or [share]
            bound = min(total, *known)
            if asked == "in a batch" or (asked == "by hand" and bound == total):
                least = min(bound, 1.0 if resource == "cpu_cores" else LEAST_HELD_SHARE * total)
                room = free.get(resource, total)
                wants[resource] = Want(least, _slice(room, running, least, bound))
            else:
                wants[resource] = Want(bound, bound)
        else:
            ceiling = min(total, ceilings.get(resource, total))
            least = min(ceiling, LEAST_SHARE * total)
            wants[resource] = Want(
                least, _slice(free.get(resource, total), running, least, ceiling)
            )
    return wants


def more_wants(
    quota: Quota,
    limits: Limits,
    granted: Mapping[str, float],
    needs: Mapping[str, float],
    free: Mapping[str, float],
    running: int,
) -> dict[str, Want]:
    """Return what a running trial asks for when what it was granted runs out.

    Args:
        quota: The study's quota.
        limits: The trial's limits.
        granted: What it was granted, by resource.
        needs: What it uses of the resources that run out; of what is held at one moment, less
            than that would not do.
        free: What is neither used nor reserved, by resource, as last read.
        running: The number of other trials that run, as last read.
    """
    ceilings = upper_bounds(limits.amounts(), quota)
    totals = quota.amounts()
    wants: dict[str, Want] = {}
    for resource in needs.keys() & granted.keys() & totals.keys():
        total, held = totals[resource], granted[resource]
        room = min(total, max(held, ceilings.get(resource, total))) - held
        least = min(room, LEAST_SHARE * total)
        if resource in HELD_RESOURCES:
            least = min(room, max(least, needs[resource] - held))
        if least > 0:
            more = _slice(free.get(resource, 0.0), running, least, room)
            wants[resource] = Want(held + least, held + more)
    return wants


def revised_promise(
    quota: Quota,
    limits: Limits,
    granted: Mapping[str, float],
    bounds: Mapping[str, float],
    used: Mapping[str, float],
) -> tuple[dict[str, float], dict[str, float]]:
    """Return what a trial gives back, and what it needs, once its point is known.

    Args:
        quota: The study's quota.
        limits: The trial's limits.
        granted: What it was promised before.
        bounds: Upper bounds of what it will hold, by resource.
        used: What it has held so far.

    Returns:
        The promises that are smaller from now on, and the amounts that are more than was promised.
    """
    smaller, larger = {}, {}
    for name in quota.held.keys() & granted.keys() & bounds.keys():
        bound = max(bounds[name], used.get(name, 0.0) / extension_threshold(name))
        bound = min(bound, quota.held[name], limits.amounts().get(name, bound))
        if bound < WORTH_GIVING_BACK * granted[name]:
            smaller[name] = bound
        elif bound > granted[name]:
            larger[name] = bound
    return smaller, larger


def _slice(free: float, running: int, least: float, ceiling: float) -> float:
    return min(ceiling, max(least, free / (2 * (running + 1))))
