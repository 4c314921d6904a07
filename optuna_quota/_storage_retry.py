"""Storage faults: what is_transient is waited for, where doing it again is safe.

Reading is safe to repeat, and so is writing an attribute or the state of one's own row: the second
write finds what the first one left. Creating a row is not, and is left to Optuna.
"""

from __future__ import annotations

from collections.abc import Callable
import logging
import os
import random
import time
from typing import Any
from typing import BinaryIO
from typing import TYPE_CHECKING
from typing import TypeVar
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

# By name, so that no driver has to be there: a server that is down, restarts, is slow or locked.
_PASSING = {
    "sqlalchemy.exc": {"OperationalError", "InterfaceError", "TimeoutError", "DisconnectionError"},
    "psycopg2": {"OperationalError", "InterfaceError"},
    "psycopg.errors": {"OperationalError"},
    "psycopg": {"OperationalError", "InterfaceError"},
    "pymysql.err": {"OperationalError", "InterfaceError"},
    "MySQLdb": {"OperationalError", "InterfaceError"},
    "redis.exceptions": {"ConnectionError", "TimeoutError", "BusyLoadingError", "ReadOnlyError"},
}
_PASSING_GRPC = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN", "ABORTED"}


def retry(
    call: Callable[[], Result],
    *,
    timeout: float = TIMEOUT,
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """Return what ``call`` returns, calling again while the storage has a fault that is_transient.

    Args:
        call: Something that is safe to do twice.
        timeout: Seconds after which the fault is raised.
        sleep: Lets time pass; for tests.

    Raises:
        Exception: Whatever ``call`` raised, when it does not pass or not in time.
    """
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while True:
        try:
            return call()
        except Exception as fault:
            if not is_transient(fault) or time.monotonic() + pause > deadline:
                raise
            _logger.info(f"The storage has a fault, trying again in {pause:.2f} s: {fault!r}.")
        # Workers that failed together should not come back together.
        sleep(pause * random.uniform(0.5, 1.0))
        pause = min(_LONGEST_PAUSE, 2 * pause)


def is_transient(fault: BaseException) -> bool:
    """Return whether a fault is one that is_transient by itself."""
    if isinstance(fault, StorageInternalError):
        # Optuna wraps every error of a database alike: the cause tells.
        return fault.__cause__ is not None and is_transient(fault.__cause__)
    if any(c.__name__ in _PASSING.get(c.__module__, ()) for c in type(fault).__mro__):
        return True
    if any(c.__module__.split(".")[0] == "grpc" for c in type(fault).__mro__):
        code = getattr(fault, "code", None)
        return callable(code) and getattr(code(), "name", "") in _PASSING_GRPC
    return isinstance(fault, ConnectionError)


_BLOCK = 65_536
_SERVERS = ("postgresql", "mysql", "mariadb")
_watched: WeakSet[Any] = WeakSet()


def reconnect_dead_connections(storage: BaseStorage) -> None:
    """Have a storage's connections to a database server tried and renewed; once each engine."""
    engine = _optuna.engine_of(storage)
    if engine is None or engine.dialect.name not in _SERVERS or engine in _watched:
        return
    from sqlalchemy import event

    _watched.add(engine)
    event.listen(engine, "do_connect", _connect)
    event.listen(engine, "checkout", _checker(engine))


def repair_torn_lines(storage: BaseStorage) -> None:
    """Have a torn last line of a journal file taken away before another follows it."""
    _optuna.wrap_journal_lock(storage, _mending)


def _mending(lock: Any, path: str) -> Any:
    return lock if isinstance(lock, _MendingLock) else _MendingLock(lock, path)


class _MendingLock:
    """A journal's lock under which the journal is mended first and last."""

    def __init__(self, lock: Any, path: str) -> None:
        self._lock = lock
        self._path = path

    def acquire(self) -> bool:
        got: bool = self._lock.acquire()
        self._mend()
        return got

    def release(self) -> None:
        self._mend()
        self._lock.release()

    def _mend(self) -> None:
        try:
            with open(self._path, "rb+") as journal:
                _cut_torn_line(journal)
        except OSError as error:
            # Whatever keeps us from it keeps Optuna from writing, and that is told.
            _logger.debug(f"The journal {self._path} could not be looked at: {error!r}.")


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
    _logger.warning(f"{size - whole} bytes of a line that could not be written were taken away.")


def _connect(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
    return retry(lambda: dialect.connect(*arguments, **options))


def _checker(engine: Any) -> Any:
    """Return what raises when a pooled connection is dead; the pool then makes a new one."""
    from sqlalchemy.exc import DisconnectionError

    dialect = engine.dialect

    def check(connection: Any, record: Any, proxy: Any) -> None:
        try:
            dialect.do_ping(connection)
        except dialect.loaded_dbapi.Error as fault:
            raise DisconnectionError(f"The database closed the connection: {fault}") from fault

    return check
