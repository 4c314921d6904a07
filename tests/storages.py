"""Every kind of storage that users run, for tests and benchmarks, opened by any process.

Databases are named by environment variables; what they leave unset is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import os
from pathlib import Path
import socket
import sqlite3
import subprocess
import sys
from typing import Any
import uuid

import optuna
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalRedisBackend
from sqlalchemy import event
from sqlalchemy.engine import Engine


ALONE = "memory"
SHARED = ("sqlite", "journal-file", "grpc", "postgresql", "mysql", "journal-redis")
KINDS = (ALONE, *SHARED)
VARIABLES = {
    "postgresql": "OPTUNA_QUOTA_TEST_POSTGRESQL_URL",
    "mysql": "OPTUNA_QUOTA_TEST_MYSQL_URL",
    "journal-redis": "OPTUNA_QUOTA_TEST_REDIS_URL",
}
_SERVER = """
import sys
from optuna.storages import run_grpc_proxy_server, RDBStorage
run_grpc_proxy_server(RDBStorage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


def _relax(connection: Any, _: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")


@contextmanager
def without_fsync() -> Iterator[None]:
    """Let this process not wait until the disk has what it writes: no test cuts the power."""
    before, os.fsync = os.fsync, lambda _: None
    event.listen(Engine, "connect", _relax)
    try:
        yield
    finally:
        os.fsync = before
        event.remove(Engine, "connect", _relax)


@dataclass(frozen=True)
class Address:
    """Where a storage is; small enough to be handed to another process.

    Attributes:
        kind: One of ``KINDS``.
        place: A path, URL or port.
        prefix: Of its keys, where a server holds several.
        lock_grace: Seconds after which a journal's lock is taken from its holder; Optuna's
            own default.
    """

    kind: str
    place: str
    prefix: str = ""
    lock_grace: int = 30

    def open(self) -> BaseStorage:
        """Open the storage in this process."""
        if self.kind in ("sqlite", "postgresql", "mysql"):
            # Many processes on a loaded machine wait longer for SQLite's lock than 5 s.
            patient = {"connect_args": {"timeout": 60}} if self.kind == "sqlite" else {}
            return optuna.storages.get_storage(RDBStorage(self.place, engine_kwargs=patient))
        if self.kind == "journal-file":
            lock = JournalFileSymlinkLock(self.place, grace_period=self.lock_grace)
            return JournalStorage(JournalFileBackend(self.place, lock_obj=lock))
        if self.kind == "journal-redis":
            return JournalStorage(JournalRedisBackend(self.place, prefix=self.prefix))
        if self.kind == "grpc":
            return GrpcStorageProxy(host="127.0.0.1", port=int(self.place))
        assert self.kind == ALONE
        return optuna.storages.InMemoryStorage()


def missing(kind: str) -> str | None:
    """Return why a kind of storage can't be had here, None when it can."""
    variable = VARIABLES.get(kind)
    return f"{variable} is not set" if variable and variable not in os.environ else None


@contextmanager
def storage_at(kind: str, folder: Path) -> Iterator[Address]:
    """Yield the address of a new storage; its server ends with the block."""
    unique = uuid.uuid4().hex[:8]
    if kind == "sqlite":
        yield Address(kind, f"sqlite:///{folder}/{unique}.db")
    elif kind == "journal-file":
        yield Address(kind, str(folder / f"{unique}.log"))
    elif kind == "grpc":
        with _grpc_server(f"sqlite:///{folder}/{unique}.db") as port:
            yield Address(kind, str(port))
    elif kind == ALONE:
        yield Address(kind, "")
    else:
        yield Address(kind, os.environ[VARIABLES[kind]], prefix=unique)


@contextmanager
def study_in(address: Address, **arguments: object) -> Iterator[optuna.Study]:
    """Yield a new study, deleted with the block."""
    name = f"quota-{uuid.uuid4().hex[:12]}"
    study = optuna.create_study(storage=address.open(), study_name=name, **arguments)  # type: ignore[arg-type]
    try:
        yield study
    finally:
        if address.kind in VARIABLES:
            optuna.delete_study(study_name=name, storage=address.open())


@contextmanager
def _grpc_server(url: str) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER, url, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        GrpcStorageProxy(host="127.0.0.1", port=port).wait_server_ready(timeout=60)
        yield port
    finally:
        server.kill()
        server.wait()
