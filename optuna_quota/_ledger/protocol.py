"""The protocol by which workers that share only trial rows never admit more than a quota.

A trial **asks**: it writes a claim into its own row, reads all rows, and decides by what it sees.
The later writer of two sees the other's claim, so at least one of them counts both. If both do,
the trial with the higher number gives way and the lower one waits for that:

* There is room in addition to what is used, granted and claimed by others: **grant**.
* There is room except for claims of higher numbers: **wait** and read again. They give way, or
  they had not seen this claim and were granted.
* Else **withdraw**, and perhaps keep a place in the queue, which higher numbers respect.

A trial only ever waits for a higher number. It asks for everything at once and holds nothing while
it is in the queue, so there is no deadlock. The lowest number of all that ask never gives way to
another claim, so a trial is admitted whenever there is room. The module does no I/O, so that
``tests/ledger_tests/test_protocol.py`` can search all interleavings of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from optuna_quota._ledger.reservation import Reservation
from optuna_quota._metering.breach import quota_bound
from optuna_quota._resources import HELD_RESOURCES


# The memory of one GPU is a resource named by this prefix and the GPU's UUID.
DEVICE = "gpu:"

Action = Literal["grant", "wait", "withdraw"]


@dataclass(frozen=True)
class Claim:
    """One running trial as the protocol sees it; amounts by resource."""

    number: int  # The trial's number; the lower goes first
    machine: str = ""  # Where it runs; what is held counts by machine
    granted: Mapping[str, float] = field(default_factory=dict)
    # What it would hold in all if its claim is granted.
    asked: Mapping[str, float] = field(default_factory=dict)
    queued_for: Mapping[str, float] = field(default_factory=dict)  # What it waits for in the queue


@dataclass(frozen=True)
class ResourceRequest:
    """How much of one resource a trial requests: it accepts any grant from least to most."""

    least: float
    most: float


@dataclass(frozen=True)
class Shortage:
    """Why a trial was not granted what it requests."""

    resource: str
    wanted: float  # The least that it would have accepted
    used: float  # What finished trials used of it
    reserved: float  # What others hold, ask for or keep a place for
    quota: float
    granted: float = 0.0  # The part of ``reserved`` that others were granted


@dataclass(frozen=True)
class Decision:
    """What a trial does next, with its grant or the shortage."""

    action: Action
    granted: Mapping[str, float] = field(default_factory=dict)
    shortage: Shortage | None = None


def is_held(resource: str) -> bool:
    """Return whether a resource is held at one moment on one machine, not used up."""
    return resource in HELD_RESOURCES or resource.startswith(DEVICE)


Row = TypeVar("Row", Claim, Reservation)


def with_claim(row: Row, requests: Mapping[str, ResourceRequest]) -> Row:
    """Return a row with a claim for requests."""
    most = {name: request.most for name, request in requests.items()}
    return replace(row, asked={**row.granted, **most})


def with_decision(row: Row, decision: Decision) -> Row:
    """Return a row after a decision other than to wait."""
    if decision.action == "withdraw":
        return replace(row, asked={})
    return replace(row, granted={**row.granted, **decision.granted}, asked={}, queued_for={})


def with_queue_place(row: Row, requests: Mapping[str, ResourceRequest]) -> Row:
    """Return a row with a place in the queue until others release what they hold."""
    return replace(row, queued_for={name: request.least for name, request in requests.items()})


def decide(
    me: Claim,
    requests: Mapping[str, ResourceRequest],
    claims: Iterable[Claim],
    used: Mapping[str, float],
    quota: Mapping[str, float],
    *,
    queue: bool = True,
) -> Decision:
    """Return what a trial does, by the rows that it read after it had written its claim.

    It requests amounts in all and not in addition, and claimed the most. Resources without a
    quota are granted as requested. A trial that already runs goes before those in the queue.
    """
    others = [claim for claim in claims if claim.number != me.number]
    granted: dict[str, float] = {}
    waiting: Shortage | None = None
    for resource, request in requests.items():
        if resource not in quota:
            granted[resource] = request.most
            continue
        held, lower, higher = _reserved_by_others(resource, me, others, queue=queue)
        spent, total = used.get(resource, 0.0), quota[resource]
        left = total - spent - held - lower
        slack = quota_bound(total) - total
        shortage = Shortage(resource, request.least, spent, held + lower, total, granted=held)
        if request.least > left + slack:
            return Decision("withdraw", shortage=shortage)
        if request.least > left - higher + slack:
            waiting = shortage
        granted[resource] = min(request.most, max(request.least, left - higher))
    if waiting is not None:
        return Decision("wait", shortage=waiting)
    return Decision("grant", granted)


def _reserved_by_others(
    resource: str, me: Claim, others: Iterable[Claim], *, queue: bool
) -> tuple[float, float, float]:
    """Return what others hold, and what lower and higher numbers ask for beyond that."""
    held = lower = higher = 0.0
    for other in others:
        if is_held(resource) and other.machine != me.machine:
            continue
        granted = other.granted.get(resource, 0.0)
        held += granted
        asked = max(0.0, other.asked.get(resource, 0.0) - granted)
        if other.number > me.number:
            higher += asked
        else:
            place = other.queued_for.get(resource, 0.0) if queue else 0.0
            lower += max(asked, place - granted)
    return held, lower, higher
