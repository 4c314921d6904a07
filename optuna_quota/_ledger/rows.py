"""The ledger's access to storage: rows in, attributes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.trial import TrialState

from optuna_quota import _optuna
from optuna_quota._ledger.book import Book
from optuna_quota._ledger.book import Entry
from optuna_quota._ledger.book import read_entry
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._ledger.reservation import reservation_object
from optuna_quota._patience import patiently
from optuna_quota._records import RESERVATION
from optuna_quota._records import TrialRecord
from optuna_quota._records import write_record


if TYPE_CHECKING:
    from optuna.study import Study


class Rows:
    """A cursor over a study's rows: each finished one is read once.

    Not safe for threads; the ledger holds a lock around reading.
    """

    def __init__(self, study: Study) -> None:
        self._storage = _optuna.storage_of(study)
        self._study_id = _optuna.study_id_of(study)
        self._next = 0
        self._open: list[int] = []

    def read_into(self, book: Book) -> None:
        """Bring a book up to date with the storage."""
        trials = patiently(lambda: self._storage.get_all_trials(self._study_id, deepcopy=False))
        count = len(trials)
        finished: list[Entry] = []
        still_open: list[Entry] = []
        # Rows are never deleted, so a row's place in the list is its number.
        for number in (*self._open, *range(self._next, count)):
            trial = trials[number]
            entry = read_entry(trial, _optuna.trial_id_of(trial), book.quota)
            (finished if entry.state == "finished" else still_open).append(entry)
        self._next = max(self._next, count)
        self._open = [entry.number for entry in still_open]
        book.fold(finished, still_open)

    def stale(self) -> list[int]:
        """Return the ids of trials whose heartbeat the storage has missed."""
        return patiently(lambda: _optuna.stale_trial_ids(self._storage, self._study_id))

    def write(self, trial_id: int, reservation: Reservation) -> None:
        """Write a trial's reservation into its row.

        Raises:
            optuna.exceptions.UpdateFinishedTrialError: If the row is finished: someone took this
                worker for dead.
        """
        value = reservation_object(reservation)
        patiently(lambda: self._storage.set_trial_system_attr(trial_id, RESERVATION, value))

    def fail(self, trial_id: int, record: TrialRecord, reservation: Reservation) -> None:
        """Finish the row of a trial whose worker is gone.

        Raises:
            optuna.exceptions.UpdateFinishedTrialError: If someone else has done so.
        """
        self.write(trial_id, reservation)
        patiently(lambda: write_record(self._storage, trial_id, record))
        patiently(lambda: self._storage.set_trial_state_values(trial_id, TrialState.FAIL))
