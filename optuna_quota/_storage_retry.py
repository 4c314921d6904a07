"""Retry transient storage errors, and survive restarts of servers and full disks.

Workers survive a server outage of less than a minute: all storage calls of a study with limits or
a quota are repeated until they succeed. Reads are idempotent, and so are writes of an attribute, a
parameter or an intermediate value. If the answer to a call that creates, claims or finishes a row
was lost, the row shows whether the call was executed.

A full disk truncates a line of a journal file. Optuna would append the next line to it, and the
study would be unreadable. Here the worker that holds the lock removes the incomplete line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import copyreg
from datetime import datetime, timedelta
import functools
import logging
import os
import random
import re
import threading
import time
from typing import Any, BinaryIO, TypeVar

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import create_trial, FrozenTrial, TrialState

from optuna_quota import _optuna


Result = TypeVar("Result")

_logger = logging.getLogger("optuna.quota.storage")

# Seconds: a database server restarts within them.
TIMEOUT = 60.0
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0

# By name, so that no driver is imported: the server is down, restarting, slow or locked.
_TRANSIENT = {
    "sqlalchemy.exc": {
        *("OperationalError", "InterfaceError", "TimeoutError", "DisconnectionError"),
        # The connection was lost within a transaction.
        "PendingRollbackError",
    },
    "psycopg2": {"OperationalError", "InterfaceError"},
    "psycopg.errors": {"OperationalError"},
    "psycopg": {"OperationalError", "InterfaceError"},
    "pymysql.err": {"OperationalError", "InterfaceError"},
    "MySQLdb": {"OperationalError", "InterfaceError"},
    "redis.exceptions": {"ConnectionError", "TimeoutError", "BusyLoadingError", "ReadOnlyError"},
}
# Errors of the same classes that waiting does not fix.
_PERMANENT = re.compile(
    r"no such (table|column)|does(n't| not) exist|readonly database|access denied"
    r"|authentication failed|unknown (database|column)",
    re.IGNORECASE,
)
_TRANSIENT_GRPC = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN", "ABORTED"}

_BLOCK = 65_536
# After a call of this many seconds, a row may have been created twice; within as many seconds, a
# worker writes its claim into a row.
_SLOW = 0.5
_CLAIM = 1.0

# The system attribute that identifies a row if the storage rounds its start.
ASKED = "quota:asked"

# In addition to reads, and to writes of one attribute, parameter or intermediate value.
_IDEMPOTENT = ("record_heartbeat", "_get_stale_trial_ids")


def retry(
    call: Callable[[], Result],
    *,
    timeout: float = TIMEOUT,
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """Make an idempotent call, again while it raises a transient error."""
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while True:
        try:
            return call()
        except Exception as error:
            if not is_transient(error) or time.monotonic() + pause > deadline:
                raise
            _logger.info(f"Storage error, retrying in {pause:.2f} s: {error!r}.")
        # Jitter, so that workers that failed together don't retry together.
        sleep(pause * random.uniform(0.5, 1.0))
        pause = min(_LONGEST_PAUSE, 2 * pause)


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed later."""
    if isinstance(error, StorageInternalError):
        # Optuna wraps every database error alike.
        return error.__cause__ is not None and is_transient(error.__cause__)
    if any(c.__name__ in _TRANSIENT.get(c.__module__, ()) for c in type(error).__mro__):
        # SQLAlchemy's own text contains the statement.
        return not _PERMANENT.search(str(getattr(error, "orig", error)))
    if getattr(error, "connection_invalidated", False):
        # Set by SQLAlchemy.
        return True
    if any(c.__module__.split(".")[0] == "grpc" for c in type(error).__mro__):
        code = getattr(error, "code", None)
        return callable(code) and getattr(code(), "name", "") in _TRANSIENT_GRPC
    return isinstance(error, ConnectionError)


def survive_outages(storage: BaseStorage) -> None:
    """Retry all calls of a storage object for up to a minute while the server is away."""
    # Once, as trials in other threads may do the same.
    kind: Any = type(storage)
    if issubclass(kind, _Retrying) or kind is InMemoryStorage:
        return
    repair_torn_lines(storage)
    try:
        # The same object gets other methods, as others refer to it too.
        object.__setattr__(storage, "__class__", _retrying(kind))
    except (AttributeError, TypeError) as error:
        # A proxy, or an object whose class can't have subclasses.
        _logger.debug(f"Calls of {kind.__qualname__} are not repeated: {error!r}.")


class _Retrying:
    """Marks classes that :func:`_retrying` returns."""


@contextlib.contextmanager
def without_retries() -> Iterator[None]:
    """Within the block, let calls of this thread fail at once."""
    _here.once = True
    try:
        yield
    finally:
        _here.once = False


_here = threading.local()


def _retry(call: Callable[[], Result]) -> Result:
    return call() if getattr(_here, "once", False) else retry(call)


@functools.cache
def _retrying(storage_class: type[BaseStorage]) -> type[BaseStorage]:
    """Return a class of storages whose calls are repeated; its objects are pickled as before."""

    def retried(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def repeat(self: BaseStorage, *args: Any, **kwargs: Any) -> Any:
            return _retry(lambda: call(self, *args, **kwargs))

        return repeat

    def reduce(self: BaseStorage, protocol: Any) -> Any:
        reduced: Any = storage_class.__reduce_ex__(self, max(2, protocol))
        make, arguments, *state = reduced
        make, *arguments = (storage_class if x is type(self) else x for x in (make, *arguments))
        # Pickle refuses `copyreg.__newobj__` for another class than the object's.
        make = _new if make is copyreg.__newobj__ else make  # type: ignore[attr-defined]
        return make, tuple(arguments), *state

    # Only Optuna's interface: other methods of a user's class may be static or not idempotent.
    members: dict[str, Any] = {
        name: retried(getattr(storage_class, name))
        for name in [*dir(BaseStorage), *_IDEMPOTENT]
        if (name.startswith(("get_", "set_")) or name in _IDEMPOTENT)
        and hasattr(storage_class, name)
    }
    members["create_new_trial"] = _create_once(storage_class.create_new_trial)
    members["set_trial_state_values"] = _store_once(storage_class.set_trial_state_values)
    members["__reduce_ex__"] = reduce
    members["__module__"] = storage_class.__module__
    return type(storage_class.__name__, (storage_class, _Retrying), members)


def _new(storage_class: type[BaseStorage], *arguments: Any) -> BaseStorage:
    storage: BaseStorage = storage_class.__new__(storage_class, *arguments)
    return storage


def _create_once(create: Callable[..., int]) -> Callable[..., int]:
    """Return a ``create_new_trial`` that creates no second row if an answer was lost."""

    @functools.wraps(create)
    def create_once(
        self: BaseStorage, study_id: int, template_trial: FrozenTrial | None = None
    ) -> int:
        if template_trial is not None:
            return create(self, study_id, template_trial)
        template = create_trial(state=TrialState.RUNNING)
        # The row is found again by its start, unique for each call, or else by a mark.
        start = datetime.now() - timedelta(microseconds=random.randrange(1000))
        template.datetime_start, mark = start, None
        if not _optuna.stores_microseconds(self):
            mark = f"{random.getrandbits(64):016x}"
            template.system_attrs = {ASKED: mark}
        began, lost = time.monotonic(), False

        def created() -> list[int]:
            return [
                _optuna.trial_id_of(row)
                for row in self.get_all_trials(study_id, False, (TrialState.RUNNING,))
                if (row.system_attrs.get(ASKED) == mark if mark else row.datetime_start == start)
            ]

        def attempt() -> int:
            nonlocal lost
            found = created() if lost else []
            lost = True
            return found[0] if found else create(self, study_id, template)

        trial_id = _retry(attempt)
        if time.monotonic() - began > _SLOW:
            # Optuna tries again too.
            for other in created():
                if other != trial_id:
                    self.set_trial_state_values(other, TrialState.FAIL)
        return trial_id

    return create_once


def _store_once(store: Callable[..., bool]) -> Callable[..., bool]:
    """Return a ``set_trial_state_values`` that detects whether a lost call was executed."""

    @functools.wraps(store)
    def store_once(
        self: BaseStorage, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        begun, attempts = datetime.now(), 0

        def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                stored = store(self, trial_id, state, values)
            except UpdateFinishedTrialError:
                row = self.get_trial(trial_id)
                if attempts > 1 and (row.state, row.values) == (state, values and [*values]):
                    return True
                raise
            if attempts > 1 and not stored and state == TrialState.RUNNING:
                return _is_own(self, trial_id, begun)
            return stored

        return _retry(attempt)

    return store_once


def _is_own(storage: BaseStorage, trial_id: int, begun: datetime) -> bool:
    """Return whether this process claimed an enqueued trial since a given time."""
    row = storage.get_trial(trial_id)
    if row.state != TrialState.RUNNING or row.datetime_start is None:
        return False
    # Databases may store whole seconds. Any other worker writes its claim into the row at once.
    if row.datetime_start < begun - timedelta(seconds=1):
        return False
    time.sleep(_CLAIM)
    later = storage.get_trial(trial_id)
    return (later.state, later.system_attrs) == (row.state, row.system_attrs)


def repair_torn_lines(storage: BaseStorage) -> None:
    """Remove an incomplete last line of a journal file before another one is appended."""

    def wrap(lock: Any, path: str) -> Any:
        return lock if isinstance(lock, _RepairingLock) else _RepairingLock(lock, path)

    _optuna.wrap_journal_lock(storage, wrap)


class _RepairingLock:
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
    _logger.warning(
        f"Removed an incomplete line of {size - whole} bytes from the journal {journal.name}: the "
        "disk was full as it was written, or its writer was killed."
    )
