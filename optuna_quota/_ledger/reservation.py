"""The reservation in a trial's row, the worker that wrote it, and whether that one is alive.

Each worker writes the rows of its own trials only, the whole reservation in one attribute, so that
any storage changes it at once or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
import os
from pathlib import Path
import platform
import sys
from typing import Any

from optuna_quota._records import number, plain_number


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
    """Return when a process started; None if it is dead, reaped or not.

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
    import psutil

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
    """Return whether a worker is alive; None if that can't be known from this process."""
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
    # What it claims instead while that is being settled, else empty.
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
    # What an orphaned trial is charged for, as its usage was not measured.
    charged: Mapping[str, float] = field(default_factory=dict)
    gpu: str | None = None  # UUIDs of the GPUs that it was given, separated by commas
    study: str | None = None  # The stamp of the study that it was written in


# Keys of the attribute, by field.
_AMOUNTS = {
    "granted": "granted",
    "asked": "asked",
    "queued_for": "waits",
    "used": "used",
    "charged": "charged",
}


def reservation_object(reservation: Reservation) -> dict[str, Any]:
    """Return a reservation as a JSON object, without what is empty or unknown."""
    found: dict[str, Any] = {"trial": reservation.trial_id}
    for name, key in _AMOUNTS.items():
        amounts = getattr(reservation, name)
        if amounts:
            found[key] = {resource: plain_number(value) for resource, value in amounts.items()}
    optional = {
        "began": None if reservation.began is None else round(reservation.began, 3),
        "beat": None if reservation.beat is None else round(reservation.beat, 3),
        "every": None if reservation.every == HEARTBEAT else reservation.every,
        "study": reservation.study,
        "gpu": reservation.gpu,
        "worker": None if reservation.worker is None else dict(vars(reservation.worker)),
    }
    found.update({name: value for name, value in optional.items() if value is not None})
    return found


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
