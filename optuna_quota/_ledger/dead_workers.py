"""Which rows belong to workers that are gone (pure; the caller observes)."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
import logging
import os

from optuna_quota._ledger.reservation import Reservation
from optuna_quota._ledger.reservation import Worker
from optuna_quota._ledger.rows import Rows
from optuna_quota._ledger.totals import Entry
from optuna_quota._records import TrialRecord
from optuna_quota._resources import CHARGED_RESOURCES
from optuna_quota._resources import Usage
from optuna_quota._resources import USAGE_RESOURCES
from optuna_quota._units import format_seconds


@dataclass(frozen=True)
class Death:
    """A row whose worker is gone.

    Attributes:
        entry: The row.
        reason: One sentence for a person.
        silent: Seconds for which nothing was heard of the worker.
        here: Whether it ran on this machine, whose clock is then its own.
    """

    entry: Entry
    reason: str
    silent: float
    here: bool = False


class Leases:
    """Watches rows change, on this process's own steady clock: others' clocks may differ.

    A worker on this machine is judged by its process. Any other has died when its row has not
    changed for a whole lease while this process was looking; so has whoever asks for a whole
    lease, as asking takes moments. A row that was made and never touched since names no worker;
    it gets ten leases, as a worker that no ledger knows may be slow to begin.

    Args:
        lease: Seconds.
        alive: Whether a worker lives, None when that can't be known from here.
    """

    blank_leases = 10

    def __init__(self, lease: float, alive: Callable[[Worker], bool | None]) -> None:
        self.lease = lease
        self._alive = alive
        self._seen: dict[int, tuple[object, float]] = {}

    def deaths(
        self, entries: Iterable[Entry], now: float, stale: Collection[int] = ()
    ) -> list[Death]:
        """Return the rows whose workers are gone.

        Args:
            entries: All rows that have not finished.
            now: Seconds on a steady clock.
            stale: Ids of trials whose heartbeat the storage has missed.
        """
        running = [e for e in entries if e.state == "running"]
        self._seen = {e.number: self._look(e, now) for e in running}
        found = [self._judge(e, now - self._seen[e.number][1], stale) for e in running]
        return [death for death in found if death is not None]

    def _look(self, entry: Entry, now: float) -> tuple[object, float]:
        sign: object = entry.reservation or entry.untouched
        before = self._seen.get(entry.number)
        return before if before is not None and before[0] == sign else (sign, now)

    def _judge(self, entry: Entry, silent: float, stale: Collection[int]) -> Death | None:
        held = entry.reservation
        if held is None or held.worker is None:
            return self._judge_blank(entry, silent)
        alive = self._alive(held.worker)
        if alive is False:
            return Death(entry, f"Its worker {held.worker.label} died.", silent, here=True)
        overdue = silent > self.lease and (alive is None or bool(held.asked))
        if overdue or (alive is None and entry.trial_id in stale):
            waited = format_seconds(max(silent, 1.0))
            text = f"Its worker {held.worker.label} was not heard of for {waited} or more."
            return Death(entry, text, silent, here=alive is True)
        return None

    def _judge_blank(self, entry: Entry, silent: float) -> Death | None:
        if not entry.untouched or silent <= self.blank_leases * self.lease:
            return None
        waited = format_seconds(silent)
        return Death(entry, f"It never began: its row was empty for {waited}.", silent)


_logger = logging.getLogger("optuna.quota.ledger")


def bury(rows: Rows, deaths: Sequence[Death], now: float) -> list[int]:
    """Finish the rows of workers that are gone; return the ids of those that this call finished.

    Args:
        rows: The study's rows.
        deaths: Which, and why.
        now: Seconds since the epoch on this machine's clock.
    """
    finished = []
    for death in deaths:
        entry = death.entry
        held = entry.reservation or Reservation(trial_id=entry.trial_id)
        charged = replace(held, asked={}, waits={}, charged=charges_of(death, now))
        host = held.worker.host if held.worker is not None else None
        record = TrialRecord(_last_known(held), "failed", death.reason, host=host)
        # Another worker may be faster, or this one comes back and finishes it.
        if rows.fail(entry.trial_id, record, charged):
            _logger.warning(f"Trial {entry.number} was failed: {death.reason}")
            finished.append(entry.trial_id)
    return finished


def _last_known(held: Reservation) -> Usage:
    return Usage(*(held.used.get(name) for name in USAGE_RESOURCES))


def charges_of(death: Death, now: float) -> dict[str, float]:
    """Return the most that a trial can have used whose worker is gone, by resource.

    It was metered and ended at what it was granted, so it is charged no more than that. Time
    bounds it further: until now where its worker's clock is this machine's, else from the last
    that was heard of it for as long as nothing was.
    """
    held = death.entry.reservation
    if held is None or held.began is None:
        return {}
    before = held.used.get("wall_time", 0.0)
    elapsed = max(before, now - held.began) if death.here else before + death.silent
    charges = {"trial_time": min(elapsed, held.granted.get("trial_time", elapsed))}
    if death.here and "cpu_time" in held.granted:
        most = held.used.get("cpu_time", 0.0) + (os.cpu_count() or 1) * (elapsed - before)
        charges["cpu_time"] = min(most, held.granted["cpu_time"])
    for name in CHARGED_RESOURCES:
        charges.setdefault(name, held.granted.get(name, held.used.get(name, -1.0)))
    return {name: amount for name, amount in charges.items() if amount >= 0}
