"""Retry transient storage errors of idempotent calls, and survive restarts and full disks.

Reads are idempotent, and so are writes of an attribute or of the state of one's own row: the
second write finds what the first one left. Creating a row is not, and is left to Optuna.

Optuna keeps database connections and gives up on the first that is dead. Here each is pinged when
it is taken from the pool, and reconnected with backoff while the server is down. A transaction
that the restart interrupts still fails, since whether it was committed is unknown.

A full disk tears a line of a journal file. Optuna would append the next line to its rest, after
which the study is unreadable. Here the worker that holds the lock removes it.
"""

from __future__ import annotations

from collections.abc import Callable
import logging
import os
import random
import time
from typing import Any, BinaryIO, TYPE_CHECKING, TypeVar
from weakref import WeakSet

from optuna.exceptions import StorageInternalError

from optuna_quota import _optuna


if TYPE_CHECKING:
    from optuna.storages import BaseStorage


Result = TypeVar("Result")

_logger = logging.getLogger("optuna.quota.storage")

# Seconds: a database server restarts within them.
TIMEOUT = 60.0
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0

# By name, so that no driver is imported: a server that is down, restarts, is slow or locked.
_TRANSIENT = {
    "sqlalchemy.exc": {"OperationalError", "InterfaceError", "TimeoutError", "DisconnectionError"},
    "psycopg2": {"OperationalError", "InterfaceError"},
    "psycopg.errors": {"OperationalError"},
    "psycopg": {"OperationalError", "InterfaceError"},
    "pymysql.err": {"OperationalError", "InterfaceError"},
    "MySQLdb": {"OperationalError", "InterfaceError"},
    "redis.exceptions": {"ConnectionError", "TimeoutError", "BusyLoadingError", "ReadOnlyError"},
}
_TRANSIENT_GRPC = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN", "ABORTED"}

_SERVERS = ("postgresql", "mysql", "mariadb")
_BLOCK = 65_536
_engines: WeakSet[Any] = WeakSet()


def retry(
    call: Callable[[], Result],
    *,
    timeout: float = TIMEOUT,
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """Return what ``call`` returns, calling again while it raises a transient error.

    Args:
        call: An idempotent call.
        timeout: Seconds after which the error is raised.
        sleep: Waits for some seconds; for tests.

    Raises:
        Exception: Whatever ``call`` raised, if it is not transient or the time is over.
    """
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while True:
        try:
            return call()
        except Exception as error:
            if not is_transient(error) or time.monotonic() + pause > deadline:
                raise
            _logger.info(f"Storage error, retrying in {pause:.2f} s: {error!r}.")
        # Workers that failed together should not come back together.
        sleep(pause * random.uniform(0.5, 1.0))
        pause = min(_LONGEST_PAUSE, 2 * pause)


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed later."""
    if isinstance(error, StorageInternalError):
        # Optuna wraps every database error alike.
        return error.__cause__ is not None and is_transient(error.__cause__)
    if any(c.__name__ in _TRANSIENT.get(c.__module__, ()) for c in type(error).__mro__):
        return True
    if any(c.__module__.split(".")[0] == "grpc" for c in type(error).__mro__):
        code = getattr(error, "code", None)
        return callable(code) and getattr(code(), "name", "") in _TRANSIENT_GRPC
    return isinstance(error, ConnectionError)


def reconnect_dead_connections(storage: BaseStorage) -> None:
    """Ping a storage's pooled connections to a database server, and renew dead ones with backoff.

    SQLAlchemy's ``pool_pre_ping`` renews one at once or fails: it does not wait for a server that
    restarts.
    """
    engine = _optuna.engine_of(storage)
    if engine is None or engine.dialect.name not in _SERVERS or engine in _engines:
        return
    from sqlalchemy import event

    _engines.add(engine)
    # What `create_engine(pool_pre_ping=True)` sets; the user has created the engine already.
    engine.pool._pre_ping = True
    event.listen(engine, "do_connect", _connect)


def _connect(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
    return retry(lambda: dialect.connect(*arguments, **options))


def repair_torn_lines(storage: BaseStorage) -> None:
    """Remove a torn last line of a journal file before another one is appended."""

    def wrap(lock: Any, path: str) -> Any:
        return lock if isinstance(lock, _RepairingLock) else _RepairingLock(lock, path)

    _optuna.wrap_journal_lock(storage, wrap)


class _RepairingLock:
    """A journal's lock that repairs the journal when it is acquired and released."""

    def __init__(self, lock: Any, path: str) -> None:
        self._lock = lock
        self._path = path

    def acquire(self) -> bool:
        acquired: bool = self._lock.acquire()
        self._repair()
        return acquired

    def release(self) -> None:
        self._repair()
        self._lock.release()

    def _repair(self) -> None:
        try:
            with open(self._path, "rb+") as journal:
                _cut_torn_line(journal)
        except OSError as error:
            # Optuna fails to write for the same reason, and reports it.
            _logger.debug(f"The journal {self._path} could not be checked: {error!r}.")


def _cut_torn_line(journal: BinaryIO) -> None:
    size = journal.seek(0, os.SEEK_END)
    if size == 0:
        return
    journal.seek(size - 1)
    if journal.read(1) == b"\n":
        return
    whole, begin = 0, size
    while whole == 0 and begin > 0:
        begin, end = max(0, begin - _BLOCK), begin
        journal.seek(begin)
        found = journal.read(end - begin).rfind(b"\n")
        whole = begin + found + 1 if found >= 0 else 0
    journal.truncate(whole)
    _logger.warning(f"Removed an incomplete line of {size - whole} bytes from the journal.")
