"""Lets a study outlive the restart of its database.

Optuna keeps connections for long and gives up on the first that is dead. Here each is tried when
it is taken from the pool, and made anew, with backoff, while the server is down. Only a
transaction that the restart cuts in two still fails, as nobody can tell whether it happened.
"""

from __future__ import annotations

from typing import Any
from typing import TYPE_CHECKING
from weakref import WeakSet

from optuna_quota import _optuna
from optuna_quota._patience import patiently


if TYPE_CHECKING:
    from optuna.storages import BaseStorage


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
