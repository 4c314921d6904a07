"""Computes how much of a quota a trial requests, and when it is refused. No I/O.

With a known footprint, a trial requests its upper bound, all or nothing. Of a total of which only
a limit is known, or nothing, a fixed reservation would either starve the others or not bound the
trial, so it requests a slice of what is left, and further slices as it uses them up; a slice is
never more than the limit. Slices shrink with what is left, so that little is still reserved when a
quota runs out.

What is held at one moment is promised as a whole, since a trial stopped for it has run in vain:
the upper bound of the footprint, or the limit, or else an even share of the quota. If nothing is
known, the trial is alone with the quota until its footprint is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
import math
from types import MappingProxyType
from typing import Literal

from optuna_quota._ledger.protocol import Claim, DEVICE, is_held, ResourceRequest, Shortage
from optuna_quota._metering import extension_threshold
from optuna_quota._metering.breach import quota_bound
from optuna_quota._resources import (
    CHARGED_RESOURCES,
    format_amount,
    get_resource,
    HELD_RESOURCES,
    LIMIT_RESOURCES,
    Limits,
    Quota,
    RESOURCES,
)


RequestedBy = Literal["optimize", "ask", "ask in a batch"]

# A smaller share of a quota is not worth running for: the quota counts as used up.
_MIN_SHARE = 1e-3
# The smallest share of what is held at one moment with which a trial of unknown needs starts.
_MIN_HELD_SHARE = 1 / 8
# What is held is released once the point is known, if it needs less than this part of it.
RELEASE_BELOW = 0.9


def upper_bounds(amounts: Mapping[str, float], quota: Quota) -> dict[str, float]:
    """Add the time and the cost of a trial to bounds of its usage."""
    bounds = dict(amounts)
    if "wall_time" in amounts:
        bounds["trial_time"] = amounts["wall_time"]
    if quota.prices and all(name in bounds for name in quota.prices):
        bounds["cost"] = quota.price(bounds)
    return bounds


def initial_requests(
    quota: Quota,
    limits: Limits,
    footprint: Mapping[str, float],
    free: Mapping[str, float],
    running: int,
    *,
    bounds: Mapping[str, float] = MappingProxyType({}),
    needs: Mapping[str, float] = MappingProxyType({}),
    n_jobs: int | None = None,
    requested_by: RequestedBy = "optimize",
) -> dict[str, ResourceRequest]:
    """Return what a trial requests before it runs.

    Args:
        quota: The study's quota.
        limits: The trial's limits.
        footprint: Upper bounds of its usage, where the user stated them.
        free: What is neither used nor reserved, by resource, as last read.
        running: Number of other running trials, as last read.
        bounds: Upper bounds of what it will hold at one moment, where they were learned.
        needs: The least that any point is expected to use, where that is known.
        n_jobs: Number of trials that run at once, if known: without a limit or a bound, each is
            promised an even share of what may be held at one moment.
        requested_by: A thread that calls ``ask`` may do so several times before any ``tell``.
            A trial of unknown needs then takes a part of what is free only. In a batch, where
            waiting for the others could be a deadlock, less than the bound is enough.
    """
    ceilings = upper_bounds(limits.amounts(), quota)
    expected, least_needs = upper_bounds(footprint, quota), upper_bounds(needs, quota)
    requests: dict[str, ResourceRequest] = {}
    for resource, total in quota.amounts().items():
        if resource == "n_trials":
            requests[resource] = ResourceRequest(1, 1)
        elif resource == "wall_time":
            # Overlapping trials share it, so there is nothing to divide.
            continue
        elif resource in expected:
            bound = min(expected[resource], ceilings.get(resource, expected[resource]))
            requests[resource] = ResourceRequest(bound, bound)
        elif resource in HELD_RESOURCES:
            share = total if n_jobs is None else total / n_jobs
            known = [k[resource] for k in (ceilings, bounds) if resource in k] or [share]
            bound = min(total, *known)
            batch = requested_by == "ask in a batch"
            if batch or (requested_by == "ask" and bound == total):
                least = min(bound, 1.0 if resource == "cpu_cores" else _MIN_HELD_SHARE * total)
                room = free.get(resource, total)
                requests[resource] = ResourceRequest(least, _slice(room, running, least, bound))
            else:
                requests[resource] = ResourceRequest(bound, bound)
        else:
            most = ceilings.get(resource, math.inf)
            need = min(most, least_needs.get(resource, 0.0))
            least = max(min(most, _MIN_SHARE * total), need)
            ceiling = max(least, min(total, most))
            requests[resource] = ResourceRequest(
                least, _slice(free.get(resource, total), running, least, ceiling)
            )
    return requests


def extension_requests(
    quota: Quota,
    limits: Limits,
    granted: Mapping[str, float],
    needs: Mapping[str, float],
    free: Mapping[str, float],
    running: int,
    *,
    exactly: bool = False,
) -> dict[str, ResourceRequest]:
    """Return what a running trial requests when what it was granted runs low.

    Args:
        quota: The study's quota.
        limits: The trial's limits.
        granted: What it was granted, by resource.
        needs: Its usage of the resources that run low: the least it accepts in all.
        free: What is neither used nor reserved, by resource, as last read.
        running: Number of other running trials, as last read.
        exactly: Whether it requests no more than that.
    """
    ceilings = upper_bounds(limits.amounts(), quota)
    totals = quota.amounts()
    requests: dict[str, ResourceRequest] = {}
    for resource in needs.keys() & granted.keys() & totals.keys():
        total, held = totals[resource], granted[resource]
        room = min(total, max(held, ceilings.get(resource, total))) - held
        least = min(room, max(_MIN_SHARE * total, needs[resource] - held))
        if exactly:
            least = more = min(room, needs[resource] - held)
        if least > 0:
            more = least if exactly else _slice(free.get(resource, 0.0), running, least, room)
            requests[resource] = ResourceRequest(held + least, held + more)
    return requests


def revise_promise(
    quota: Quota,
    limits: Limits,
    granted: Mapping[str, float],
    bounds: Mapping[str, float],
    used: Mapping[str, float],
) -> tuple[dict[str, float], dict[str, float]]:
    """Return what a trial releases, and what it lacks, once its point is known.

    Args:
        quota: The study's quota.
        limits: The trial's limits.
        granted: What it was promised before.
        bounds: Upper bounds of what it will hold, by resource.
        used: The most it has held so far.

    Returns:
        The promises that become smaller, and the amounts that exceed what was promised.
    """
    smaller, larger = {}, {}
    for name in quota.held.keys() & granted.keys() & bounds.keys():
        bound = max(bounds[name], used.get(name, 0.0) / extension_threshold(name))
        bound = min(bound, quota.held[name], limits.amounts().get(name, bound))
        if bound < RELEASE_BELOW * granted[name]:
            smaller[name] = bound
        elif bound > granted[name]:
            larger[name] = bound
    return smaller, larger


def _slice(free: float, running: int, least: float, ceiling: float) -> float:
    return min(ceiling, max(least, free / (2 * (running + 1))))


@dataclass(frozen=True)
class Grant:
    """A trial was admitted.

    Attributes:
        left: What it may use for now, by resource, from its start; ``extend`` may raise it.
            ``wall_time`` is the seconds until the study's clock time is used up.
        gpu: UUIDs of the GPUs that it was given, separated by commas; None if it sees all.
    """

    left: Mapping[str, float] = field(default_factory=dict)
    gpu: str | None = None


@dataclass(frozen=True)
class Refusal:
    """A trial was not admitted.

    Attributes:
        resource: The resource that decided.
        reason: A sentence for the trial table.
        wanted: The least that it would have accepted.
        used: What finished trials used of it.
        reserved: What running trials hold of it.
        quota: The quota.
        final: Whether nothing more can be admitted to the study; if False, a smaller trial may.
        late: Whether the study ended while the trial waited.
        temporary: Whether a trial may be admitted once one that runs has ended.
    """

    resource: str
    reason: str
    wanted: float
    used: float
    reserved: float
    quota: float
    final: bool
    late: bool = False
    temporary: bool = False


def _refuse(shortage: Shortage, *, final: bool) -> Refusal:
    return Refusal(
        shortage.resource,
        _sentence(shortage),
        shortage.wanted,
        shortage.used,
        shortage.reserved,
        shortage.quota,
        final,
    )


def refuse_never_fitting(short: Shortage) -> Refusal | None:
    """Return a refusal if waiting for others can't help, None if it may."""
    if is_held(short.resource):
        over = short.wanted > quota_bound(short.quota)
        return _refuse(short, final=False) if over else None
    # A granted trial will count; everything else that is reserved may be released.
    spent = short.used + (short.granted if short.resource == "n_trials" else 0.0)
    over = spent + short.wanted > quota_bound(short.quota)
    return _refuse(short, final=True) if over else None


def refuse_study_ended(short: Shortage) -> Refusal:
    """Return the refusal of a trial that waited until its study ended."""
    device = short.resource.startswith(DEVICE)
    title = get_resource("gpu_memory" if device else short.resource).title
    reason = f"The study ended while this trial waited for {title} that other trials hold."
    return replace(_refuse(short, final=False), reason=reason, late=True)


def refuse_to_wait(short: Shortage, claims: Iterable[Claim], number: int) -> Refusal:
    """Return the refusal of a trial that must not wait for those that run.

    Args:
        short: What it would wait for.
        claims: All running trials.
        number: The trial.
    """
    others = ", ".join(str(claim.number) for claim in claims if claim.number != number)
    device = short.resource.startswith(DEVICE)
    title = get_resource("gpu_memory" if device else short.resource).title
    reason = f"Running trials ({others}) hold what is left of {title}: ask again after a `tell`."
    return replace(_refuse(short, final=False), reason=reason, temporary=True)


def refuse_exhausted(
    quota: Quota,
    used: Mapping[str, float],
    footprint: Mapping[str, float],
    granted: Mapping[str, float] | None = None,
    needs: Mapping[str, float] = MappingProxyType({}),
) -> Refusal | None:
    """Return a refusal if too little of a total is left for any trial, else None.

    Args:
        quota: The study's quota.
        used: Usage by resource.
        footprint: Upper bounds of a trial's usage, if known; only its clock time counts here,
            which overlapping trials share, so that it can't be reserved.
        granted: What running trials were granted, by resource.
        needs: The least that any point is expected to use, where that is known.
    """
    least_needs = upper_bounds(needs, quota)
    for name, total in quota.totals.items():
        least = 1.0 if name == "n_trials" else _MIN_SHARE * total
        least = max(least, least_needs.get(name, 0.0))
        if name == "wall_time":
            least = max(least, footprint.get(name, 0.0))
        held = (granted or {}).get(name, 0.0)
        spent = used.get(name, 0.0) + (held if name == "n_trials" else 0.0)
        if spent + least > quota_bound(total):
            return _refuse(Shortage(name, least, used.get(name, 0.0), held, total), final=True)
    return None


def _sentence(short: Shortage) -> str:
    is_device = short.resource.startswith(DEVICE)

    def text(amount: float) -> str:
        return format_amount("gpu_memory" if is_device else short.resource, amount)

    if is_device:
        gpu = short.resource.removeprefix(DEVICE)
        return f"It needs {text(short.wanted)} on {gpu}, which has {text(short.quota)}."
    title = get_resource(short.resource).title
    if is_held(short.resource):
        return f"It needs {text(short.wanted)} of {title}; the quota is {text(short.quota)}."
    if short.resource == "n_trials":
        running = f", {text(short.reserved)} running" if short.reserved > 0 else ""
        plural = "" if short.quota == 1 else "s"
        return (
            f"The quota of {text(short.quota)} trial{plural} is used up: "
            f"{text(short.used)} finished{running}."
        )
    reserved = f", {text(short.reserved)} reserved" if short.reserved > 0 else ""
    spent = f"{text(short.used)} used{reserved}"
    left, negligible = short.quota - short.used, 1.01 * _MIN_SHARE * short.quota
    if left < negligible or left < short.wanted <= negligible:
        return f"The quota of {text(short.quota)} of {title} is used up: {spent}."
    return (
        f"The quota of {text(short.quota)} of {title} has no room for another trial, which takes "
        f"at least {text(short.wanted)}: {text(short.used)} used, {text(max(0.0, left))} left."
    )


def describe_serial(short: Shortage | None, quota: Quota) -> str | None:
    """Return a log line if trials run one at a time as each may need a whole quota, else None."""
    if short is None or short.wanted < quota.held.get(short.resource, math.inf):
        return None
    title = get_resource(short.resource).title
    return (
        f"A trial may need the whole {title} quota, so trials run one at a time. "
        f"Set `Limits({short.resource}=…)` or `Strategy(n_jobs=…)` to run more at once."
    )


def describe_resumed(quota: Quota, used: Mapping[str, float]) -> str | None:
    """Return a log line on what a resumed study's trials have used, None before the first."""
    n_trials = int(used.get("n_trials", 0))
    parts = [
        f"{format_amount(name, used.get(name, 0.0))} of {format_amount(name, total)} "
        f"({get_resource(name).title})"
        for name, total in quota.totals.items()
    ]
    if not n_trials or not parts:
        return None
    trials = "1 earlier trial has" if n_trials == 1 else f"{n_trials} earlier trials have"
    return f"Resumed: {trials} used {', '.join(parts)} of the quota."


def deadlock_warning(
    number: int, shortage: Shortage | None, claims: Iterable[Claim], own: Collection[int]
) -> str | None:
    """Return a warning if a trial may wait for its own thread, None if others may make room.

    Args:
        number: The trial that waits.
        shortage: What it waits for.
        claims: All running trials.
        own: Numbers of those that the waiting thread got from ``ask``.
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
        "if it is also the one to call `tell`, this is a deadlock. Ask for fewer trials at once, "
        "or increase the quota."
    )


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
