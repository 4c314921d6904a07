"""What the ledger answers."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

from optuna_quota._ledger.protocol import Claim
from optuna_quota._ledger.protocol import DEVICE
from optuna_quota._ledger.protocol import is_held
from optuna_quota._ledger.protocol import Shortage
from optuna_quota._ledger.protocol import Want
from optuna_quota._metering import extension_threshold
from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import HELD_RESOURCES
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota
from optuna_quota._resources import RESOURCES


# Seconds of waiting after which it is said.
PATIENCE = 10.0


def standstill(
    number: int, shortage: Shortage | None, claims: Iterable[Claim], own: Collection[int]
) -> str | None:
    """Return a warning when a trial may wait for ever, None when others may make room.

    Args:
        number: The trial that waits.
        shortage: What it waits for.
        claims: All running trials.
        own: Those that the waiting thread asked for by hand.
    """
    others = {claim.number for claim in claims} - {number}
    if not others or not others <= set(own):
        return None
    resource = None if shortage is None else RESOURCES.get(shortage.resource)
    what = "what it needs" if resource is None else resource.title
    listed = ", ".join(str(other) for other in sorted(others))
    held_by = f"trial {listed} holds" if len(others) == 1 else f"trials {listed} hold"
    return (
        f"Trial {number} waits for {what} that {held_by}. The same thread asked for all of them: "
        "if it is this thread that tells them, it waits for ever. Ask for fewer at once, or give "
        "a larger quota."
    )


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


# Sums of floats differ in their last bits by their order.
_SLACK = 1 + 1e-9


@dataclass(frozen=True)
class Grant:
    """A trial was admitted.

    Attributes:
        left: What it may use for now, by resource, counted from its start; ``extend`` may raise
            it. ``wall_time`` is how long it may run until the study's clock time is used up.
        reason: One sentence for a person.
        gpu: The GPU with room that it was given, by UUID; None when there is no choice to make.
    """

    left: Mapping[str, float] = field(default_factory=dict)
    reason: str = "It fits."
    gpu: str | None = None


@dataclass(frozen=True)
class Refusal:
    """A trial was not admitted.

    Attributes:
        resource: The resource that decided.
        reason: One sentence for a person.
        wanted: The least that would have done.
        used: What finished trials used of it.
        reserved: What running trials hold of it.
        quota: The quota.
        final: True when nothing more can be admitted to the study; False when this trial can't
            be, while a smaller one might.
        late: True when the study ended while the trial waited.
    """

    resource: str
    reason: str
    wanted: float
    used: float
    reserved: float
    quota: float
    final: bool
    late: bool = False


def refuse(shortage: Shortage, *, final: bool) -> Refusal:
    """Return the refusal of a trial for what is short."""
    return Refusal(
        shortage.resource,
        _sentence(shortage),
        shortage.wanted,
        shortage.used,
        shortage.reserved,
        shortage.quota,
        final,
    )


def hopeless(short: Shortage) -> Refusal | None:
    """Return a refusal when waiting for others can't help, None when it may."""
    if is_held(short.resource):
        over = short.wanted > short.quota * _SLACK
        return refuse(short, final=False) if over else None
    # Whoever was granted a trial will have run it; all else may be given back.
    spent = short.used + (short.granted if short.resource == "n_trials" else 0.0)
    over = spent + short.wanted > short.quota * _SLACK
    return refuse(short, final=True) if over else None


def too_late(short: Shortage) -> Refusal:
    """Return the refusal of a trial that waited until its study ended."""
    device = short.resource.startswith(DEVICE)
    title = get_resource("gpu_memory" if device else short.resource).title
    reason = f"The study ended while the trial waited for {title} that others hold."
    return replace(refuse(short, final=False), reason=reason, late=True)


def beyond(
    quota: Quota,
    used: Mapping[str, float],
    footprint: Mapping[str, float],
    granted: Mapping[str, float] | None = None,
) -> Refusal | None:
    """Return the refusal when too little of a total quota is left for any trial, else None.

    Args:
        quota: The study's quota.
        used: What was used, by resource.
        footprint: Upper bounds of what a trial uses, where known; only its clock time counts
            here, as trials that overlap share it and there is nothing to reserve.
        granted: What running trials were granted, by resource; without it, only what is used
            up for good counts.
    """
    for name, total in quota.totals.items():
        least = 1.0 if name == "n_trials" else LEAST_SHARE * total
        if name == "wall_time":
            least = footprint.get(name, least)
        held = (granted or {}).get(name, 0.0)
        spent = used.get(name, 0.0) + (held if name == "n_trials" else 0.0)
        if spent + least > total * _SLACK:
            return refuse(Shortage(name, least, used.get(name, 0.0), held, total), final=True)
    return None


def _sentence(short: Shortage) -> str:
    device = short.resource.startswith(DEVICE)

    def text(amount: float) -> str:
        return format_amount("gpu_memory" if device else short.resource, amount)

    if device:
        gpu = short.resource.removeprefix(DEVICE)
        return f"It would hold {text(short.wanted)} of {gpu}, which has {text(short.quota)}."
    title = get_resource(short.resource).title
    if is_held(short.resource):
        held = f"It would hold {text(short.wanted)} of {title}"
        return f"{held}, over the quota of {text(short.quota)}."
    if short.resource == "n_trials":
        running = f" and {text(short.reserved)} still run" if short.reserved > 0 else ""
        return (
            f"The quota of {text(short.quota)} trials is used up: {text(short.used)} have "
            f"run{running}."
        )
    reserved = f" and {text(short.reserved)} reserved" if short.reserved > 0 else ""
    spent = f"{text(short.used)} used{reserved}"
    if short.used + short.wanted > short.quota * _SLACK:
        return f"The quota of {text(short.quota)} of {title} is used up: {spent}."
    return (
        f"The quota of {text(short.quota)} of {title} has no room for another "
        f"{text(short.wanted)}: {spent}."
    )
