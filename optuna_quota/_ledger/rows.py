"""The ledger's access to storage: rows in, attributes out."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
from dataclasses import replace
from datetime import datetime
import logging
from typing import Any
from typing import TYPE_CHECKING
import zlib

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from optuna_quota import _optuna
from optuna_quota._ledger.book import Book
from optuna_quota._ledger.book import Entry
from optuna_quota._ledger.book import read_entry
from optuna_quota._ledger.reservation import parse_reservation
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._ledger.reservation import reservation_object
from optuna_quota._ledger.tables import Tables
from optuna_quota._records import RESERVATION
from optuna_quota._records import TrialRecord
from optuna_quota._records import write_attributes
from optuna_quota._records import write_record
from optuna_quota._storage_retry import retry


if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

_logger = logging.getLogger("optuna.quota.ledger")


class Rows:
    """A cursor over a study's rows: each finished one is read once.

    Not safe for threads; the ledger holds a lock around reading.
    """

    def __init__(self, study: Study) -> None:
        self._storage = _optuna.storage_of(study)
        self._study_id = _optuna.study_id_of(study)
        # Short, as it stands in every row.
        self._stamp = f"{zlib.crc32(study.study_name.encode(errors='replace')):08x}"
        self._tables = _tables_of(self._storage, self._study_id)
        self._next = 0
        self._open: list[int] = []
        self._last_id = -1
        self._trials: Sequence[FrozenTrial] = ()

    @property
    def trials(self) -> Sequence[FrozenTrial]:
        """All rows by number: as they were last read, where they were read as a whole."""
        if self._tables is None and self._trials:
            return self._trials
        return retry(lambda: self._storage.get_all_trials(self._study_id, deepcopy=False))

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Keep all other writers out while the block runs; yield whether that can be done."""
        with contextlib.nullcontext(False) if self._tables is None else self._tables.alone() as it:
            yield it

    def read_into(self, book: Book) -> None:
        """Bring a book up to date with the storage."""
        entries = self._read_storage(book) if self._tables is None else self._read_tables(book)
        still_open = [entry for entry in entries if entry.state != "finished"]
        book.fold([entry for entry in entries if entry.state == "finished"], still_open)

    def _read_storage(self, book: Book) -> list[Entry]:
        trials = retry(lambda: self._storage.get_all_trials(self._study_id, deepcopy=False))
        self._trials = trials
        # Rows are never deleted, so a row's place in the list is its number.
        numbers = (*self._open, *range(self._next, len(trials)))
        found = [trials[number] for number in numbers]
        entries = [
            read_entry(trial, _optuna.trial_id_of(trial), book.quota, study=self._stamp)
            for trial in found
        ]
        self._next = max(self._next, len(trials))
        self._open = [entry.number for entry in entries if entry.state != "finished"]
        return entries

    def _read_tables(self, book: Book) -> list[Entry]:
        assert self._tables is not None
        tables = self._tables
        rows = retry(lambda: tables.changed(self._last_id, self._open))
        entries = [
            read_entry(
                row.trial,
                _optuna.trial_id_of(row.trial),
                book.quota,
                study=self._stamp,
                touched=row.touched,
            )
            for row in rows
        ]
        self._last_id = max([self._last_id, *(entry.trial_id for entry in entries)])
        self._open = [entry.trial_id for entry in entries if entry.state != "finished"]
        return entries

    def stale(self) -> list[int]:
        """Return the ids of trials whose heartbeat the storage has missed."""
        return retry(lambda: _optuna.stale_trial_ids(self._storage, self._study_id))

    def write(self, trial_id: int, reservation: Reservation) -> None:
        """Write a trial's reservation into its row.

        Raises:
            optuna.exceptions.UpdateFinishedTrialError: If the row is finished: someone took this
                worker for dead.
        """
        value = self._object(reservation)
        tables = self._tables
        if tables is None or not retry(lambda: tables.write(trial_id, value)):
            if tables is not None and tables.is_alone:
                # The storage's own connection would wait for this one.
                raise UpdateFinishedTrialError(f"The trial with id {trial_id} has finished.")
            write_attributes(self._storage, trial_id, system={RESERVATION: value})

    def take(self, trial_id: int, reservation: Reservation) -> bool:
        """Return whether an enqueued trial is this worker's, and nobody else's already.

        Optuna relies on row locks to give it to one worker only, and SQLite has none.
        """
        tables, value = self._tables, self._object(reservation)
        if tables is None or retry(lambda: tables.write_first(trial_id, value)):
            return True
        trial = retry(lambda: self._storage.get_trial(trial_id))
        # What a retried trial copied from another one is void.
        held = parse_reservation(trial.system_attrs.get(RESERVATION), trial_id)
        return held is None and not trial.state.is_finished()

    def _object(self, reservation: Reservation) -> dict[str, Any]:
        return reservation_object(replace(reservation, study=self._stamp))

    def fail(self, trial_id: int, record: TrialRecord, reservation: Reservation) -> None:
        """Finish the row of a trial whose worker is gone; of several that try, one succeeds.

        Raises:
            optuna.exceptions.UpdateFinishedTrialError: If someone else has done so.
        """
        tables = self._tables
        self.write(trial_id, reservation)
        write_record(self._storage, trial_id, record)
        if tables is None:
            retry(lambda: self._storage.set_trial_state_values(trial_id, TrialState.FAIL))
        # On SQLite, Optuna reads the state and writes it in two steps.
        elif not retry(lambda: tables.fail(trial_id, datetime.now())):
            raise UpdateFinishedTrialError(f"The trial with id {trial_id} has finished.")


def _tables_of(storage: BaseStorage, study_id: int) -> Tables | None:
    try:
        return Tables.of(storage, study_id)
    except (AttributeError, ImportError, KeyError) as error:
        _logger.debug(f"The tables are not those of the Optuna that is known: {error!r}.")
        return None
