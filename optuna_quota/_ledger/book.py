"""The sum of all rows: each finished one is added once, those that run are looked at anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING

from optuna_quota._ledger.protocol import Claim
from optuna_quota._ledger.protocol import is_held
from optuna_quota._ledger.reservation import parse_reservation
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._ledger.reservation import Worker
from optuna_quota._ledger.spans import WorkerSpans
from optuna_quota._records import parse_record
from optuna_quota._records import RESERVATION
from optuna_quota._resources import Quota
from optuna_quota._resources import Usage


if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


# Seconds between two writes of a worker that show that it is alive.
HEARTBEAT = 30.0

# What is summed over the rows of finished trials. `wall_time` is a union, not a sum.
SUMMED = ("n_trials", "trial_time", "cpu_time", "gpu_time", "energy", "cost")


@dataclass(frozen=True)
class Entry:
    """One row as the ledger sees it.

    Attributes:
        number: The trial's number.
        trial_id: Its id in the storage.
        state: ``"running"``, ``"waiting"`` or ``"finished"``.
        outcome: How it ended, empty before it has.
        reservation: What it holds, None when no ledger ever saw it.
        charges: What it used by resource; None where nobody knows.
        span: When it ran, from start to end, on its machine's clock.
        untouched: True when nothing was written into the row since it was made.
    """

    number: int
    trial_id: int
    state: str
    outcome: str = ""
    reservation: Reservation | None = None
    charges: Mapping[str, float | None] = field(default_factory=dict)
    span: tuple[float, float] | None = None
    untouched: bool = False

    @property
    def worker(self) -> str:
        """Who ran it, for people."""
        known = self.reservation is not None and self.reservation.worker is not None
        return self.reservation.worker.label if known else "unknown"  # type: ignore[union-attr]

    @property
    def claim(self) -> Claim:
        """The row as the protocol sees it."""
        held = self.reservation or Reservation()
        machine = held.worker.machine if held.worker is not None else ""
        return Claim(self.number, machine, held.granted, held.asked, held.waits)


def read_entry(
    trial: FrozenTrial,
    trial_id: int,
    quota: Quota,
    *,
    study: str | None = None,
) -> Entry:
    """Return what a row means to the ledger.

    Args:
        trial: The row.
        trial_id: Its id in the storage.
        quota: The quota; its prices turn usage into cost.
        study: What tells the study from others in reservations.
    """
    written = trial.system_attrs.get(RESERVATION)
    reservation = parse_reservation(written, trial_id, study)
    if not trial.state.is_finished():
        state = trial.state.name.lower()
        untouched = state == "running" and not _touched(trial)
        return Entry(trial.number, trial_id, state, reservation=reservation, untouched=untouched)
    record = parse_record(trial.user_attrs)
    outcome = record.outcome or _outcome_of_state(trial.state.name)
    never_ran = reservation is not None and reservation.began is None
    if trial.state.name == "COMPLETE":
        # It has a value, so it ran, whatever else stands in its row.
        outcome, never_ran = ("completed" if outcome == "rejected" else outcome), False
    if outcome == "rejected" or never_ran:
        return Entry(trial.number, trial_id, "finished", outcome, reservation)
    if reservation is None:
        ran_here = written is None or (
            isinstance(written, Mapping) and study is not None and written.get("study") == study
        )
        charges = _charges_shown(trial, record.usage, quota, ran_here=ran_here)
    else:
        charges = _charges(trial, reservation, record.usage, quota)
    span = _span(trial, reservation, charges.get("trial_time"))
    return Entry(trial.number, trial_id, "finished", outcome, reservation, charges, span)


def _touched(trial: FrozenTrial) -> bool:
    return bool(
        trial.params or trial.user_attrs or trial.system_attrs or trial.intermediate_values
    )


def _outcome_of_state(state: str) -> str:
    return {"COMPLETE": "completed", "PRUNED": "pruned"}.get(state, "failed")


def _charges_shown(
    trial: FrozenTrial, usage: Usage, quota: Quota, *, ran_here: bool
) -> dict[str, float | None]:
    """Return what a row shows that no ledger admitted: it ran before there was a quota, or was
    added with its result.

    What it does not show is not charged: nothing bounded it. It counts among the trials of the
    study if it ran here: ``create_trial`` gives a row that was added one time for its start and
    its end, and one that was copied from another study with a quota keeps the reservation that it
    had there. One copied with its times from a study without a quota can't be told from one that
    ran here.
    """
    names = ("trial_time", "cpu_time", "gpu_time", "energy")
    charges = {name: usage.get(name) for name in names}
    seconds = 0.0 if trial.duration is None else max(0.0, trial.duration.total_seconds())
    if charges["trial_time"] is None and seconds > 0:
        charges["trial_time"] = seconds
    if seconds > 0 and ran_here:
        charges["n_trials"] = 1.0
    known = {name: amount for name, amount in charges.items() if amount is not None}
    return {**known, "cost": quota.price(known)} if quota.prices else dict(known)


def _charges(
    trial: FrozenTrial, held: Reservation, usage: Usage, quota: Quota
) -> dict[str, float | None]:
    charges: dict[str, float | None] = {"n_trials": 1.0}
    for name in ("trial_time", "cpu_time", "gpu_time", "energy"):
        known = [v for v in (usage.get(name), held.charged.get(name)) if v is not None]
        charges[name] = max(known) if known else held.granted.get(name)
    if charges["trial_time"] is None and trial.duration is not None:
        charges["trial_time"] = max(0.0, trial.duration.total_seconds())
    if quota.prices:
        unknown = any(charges.get(name) is None for name in quota.prices)
        charges["cost"] = held.granted.get("cost") if unknown else quota.price(charges)
    return charges


def _span(
    trial: FrozenTrial, reservation: Reservation | None, seconds: float | None
) -> tuple[float, float] | None:
    began = reservation.began if reservation is not None else None
    if began is None and trial.datetime_start is not None:
        began = trial.datetime_start.timestamp()
    return None if began is None or seconds is None else (began, began + seconds)


class Book:
    """What all rows of a study come to.

    Args:
        quota: The quota; its prices turn usage into cost.
        bounds: Limits on one trial, by resource: what a trial of unknown usage is charged.
        heartbeat: Seconds between two heartbeats of a worker.

    Attributes:
        earlier: What rows come to that no ledger admitted, by resource, and how many they are:
            those that ran as ``n_trials``, the others as ``added``.
    """

    def __init__(
        self,
        quota: Quota,
        bounds: Mapping[str, float] | None = None,
        heartbeat: float = HEARTBEAT,
    ) -> None:
        self.quota = quota
        self._heartbeat = heartbeat
        self.bounds = bounds or {}
        self.open: tuple[Entry, ...] = ()
        self.earlier: Counter[str] = Counter()
        self._spans = WorkerSpans()
        self.unknown: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.by_worker: dict[str, Counter[str]] = {}
        self.by_outcome: dict[str, Counter[str]] = {}
        self._known: Counter[str] = Counter()
        self._largest: dict[str, float] = {}

    def fold(self, entries: Iterable[Entry], still_open: Sequence[Entry]) -> None:
        """Add rows that have finished, and replace those that have not."""
        for entry in entries:
            self._add(entry)
        self.open = tuple(still_open)

    def _add(self, entry: Entry) -> None:
        self.outcomes[entry.outcome] += 1
        if entry.reservation is None and entry.outcome != "rejected":
            self.earlier.update(entry.charges)
            self.earlier["added"] += "n_trials" not in entry.charges
        worker = self.by_worker.setdefault(entry.worker, Counter())
        outcome = self.by_outcome.setdefault(entry.outcome, Counter())
        for name, amount in entry.charges.items():
            if amount is None:
                self.unknown[name] += 1
                continue
            self._known[name] += amount  # type: ignore[assignment]  # a Counter holds floats too
            worker[name] += amount  # type: ignore[assignment]  # as above
            outcome[name] += amount  # type: ignore[assignment]  # as above
            self._largest[name] = max(amount, self._largest.get(name, 0.0))
        if entry.span is not None:
            who = None if entry.reservation is None else entry.reservation.worker
            self._spans.add(who, *entry.span)

    def used(self, now: float, here: Worker | None = None) -> dict[str, float]:
        """Return what was used by resource: rows of unknown usage count by their bound.

        The bound is the limit where one is set, else the largest usage known.

        Args:
            now: Seconds since the epoch.
            here: A worker that is about to start a trial.
        """
        used = {name: self._known[name] + self._unknown(name) for name in SUMMED}
        used["wall_time"] = self.wall_time(now, here)
        return used

    def wall_time(self, now: float, here: Worker | None = None) -> float:
        """Return the clock time of the study's workers, until now of those that run a trial.

        From a worker's first trial to the end of its last; pauses longer than
        :data:`LONGEST_GAP` don't count.

        Args:
            now: Seconds since the epoch.
            here: A worker that is about to start a trial.
        """
        running: list[tuple[Worker | None, float, float]] = [
            (e.reservation.worker, e.reservation.began, self._until(e.reservation, now))
            for e in self.open
            if e.reservation is not None and e.reservation.began is not None
        ]
        if here is not None:
            running.append((here, now, now))
        return self._spans.with_running(running)

    def _until(self, reservation: Reservation, now: float) -> float:
        # By the worker's own clock, which may differ from the reader's: what has passed since its
        # last heartbeat is between nothing and the time to the next one.
        beat = reservation.beat
        return now if beat is None else min(max(now, beat), beat + self._heartbeat)

    def _unknown(self, name: str) -> float:
        bound = self.bounds.get(name, self._largest.get(name, 0.0))
        return self.unknown[name] * bound

    def reserved(self, machine: str | None = None) -> dict[str, float]:
        """Return what running trials hold or ask for, by resource.

        Args:
            machine: Count what is held at one moment on this machine only.
        """
        reserved: dict[str, float] = {}
        for entry in self.open:
            claim = entry.claim
            for name in claim.granted.keys() | claim.asked.keys():
                if is_held(name) and machine not in (None, claim.machine):
                    continue
                amount = max(claim.granted.get(name, 0.0), claim.asked.get(name, 0.0))
                reserved[name] = reserved.get(name, 0.0) + amount
        return reserved

    @property
    def claims(self) -> list[Claim]:
        """Running trials that hold, ask or wait, as the protocol sees them."""
        return [entry.claim for entry in self.open if entry.reservation is not None]
