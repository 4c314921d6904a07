"""The ledger's own statements where rows stand in a database: few, and for few rows.

Through Optuna's storage, what the ledger does before each trial takes eleven statements in three
transactions, and objects for all that they bring; most of an admission's time was spent there.
These ask for the ledger's own attributes only, and for rows by their ids, so that no database
looks through all rows whatever it believes of its tables. The tables are those that Optuna made.

A row's state is read before its attributes. Those of a finished row don't change any more, and
the claim of one that runs is read after the reader wrote its own: the protocol needs no more.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Iterator
import contextlib
from dataclasses import dataclass
from datetime import datetime
import json
import logging
import threading
from typing import Any
from typing import TYPE_CHECKING

from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_quota import _optuna
from optuna_quota._records import PREFIX
from optuna_quota._records import RESERVATION


if TYPE_CHECKING:
    from optuna.storages import BaseStorage


_logger = logging.getLogger("optuna.quota.ledger")

# Those that write a row's attribute, or don't when it has finished, in one statement.
_UPSERTING = ("postgresql", "sqlite")

# Ids in one statement: databases have a limit on its parameters.
_AT_ONCE = 500


@dataclass(frozen=True)
class Row:
    """One row as far as the ledger is concerned.

    Attributes:
        trial: The trial with the ledger's attributes alone.
        touched: Whether anything was written into it since it was made.
    """

    trial: FrozenTrial
    touched: bool


class Tables:
    """The rows of one study in a database.

    Args:
        engine: SQLAlchemy's engine under the storage.
        models: Optuna's tables.
        study_id: The study.
    """

    def __init__(self, engine: Any, models: Any, study_id: int) -> None:
        self._engine = engine
        self._study_id = study_id
        self._statements = _Statements.of(models)
        self._upsert = _upsert(models, engine.dialect.name)
        self._sole = threading.local()
        self._first = _upsert(models, "sqlite", first=True)

    @classmethod
    def of(cls, storage: BaseStorage, study_id: int) -> Tables | None:
        """Return the study's rows, None where they are not in a database that we know."""
        found = _optuna.tables_of(storage)
        if found is None:
            return None
        engine, models = found
        return cls(engine, models, study_id)

    def changed(self, after: int, still_open: Collection[int]) -> list[Row]:
        """Return new rows, and those that were open, by their ids: the oldest first.

        Args:
            after: The largest id that is known.
            still_open: Ids of rows that had not finished.
        """
        known = after >= 0
        with self._connection() as connection:
            trials = self._trials(connection, after, still_open)
            ids = sorted(trials)
            ended = [i for i in ids if trials[i].state.is_finished()]
            for statement, wanted in (
                (self._statements.own, ids),
                (self._statements.usage, ended),
            ):
                for line in self._lines(connection, statement, wanted, by_id=known):
                    trial = trials.get(line.trial_id)
                    if trial is not None:
                        system = line.key == RESERVATION
                        found = trial.system_attrs if system else trial.user_attrs
                        found[line.key] = json.loads(line.value_json)
            # A worker that died before it wrote anything left a row behind: only that is asked.
            blank = [
                trial_id
                for trial_id, trial in trials.items()
                if trial.state == TrialState.RUNNING and not trial.system_attrs
            ]
            lines = self._lines(connection, self._statements.written, blank, by_id=True)
            untouched = set(blank) - {line.trial_id for line in lines}
        return [Row(trials[i], touched=i not in untouched) for i in ids]

    def _trials(
        self, connection: Any, after: int, still_open: Collection[int]
    ) -> dict[int, FrozenTrial]:
        statement = self._statements.new if after >= 0 else self._statements.all
        lines = connection.execute(statement, {"study": self._study_id, "after": after}).all()
        lines += self._lines(connection, self._statements.open, still_open, by_id=True)
        return {line.trial_id: _bare_trial(line) for line in lines}

    def _lines(
        self, connection: Any, statement: _Twofold, ids: Collection[int], *, by_id: bool
    ) -> list[Any]:
        """Return what a statement finds of some rows, or of all where they may be too many."""
        if not ids:
            return []
        if not by_id:
            return list(connection.execute(statement.of_all, {"study": self._study_id}))
        listed = list(ids)
        return [
            line
            for begin in range(0, len(listed), _AT_ONCE)
            for line in connection.execute(
                statement.by_id, {"ids": listed[begin : begin + _AT_ONCE]}
            )
        ]

    def write(self, trial_id: int, value: Any) -> bool:
        """Write a reservation into a row; return False where the storage has to do it.

        It also has to tell why it can't: the row has finished, or there is none.
        """
        if self._upsert is None:
            return False
        values = {"trial": trial_id, "name": RESERVATION, "value": json.dumps(value)}
        with self._connection() as connection:
            return bool(connection.execute(self._upsert, values).rowcount)

    def fail(self, trial_id: int, now: datetime) -> bool:
        """Finish a row as failed; return whether it was not finished already."""
        with self._connection() as connection:
            return bool(
                connection.execute(self._statements.fail, {"trial": trial_id, "now": now}).rowcount
            )

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Make what this thread reads and writes one transaction that no writer comes between.

        Yields False where the database has no one lock that all writers need, as SQLite has, or
        somebody else holds it, and does nothing then. What was written is committed at the end,
        and undone by an exception.
        """
        connection = self._sole_writer()
        if connection is None:
            yield False
            return
        with connection:
            self._sole.connection = connection
            try:
                yield True
            except BaseException:
                connection.exec_driver_sql("ROLLBACK")
                raise
            else:
                with _told_as_optuna_does():
                    _commit(connection)
            finally:
                self._sole.connection = None

    @property
    def is_alone(self) -> bool:
        """Whether this thread is inside of :meth:`alone`."""
        return getattr(self._sole, "connection", None) is not None

    def _sole_writer(self) -> Any:
        if self._engine.dialect.name != "sqlite":
            return None
        from sqlalchemy.exc import SQLAlchemyError

        with _told_as_optuna_does():
            connection = self._connect()
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except SQLAlchemyError as fault:
            _logger.debug(f"No transaction of its own: {fault!r}.")
            connection.close()
            return None
        return connection

    def write_first(self, trial_id: int, value: Any) -> bool:
        """Write a reservation into a row that has none of its own; return whether that was so.

        What was copied into the row from that of another trial is replaced.

        On SQLite alone; elsewhere nothing is written, as nobody else can have been given the row.
        """
        if self._engine.dialect.name != "sqlite":
            return True
        values = {"trial": trial_id, "name": RESERVATION, "value": json.dumps(value)}
        with self._connection() as connection:
            return bool(connection.execute(self._first, values).rowcount)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Any]:
        with _told_as_optuna_does():
            if self.is_alone:
                yield self._sole.connection
                return
            with self._connect() as connection:
                yield connection

    def _connect(self) -> Any:
        # Each statement is a transaction of its own.
        return self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")


@contextlib.contextmanager
def _told_as_optuna_does() -> Iterator[None]:
    """Raise the database's faults as Optuna's storage raises them, with the cause."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except SQLAlchemyError as fault:
        raise StorageInternalError(f"The ledger's rows are out of reach: {fault}") from fault


def _commit(connection: Any) -> None:
    try:
        connection.exec_driver_sql("COMMIT")
    except BaseException:
        # Readers may have kept it from being done, and it would go on holding the lock.
        with contextlib.suppress(Exception):
            connection.exec_driver_sql("ROLLBACK")
        raise


def _bare_trial(line: Any) -> FrozenTrial:
    return FrozenTrial(
        number=line.number,
        state=line.state,
        value=None,
        datetime_start=line.datetime_start,
        datetime_complete=line.datetime_complete,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=line.trial_id,
    )


@dataclass(frozen=True)
class _Twofold:
    """A statement for rows whose ids are listed, and for all rows of the study."""

    by_id: Any
    of_all: Any = None


@dataclass(frozen=True)
class _Statements:
    """What is asked of the tables.

    Attributes:
        all: All trials of the study.
        new: Those after an id.
        open: Trials by their ids.
        own: Reservations.
        usage: What stands in the trial table.
        written: The trials into which anything was written.
        fail: Finishes a trial that has not.
    """

    all: Any
    new: Any
    open: _Twofold
    own: _Twofold
    usage: _Twofold
    written: _Twofold
    fail: Any

    @classmethod
    def of(cls, models: Any) -> _Statements:
        """Build the statements; that they are compiled is kept by SQLAlchemy."""
        import sqlalchemy as sql

        trials = models.TrialModel.__table__.c
        shown = models.TrialUserAttributeModel.__table__.c
        hidden = models.TrialSystemAttributeModel.__table__.c
        params = models.TrialParamModel.__table__.c
        reports = models.TrialIntermediateValueModel.__table__.c
        names = ("trial_id", "number", "state", "datetime_start", "datetime_complete")
        rows = sql.select(*(trials[name] for name in names))
        of_study = trials.study_id == sql.bindparam("study")
        everything = sql.select(trials.trial_id).where(of_study)
        # The sum keeps a database from going through all of the study by the index on it.
        same_study = trials.study_id + 0 == sql.bindparam("study")
        newer = trials.trial_id > sql.bindparam("after")

        def listed(column: Any) -> Any:
            return column.in_(sql.bindparam("ids", expanding=True))

        def attributes(columns: Any, wanted: Any) -> _Twofold:
            found = sql.select(columns.trial_id, columns.key, columns.value_json).where(wanted)
            return _Twofold(
                found.where(listed(columns.trial_id)),
                found.where(columns.trial_id.in_(everything)),
            )

        return cls(
            all=rows.where(of_study),
            new=rows.where(newer, same_study),
            open=_Twofold(rows.where(listed(trials.trial_id))),
            own=attributes(hidden, hidden.key == RESERVATION),
            usage=attributes(shown, shown.key.startswith(PREFIX)),
            written=_Twofold(
                sql.union(
                    *(
                        sql.select(columns.trial_id).where(listed(columns.trial_id))
                        for columns in (params, shown, hidden, reports)
                    )
                )
            ),
            fail=sql.update(models.TrialModel.__table__)
            .where(
                trials.trial_id == sql.bindparam("trial"),
                trials.state.in_([TrialState.RUNNING, TrialState.WAITING]),
            )
            .values(state=TrialState.FAIL, datetime_complete=sql.bindparam("now")),
        )


def _upsert(models: Any, dialect: str, *, first: bool = False) -> Any:
    import sqlalchemy as sql

    if dialect not in _UPSERTING:
        return None
    from sqlalchemy.dialects import postgresql
    from sqlalchemy.dialects import sqlite

    insert = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}[dialect]
    trials = models.TrialModel.__table__.c
    attributes = models.TrialSystemAttributeModel.__table__
    own = sql.select(
        trials.trial_id,
        sql.bindparam("name", type_=sql.String()),
        sql.bindparam("value", type_=sql.Text()),
    ).where(
        trials.trial_id == sql.bindparam("trial"),
        trials.state.in_([TrialState.RUNNING, TrialState.WAITING]),
    )
    statement: Any = insert(attributes).from_select(["trial_id", "key", "value_json"], own)
    same = [attributes.c.trial_id, attributes.c.key]
    replaced: dict[str, Any] = {"set_": {"value_json": statement.excluded.value_json}}
    if first:
        # As `reservation_object` begins.
        of_this_trial = sql.literal('{"trial": ').concat(sql.bindparam("trial")).concat(",%")
        replaced["where"] = attributes.c.value_json.not_like(of_this_trial)
    return statement.on_conflict_do_update(index_elements=same, **replaced)
