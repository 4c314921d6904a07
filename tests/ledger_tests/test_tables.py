"""The ledger's own statements read and write what Optuna's storage would."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from pathlib import Path
import sqlite3

import optuna
from optuna.exceptions import StorageInternalError
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import create_trial
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler
from optuna_quota import Usage
from optuna_quota._ledger import Ledger
from optuna_quota._ledger.book import Book
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._ledger.rows import Rows
from optuna_quota._ledger.tables import Tables
from optuna_quota._optuna import engine_of
from optuna_quota._optuna import storage_of
from optuna_quota._optuna import study_id_of
from optuna_quota._optuna import trial_id_of
from tests.ledger_tests.test_ledger import begin
from tests.ledger_tests.test_ledger import finish
from tests.ledger_tests.test_ledger import reserve
from tests.storages import Address
from tests.storages import missing
from tests.storages import storage_at
from tests.storages import study_in
from tests.storages import VARIABLES


QUOTA = Quota(n_trials=10**6, cpu_time=1e6, memory="1TiB", wall_time="100d")


@pytest.fixture(
    params=[
        pytest.param(kind, marks=pytest.mark.storage if kind in VARIABLES else ())
        for kind in ("sqlite", "postgresql", "mysql")
    ]
)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Address]:
    reason = missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    with storage_at(request.param, tmp_path) as found:
        yield found


def run_all_sorts(address: Address, study: optuna.Study) -> None:
    """Leave rows of every sort in a study."""
    tuned = optuna.load_study(
        study_name=study.study_name,
        storage=address.open(),
        sampler=QuotaSampler(optuna.samplers.RandomSampler(), quota=QUOTA),
        pruner=QuotaPruner(limits=Limits(memory=1)),
    )

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("other", "kept out")
        x = trial.suggest_float("x", 0, 1)
        if trial.number == 1:
            raise optuna.TrialPruned
        if trial.number == 2:
            raise ValueError("bad luck")
        return x

    tuned.optimize(objective, n_trials=4, catch=(ValueError,))
    study.ask()
    study.ask().suggest_float("x", 0, 1)
    study.ask().set_user_attr("other", 1)
    study.ask().report(0.5, 1)
    reserve(Ledger(study, QUOTA), begin(study), {"cpu_time": 2.0, "memory": 8.0})
    study.enqueue_trial({"x": 0.5})


def read(study: optuna.Study, *, by_storage: bool) -> tuple[Rows, Book]:
    rows, book = Rows(study), Book(QUOTA)
    assert rows._tables is not None
    if by_storage:
        rows._tables = None
    rows.read_into(book)
    return rows, book


def assert_equal(one: Book, other: Book) -> None:
    assert one.open == other.open
    assert one.claims == other.claims
    assert one.outcomes == other.outcomes
    assert one.by_worker == other.by_worker
    assert one.by_outcome == other.by_outcome
    assert one.unknown == other.unknown
    assert one.used(0.0) == other.used(0.0)


def test_all_sorts_of_rows_are_read_as_from_the_storage(address: Address) -> None:
    with study_in(address) as study:
        run_all_sorts(address, study)
        rows, book = read(study, by_storage=False)
        others, other = read(study, by_storage=True)
        assert_equal(book, other)
        assert [entry.untouched for entry in book.open] == [True] + [False] * 5
        assert {entry.state for entry in book.open} == {"running", "waiting"}
        # And so is what has changed since: rows that were open, and new ones.
        study.tell(4, 0.5)
        study.tell(5, state=TrialState.FAIL)
        study.add_trial(create_trial(value=0.5, user_attrs={"quota:cpu_time": 3}))
        study.ask()
        rows.read_into(book)
        others.read_into(other)
        assert_equal(book, other)
        assert len(book.open) == 5 - 1
        assert book.used(0.0)["cpu_time"] >= 3


def test_a_row_that_has_finished_is_not_written_and_says_so(address: Address) -> None:
    with study_in(address) as study:
        rows, trial = Rows(study), study.ask()
        trial_id = trial_id_of(trial)
        for amount in (1.0, 2.0, 2.0):
            rows.write(trial_id, Reservation(trial_id, granted={"cpu_time": amount}))
        book = Book(QUOTA)
        rows.read_into(book)
        assert book.claims[0].granted == {"cpu_time": 2}
        study.tell(trial, 0.0)
        with pytest.raises(UpdateFinishedTrialError):
            rows.write(trial_id, Reservation(trial_id, granted={"cpu_time": 3.0}))
        with pytest.raises(KeyError):
            rows.write(10**8, Reservation(10**8))
        again = Book(QUOTA)
        Rows(study).read_into(again)
        assert again.outcomes == {"completed": 1}


def test_an_admission_takes_as_many_statements_however_many_trials_finished(
    tmp_path: Path,
) -> None:
    import sqlalchemy

    statements: list[str] = []
    rows_read: list[int] = []
    with storage_at("sqlite", tmp_path) as address, study_in(address) as study:
        study.add_trials([create_trial(value=0.0, user_attrs={"quota:cpu_time": 1})] * 50)
        ledger = Ledger(study, QUOTA)
        engine = engine_of(storage_of(study))
        changed = Tables.changed

        def counted(self: Tables, after: int, still_open: list[int]) -> object:
            found = changed(self, after, still_open)
            rows_read.append(len(found))
            return found

        def note(*details: object) -> None:
            statements.append(str(details[2]))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tables, "changed", counted)
            for _ in range(3):
                row = begin(study)
                statements.clear()
                rows_read.clear()
                sqlalchemy.event.listen(engine, "before_cursor_execute", note)
                reserve(ledger, row, {"cpu_time": 1.0})
                sqlalchemy.event.remove(engine, "before_cursor_execute", note)
                finish(study, ledger, row, Usage(cpu_time=1.0))
        # New rows, open ones, their reservations, what finished ones used, whether the trial's own
        # is blank; the grant: in a transaction that begins and ends, and is the only one to write.
        assert len(statements) == 8
        assert [text.split()[0] for text in statements if not text.startswith("SELECT")] == [
            "BEGIN",
            "INSERT",
            "COMMIT",
        ]
        # This row, and the one before, which has finished.
        assert rows_read == [2]


def test_a_storage_of_someones_own_is_left_to_itself(tmp_path: Path) -> None:
    class Own(optuna.storages.RDBStorage):
        pass

    storage = Own(f"sqlite:///{tmp_path}/own.db")
    study = optuna.create_study(storage=storage)
    assert Tables.of(storage, study_id_of(study)) is None
    memory = optuna.create_study()
    assert Tables.of(storage_of(memory), study_id_of(memory)) is None


def in_sqlite(folder: Path) -> tuple[optuna.Study, Tables, int]:
    study = optuna.create_study(storage=f"sqlite:///{folder}/study.db")
    tables = Tables.of(storage_of(study), study_id_of(study))
    assert tables is not None
    return study, tables, trial_id_of(study.ask())


def other_writer(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / "study.db", timeout=0.0, isolation_level=None)


def reservations_in(folder: Path) -> int:
    with contextlib.closing(other_writer(folder)) as connection:
        (count,) = connection.execute("SELECT COUNT(*) FROM trial_system_attributes").fetchone()
    return int(count)


def test_while_one_writes_alone_others_wait(tmp_path: Path) -> None:
    study, tables, trial_id = in_sqlite(tmp_path)
    with tables.alone() as alone:
        assert alone
        assert [row.trial.number for row in tables.changed(-1, ())] == [0]
        with (
            contextlib.closing(other_writer(tmp_path)) as connection,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            connection.execute("BEGIN IMMEDIATE")
        assert tables.write(trial_id, {"a": 1})
        assert reservations_in(tmp_path) == 0
    assert not tables.is_alone
    assert reservations_in(tmp_path) == 1
    study.tell(0, 1.0)
    assert study.trials[0].system_attrs == {"quota:reservation": {"a": 1}}


def test_what_was_written_alone_before_an_error_is_undone(tmp_path: Path) -> None:
    study, tables, trial_id = in_sqlite(tmp_path)
    with pytest.raises(KeyError), tables.alone():
        tables.write(trial_id, {"a": 1})
        raise KeyError("a")
    assert reservations_in(tmp_path) == 0
    assert tables.write(trial_id, {"b": 2})
    assert study.trials[0].system_attrs == {"quota:reservation": {"b": 2}}


def test_nobody_writes_alone_while_another_has_begun(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 0.01}})
    study = optuna.create_study(storage=storage)
    tables = Tables.of(storage_of(study), study_id_of(study))
    assert tables is not None
    with contextlib.closing(other_writer(tmp_path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with tables.alone() as alone:
            assert not alone
        connection.execute("ROLLBACK")
    study.ask()
    assert len(study.trials) == 1


def test_a_row_that_has_finished_is_granted_nothing_and_keeps_nobody_waiting(
    tmp_path: Path,
) -> None:
    study, _, trial_id = in_sqlite(tmp_path)
    rows = Rows(study)
    study.tell(0, 1.0)
    with pytest.raises(UpdateFinishedTrialError), rows.alone() as alone:
        assert alone
        rows.write(trial_id, Reservation())
    study.ask()
    assert len(study.trials) == 2


def test_a_server_has_no_one_lock_for_all_writers(address: Address) -> None:
    with study_in(address) as study:
        tables = Tables.of(storage_of(study), study_id_of(study))
        assert tables is not None
        with tables.alone() as alone:
            assert alone is (address.kind == "sqlite")


def test_faults_of_the_database_are_told_as_optuna_tells_them(tmp_path: Path) -> None:
    import sqlalchemy

    with storage_at("sqlite", tmp_path) as address, study_in(address) as study:
        rows, row = Rows(study), begin(study)
        engine = engine_of(storage_of(study))
        engine.dispose()

        def fail(*_: object) -> None:
            raise sqlalchemy.exc.ProgrammingError("SELECT", {}, Exception("no such column"))

        sqlalchemy.event.listen(engine, "before_cursor_execute", fail)
        try:
            for call in (
                lambda: rows.read_into(Book(QUOTA)),
                lambda: rows.write(trial_id_of(row), Reservation()),
                lambda: rows.take(trial_id_of(row), Reservation()),
            ):
                with pytest.raises(StorageInternalError) as caught:
                    call()
                assert isinstance(caught.value.__cause__, sqlalchemy.exc.ProgrammingError)
        finally:
            sqlalchemy.event.remove(engine, "before_cursor_execute", fail)
