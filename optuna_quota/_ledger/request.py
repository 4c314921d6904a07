"""What a trial asks of each quota before it runs, and what more while it runs (pure).

Where a footprint is given, a trial asks for its upper bound, all or nothing. Where only a limit is
known, or nothing, a fixed reservation would either starve the others or not bound the trial, so it
asks for a slice of what is left and for further slices as it uses them up; a slice is never more
than the limit. Slices shrink with what is left, so that little is still reserved when a quota runs
out.
"""

from __future__ import annotations

from collections.abc import Mapping

from optuna_quota._ledger.protocol import Want
from optuna_quota._resources import HELD_RESOURCES
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota


# A slice below this share of a quota is not worth running for: the quota counts as used up.
LEAST_SHARE = 1e-3
# Of what is held at one moment, a trial of unknown needs starts with no less than this share.
LEAST_HELD_SHARE = 1 / 8


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
) -> dict[str, Want]:
    """Return what a trial asks for before it runs.

    Args:
        quota: The study's quota.
        limits: The trial's limits.
        footprint: Upper bounds of what it will use, where known.
        free: What is neither used nor reserved, by resource, as last read.
        running: The number of other trials that run, as last read.
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
        else:
            ceiling = min(total, ceilings.get(resource, total))
            least = min(ceiling, _least(resource, total))
            wants[resource] = Want(
                least, _slice(free.get(resource, total), running, least, ceiling)
            )
    return wants


def more_wants(
    quota: Quota,
    limits: Limits,
    granted: Mapping[str, float],
    short: frozenset[str],
    free: Mapping[str, float],
    running: int,
) -> dict[str, Want]:
    """Return what a running trial asks for when its slices of ``short`` resources run out."""
    ceilings = upper_bounds(limits.amounts(), quota)
    totals = quota.amounts()
    wants: dict[str, Want] = {}
    for resource in short & granted.keys() & totals.keys():
        total, held = totals[resource], granted[resource]
        room = min(total, max(held, ceilings.get(resource, total))) - held
        least = min(room, LEAST_SHARE * total)
        if least > 0:
            more = _slice(free.get(resource, 0.0), running, least, room)
            wants[resource] = Want(held + least, held + more)
    return wants


def _least(resource: str, total: float) -> float:
    if resource == "cpu_cores":
        return min(1.0, total)
    return total * (LEAST_HELD_SHARE if resource in HELD_RESOURCES else LEAST_SHARE)


def _slice(free: float, running: int, least: float, ceiling: float) -> float:
    return min(ceiling, max(least, free / (2 * (running + 1))))
