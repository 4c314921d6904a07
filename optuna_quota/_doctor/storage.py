"""What a study's storage means for a quota over many workers."""

from __future__ import annotations

from dataclasses import dataclass
import time
from typing import TYPE_CHECKING

from optuna_quota import _units
from optuna_quota._doctor.finding import Finding


if TYPE_CHECKING:
    from optuna.storages import BaseStorage


_SLOW = 0.05


@dataclass(frozen=True)
class StorageFacts:
    """What was seen of a storage.

    Attributes:
        kind: Its class, and the database behind it.
        n_studies: How many studies it has.
        seconds: How long it took to list them.
        heartbeat: Whether workers can have a heartbeat in it.
        one_host: Whether only workers on one host can share it.
    """

    kind: str
    n_studies: int
    seconds: float
    heartbeat: bool
    one_host: bool


def read_storage(storage: BaseStorage) -> StorageFacts:
    """Return the facts of a storage that answers; what it raises comes through."""
    storage.get_all_studies()  # the first question pays for the connection
    start = time.perf_counter()
    n_studies = len(storage.get_all_studies())
    seconds = time.perf_counter() - start
    database = getattr(getattr(storage, "engine", None), "name", "")
    kind = type(storage).__name__ + (f" on {database}" if database else "")
    return StorageFacts(
        kind, n_studies, seconds, hasattr(storage, "record_heartbeat"), database == "sqlite"
    )


def judge_storage(facts: StorageFacts) -> list[Finding]:
    """Return whether it answers swiftly, and how it tells that a worker died."""
    studies = "1 study" if facts.n_studies == 1 else f"{facts.n_studies} studies"
    took = _units.format_seconds(facts.seconds)
    found = f"{facts.kind}, {studies}, listed in {took}."
    return [_judge_speed(found, facts.seconds), _judge_reach(facts), _judge_heartbeat(facts)]


def _judge_speed(found: str, seconds: float) -> Finding:
    if seconds <= _SLOW:
        return Finding("storage", "answers", "ok", found)
    return Finding(
        "storage",
        "answers",
        "degraded",
        found,
        "Each trial asks it several times to be admitted and to report.",
        "Bring the workers nearer to it.",
    )


def _judge_reach(facts: StorageFacts) -> Finding:
    if not facts.one_host:
        return Finding("storage", "workers", "ok", "Workers on many hosts can share it.")
    return Finding(
        "storage",
        "workers",
        "degraded",
        "SQLite: only workers on this host can share it.",
        "On a network file system its locks are not to be trusted.",
        "For workers on many hosts use PostgreSQL, MySQL, Redis, or Optuna's gRPC proxy.",
    )


def _judge_heartbeat(facts: StorageFacts) -> Finding:
    if facts.heartbeat:
        found = (
            "Optuna's heartbeat can tell that a worker died: RDBStorage(heartbeat_interval=60)."
        )
        return Finding("storage", "dead workers", "ok", found)
    return Finding(
        "storage",
        "dead workers",
        "degraded",
        "It has no heartbeat.",
        "What a dead worker on another host had reserved comes back when its lease ends.",
        "Use a database (RDBStorage) with heartbeat_interval, where that matters.",
    )
