"""Lets a study outlive the restart of its database, and a disk that was full for a while.

Optuna keeps connections for long and gives up on the first that is dead. Here each is tried when
it is taken from the pool, and made anew, with backoff, while the server is down. Only a
transaction that the restart cuts in two still fails, as nobody can tell whether it happened.

A full disk tears a line of a journal file. Optuna would append the next line to what is there of
it, and from then on nobody could read the study. Here whoever holds the lock takes it away.
"""

from __future__ import annotations

import logging
import os
from typing import Any
from typing import BinaryIO
from typing import TYPE_CHECKING
from weakref import WeakSet

from optuna_quota import _optuna
from optuna_quota._storage_retry import patiently


if TYPE_CHECKING:
    from optuna.storages import BaseStorage


_logger = logging.getLogger("optuna.quota.storage")

_BLOCK = 65_536
_SERVERS = ("postgresql", "mysql", "mariadb")
_watched: WeakSet[Any] = WeakSet()


def outlive_restarts(storage: BaseStorage) -> None:
    """Have a storage's connections to a database server tried and renewed; once each engine."""
    engine = _optuna.engine_of(storage)
    if engine is None or engine.dialect.name not in _SERVERS or engine in _watched:
        return
    from sqlalchemy import event

    _watched.add(engine)
    event.listen(engine, "do_connect", _connect)
    event.listen(engine, "checkout", _checker(engine))


def keep_lines_whole(storage: BaseStorage) -> None:
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
    return patiently(lambda: dialect.connect(*arguments, **options))


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
