"""Finds dead workers, charges their trials to the quota, and finds other running workers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
import time

from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _optuna
from optuna_quota._ledger.protocol import (
    HEARTBEAT,
    is_alive,
    parse_reservation,
    Reservation,
    this_worker,
    Worker,
)
from optuna_quota._ledger.totals import Entry, LONGEST_GAP
from optuna_quota._metering.host import cpu_count
from optuna_quota._records import parse_record, RESERVATION, TrialRecord
from optuna_quota._resources import CHARGED_RESOURCES, USAGE_RESOURCES
from optuna_quota._units import format_seconds
from optuna_quota._usage import Usage


HEARTBEATS_PER_LEASE = 4
# Seconds without a heartbeat after which a worker on another machine counts as dead.
LEASE = HEARTBEATS_PER_LEASE * HEARTBEAT
# A worker without a ledger may write into its new row late.
_LEASES_OF_UNTOUCHED = 10


@dataclass(frozen=True)
class OrphanedTrial:
    """A running trial whose worker is dead."""

    entry: Entry
    reason: str  # A sentence for the trial table
    silent: float  # Seconds since the last change of its row
    here: bool = False  # Whether it ran on this machine, so that its clock is this one's


class Leases:
    """Finds dead workers by when rows last changed, on this process's monotonic clock.

    A worker on this machine is dead when its process is. On another machine, it is dead when its
    row has not changed for a whole lease. So is a worker whose request stays open for a lease,
    which normally takes milliseconds, and one that left its new row empty for ten leases.
    """

    def __init__(self, lease: float, is_alive: Callable[[Worker], bool | None]) -> None:
        self.lease = lease
        self._is_alive = is_alive
        self._seen: dict[int, tuple[object, float]] = {}

    def find_orphaned(
        self, entries: Iterable[Entry], now: float, stale: Collection[int] = ()
    ) -> list[OrphanedTrial]:
        """Return the running trials whose worker is dead, or stale by the storage's own clock."""
        running = [e for e in entries if e.state == "running"]
        self._seen = {e.number: self._look(e, now) for e in running}
        found = [self._judge(e, now - self._seen[e.number][1], stale) for e in running]
        return [orphan for orphan in found if orphan is not None]

    def _look(self, entry: Entry, now: float) -> tuple[object, float]:
        sign: object = entry.reservation or entry.untouched
        before = self._seen.get(entry.number)
        return before if before is not None and before[0] == sign else (sign, now)

    def _judge(self, entry: Entry, silent: float, stale: Collection[int]) -> OrphanedTrial | None:
        held = entry.reservation
        if held is None or held.worker is None:
            if not entry.untouched or silent <= _LEASES_OF_UNTOUCHED * self.lease:
                return None
            text = f"It never started: its row was empty for {format_seconds(silent)}."
            return OrphanedTrial(entry, text, silent)
        alive = self._is_alive(held.worker)
        if alive is False:
            return OrphanedTrial(entry, f"Its worker {held.worker.label} died.", silent, here=True)
        # If the worker's own lease is longer, two heartbeats must be missing.
        longest = max(self.lease, 2 * held.every)
        overdue = silent > longest and (alive is None or bool(held.asked))
        if overdue or (alive is None and entry.trial_id in stale):
            text = (
                f"Its worker {held.worker.label} sent no heartbeat for "
                f"{format_seconds(max(silent, 1.0))}."
            )
            return OrphanedTrial(entry, text, silent, here=alive is True)
        return None


def close_orphan(
    orphan: OrphanedTrial, now: float, rates: Mapping[str, float], *, lease: float
) -> tuple[Reservation, TrialRecord]:
    """Return what to write into the row of an orphaned trial; see :func:`charge_orphan`."""
    held = orphan.entry.reservation or Reservation(trial_id=orphan.entry.trial_id)
    charges = charge_orphan(orphan, now, rates, lease=lease)
    usage = Usage(*(held.used.get(name) for name in USAGE_RESOURCES))
    host = held.worker.host if held.worker is not None else None
    record = TrialRecord(usage, "failed", orphan.reason, host=host)
    return replace(held, asked={}, queued_for={}, charged=charges), record


def charge_orphan(
    orphan: OrphanedTrial, now: float, rates: Mapping[str, float], *, lease: float = LEASE
) -> dict[str, float]:
    """Return what an orphaned trial is charged, by resource.

    That is its usage at its last heartbeat plus, for the time until it was known to be dead, the
    highest rate of any trial; at most its grant, and on this machine all cores and one lease.
    """
    held = orphan.entry.reservation
    if held is None or held.began is None:
        return {}
    before, unseen = held.used.get("wall_time", 0.0), orphan.silent
    if orphan.here:
        last_sign = max(held.began + before, held.beat or held.began)
        unseen = max(0.0, min(now, last_sign + lease) - held.began - before)
        cores = cpu_count()
        rates = {**rates, "cpu_time": min(cores, rates.get("cpu_time", cores))}
    elapsed = before + unseen
    charges = {"trial_time": min(elapsed, held.granted.get("trial_time", elapsed))}
    for name in CHARGED_RESOURCES:
        granted, used = held.granted.get(name), held.used.get(name)
        most = None
        if unseen == 0:
            most = used
        elif name in rates:
            most = (used or 0.0) + rates[name] * unseen
        amount = used if granted is None else min(granted, granted if most is None else most)
        if amount is not None:
            charges.setdefault(name, amount)
    return charges


def usage_rates(trials: Iterable[FrozenTrial]) -> dict[str, float]:
    """Return the highest usage per second of wall time of any finished trial, by resource."""
    rates: dict[str, float] = {}
    for trial in trials:
        usage = parse_record(trial.user_attrs).usage if trial.state.is_finished() else Usage()
        for name, measured in CHARGED_RESOURCES.items():
            amount = usage.get(measured)
            if usage.wall_time and amount is not None and measured != "wall_time":
                rates[name] = max(amount / usage.wall_time, rates.get(name, 0.0))
    return rates


def others_run(study: Study) -> bool:
    """Return whether another process runs trials of a study.

    A worker that is between two trials counts. A worker on another machine counts while its last
    heartbeat is recent.
    """
    storage, study_id = _optuna.storage_of(study), _optuna.study_id_of(study)
    trials, now = storage.get_all_trials(study_id, deepcopy=False), time.time()
    return any(_is_run_elsewhere(trial, now) for trial in reversed(trials))


def _is_run_elsewhere(trial: FrozenTrial, now: float) -> bool:
    held = parse_reservation(trial.system_attrs.get(RESERVATION), _optuna.trial_id_of(trial))
    if held is None or held.worker is None or held.worker == this_worker():
        return False
    ended = trial.datetime_complete
    # Optuna's times are local and naive.
    if ended is not None and now - ended.timestamp() > LONGEST_GAP:
        return False
    alive = is_alive(held.worker)
    if alive is None and ended is None:
        return held.beat is not None and now - held.beat < HEARTBEATS_PER_LEASE * held.every
    return alive is not False
