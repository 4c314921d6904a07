"""What a trial's own row says of its place in the ledger.

Each worker writes the rows of its own trials only, the whole reservation in one attribute, so that
any storage changes it at once or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from functools import lru_cache
import math
import os
from pathlib import Path
import platform
import sys
from typing import Any

from optuna_quota._records import number
from optuna_quota._records import plain_number


_DEAD = frozenset("ZXx")


def this_worker() -> Worker:
    """Return this process; after a fork the child is another."""
    return _worker(os.getpid())


@lru_cache(maxsize=8)
def _worker(pid: int) -> Worker:
    return Worker(platform.node(), _machine(), _space(), pid, process_start(pid) or 0.0)


def process_start(pid: int) -> float | None:
    """Return when a process started, None when there is none or it is dead but not reaped.

    In kernel ticks since the boot on Linux: they don't move when the clock is set.

    Raises:
        PermissionError: If that can't be known.
    """
    if sys.platform.startswith("linux"):
        return _start_on_linux(pid)
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return round(process.create_time(), 2)
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied as error:
        raise PermissionError(f"Process {pid} can't be looked at.") from error


def _start_on_linux(pid: int) -> float | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name of the program, in parentheses, may hold anything; what follows starts at field 3.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in _DEAD else float(fields[19])


def is_alive(worker: Worker) -> bool | None:
    """Return whether a worker lives, None when that can't be known from here."""
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
    # Another boot is another machine: nothing that ran before it runs now.
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
class Worker:
    """The process that runs a trial, told apart from every other one.

    Attributes:
        host: The name of the machine, for people.
        machine: What tells one machine, and one boot of it, from every other.
        space: The process-id namespace: a pid means something only inside the same one.
        pid: The process id.
        started: When the process started, as its machine counts; a reused pid has another.
    """

    host: str
    machine: str
    space: str = ""
    pid: int = 0
    started: float = 0.0

    @property
    def label(self) -> str:
        """The worker in a word, for people."""
        return f"{self.host}:{self.pid}"


@dataclass(frozen=True)
class Reservation:
    """What a running trial holds, asks for or waits for; amounts in SI base units by resource.

    Attributes:
        trial_id: The trial it was written for: attributes get copied into other rows.
        granted: What it may use or hold, settled with all other workers.
        asked: What it would have instead, while that is being settled; empty otherwise.
        waits: The place it keeps in the queue while it waits; empty otherwise.
        worker: Who runs it.
        began: When it was granted, seconds since the epoch on its machine's clock.
        beat: When its worker last wrote, on the same clock.
        used: What it had used by then.
        charged: What it is charged for where no usage was measured: it ended without its worker.
        gpu: The GPU it was given.
        study: What tells the study that it was written in from others; None where it does not.
    """

    trial_id: int = -1
    granted: Mapping[str, float] = field(default_factory=dict)
    asked: Mapping[str, float] = field(default_factory=dict)
    waits: Mapping[str, float] = field(default_factory=dict)
    worker: Worker | None = None
    began: float | None = None
    beat: float | None = None
    used: Mapping[str, float] = field(default_factory=dict)
    charged: Mapping[str, float] = field(default_factory=dict)
    gpu: str | None = None
    study: str | None = None


_AMOUNTS = ("granted", "asked", "waits", "used", "charged")
_TIMES = ("began", "beat")


def reservation_object(reservation: Reservation) -> dict[str, Any]:
    """Return a reservation as a JSON object; what is empty or unknown is left out."""
    found: dict[str, Any] = {"trial": reservation.trial_id}
    for name in _AMOUNTS:
        amounts = getattr(reservation, name)
        if amounts:
            found[name] = {key: plain_number(value) for key, value in amounts.items()}
    for name in _TIMES:
        if getattr(reservation, name) is not None:
            found[name] = round(getattr(reservation, name), 3)
    if reservation.study is not None:
        found["study"] = reservation.study
    if reservation.gpu is not None:
        found["gpu"] = reservation.gpu
    if reservation.worker is not None:
        found["worker"] = dict(vars(reservation.worker))
    return found


def parse_reservation(value: Any, trial_id: int, study: str | None = None) -> Reservation | None:
    """Return a row's reservation without what is malformed; None if it was copied from elsewhere.

    Args:
        value: The attribute.
        trial_id: The row's id: a retried trial has a copy of another row's attributes.
        study: The study's stamp: a copied study may have rows with the same ids.
    """
    if not isinstance(value, Mapping) or value.get("trial") != trial_id:
        return None
    gpu, stamp = value.get("gpu"), value.get("study")
    if study is not None and stamp is not None and stamp != study:
        return None
    return Reservation(
        trial_id,
        granted=_amounts(value.get("granted")),
        asked=_amounts(value.get("asked")),
        waits=_amounts(value.get("waits")),
        worker=_parse_worker(value.get("worker")),
        began=number(value.get("began")),
        beat=number(value.get("beat")),
        used=_amounts(value.get("used")),
        charged=_amounts(value.get("charged")),
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
    texts = {name: value.get(name) for name in ("host", "machine", "space")}
    if not all(isinstance(text, str) for text in texts.values()):
        return None
    pid, started = number(value.get("pid")), number(value.get("started"))
    return Worker(
        **{name: str(text) for name, text in texts.items()},
        pid=int(pid) if pid is not None and math.isfinite(pid) else 0,
        started=started or 0.0,
    )
