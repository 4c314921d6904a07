"""Retries of transient storage errors, and connections that survive a restart of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import copy
import os
from pathlib import Path
import pickle
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
import pytest
import sqlalchemy

from optuna_quota import _optuna, _storage_retry, Limits, Quota, QuotaPruner, QuotaSampler, status
from optuna_quota._storage_retry import is_transient, retry, survive_outages
from tests.storages import VARIABLES


DOWN = sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("server closed the connection"))
LOST = sqlalchemy.exc.DBAPIError("SELECT", {}, Exception(), connection_invalidated=True)
WRONG = sqlalchemy.exc.DataError("INSERT", {}, Exception("value too long"))
# By its name, so that the driver need not be installed.
GONE = type("ConnectionError", (Exception,), {"__module__": "redis.exceptions"})()
KILL = {"postgresql": "SELECT pg_terminate_backend({id})", "mysql": "KILL {id}"}
CONNECTION_ID = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}


def wrapped(cause: Exception) -> StorageInternalError:
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = cause
    return error


def refused(driver: str, message: str) -> StorageInternalError:
    cause = type("OperationalError", (Exception,), {"__module__": driver})(message)
    return wrapped(sqlalchemy.exc.OperationalError("SELECT does not exist", {}, cause))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DOWN, True),
        (wrapped(DOWN), True),
        (wrapped(sqlalchemy.exc.PendingRollbackError("Can't reconnect")), True),
        (wrapped(LOST), True),
        (GONE, True),
        (ConnectionResetError(), True),
        (refused("sqlite3", "database is locked"), True),
        (refused("sqlite3", "no such table: trials"), False),
        (refused("psycopg2", 'FATAL:  password authentication failed for user "x"'), False),
        (refused("pymysql", "(1049, \"Unknown database 'x'\")"), False),
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
    survive_outages(storage)
    survive_outages(storage)
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


class Server:
    """Is away at one call to it: before that is executed, or before the answer."""

    def __init__(self) -> None:
        self.calls = 0
        self.failing, self.executed = -1, False
        self.gone = False

    def serve(self, call: Callable[[], Any]) -> Any:
        self.calls += 1
        fails = self.gone or self.calls - 1 == self.failing
        if fails and not self.executed:
            raise ConnectionError("on purpose")
        answer = call()
        if fails:
            raise ConnectionError("on purpose")
        return answer


CALLS = (
    *("create_new_trial", "set_trial_state_values", "set_trial_param", "get_trial"),
    *("get_all_trials", "set_trial_user_attr", "set_trial_system_attr"),
    *("set_trial_intermediate_value", "get_study_user_attrs"),
)


def served(name: str) -> Callable[..., Any]:
    call = getattr(optuna.storages.InMemoryStorage, name)
    return lambda self, *args, **kwargs: self.server.serve(lambda: call(self, *args, **kwargs))


Remote = type("Remote", (optuna.storages.InMemoryStorage,), {name: served(name) for name in CALLS})


def study_on(server: Server) -> optuna.Study:
    storage = Remote()
    storage.server = server
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=9))
    study = optuna.create_study(
        storage=storage, sampler=sampler, pruner=QuotaPruner(limits=Limits())
    )
    study.optimize(objective, n_trials=1)
    study.enqueue_trial({"x": 0.5})
    return study


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    trial.report(x, 1)
    assert not trial.should_prune()
    trial.set_user_attr("x", x)
    return x


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("exact", [True, False])
def test_a_server_that_is_away_costs_no_trial_and_no_worker(
    exact: bool, executed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_storage_retry, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(_storage_retry, "_CLAIM", 0.001)
    monkeypatch.setattr(_storage_retry, "_SLOW", 0.0)
    monkeypatch.setattr(_optuna, "stores_microseconds", lambda storage: exact)
    server = Server()
    study = study_on(server)
    before = server.calls
    study.optimize(objective, n_trials=2)
    n_calls = server.calls - before
    assert n_calls > 30
    for failing in range(n_calls):
        server = Server()
        study = study_on(server)
        server.failing, server.executed = server.calls + failing, executed
        study.optimize(objective, n_trials=2)
        assert [t.state.name for t in study.trials] == ["COMPLETE"] * 3, failing
        assert all(t.value == t.params["x"] == t.user_attrs["x"] for t in study.trials)
        assert study.trials[1].params == {"x": 0.5}
        assert status(study).table.loc["n_trials", "used"] == 3


def test_a_value_that_could_not_be_stored_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    optuna.logging.enable_propagation()
    monkeypatch.setitem(retry.__kwdefaults__, "timeout", 0.1)  # type: ignore[arg-type]
    server = Server()
    study = study_on(server)

    def ends_alone(trial: optuna.Trial) -> float:
        value = objective(trial)
        server.gone = True
        return value

    # Optuna reads the row again, and does not expect that to fail.
    with pytest.raises((ConnectionError, UnboundLocalError)):
        study.optimize(ends_alone, n_trials=1)
    assert "Trial 1 ended with the value 0.5, which may be lost: ConnectionError" in caplog.text


class Reopened(optuna.storages.InMemoryStorage):
    """Is pickled by what opens it again, as ``DaskStorage`` is."""

    __slots__ = ("url",)

    def __init__(self, url: str | None) -> None:
        super().__init__()
        self.url = url

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url,)


class Delegating:
    """Hands all calls on."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["storage"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        assert name == "storage"
        vars(self)[name] = value


class Registered(optuna.storages.InMemoryStorage):
    def __init_subclass__(cls, *, name: str) -> None:
        super().__init_subclass__()


class WithHelpers(optuna.storages.InMemoryStorage):
    """Has methods of its own beside those that Optuna calls."""

    calls = 0

    @staticmethod
    def get_folder() -> str:
        return "here"

    @property
    def get_name(self) -> str:
        return "name"

    def get_next(self) -> int:
        self.calls += 1
        raise ConnectionError("No number is lost.")


def test_only_calls_of_optuna_are_repeated() -> None:
    storage = WithHelpers()
    survive_outages(storage)
    assert storage.get_folder() == "here"
    assert storage.get_name == "name"
    with pytest.raises(ConnectionError):
        storage.get_next()
    assert storage.calls == 1


@pytest.mark.parametrize("kind", ["reopened", "delegating", "registered"])
def test_storages_of_users_own(kind: str) -> None:
    storages = {
        "reopened": lambda: Reopened("here"),
        "delegating": lambda: Delegating(optuna.storages.InMemoryStorage()),
        "registered": Registered,
    }
    storage = storages[kind]()
    study = optuna.create_study(
        storage=storage,
        sampler=QuotaSampler(quota=Quota(n_trials=2)),
        pruner=QuotaPruner(limits=Limits(wall_time="1h")),
    )
    study.optimize(objective)
    assert len(study.trials) == 2
    assert all(t.duration.total_seconds() >= 0 for t in study.trials if t.duration)
    if kind == "reopened":
        copied = pickle.loads(pickle.dumps(storage))
        assert type(copied) is Reopened and copied.url == "here"


def test_a_storage_is_copied_and_pickled_without_its_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = optuna.storages.get_storage(f"sqlite:///{tmp_path}/one.db")
    before, repair = type(storage), _storage_retry.repair_torn_lines

    def repair_late(each: optuna.storages.BaseStorage) -> None:
        """Let a trial in another thread be faster."""
        monkeypatch.setattr(_storage_retry, "repair_torn_lines", repair)
        survive_outages(each)

    monkeypatch.setattr(_storage_retry, "repair_torn_lines", repair_late)
    survive_outages(storage)
    assert type(storage).__mro__[1] is before
    for copied in (pickle.loads(pickle.dumps(storage)), copy.copy(storage)):
        assert type(copied) is before
        assert copied.get_all_studies() == []
