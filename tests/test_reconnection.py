"""A study outlives the restart of its database."""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from optuna_quota._optuna import engine_of
from optuna_quota._storage_retry import reconnect_dead_connections
from tests.storages import VARIABLES


CUT = {
    "postgresql": "SELECT pg_terminate_backend({id})",
    "mysql": "KILL {id}",
}
WHO = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}


@pytest.mark.storage
@pytest.mark.parametrize("kind", CUT)
def test_connections_that_the_server_has_cut_are_made_anew(kind: str) -> None:
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
        who = sqlalchemy.text(WHO[kind])
        own = [connection.execute(who).scalar_one() for connection in connections]
        for connection in connections:
            connection.close()
        killer = sqlalchemy.create_engine(url)
        with killer.connect() as connection:
            for one in own:
                connection.execute(sqlalchemy.text(CUT[kind].format(id=one)))
        killer.dispose()
        study.set_user_attr("after", 1)
        assert study.user_attrs == {"after": 1}
    finally:
        optuna.delete_study(study_name=study.study_name, storage=storage)
        storage.engine.dispose()


def test_files_and_memory_need_nothing(tmp_path: Path) -> None:
    reconnect_dead_connections(optuna.storages.InMemoryStorage())
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/one.db")
    reconnect_dead_connections(storage)
    assert not sqlalchemy.event.contains(storage.engine, "do_connect", reconnect_dead_connections)
    assert engine_of(storage) is storage.engine
    assert engine_of(optuna.storages.InMemoryStorage()) is None
