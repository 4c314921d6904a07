"""Who this process is, and whether another one on this machine still lives."""

from __future__ import annotations

from functools import lru_cache
import os
from pathlib import Path
import platform
import sys

from optuna_quota._ledger.reservation import Worker


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
