"""Reads the rows of a study's trials, and writes reservations into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TYPE_CHECKING
import zlib

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from optuna_quota import _optuna
from optuna_quota._ledger.reservation import parse_reservation, Reservation, reservation_object
from optuna_quota._ledger.totals import QuotaTotals, read_entry
from optuna_quota._records import RESERVATION, TrialRecord, write_attributes, write_record
from optuna_quota._storage_retry import retry


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial


class TrialRows:
    """A cursor over a study's rows: each finished one is parsed once.

    Not thread-safe; the ledger holds a lock while it reads.
    """

    def __init__(self, study: Study) -> None:
        self._storage = _optuna.storage_of(study)
        self._study_id = _optuna.study_id_of(study)
        # Short, as every row has it.
        self._stamp = f"{zlib.crc32(study.study_name.encode(errors='replace')):08x}"
        self._next = 0
        self._open: list[int] = []
        self._trials: Sequence[FrozenTrial] | None = None

    @property
    def trials(self) -> Sequence[FrozenTrial]:
        """All rows by number, as last read."""
        return self._read() if self._trials is None else self._trials

    def read_into(self, totals: QuotaTotals) -> None:
        """Bring totals up to date with the storage."""
        trials = self._read()
        # Rows are never deleted, so a row's place in the list is its number.
        numbers = (*self._open, *range(self._next, len(trials)))
        found = [trials[number] for number in numbers]
        entries = [
            read_entry(trial, _optuna.trial_id_of(trial), totals.quota, study=self._stamp)
            for trial in found
        ]
        still_open = [entry for entry in entries if entry.state != "finished"]
        self._next = max(self._next, len(trials))
        self._open = [entry.number for entry in still_open]
        totals.update([entry for entry in entries if entry.state == "finished"], still_open)

    def _read(self) -> Sequence[FrozenTrial]:
        trials = retry(lambda: self._storage.get_all_trials(self._study_id, deepcopy=False))
        if trials and trials[-1].number != len(trials) - 1:
            # Between reading a database and returning its rows, Optuna's cache may get one that
            # another thread creates, but not those that other processes created before it.
            trials = [trial for index, trial in enumerate(trials) if trial.number == index]
        self._trials = trials
        return trials

    def stale_trial_ids(self) -> list[int]:
        """Return the ids of trials whose heartbeat is overdue by the storage."""
        return retry(lambda: _optuna.stale_trial_ids(self._storage, self._study_id))

    def write(self, trial_id: int, reservation: Reservation) -> None:
        """Write a trial's reservation into its row.

        Raises:
            optuna.exceptions.UpdateFinishedTrialError: If another worker found this one dead and
                finished the row.
        """
        write_attributes(self._storage, trial_id, system={RESERVATION: self._object(reservation)})

    def take_enqueued(self, trial_id: int, reservation: Reservation) -> bool:
        """Return whether an enqueued trial is this worker's alone.

        Optuna relies on row locks to give it to one worker only, and SQLite has none.
        """
        storage, value = self._storage, self._object(reservation)
        if _optuna.has_row_locks(storage):
            return True
        trial = retry(lambda: storage.get_trial(trial_id))
        written = trial.system_attrs.get(RESERVATION)
        # A retried trial has a copy of another one's reservation, which is parsed as None.
        if trial.state.is_finished() or parse_reservation(written, trial_id, self._stamp):
            return False
        return retry(
            lambda: _optuna.swap_system_attr_on_sqlite(
                storage, trial_id, RESERVATION, written, value
            )
        )

    def fail(self, trial_id: int, record: TrialRecord, reservation: Reservation) -> bool:
        """Finish an orphaned trial's row; of several workers that try, one gets True."""
        storage = self._storage
        try:
            self.write(trial_id, reservation)
            write_record(storage, trial_id, record)
            if not _optuna.has_row_locks(storage):
                return retry(lambda: _optuna.fail_row_on_sqlite(storage, trial_id))
            retry(lambda: storage.set_trial_state_values(trial_id, TrialState.FAIL))
        except UpdateFinishedTrialError:
            return False
        return True

    def _object(self, reservation: Reservation) -> dict[str, Any]:
        return reservation_object(replace(reservation, study=self._stamp))
