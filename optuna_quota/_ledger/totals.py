"""The clock time in which trials ran, without the longer pauses between them (pure)."""

from __future__ import annotations

from bisect import bisect_left
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable
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
from optuna_quota._records import parse_record
from optuna_quota._records import RESERVATION
from optuna_quota._resources import CHARGED_RESOURCES
from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import Quota
from optuna_quota._resources import TOTAL_RESOURCES
from optuna_quota._resources import Usage


if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


Interval = tuple[float, float]

# Seconds: where a worker runs no trial for longer than this, its clock stands still. What it does
# between trials, such as to draw a point, takes less and counts.
LONGEST_GAP = 10.0


class Spans:
    """A union of intervals that grows; an interval costs the logarithm of what is there.

    Args:
        intervals: The first ones.
        gap: Intervals no further apart than this are one, with what is between them.
    """

    def __init__(self, intervals: Iterable[Interval] = (), gap: float = 0.0) -> None:
        self._gap = gap
        self._starts: list[float] = []
        self._ends: list[float] = []
        self.total = 0.0
        for start, end in intervals:
            self.add(start, end)

    def add(self, start: float, end: float) -> None:
        """Add an interval; one that ends before it starts is empty."""
        if end <= start:
            return
        first, last = self._touched(start, end)
        start, end = self._joined(start, end, first, last)
        self.total += end - start - self._length(first, last)
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def joined(self, start: float, end: float) -> Interval:
        """Return an interval with those that it would become one with, without adding it."""
        return self._joined(start, end, *self._touched(start, end))

    def _joined(self, start: float, end: float, first: int, last: int) -> Interval:
        if first >= last:
            return start, end
        return min(start, self._starts[first]), max(end, self._ends[last - 1])

    def with_added(self, intervals: Iterable[Interval]) -> float:
        """Return what the total would be with more intervals."""
        more = Spans(intervals)
        shared = sum(
            self._overlap(start, end) for start, end in zip(more._starts, more._ends, strict=True)
        )
        return self.total + more.total - shared

    def _touched(self, start: float, end: float) -> tuple[int, int]:
        gap = self._gap
        return bisect_left(self._ends, start - gap), bisect_right(self._starts, end + gap)

    def _length(self, first: int, last: int) -> float:
        pairs = zip(self._starts[first:last], self._ends[first:last], strict=True)
        return sum(end - start for start, end in pairs)

    def _overlap(self, start: float, end: float) -> float:
        first, last = self._touched(start, end)
        pairs = zip(self._starts[first:last], self._ends[first:last], strict=True)
        return sum(max(0.0, min(end, e) - max(start, s)) for s, e in pairs)


class WorkerSpans:
    """The clock time of all workers: each from trial to trial, those at once counted once."""

    def __init__(self) -> None:
        self._own: dict[Hashable, Spans] = {}
        self._all = Spans()

    def add(self, worker: Hashable, start: float, end: float) -> None:
        """Add a trial of a worker."""
        own = self._own.setdefault(worker, Spans(gap=LONGEST_GAP))
        own.add(start, end)
        if end > start:
            self._all.add(*own.joined(start, end))

    @property
    def total(self) -> float:
        """The clock time of all trials that were added."""
        return self._all.total

    def with_running(self, running: Iterable[tuple[Hashable, float, float]]) -> float:
        """Return the total with what workers do now, from a start until the given time."""
        joined = []
        for worker, start, now in running:
            own = self._own.get(worker)
            joined.append((start, now) if own is None else own.joined(start, now))
        return self._all.with_added(joined)


# Seconds between two writes of a worker that show that it is alive.
HEARTBEAT = 30.0

# What is summed over the rows of finished trials. `wall_time` is a union, not a sum.
SUMMED = tuple(name for name in TOTAL_RESOURCES if name != "wall_time")


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
    charges = {name: usage.get(name) for name in CHARGED_RESOURCES}
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
    for name in CHARGED_RESOURCES:
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


def describe_earlier(earlier: Mapping[str, float]) -> str | None:
    """Return a sentence on trials that ran before there was a quota, and on rows that were added.

    Args:
        earlier: What they come to; see :attr:`~optuna_quota._ledger.totals.Book.earlier`.
    """
    ran, added = int(earlier.get("n_trials", 0)), int(earlier.get("added", 0))
    if not ran and not added:
        return None
    amounts = [
        f"{format_amount(name, earlier[name])} of {get_resource(name).title}"
        for name in TOTAL_RESOURCES
        if name != "n_trials" and earlier.get(name)
    ]
    return (
        f"Trials that this quota did not admit count with what their rows show ({ran} ran, "
        f"{added} {'was' if added == 1 else 'were'} added): "
        f"{', '.join(amounts) or 'no usage'}."
    )
