"""Faults of storages: which pass, and what is done about those."""

from __future__ import annotations

from collections.abc import Iterator

from optuna.exceptions import StorageInternalError
import pytest
import sqlalchemy.exc

from optuna_quota._storage_retry import is_transient
from optuna_quota._storage_retry import retry


DOWN = sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("server closed the connection"))
WRONG = sqlalchemy.exc.DataError("INSERT", {}, Exception("value too long"))


# By its name, so that the driver need not be there.
GONE = type("ConnectionError", (Exception,), {"__module__": "redis.exceptions"})()


def wrapped(cause: Exception) -> StorageInternalError:
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("fault", "expected"),
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
def test_a_fault_passes_or_not(fault: Exception, expected: bool) -> None:
    assert is_transient(fault) is expected


class Storage:
    """Fails a number of times, then answers."""

    def __init__(self, *faults: Exception) -> None:
        self.faults: Iterator[Exception] = iter(faults)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        for fault in self.faults:
            raise fault
        return "answer"


def test_what_passes_is_waited_for_longer_and_longer() -> None:
    pauses: list[float] = []
    storage = Storage(*[wrapped(DOWN)] * 8)
    assert retry(storage, sleep=pauses.append) == "answer"
    assert storage.calls == 9
    assert pauses[0] < 0.06 and all(1.0 <= pause <= 2.0 for pause in pauses[6:])


def test_what_does_not_pass_is_raised_at_once() -> None:
    storage = Storage(WRONG)
    with pytest.raises(sqlalchemy.exc.DataError):
        retry(storage, sleep=lambda seconds: pytest.fail("waited"))
    assert storage.calls == 1


def test_patience_ends_and_the_fault_itself_is_raised() -> None:
    with pytest.raises(sqlalchemy.exc.OperationalError):
        retry(Storage(*[DOWN] * 1000), timeout=0.0, sleep=lambda seconds: None)
