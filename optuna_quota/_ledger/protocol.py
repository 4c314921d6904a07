"""How workers that share nothing but trial rows never admit more than a quota.

A trial **asks**: it writes what it wants into its own row, reads all rows, and decides by what it
sees. Whoever of two wrote later sees the other's claim, so at least one of them counts both. Where
both do, the trial with the higher number gives way and the lower one waits for that:

* What is used, what others were granted and all that others ask for leaves room: **grant**.
* It leaves room but for what higher numbers ask for: **wait** and read again; they give way, or
  they had not seen this claim and were granted.
* Else **withdraw**, and perhaps keep a place in the queue, which higher numbers respect.

A wait is only ever for a higher number, and a trial asks for everything at once and holds nothing
while it waits in the queue, so there is no cycle to wait in. Of all that ask the lowest number
never gives way to another claim, so someone is admitted wherever there is room. This module is
pure: ``tests/ledger_tests/test_protocol.py`` searches all interleavings of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Literal
from typing import TypeVar

from optuna_quota._ledger.reservation import Reservation
from optuna_quota._resources import HELD_RESOURCES


# Sums of floats differ in their last bits by their order.
_TOLERANCE = 1e-9

# Memory of one GPU is a resource by this prefix and its UUID.
DEVICE = "gpu:"

Action = Literal["grant", "wait", "withdraw"]


@dataclass(frozen=True)
class Claim:
    """One running trial as the protocol sees it; amounts by resource.

    Attributes:
        number: The trial's number: the lower goes first.
        machine: Where it runs; what is held counts by machine.
        granted: What it holds for sure.
        asked: The whole of what it would hold instead, while that is being settled.
        waits: What its place in the queue is for.
    """

    number: int
    machine: str = ""
    granted: Mapping[str, float] = field(default_factory=dict)
    asked: Mapping[str, float] = field(default_factory=dict)
    waits: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Want:
    """How much of one resource a trial wants: any grant from ``least`` to ``most`` will do."""

    least: float
    most: float


@dataclass(frozen=True)
class Shortage:
    """Why a trial was not granted what it wants.

    Attributes:
        resource: The resource that is short.
        wanted: The least that would have done.
        used: What finished trials used of it.
        reserved: What others hold, ask for or keep a place for.
        quota: The quota.
        granted: The part of ``reserved`` that others were granted.
    """

    resource: str
    wanted: float
    used: float
    reserved: float
    quota: float
    granted: float = 0.0


@dataclass(frozen=True)
class Decision:
    """What a trial does next, with what it was granted or what is short."""

    action: Action
    granted: Mapping[str, float] = field(default_factory=dict)
    shortage: Shortage | None = None


def is_held(resource: str) -> bool:
    """Return whether a resource is held at one moment on one machine, and not used up."""
    return resource in HELD_RESOURCES or resource.startswith(DEVICE)


Row = TypeVar("Row", Claim, Reservation)


def claimed(row: Row, wants: Mapping[str, Want]) -> Row:
    """Return a row as it reads while it asks."""
    return replace(row, asked={**row.granted, **{name: w.most for name, w in wants.items()}})


def answered(row: Row, decision: Decision) -> Row:
    """Return a row that asked as it reads after a decision other than to wait."""
    if decision.action == "withdraw":
        return replace(row, asked={})
    return replace(row, granted={**row.granted, **decision.granted}, asked={}, waits={})


def queued(row: Row, wants: Mapping[str, Want]) -> Row:
    """Return a row as it reads while it waits for others to give back what they hold."""
    return replace(row, waits={name: want.least for name, want in wants.items()})


def decide(
    me: Claim,
    wants: Mapping[str, Want],
    claims: Iterable[Claim],
    used: Mapping[str, float],
    quota: Mapping[str, float],
    *,
    queue: bool = True,
) -> Decision:
    """Return what a trial does by what it read after it had written its claim.

    Args:
        me: The trial; it may be among ``claims``.
        wants: What it wants by resource, the whole and not what it wants in addition; it wrote
            ``most`` into its row.
        claims: All running trials.
        used: What finished trials used, by resource.
        quota: The quota by resource; resources without one are granted as wanted.
        queue: Whether places in the queue of lower numbers are respected; a trial that runs
            already goes before those that wait.
    """
    others = [claim for claim in claims if claim.number != me.number]
    granted: dict[str, float] = {}
    waiting: Shortage | None = None
    for resource, want in wants.items():
        if resource not in quota:
            granted[resource] = want.most
            continue
        seen = _Seen.of(resource, me, others, used, queue=queue)
        left = quota[resource] - seen.firm - seen.lower
        slack = _TOLERANCE * quota[resource]
        spent = used.get(resource, 0.0)
        held = seen.firm - spent
        shortage = Shortage(
            resource, want.least, spent, held + seen.lower, quota[resource], granted=held
        )
        if want.least > left + slack:
            return Decision("withdraw", shortage=shortage)
        if want.least > left - seen.higher + slack:
            waiting = shortage
        granted[resource] = min(want.most, max(want.least, left - seen.higher))
    if waiting is not None:
        return Decision("wait", shortage=waiting)
    return Decision("grant", granted)


@dataclass(frozen=True)
class _Seen:
    firm: float
    lower: float
    higher: float

    @classmethod
    def of(
        cls,
        resource: str,
        me: Claim,
        others: Iterable[Claim],
        used: Mapping[str, float],
        *,
        queue: bool,
    ) -> _Seen:
        firm, lower, higher = used.get(resource, 0.0), 0.0, 0.0
        for other in others:
            if is_held(resource) and other.machine != me.machine:
                continue
            held = other.granted.get(resource, 0.0)
            firm += held
            if other.number > me.number:
                higher += max(0.0, other.asked.get(resource, 0.0) - held)
                continue
            place = other.waits.get(resource, 0.0) if queue else 0.0
            lower += max(0.0, other.asked.get(resource, 0.0) - held, place - held)
        return cls(firm, lower, higher)
