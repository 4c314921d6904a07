"""Storage faults: what passes is waited for, where doing it again is safe.

Reading is safe to repeat, and so is writing an attribute or the state of one's own row: the second
write finds what the first one left. Creating a row is not, and is left to Optuna.
"""

from __future__ import annotations

from collections.abc import Callable
import logging
import random
import time
from typing import TypeVar

from optuna.exceptions import StorageInternalError


Result = TypeVar("Result")

_logger = logging.getLogger("optuna.quota.storage")

# Seconds: a database server restarts within them.
PATIENCE = 60.0
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


def patiently(
    call: Callable[[], Result],
    *,
    patience: float = PATIENCE,
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """Return what ``call`` returns, calling again while the storage has a fault that passes.

    Args:
        call: Something that is safe to do twice.
        patience: Seconds after which the fault is raised.
        sleep: Lets time pass; for tests.

    Raises:
        Exception: Whatever ``call`` raised, when it does not pass or not in time.
    """
    deadline = time.monotonic() + patience
    pause = _FIRST_PAUSE
    while True:
        try:
            return call()
        except Exception as fault:
            if not passes(fault) or time.monotonic() + pause > deadline:
                raise
            _logger.info(f"The storage has a fault, trying again in {pause:.2f} s: {fault!r}.")
        # Workers that failed together should not come back together.
        sleep(pause * random.uniform(0.5, 1.0))
        pause = min(_LONGEST_PAUSE, 2 * pause)


def passes(fault: BaseException) -> bool:
    """Return whether a fault is one that passes by itself."""
    if isinstance(fault, StorageInternalError):
        # Optuna wraps every error of a database alike: the cause tells.
        return fault.__cause__ is not None and passes(fault.__cause__)
    if any(c.__name__ in _PASSING.get(c.__module__, ()) for c in type(fault).__mro__):
        return True
    if any(c.__module__.split(".")[0] == "grpc" for c in type(fault).__mro__):
        code = getattr(fault, "code", None)
        return callable(code) and getattr(code(), "name", "") in _PASSING_GRPC
    return isinstance(fault, ConnectionError)
