"""Computes how much of a quota a trial requests, and when it is refused. No I/O.

With a known footprint, a trial requests its upper bound, all or nothing. Without one, a fixed
reservation of a total would either starve other trials or not bound this one. So it requests a
slice of what is left, at most its limit, and further slices as it uses them up. Slices shrink with
what is left, so that little is still reserved when a quota runs out.

Memory and other resources held at one moment are granted as a whole, as a trial that is stopped
for them has wasted its time: the upper bound of the footprint, or the limit, or else an even share
of the quota. If nothing is known, the trial gets the whole quota until its footprint is learned.

The memory of each GPU is a resource of its own, and a trial requests that of the GPUs with the
most room. It does not wait for what processes outside of the study hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
import math
from types import MappingProxyType
from typing import Literal

from optuna_quota._ledger.protocol import Claim, is_held, ResourceRequest, Shortage
from optuna_quota._limits import Limits, Quota
from optuna_quota._metering.breach import extension_threshold, quota_bound
from optuna_quota._metering.host import DEVICE, Gpu
from optuna_quota._resources import (
    CHARGED_RESOURCES,
    format_amount,
    get_resource,
    HELD_RESOURCES,
    LIMIT_RESOURCES,
    Resource,
)
from optuna_quota._units import counted, format_seconds


RequestedBy = Literal["optimize", "ask", "ask in a batch"]
# From what is free by resource, and the number of other running trials, to the smallest expected
# usage of any point.
Needs = Callable[[Mapping[str, float], int], Mapping[str, float]]
_NOTHING: Mapping[str, float] = MappingProxyType({})

# With less than this share left, a quota counts as used up.
_MIN_SHARE = 1e-3
# A trial of unknown footprint starts with at least this share of a quota on memory and the like,
# or of a GPU's memory.
_MIN_HELD_SHARE = 1 / 8
# A grant is reduced if the trial's point needs less than this share of it.
_RELEASE_BELOW = 0.9


def _with_time_and_cost(amounts: Mapping[str, float], quota: Quota) -> dict[str, float]:
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
    bounds: Mapping[str, float] = _NOTHING,
    needs: Mapping[str, float] = _NOTHING,
    n_jobs: int | None = None,
    requested_by: RequestedBy = "optimize",
) -> dict[str, ResourceRequest]:
    """Return what a trial requests before it runs, given what is free and how many others run.

    ``footprint`` has upper bounds that the user stated, ``bounds`` learned ones of memory and the
    like, ``needs`` the smallest expected usage of any point. Without limit and bound, each of
    ``n_jobs`` trials requests an even share of a quota on memory and the like.

    A thread may call ``ask`` several times before it calls ``tell``. Then a trial of unknown
    footprint requests only a part of what is free. In such a batch, where waiting for the others
    could be a deadlock, it accepts less than its bound.
    """
    ceilings = _with_time_and_cost(limits.amounts(), quota)
    expected = _with_time_and_cost(footprint, quota)
    least_needs = _with_time_and_cost(needs, quota)
    requests: dict[str, ResourceRequest] = {}
    for resource, total in quota.amounts().items():
        room = free.get(resource, total)
        if resource == "n_trials":
            requests[resource] = ResourceRequest(1, 1)
        elif resource == "wall_time":
            # Overlapping trials share it, so there is nothing to divide.
            continue
        elif resource in expected:
            bound = min(expected[resource], ceilings.get(resource, math.inf))
            requests[resource] = ResourceRequest(bound, bound)
        elif resource in HELD_RESOURCES:
            share = total / (n_jobs or 1)
            known = [k[resource] for k in (ceilings, bounds) if resource in k] or [share]
            least = bound = most = min(total, *known)
            if requested_by == "ask in a batch" or (requested_by == "ask" and bound == total):
                least = min(bound, 1.0 if resource == "cpu_cores" else _MIN_HELD_SHARE * total)
                most = _slice(room, running, least, bound)
            requests[resource] = ResourceRequest(least, most)
        else:
            most = ceilings.get(resource, math.inf)
            need = min(most, least_needs.get(resource, 0.0))
            least = max(min(most, _MIN_SHARE * total), need)
            ceiling = max(least, min(total, most))
            requests[resource] = ResourceRequest(least, _slice(room, running, least, ceiling))
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
    """Return what a running trial requests when its grant runs low.

    ``needs`` has its usage of the resources that run low: the least that it accepts in all, and
    with ``exactly`` also the most.
    """
    ceilings, totals = _with_time_and_cost(limits.amounts(), quota), quota.amounts()
    requests: dict[str, ResourceRequest] = {}
    for resource in needs.keys() & granted.keys() & totals.keys():
        total, held = totals[resource], granted[resource]
        room = min(total, max(held, ceilings.get(resource, total))) - held
        smallest = 0.0 if exactly else _MIN_SHARE * total
        least = min(room, max(smallest, needs[resource] - held))
        if least > 0:
            more = least if exactly else _slice(free.get(resource, 0.0), running, least, room)
            requests[resource] = ResourceRequest(held + least, held + more)
    return requests


def _slice(free: float, running: int, least: float, ceiling: float) -> float:
    return min(ceiling, max(least, free / (2 * (running + 1))))


@dataclass(frozen=True)
class GpuChoice:
    """Which GPUs one trial requests: those with the most room."""

    gpus: Sequence[Gpu]
    machine: str
    need: float | None  # bytes, evenly on all of the trial's GPUs; None if unknown
    count: int = 1
    # What all processes hold now, in bytes by UUID, where known.
    in_use: Mapping[str, float] = field(default_factory=dict)

    def request(self, claims: Iterable[Claim]) -> dict[str, ResourceRequest]:
        """Return the request for GPUs beside these claims; empty without GPUs."""
        here = [claim for claim in claims if claim.machine == self.machine]
        each = None if self.need is None else self.need / self.count
        room, usable = {}, {}
        for gpu in self.gpus:
            name = gpu.resource
            held = sum(max(c.granted.get(name, 0.0), c.asked.get(name, 0.0)) for c in here)
            # Only memory beyond all grants certainly belongs to other processes.
            outside = max(0.0, self.in_use.get(gpu.uuid, 0.0) - held)
            usable[gpu] = gpu.memory - outside
            room[gpu] = usable[gpu] - held

        def preference(gpu: Gpu) -> tuple[bool, float]:
            # A GPU full of other processes' memory comes last: no trial of the study will free it.
            return each is None or usable[gpu] >= each, room[gpu]

        requests = {}
        for gpu in sorted(self.gpus, key=preference, reverse=True)[: self.count]:
            least = _MIN_HELD_SHARE * gpu.memory if each is None else each
            most = max(least, room[gpu] / 2) if each is None else each
            requests[gpu.resource] = ResourceRequest(least, most)
        return requests

    def revise(
        self, requests: Mapping[str, ResourceRequest], number: int, claims: Iterable[Claim]
    ) -> dict[str, ResourceRequest] | None:
        """Return a new request if others ask for the same GPUs, None if there is no conflict.

        Of trials that ask at once, the lowest number chooses first. It asks again until the others
        have seen its claim, which they may have read the rows too early for.
        """
        others = [claim for claim in claims if claim.number != number]
        before = [each if each.number < number else replace(each, asked={}) for each in others]
        mine = self.request(before)
        if mine.keys() | self.request(others).keys() <= requests.keys():
            return None
        return {n: r for n, r in requests.items() if not n.startswith(DEVICE)} | mine


def find_gpus(granted: Mapping[str, float]) -> str | None:
    """Return the UUIDs of the GPUs in a grant as ``CUDA_VISIBLE_DEVICES`` takes them."""
    names = [name.removeprefix(DEVICE) for name in granted if name.startswith(DEVICE)]
    return ",".join(names) or None


def check_gpus_per_trial(gpus: Sequence[Gpu], count: int) -> None:
    """Raise ValueError if there are fewer than ``gpus_per_trial`` GPUs."""
    if not gpus or count == 1:
        return
    whole = [gpu for gpu in gpus if not gpu.uuid.startswith("MIG-")]
    if len(whole) < count:
        instances = "" if len(whole) == len(gpus) else "; a process can use one MIG instance only"
        raise ValueError(
            f"`gpus_per_trial` must be at most the {counted(len(whole), 'GPU')} that this worker "
            f"may use but got {count}{instances}."
        )


def revise_grant(
    quota: Quota,
    limits: Limits,
    granted: Mapping[str, float],
    expected: Mapping[str, float],
    used: Mapping[str, float] = _NOTHING,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return which grants to reduce and to raise, once the trial's point is known.

    ``expected`` has upper bounds of what it will hold, and its expected usage of totals; ``used``
    is its usage so far, as it may suggest its last parameter late.
    """
    smaller, larger = {}, {}
    needs, spent = _with_time_and_cost(expected, quota), _with_time_and_cost(used, quota)
    most = _with_time_and_cost(limits.amounts(), quota)
    for name in quota.amounts().keys() & granted.keys() & needs.keys():
        need = max(needs[name], spent.get(name, 0.0) / extension_threshold(name))
        need = min(need, most.get(name, math.inf), quota.held.get(name, math.inf))
        if need < _RELEASE_BELOW * granted[name] and (need > 0 or is_held(name)):
            smaller[name] = need
        elif need > granted[name]:
            larger[name] = need
    return smaller, larger


def left_for_trial(
    quota: Quota, granted: Mapping[str, float], free: Mapping[str, float]
) -> dict[str, float]:
    """Return what a trial may use of each resource without exceeding a total."""
    left: dict[str, float] = {}
    for name in quota.totals.keys() & granted.keys():
        amount, used = granted[name] + free.get(name, 0.0), CHARGED_RESOURCES.get(name, name)
        if name == "cost" and len(quota.prices) == 1:
            [(priced, price)] = quota.prices.items()
            amount, used = amount / price * 3600 if price else math.inf, CHARGED_RESOURCES[priced]
        if used in LIMIT_RESOURCES and amount < left.get(used, math.inf):
            left[used] = amount
    return left


@dataclass(frozen=True)
class Refusal(Shortage):
    """A trial was not admitted."""

    reason: str = ""  # A sentence for the trial table
    # Whether nothing more can be admitted to the study; if False, a smaller trial may.
    final: bool = False
    late: bool = False  # Whether the study ended while the trial waited
    temporary: bool = False  # Whether a trial may be admitted once one that runs has ended
    by_deadline: bool = False  # Whether it is this worker's deadline and no quota
    # Whether any trial would have been refused, so that an enqueued one may run later or elsewhere
    of_any: bool = False


def refuse_never_fitting(short: Shortage) -> Refusal | None:
    """Return a refusal if waiting for others can't help, None if it may."""
    held = is_held(short.resource)
    # A granted trial will count; everything else that is reserved may be released.
    spent = 0.0 if held else short.used
    spent += short.granted if short.resource == "n_trials" else 0.0
    if spent + short.wanted <= quota_bound(short.quota):
        return None
    return Refusal(**vars(short), reason=_describe(short), final=not held)


def refuse_study_ended(short: Shortage) -> Refusal:
    """Return the refusal of a trial that waited until its study ended."""
    title = _resource_of(short).title
    reason = f"The study ended while this trial waited for {title} that other trials hold."
    return Refusal(**vars(short), reason=reason, late=True, of_any=True)


def refuse_to_wait(short: Shortage, claims: Iterable[Claim], number: int) -> Refusal:
    """Return the refusal of a trial that must not wait for the running ones."""
    others = ", ".join(str(claim.number) for claim in claims if claim.number != number)
    title = _resource_of(short).title
    reason = f"Running trials ({others}) hold what is left of {title}: ask again after a `tell`."
    return Refusal(**vars(short), reason=reason, temporary=True, of_any=True)


def refuse_exhausted(
    quota: Quota,
    used: Mapping[str, float],
    footprint: Mapping[str, float],
    granted: Mapping[str, float] = _NOTHING,
    needs: Mapping[str, float] = _NOTHING,
) -> Refusal | None:
    """Return a refusal if too little of a total is left for any trial, else None.

    Of ``footprint``, only clock time counts here: overlapping trials share it, so it can't be
    reserved. ``needs`` has the smallest expected usage of any point.
    """
    least_needs = _with_time_and_cost(needs, quota)
    for name, total in quota.totals.items():
        least = 1.0 if name == "n_trials" else _MIN_SHARE * total
        least = max(least, least_needs.get(name, 0.0))
        if name == "wall_time":
            least = max(least, footprint.get(name, 0.0))
        held, spent = granted.get(name, 0.0), used.get(name, 0.0)
        taken = spent + held if name == "n_trials" else spent
        if taken + least > quota_bound(total):
            short = Shortage(name, least, total, spent, held)
            return Refusal(**vars(short), reason=_describe(short), final=True, of_any=True)
    return None


def refuse_late(
    deadline: float, now: float, likely: float | None, margin: float
) -> Refusal | None:
    """Return the refusal of a trial that would most likely not finish before the deadline.

    Running trials are stopped ``margin`` seconds before the deadline; ``likely`` is the expected
    duration of a trial. ``deadline`` and ``now`` are in seconds since the epoch.
    """
    left = deadline - now
    if left > margin and (likely is None or likely <= left - margin):
        return None
    at = f"{datetime.fromtimestamp(deadline):%Y-%m-%d %H:%M:%S}"
    if left <= 0:
        reason = f"The deadline ({at}) has passed."
    elif left <= margin:
        reason = f"The deadline ({at}) is in {format_seconds(left)}."
    else:
        reason = (
            f"{format_seconds(left)} are left until the deadline ({at}), the last "
            f"{format_seconds(margin)} of them to stop trials, and a trial most likely takes "
            f"{format_seconds(likely or 0.0)}."
        )
    needed, left = likely or 0.0, max(0.0, left)
    return Refusal(
        "wall_time", needed, left, needed, reason=reason, final=True, by_deadline=True, of_any=True
    )


def _resource_of(short: Shortage) -> Resource:
    is_device = short.resource.startswith(DEVICE)
    return get_resource("gpu_memory" if is_device else short.resource)


def _describe(short: Shortage) -> str:
    resource = _resource_of(short)
    title, wanted, quota = resource.title, resource.format(short.wanted), short.quota
    total = resource.format(quota)
    if short.resource.startswith(DEVICE):
        gpu = short.resource.removeprefix(DEVICE)
        return f"The trial needs {wanted} of {title} on {gpu}, which has {total}."
    if is_held(short.resource):
        return f"The trial needs {wanted} of {title}, more than the whole quota of {total}."
    used, reserved = resource.format(short.used), resource.format(short.reserved)
    if short.resource == "n_trials":
        running = f", {reserved} running" if short.reserved > 0 else ""
        trials = counted(int(quota), "trial")
        return f"The quota of {trials} is used up: {used} finished{running}."
    left, negligible = quota - short.used, 1.01 * _MIN_SHARE * quota
    if left < negligible or left < short.wanted <= negligible:
        also = f", {reserved} reserved" if short.reserved > 0 else ""
        return f"The quota of {total} of {title} is used up: {used} used{also}."
    return (
        f"The quota of {total} of {title} has no room for another trial, which takes at least "
        f"{wanted}: {used} used, {resource.format(max(0.0, left))} left."
    )


def describe_serial(short: Shortage | None, quota: Quota) -> str | None:
    """Return a log line if trials run one at a time since each may need the whole quota."""
    if short is None or short.wanted < quota.held.get(short.resource, math.inf):
        return None
    return (
        f"A trial may need the whole {_resource_of(short).title} quota, so trials run one at a "
        f"time. Set `Limits({short.resource}=…)` or `Strategy(n_jobs=…)` to run more at once."
    )


def describe_resumed(quota: Quota, used: Mapping[str, float]) -> str | None:
    """Return a log line with the usage of a resumed study's trials, None without any."""
    n_trials = int(used.get("n_trials", 0))
    parts = [
        f"{format_amount(name, used.get(name, 0.0))} of {format_amount(name, total)} "
        f"({get_resource(name).title})"
        for name, total in quota.totals.items()
    ]
    if not n_trials or not parts:
        return None
    have = f"{counted(n_trials, 'earlier trial')} {'has' if n_trials == 1 else 'have'}"
    return f"Resumed: {have} used {', '.join(parts)} of the quota."


def deadlock_warning(
    number: int, short: Shortage, claims: Iterable[Claim], own: Collection[int]
) -> str | None:
    """Return a warning if all running trials are the thread's ``own`` from ``ask``, else None."""
    others = {claim.number for claim in claims} - {number}
    if not others or not others <= set(own):
        return None
    listed = ", ".join(str(other) for other in sorted(others))
    held_by = f"trial {listed} holds" if len(others) == 1 else f"trials {listed} hold"
    return (
        f"Trial {number} waits for {_resource_of(short).title} that {held_by}. The same thread "
        "asked for all of them: if it is also the one to call `tell`, this is a deadlock. Ask for "
        "fewer trials at once, or increase the quota."
    )
