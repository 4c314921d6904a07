"""Sums what a study's trials have used and reserved. No I/O."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
import math
from typing import Any

from optuna.trial import FrozenTrial

from optuna_quota._ledger.protocol import Claim, is_held, parse_reservation, Reservation, Worker
from optuna_quota._limits import Quota
from optuna_quota._records import parse_record, RESERVATION
from optuna_quota._resources import CHARGED_RESOURCES, format_amount, get_resource, TOTAL_RESOURCES
from optuna_quota._storage_retry import ASKED
from optuna_quota._table import optuna_duration
from optuna_quota._usage import Usage


# Seconds: a longer pause between two trials of a worker does not count as wall time of the study.
# Drawing a point takes less, and counts.
LONGEST_GAP = 10.0

# Seconds by which the clocks of two hosts may differ without consequences.
CLOCK_TOLERANCE = 5.0

# Summed over finished trials; `wall_time` is a union of intervals, not a sum.
_SUMMED = tuple(name for name in TOTAL_RESOURCES if name != "wall_time")


class IntervalUnion:
    """A growing union of intervals; adding one costs the logarithm of their number.

    Intervals at most a ``gap`` apart are joined, with what is between them.
    """

    def __init__(self, gap: float = 0.0) -> None:
        self._gap = gap
        self._starts: list[float] = []
        self._ends: list[float] = []
        self.total = 0.0

    def copy(self) -> IntervalUnion:
        other = IntervalUnion(self._gap)
        other._starts, other._ends, other.total = [*self._starts], [*self._ends], self.total
        return other

    def add(self, start: float, end: float) -> tuple[float, float]:
        """Add an interval; return what it is joined to with those that it touches."""
        end = max(start, end)
        first = bisect_left(self._ends, start - self._gap)
        last = bisect_right(self._starts, end + self._gap)
        touched = list(zip(self._starts[first:last], self._ends[first:last], strict=True))
        if touched:
            start, end = min(start, touched[0][0]), max(end, touched[-1][1])
        self.total += end - start - sum(e - s for s, e in touched)
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]
        return start, end


class WorkerTime:
    """Clock time in which any worker ran trials; overlapping trials count once."""

    def __init__(self) -> None:
        self._by_worker: dict[Hashable, IntervalUnion] = {}
        self._all = IntervalUnion()

    def add(self, worker: Hashable, start: float, end: float) -> None:
        if end > start:
            own = self._by_worker.setdefault(worker, IntervalUnion(gap=LONGEST_GAP))
            self._all.add(*own.add(start, end))

    @property
    def total(self) -> float:
        return self._all.total

    def with_running(self, running: Iterable[tuple[Hashable, float, float]]) -> float:
        """Return the total with running trials: worker, start and present time of each."""
        union = self._all.copy()
        for worker, start, now in running:
            own = self._by_worker.get(worker)
            union.add(*((start, now) if own is None else own.copy().add(start, now)))
        return union.total


@dataclass(frozen=True)
class Entry:
    """What the ledger needs of one row."""

    number: int
    trial_id: int
    state: str  # "running", "waiting" or "finished"
    outcome: str = ""  # How it ended; empty while it has not
    reservation: Reservation | None = None  # Its reservation; None if no ledger admitted it
    # What it used by resource; None where unknown.
    charges: Mapping[str, float | None] = field(default_factory=dict)
    span: tuple[float, float] | None = None  # When it ran, from start to end, on the study's clock
    untouched: bool = False  # Whether nothing was written into the row since it was created

    @property
    def worker(self) -> str:
        """The name of the worker that ran it, for display."""
        known = None if self.reservation is None else self.reservation.worker
        return "unknown" if known is None else known.label

    @property
    def claim(self) -> Claim:
        held = self.reservation or Reservation()
        machine = held.worker.machine if held.worker is not None else ""
        return Claim(self.number, machine, held.granted, held.asked, held.queued_for)


def read_entry(
    trial: FrozenTrial, trial_id: int, quota: Quota, *, study: str | None = None
) -> Entry:
    """Return what the ledger needs of a row; ``study`` is the study's stamp in reservations."""
    written = trial.system_attrs.get(RESERVATION)
    reservation = parse_reservation(written, trial_id, study)
    if not trial.state.is_finished():
        state = trial.state.name.lower()
        others = trial.system_attrs.keys() - {ASKED}
        touched = trial.params or trial.user_attrs or others or trial.intermediate_values
        untouched = state == "running" and not touched
        return Entry(trial.number, trial_id, state, reservation=reservation, untouched=untouched)
    record = parse_record(trial.user_attrs)
    by_state = {"COMPLETE": "completed", "PRUNED": "pruned"}.get(trial.state.name, "failed")
    outcome = record.outcome or by_state
    never_ran = reservation is not None and reservation.began is None
    if trial.state.name == "COMPLETE":
        # It has a value, so it ran, whatever its attributes say.
        outcome, never_ran = ("completed" if outcome == "rejected" else outcome), False
    if outcome == "rejected" or never_ran:
        charges: dict[str, float | None] = {**(reservation or Reservation()).charged}
        if charges and quota.prices:
            charges["cost"] = quota.price(charges)
    else:
        charges = _charges(trial, reservation, record.usage, quota)
        if reservation is None and not _ran_here(trial, written, study):
            del charges["n_trials"]
    if outcome == "preempted":
        # It runs again.
        charges.pop("n_trials", None)
    seconds, began = charges.get("trial_time"), None if reservation is None else reservation.began
    if began is None and trial.datetime_start is not None:
        began = trial.datetime_start.timestamp()
    span = None if began is None or seconds is None else (began, began + seconds)
    return Entry(trial.number, trial_id, "finished", outcome, reservation, charges, span)


def _ran_here(trial: FrozenTrial, written: Any, study: str | None) -> bool:
    """Return whether a trial that no ledger of this study admitted ran in it before its quota.

    Else it was added: ``create_trial`` gives a row the same start and end, and a row copied from
    another study with a quota has that study's stamp. A row copied from a study without a quota
    looks like one that ran here.
    """
    stamp = written.get("study") if isinstance(written, Mapping) else None
    is_own = written is None or (stamp is not None and stamp == study)
    return is_own and optuna_duration(trial) is not None


def _charges(
    trial: FrozenTrial, held: Reservation | None, usage: Usage, quota: Quota
) -> dict[str, float | None]:
    """Return what a trial is charged: its usage, else what it was granted, None if unknown.

    Unknown usage of a trial without a reservation is not charged, as no limit bounded it.
    """
    charged, granted = ({}, {}) if held is None else (held.charged, held.granted)
    charges: dict[str, float | None] = {"n_trials": 1.0}
    for name in CHARGED_RESOURCES:
        known = [v for v in (usage.get(name), charged.get(name)) if v is not None]
        charges[name] = max(known) if known else granted.get(name)
    if charges["trial_time"] is None:
        charges["trial_time"] = optuna_duration(trial)
    if quota.prices:
        unknown = held is not None and any(charges.get(name) is None for name in quota.prices)
        charges["cost"] = granted.get("cost") if unknown else quota.price(charges)
    return {n: a for n, a in charges.items() if a is not None or held is not None}


class QuotaTotals:
    """Sums over all rows of a study: finished ones are added once, the others replaced.

    Trials of unknown usage are charged the limits of one trial, ``bounds``.
    """

    def __init__(self, quota: Quota, bounds: Mapping[str, float] | None = None) -> None:
        self.quota = quota
        self.bounds = bounds or {}
        self.open: tuple[Entry, ...] = ()
        # Usage of trials that no ledger admitted; those that ran in the study as `n_trials`, the
        # others as `added`.
        self.unadmitted: Counter[str] = Counter()
        # Number of finished trials of unknown usage, by resource.
        self.unknown: Counter[str] = Counter()
        self.by_worker: dict[str, Counter[str]] = {}
        self.by_outcome: dict[str, Counter[str]] = {}
        self._time = WorkerTime()
        self._unadmitted_time = IntervalUnion(gap=LONGEST_GAP)
        self._known: Counter[str] = Counter()
        self._largest: dict[str, float] = {}
        self._latest_end: tuple[float, Worker | None] = (-math.inf, None)

    def update(self, finished: Iterable[Entry], still_open: Sequence[Entry]) -> None:
        for entry in finished:
            self._add(entry)
        self.open = tuple(still_open)

    def _add(self, entry: Entry) -> None:
        if entry.reservation is None and entry.outcome != "rejected":
            self.unadmitted.update(entry.charges)
            runs_again = entry.outcome == "preempted"
            self.unadmitted["added"] += "n_trials" not in entry.charges and not runs_again
            if entry.span is not None and entry.span[0] < entry.span[1]:
                self._unadmitted_time.add(*entry.span)
                self.unadmitted["wall_time"] = self._unadmitted_time.total  # type: ignore[assignment]
        by_worker = self.by_worker.setdefault(entry.worker, Counter())
        by_outcome = self.by_outcome.setdefault(entry.outcome, Counter())
        for name, amount in entry.charges.items():
            if amount is None:
                self.unknown[name] += 1
                continue
            for counter in (self._known, by_worker, by_outcome):
                counter[name] += amount  # type: ignore[assignment]  # a Counter holds floats too
            self._largest[name] = max(amount, self._largest.get(name, 0.0))
        if entry.span is not None:
            worker = None if entry.reservation is None else entry.reservation.worker
            self._time.add(worker, *entry.span)
            if worker is not None and entry.span[1] > self._latest_end[0]:
                self._latest_end = (entry.span[1], worker)

    def used(self, now: float, here: Worker | None = None) -> dict[str, float]:
        """Return the usage by resource at a time on the study's clock.

        A trial of unknown usage counts with its limit, or else with the largest known usage.
        With ``here``, a worker is about to start a trial.
        """
        used = {
            name: self._known[name] + self.unknown[name] * self._bound(name) for name in _SUMMED
        }
        used["wall_time"] = self.wall_time(now, here)
        return used

    def _bound(self, name: str) -> float:
        limit = self.bounds.get(CHARGED_RESOURCES.get(name, name))
        return self._largest.get(name, 0.0) if limit is None else limit

    def wall_time(self, now: float, here: Worker | None = None) -> float:
        """Return the study's clock time in seconds, up to now for running trials.

        From a worker's first trial to the end of its last, without pauses longer than
        :data:`LONGEST_GAP`.
        """
        running: list[tuple[Worker | None, float, float]] = [
            (e.reservation.worker, e.reservation.began, self._until(e.reservation, now))
            for e in self.open
            if e.reservation is not None and e.reservation.began is not None
        ]
        if here is not None:
            running.append((here, now, now))
        return self._time.with_running(running)

    @staticmethod
    def _until(held: Reservation, now: float) -> float:
        beat = held.beat
        if beat is None:
            return now
        passed = max(0.0, now - beat)
        # Later than the next heartbeat was due, its worker is dead or its clock is behind.
        return beat + (min(passed, held.every) if passed < held.every + CLOCK_TOLERANCE else 0.0)

    @property
    def latest(self) -> tuple[float, Worker | None]:
        """The latest time on the study's clock that any worker has written, and the worker."""
        beats = [
            (e.reservation.beat, e.reservation.worker)
            for e in self.open
            if e.reservation is not None and e.reservation.beat is not None
        ]
        return max([self._latest_end, *beats], key=lambda pair: pair[0])

    def reserved(self, machine: str | None = None) -> dict[str, float]:
        """Return what running trials hold or ask for; of what is held, on one machine if given."""
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
        return [entry.claim for entry in self.open if entry.reservation is not None]


def describe_unadmitted(usage: Mapping[str, float]) -> str | None:
    """Return a log line on usage that is :attr:`QuotaTotals.unadmitted`, None without any."""
    ran, added = int(usage.get("n_trials", 0)), int(usage.get("added", 0))
    if not ran and not added:
        return None
    amounts = [
        f"{format_amount(name, usage[name])} of {get_resource(name).title}"
        for name in TOTAL_RESOURCES
        if name != "n_trials" and usage.get(name)
    ]
    return (
        f"The quota includes trials from before it was set ({ran} ran, {added} "
        f"{'was' if added == 1 else 'were'} added): {', '.join(amounts) or 'no recorded usage'}."
    )
