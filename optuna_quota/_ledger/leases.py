"""Which rows belong to workers that are gone (pure; the caller observes)."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from dataclasses import dataclass

from optuna_quota._ledger.book import Entry
from optuna_quota._ledger.reservation import Worker
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
