"""Reads rows, writes claims and decides by the protocol, for all threads of a process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
import logging
import random
import threading
from typing import Any, Protocol
from weakref import WeakSet

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from optuna_quota import _optuna, _records
from optuna_quota._ledger import heartbeat, protocol
from optuna_quota._ledger.heartbeat import Leases, OrphanedTrial
from optuna_quota._ledger.protocol import (
    Claim,
    Decision,
    Reservation,
    ResourceRequest,
    this_worker,
    Worker,
)
from optuna_quota._ledger.totals import CLOCK_TOLERANCE, Entry, QuotaTotals, read_entry
from optuna_quota._limits import Limits, Quota
from optuna_quota._metering.host import Gpu
from optuna_quota._records import TrialRecord
from optuna_quota._resources import CHARGED_RESOURCES
from optuna_quota._storage_retry import retry, survive_outages
from optuna_quota._units import format_seconds
from optuna_quota._usage import Usage


_logger = logging.getLogger("optuna.quota.ledger")

# Seconds. A clock further ahead is reported but not followed: a row may be malformed.
_FURTHEST_AHEAD = 86_400.0
# Seconds between two queries for the storage's own heartbeats.
_STALE_INTERVAL = 5.0
_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.25


class Clock(Protocol):
    """The part of the module ``time`` that the ledger uses; tests replace it."""

    def time(self) -> float: ...

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


@dataclass(frozen=True)
class Snapshot:
    """All rows at one moment."""

    # Usage of finished trials, by resource; ``wall_time`` includes running ones.
    used: dict[str, float]
    # What running trials hold or ask for; on this machine if it is per host.
    reserved: dict[str, float]
    claims: tuple[Claim, ...]  # The running trials as the protocol sees them
    open: tuple[Entry, ...]  # All rows that have not finished

    def free(self, quota: Quota) -> dict[str, float]:
        return {
            name: max(0.0, total - self.used.get(name, 0.0) - self.reserved.get(name, 0.0))
            for name, total in quota.amounts().items()
        }

    def count_beside(self, number: int) -> int:
        return sum(1 for claim in self.claims if claim.number != number)


class TrialRows:
    """Reads a study's rows; each finished row is parsed once. Not thread-safe."""

    def __init__(self, study: Study) -> None:
        self.storage = _optuna.storage_of(study)
        self.study_id = _optuna.study_id_of(study)
        self.stamp = protocol.study_stamp(study.study_name)
        self._next = 0
        self._open: list[int] = []
        self._trials: Sequence[FrozenTrial] | None = None

    @property
    def trials(self) -> Sequence[FrozenTrial]:
        return self._read() if self._trials is None else self._trials

    def read_into(self, totals: QuotaTotals) -> None:
        trials = self._read()
        # Rows are never deleted, so a row's place in the list is its number.
        found = [trials[number] for number in (*self._open, *range(self._next, len(trials)))]
        entries = [
            read_entry(trial, _optuna.trial_id_of(trial), totals.quota, study=self.stamp)
            for trial in found
        ]
        still_open = [entry for entry in entries if entry.state != "finished"]
        self._next = max(self._next, len(trials))
        self._open = [entry.number for entry in still_open]
        totals.update([entry for entry in entries if entry.state == "finished"], still_open)

    def _read(self) -> Sequence[FrozenTrial]:
        # The storage of a study that is only read, as by `status`, does not retry.
        trials = retry(lambda: self.storage.get_all_trials(self.study_id, deepcopy=False))
        if trials and trials[-1].number != len(trials) - 1:
            # Between reading a database and returning its rows, Optuna's cache may get one that
            # another thread creates, but not those that other processes created before it.
            trials = [trial for index, trial in enumerate(trials) if trial.number == index]
        self._trials = trials
        return trials


class LedgerState:
    """Reads the rows of a study and writes the reservations of this process's trials.

    It refers weakly to ``Study`` objects, which the storage's callback for orphaned trials needs,
    so that a study's connections are closed when its user drops it.
    """

    def __init__(
        self,
        study: Study,
        quota: Quota,
        clock: Clock,
        lease: float,
        studies: WeakSet[Study],
        gpus: Sequence[Gpu] = (),
    ) -> None:
        self.quota = quota
        self.ceilings = {**quota.amounts(), **{gpu.resource: gpu.memory for gpu in gpus}}
        self.clock = clock
        self.heartbeat = lease / heartbeat.HEARTBEATS_PER_LEASE
        self.rows = TrialRows(study)
        self._storage = self.rows.storage
        survive_outages(self._storage)
        bounds = _records.read_amounts(_optuna.user_attrs_of(study).get(_records.STUDY_LIMITS))
        self._totals = QuotaTotals(quota, bounds)
        self._charged: dict[int, dict[str, float]] = {}
        self._lock = threading.Lock()
        self.last: Snapshot | None = None
        self._studies = studies
        self._leases = Leases(lease, protocol.is_alive)
        self._stale_read: float | None = None
        # The study's clock: this machine's at this moment, then as time passes here.
        self._ahead = clock.time() - clock.monotonic()
        self._warned_of: set[str] = set()

    def now(self, since: float | None = None) -> float:
        """Return seconds since the epoch on the study's clock, now or at a monotonic time.

        All workers follow the worker whose clock is ahead, so that trials that overlap in reality
        overlap on the study's clock.
        """
        return self._ahead + (self.clock.monotonic() if since is None else since)

    def read(self) -> Snapshot:
        """Read what has changed and return all rows at this moment."""
        with self._lock:
            self.rows.read_into(self._totals)
            open_ids = {entry.trial_id for entry in self._totals.open}
            self._charged = {k: v for k, v in self._charged.items() if k in open_ids}
            here = this_worker()
            if self.quota.wall_time is not None:
                self._follow(*self._totals.latest)
            self.last = Snapshot(
                self._totals.used(self.now(), here),
                self._totals.reserved(here.machine),
                tuple(self._totals.claims),
                self._totals.open,
            )
            return self.last

    def _follow(self, latest: float, worker: Worker | None) -> None:
        """Advance the study's clock to the latest time that another worker has written."""
        ahead = latest - self.now()
        if worker is None or ahead < CLOCK_TOLERANCE:
            return
        if ahead < _FURTHEST_AHEAD:
            self._ahead += ahead
        if worker.machine in self._warned_of:
            return
        self._warned_of.add(worker.machine)
        _logger.warning(
            f"The clock of host {worker.host} is {format_seconds(ahead)} ahead of that of "
            f"{this_worker().host}: synchronize them. Wall time of the quota is counted by the "
            "former; start and end of a trial are stored by its own host's clock."
        )

    def refresh(self) -> Snapshot:
        """Read the rows, fail those of dead workers, and return what is left."""
        seen, now = self.read(), self.clock.monotonic()
        with self._lock:
            stale: list[int] = []
            if self._stale_read is None or now - self._stale_read >= _STALE_INTERVAL:
                self._stale_read = now
                stale = _optuna.stale_trial_ids(self._storage, self.rows.study_id)
            orphans = self._leases.find_orphaned(seen.open, now, stale)
        if not orphans:
            return seen
        self.fail_orphaned(*orphans)
        return self.read()

    def fail_orphaned(self, *orphans: OrphanedTrial) -> None:
        """Finish the rows of orphaned trials, and call the storage's callback, which may retry."""
        now, rates = self.now(), heartbeat.usage_rates(self.rows.trials)
        for orphan in orphans:
            trial_id = orphan.entry.trial_id
            held, record = heartbeat.close_orphan(orphan, now, rates, lease=self._leases.lease)
            # Another worker may be faster, or the silent worker may continue and finish it.
            if not self._fail(trial_id, record, held):
                continue
            _logger.warning(f"Trial {orphan.entry.number} was marked as failed. {orphan.reason}")
            try:
                for study in tuple(self._studies)[:1]:
                    _optuna.call_stale_trial_callback(study, trial_id)
            except Exception as fault:  # noqa: BLE001 - the user's; other trials must go on
                _logger.warning(
                    f"Trial {orphan.entry.number} may not be retried, as the storage's callback "
                    f"for failed trials raised {fault!r}."
                )

    def wall_time(self) -> float:
        """Return the study's wall time by the rows as last read, as a trial starts here."""
        with self._lock:
            return self._totals.wall_time(self.now(), this_worker())

    def set_bounds(self, limits: Limits) -> None:
        with self._lock:
            self._totals.bounds = limits.amounts()

    @property
    def unadmitted(self) -> Mapping[str, float]:
        return self._totals.unadmitted

    def write(self, trial_id: int, reservation: Reservation) -> None:
        """Write a reservation of this worker.

        Raises UpdateFinishedTrialError if another worker has finished the row.
        """
        attribute = self.attribute(trial_id, reservation)
        _records.write_attributes(self._storage, trial_id, system=attribute)

    def attribute(self, trial_id: int, reservation: Reservation) -> dict[str, Any]:
        """Return what :meth:`write` writes, by key."""
        own: dict[str, Any] = {"beat": self.now(), "every": self.heartbeat}
        return self._stamped(replace(reservation, trial_id=trial_id, worker=this_worker(), **own))

    def _stamped(self, reservation: Reservation) -> dict[str, Any]:
        stamped = replace(reservation, study=self.rows.stamp)
        return {_records.RESERVATION: protocol.reservation_object(stamped)}

    def take_enqueued(self, trial_id: int) -> bool:
        """Return whether an enqueued trial is this worker's alone.

        Optuna relies on row locks to give it to one worker only, and SQLite has none.
        """
        storage, key = self._storage, _records.RESERVATION
        if _optuna.has_row_locks(storage):
            return True
        trial = storage.get_trial(trial_id)
        written = trial.system_attrs.get(key)
        # A retried trial has a copy of another one's reservation, which is parsed as None.
        if trial.state.is_finished() or protocol.parse_reservation(
            written, trial_id, self.rows.stamp
        ):
            return False
        own = self.attribute(trial_id, Reservation())[key]
        swap = _optuna.swap_system_attr_on_sqlite
        return retry(lambda: swap(storage, trial_id, key, written, own))

    def _fail(self, trial_id: int, record: TrialRecord, reservation: Reservation) -> bool:
        """Finish an orphaned trial's row; of several workers that try, one gets True."""
        storage, user = self._storage, _records.record_attributes(record)
        try:
            _records.write_attributes(
                storage, trial_id, user=user, system=self._stamped(reservation)
            )
            if not _optuna.has_row_locks(storage):
                return retry(lambda: _optuna.fail_row_on_sqlite(storage, trial_id))
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False
        return True

    def charge(self, trial_id: int, usage: Usage, *, n_trials: int) -> None:
        """Record the usage of a trial that finishes; it counts as ``n_trials`` trials."""
        amounts = {name: usage.get(name) or 0.0 for name in CHARGED_RESOURCES}
        amounts |= {"cost": self.quota.price(amounts), "n_trials": float(n_trials)}
        with self._lock:
            self._charged[trial_id] = amounts

    def with_charged(self, seen: Snapshot) -> tuple[dict[str, float], list[Claim]]:
        """Return usage by resource and the claims as if charged trials had finished."""
        with self._lock:
            charged = {
                entry.number: self._charged[entry.trial_id]
                for entry in seen.open
                if entry.trial_id in self._charged
            }
        used = dict(seen.used)
        for amounts in charged.values():
            for name, amount in amounts.items():
                used[name] = used.get(name, 0.0) + amount
        return used, [claim for claim in seen.claims if claim.number not in charged]

    def judge(
        self,
        number: int,
        held: Reservation,
        requests: Mapping[str, ResourceRequest],
        seen: Snapshot,
        *,
        queue: bool,
    ) -> Decision:
        """Return the protocol's decision by a snapshot; arguments as for :meth:`ask`."""
        machine = this_worker().machine
        me = Claim(number, machine, held.granted, held.asked, held.queued_for)
        return protocol.decide(me, requests, seen.claims, seen.used, self.ceilings, queue=queue)

    def ask(
        self,
        trial_id: int,
        number: int,
        held: Reservation,
        requests: Mapping[str, ResourceRequest],
        *,
        queue: bool,
    ) -> tuple[Decision, Snapshot]:
        """Write a claim, read all rows and decide; return the decision and the rows read.

        ``held`` is the row's reservation, which a withdrawal restores. The caller writes a grant
        into the row.
        """
        if not requests:
            return Decision("grant"), self.refresh()
        asking = protocol.with_claim(held, requests)
        self.write(trial_id, asking)
        written = self.clock.monotonic()
        for pause in pauses():
            # Claims of dead workers would never be withdrawn.
            seen = self.refresh()
            decision = self.judge(number, asking, requests, seen, queue=queue)
            if decision.action != "wait":
                break
            self.clock.sleep(pause)
            if self.clock.monotonic() - written > self.heartbeat:
                self.write(trial_id, asking)
                written = self.clock.monotonic()
        if decision.action == "withdraw":
            self.write(trial_id, protocol.with_decision(asking, decision))
        return decision, seen


def pauses() -> Iterator[float]:
    """Yield seconds to wait between reads: growing, with jitter."""
    pause = _FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(_LONGEST_PAUSE, 1.5 * pause)
