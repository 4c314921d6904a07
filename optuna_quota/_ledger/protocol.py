"""The protocol by which workers that share only trial rows never exceed a quota together.

A trial **asks**: it writes a claim into its own row, reads all rows, and decides by them. Of two
trials, the later writer sees the other's claim, so at least one of them counts both. If both do,
the trial with the higher number gives way, and the lower one waits for that:

* There is room in addition to what is used, granted and claimed by others: **grant**.
* There is room except for claims of higher numbers: **wait** and read again. They give way, or
  they had not seen this claim and were granted.
* Else **withdraw**, and perhaps keep a place in the queue, which higher numbers respect.

A trial waits only for higher numbers. It asks for everything at once and holds nothing while it is
in the queue, so there is no deadlock. The lowest number of those that ask never gives way, so a
trial is admitted whenever there is room. :func:`decide` does no I/O, so that
``tests/ledger_tests/test_protocol.py`` can check all interleavings.

Each worker writes only rows of its own trials, the whole reservation in one attribute, which any
storage changes atomically.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
import os
from pathlib import Path
import platform
import sys
from typing import Any, Literal, TypeVar
import zlib

import psutil

from optuna_quota._metering.breach import quota_bound
from optuna_quota._metering.host import DEVICE
from optuna_quota._records import number, plain_number
from optuna_quota._resources import HELD_RESOURCES


# Seconds between two heartbeats of a worker.
HEARTBEAT = 30.0

_DEAD = frozenset("ZXx")


@dataclass(frozen=True)
class Worker:
    """A process that runs trials."""

    host: str  # Name of the machine, for display
    machine: str  # Identifier of one boot of one machine
    space: str = ""  # The PID namespace in which ``pid`` is valid
    pid: int = 0
    # When the process started, as its machine counts; a reused pid has another.
    started: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.host}:{self.pid}"


def this_worker() -> Worker:
    return _worker(os.getpid())


@lru_cache(maxsize=8)
def _worker(pid: int) -> Worker:
    return Worker(platform.node(), _machine(), _space(), pid, process_start(pid) or 0.0)


def process_start(pid: int) -> float | None:
    """Return when a process started; None if it is dead, even if not yet reaped.

    On Linux in kernel ticks since the boot, which don't change when the clock is set. Raises
    PermissionError if the process can't be inspected.
    """
    if sys.platform.startswith("linux"):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The program's name, in parentheses, may have any character; field 3 comes after it.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in _DEAD else float(fields[19])
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return round(process.create_time(), 2)
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied as error:
        raise PermissionError(f"Process {pid} can't be inspected.") from error


def is_alive(worker: Worker) -> bool | None:
    """Return whether a worker is alive; None if this process can't see it."""
    here = this_worker()
    if worker == here:
        return True
    if (worker.machine, worker.space) != (here.machine, here.space) or not worker.pid:
        return None
    try:
        started = process_start(worker.pid)
    except PermissionError:
        return None
    return started is not None and started == worker.started


@lru_cache(maxsize=1)
def _machine() -> str:
    # Another boot is another machine: no process survives it.
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import uuid

        return f"{platform.node()}-{uuid.getnode():x}"


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@dataclass(frozen=True)
class Reservation:
    """What a running trial holds, asks for or waits for; amounts in SI base units by resource."""

    trial_id: int = -1  # The trial that it was written for: attributes get copied into other rows
    # What it may use or hold, settled with all other workers.
    granted: Mapping[str, float] = field(default_factory=dict)
    # What it claims instead while it asks, else empty.
    asked: Mapping[str, float] = field(default_factory=dict)
    # Its place in the queue while it waits, else empty.
    queued_for: Mapping[str, float] = field(default_factory=dict)
    worker: Worker | None = None  # The process that runs it
    # When it was granted, in seconds since the epoch on the study's clock: that of its machine,
    # unless another worker's was ahead.
    began: float | None = None
    beat: float | None = None  # When its worker last wrote, on the same clock
    every: float = HEARTBEAT  # Seconds after which its worker writes again while it runs
    used: Mapping[str, float] = field(default_factory=dict)  # Its usage at that time
    # What a trial is charged for whose row has no usage: an orphaned or a rejected one.
    charged: Mapping[str, float] = field(default_factory=dict)
    gpu: str | None = None  # UUIDs of the GPUs that it was given, separated by commas
    study: str | None = None  # The stamp of the study that it was written in


# Keys of the attribute, by field.
_AMOUNTS = {n: n for n in ("granted", "asked", "used", "charged")} | {"queued_for": "waits"}


def reservation_object(reservation: Reservation) -> dict[str, Any]:
    """Return a reservation as a JSON object, without what is empty or unknown."""
    own = vars(reservation)
    found: dict[str, Any] = {"trial": reservation.trial_id, "worker": None}
    for name, key in _AMOUNTS.items():
        found[key] = {resource: plain_number(value) for resource, value in own[name].items()}
    for name in ("began", "beat"):
        found[name] = None if own[name] is None else round(own[name], 3)
    found["every"] = None if reservation.every == HEARTBEAT else reservation.every
    found |= {name: own[name] for name in ("study", "gpu")}
    if reservation.worker is not None:
        found["worker"] = dict(vars(reservation.worker))
    return {name: value for name, value in found.items() if value not in (None, {})}


def study_stamp(study_name: str) -> str:
    """Return a short mark of a study, stored in its reservations."""
    return f"{zlib.crc32(study_name.encode(errors='replace')):08x}"


def parse_reservation(value: Any, trial_id: int, study: str | None = None) -> Reservation | None:
    """Return a row's reservation without what is malformed; None if it was copied.

    A retried trial has a copy of another row's attributes, and a copied study, which has
    another stamp, may have rows with the same ids.
    """
    if not isinstance(value, Mapping) or value.get("trial") != trial_id:
        return None
    gpu, stamp = value.get("gpu"), value.get("study")
    if study is not None and stamp is not None and stamp != study:
        return None
    return Reservation(
        trial_id,
        **{name: _amounts(value.get(key)) for name, key in _AMOUNTS.items()},
        worker=_parse_worker(value.get("worker")),
        began=number(value.get("began")),
        beat=number(value.get("beat")),
        every=number(value.get("every")) or HEARTBEAT,
        gpu=gpu if isinstance(gpu, str) else None,
        study=stamp if isinstance(stamp, str) else None,
    )


def _amounts(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        return {}
    amounts = {str(key): number(amount) for key, amount in value.items()}
    return {key: amount for key, amount in amounts.items() if amount is not None}


def _parse_worker(value: Any) -> Worker | None:
    if not isinstance(value, Mapping):
        return None
    host, machine, space = (value.get(name) for name in ("host", "machine", "space"))
    if not (isinstance(host, str) and isinstance(machine, str) and isinstance(space, str)):
        return None
    pid, started = number(value.get("pid")), number(value.get("started"))
    return Worker(host, machine, space, int(pid or 0), started or 0.0)


Action = Literal["grant", "wait", "withdraw"]


@dataclass(frozen=True)
class Claim:
    """What a running trial holds or claims; amounts by resource."""

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
    quota: float
    used: float = 0.0  # What finished trials used of it
    reserved: float = 0.0  # What others hold, ask for or keep a place for
    granted: float = 0.0  # The part of ``reserved`` that others were granted


@dataclass(frozen=True)
class Decision:
    """What a trial does next, with its grant or the shortage."""

    action: Action
    granted: Mapping[str, float] = field(default_factory=dict)
    shortage: Shortage | None = None


def is_held(resource: str) -> bool:
    """Return whether a resource is held on one machine at one moment, not used up."""
    return resource in HELD_RESOURCES or resource.startswith(DEVICE)


Row = TypeVar("Row", Claim, Reservation)


def with_claim(row: Row, requests: Mapping[str, ResourceRequest]) -> Row:
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
    """Return what a trial does next, given the rows that it read after it wrote its claim.

    It requests amounts in all, not in addition to its grant, and claimed the most. Resources
    without a quota are granted as requested. A running trial goes before those in the queue.
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
        shortage = Shortage(resource, request.least, total, spent, held + lower, granted=held)
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
