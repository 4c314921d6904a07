"""Retries of transient storage errors, and connections that survive a restart of the server."""

from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
import pytest
import sqlalchemy

from optuna_quota._optuna import engine_of
from optuna_quota._storage_retry import is_transient, reconnect_dead_connections, retry
from tests.storages import VARIABLES


DOWN = sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("server closed the connection"))
WRONG = sqlalchemy.exc.DataError("INSERT", {}, Exception("value too long"))
# By its name, so that the driver need not be installed.
GONE = type("ConnectionError", (Exception,), {"__module__": "redis.exceptions"})()
KILL = {"postgresql": "SELECT pg_terminate_backend({id})", "mysql": "KILL {id}"}
CONNECTION_ID = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}


def wrapped(cause: Exception) -> StorageInternalError:
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DOWN, True),
        (wrapped(DOWN), True),
        (GONE, True),
        (ConnectionResetError(), True),
        (WRONG, False),
        (wrapped(WRONG), False),
        (StorageInternalError(), False),
        (KeyError("no such trial"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_is_transient(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


class Storage:
    """Raises some errors, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors: Iterator[Exception] = iter(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        for error in self.errors:
            raise error
        return "answer"


def test_transient_errors_are_retried_with_backoff() -> None:
    pauses: list[float] = []
    storage = Storage(*[wrapped(DOWN)] * 8)
    assert retry(storage, sleep=pauses.append) == "answer"
    assert storage.calls == 9
    assert pauses[0] < 0.06 and all(1.0 <= pause <= 2.0 for pause in pauses[6:])


def test_other_errors_are_raised_at_once() -> None:
    storage = Storage(WRONG)
    with pytest.raises(sqlalchemy.exc.DataError):
        retry(storage, sleep=lambda seconds: pytest.fail("waited"))
    assert storage.calls == 1


def test_after_the_timeout_the_error_is_raised() -> None:
    with pytest.raises(sqlalchemy.exc.OperationalError):
        retry(Storage(*[DOWN] * 1000), timeout=0.0, sleep=lambda seconds: None)


@pytest.mark.storage
@pytest.mark.parametrize("kind", KILL)
def test_connections_that_the_server_closed_are_renewed(kind: str) -> None:
    url = os.environ.get(VARIABLES[kind])
    if url is None:
        pytest.skip(f"{VARIABLES[kind]} is not set")
    # Without the ping that Optuna turns on for MySQL alone.
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": False})
    reconnect_dead_connections(storage)
    reconnect_dead_connections(storage)
    study = optuna.create_study(storage=storage)
    try:
        pooled = storage.engine.pool.checkedin()  # type: ignore[attr-defined]
        connections = [storage.engine.connect() for _ in range(max(1, pooled))]
        query = sqlalchemy.text(CONNECTION_ID[kind])
        ids = [connection.execute(query).scalar_one() for connection in connections]
        for connection in connections:
            connection.close()
        killer = sqlalchemy.create_engine(url)
        with killer.connect() as connection:
            for each in ids:
                connection.execute(sqlalchemy.text(KILL[kind].format(id=each)))
        killer.dispose()
        study.set_user_attr("after", 1)
        assert study.user_attrs == {"after": 1}
    finally:
        optuna.delete_study(study_name=study.study_name, storage=storage)
        storage.engine.dispose()


def test_files_and_memory_have_no_connections_to_renew(tmp_path: Path) -> None:
    reconnect_dead_connections(optuna.storages.InMemoryStorage())
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/one.db")
    reconnect_dead_connections(storage)
    assert not storage.engine.pool._pre_ping
    assert engine_of(storage) is storage.engine
    assert engine_of(optuna.storages.InMemoryStorage()) is None
