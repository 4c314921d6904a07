"""The ledger's clock, which tests replace."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
import logging
import random
import threading
import time
from typing import Protocol
from typing import TYPE_CHECKING
from weakref import WeakMethod

from optuna_quota import _optuna
from optuna_quota._ledger.dead_workers import bury
from optuna_quota._ledger.dead_workers import Death
from optuna_quota._ledger.dead_workers import Leases
from optuna_quota._ledger.gpus import capacities
from optuna_quota._ledger.gpus import Gpu
from optuna_quota._ledger.protocol import answered
from optuna_quota._ledger.protocol import Claim
from optuna_quota._ledger.protocol import claimed
from optuna_quota._ledger.protocol import decide
from optuna_quota._ledger.protocol import Decision
from optuna_quota._ledger.protocol import Want
from optuna_quota._ledger.reservation import is_alive
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._ledger.reservation import this_worker
from optuna_quota._ledger.rows import Rows
from optuna_quota._ledger.totals import Book
from optuna_quota._ledger.totals import Entry
from optuna_quota._records import read_amounts
from optuna_quota._records import STUDY_LIMITS
from optuna_quota._resources import CHARGED_RESOURCES
from optuna_quota._resources import Quota
from optuna_quota._resources import Usage
from optuna_quota._storage_retry import reconnect_dead_connections
from optuna_quota._storage_retry import repair_torn_lines
from optuna_quota._units import format_seconds


if TYPE_CHECKING:
    from optuna.study import Study


class Clock(Protocol):
    """Two clocks and a way to let time pass."""

    def time(self) -> float:
        """Return seconds since the epoch; it may jump and differ between machines."""
        ...

    def monotonic(self) -> float:
        """Return seconds on a clock that never jumps and means something here only."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def time(self) -> float:
        """Return seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds on a clock that never jumps."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)


_logger = logging.getLogger("optuna.quota.ledger")

# Seconds by which the clocks of two hosts may differ without a warning.
_CLOCK_TOLERANCE = 5.0


@dataclass(frozen=True)
class Snapshot:
    """All rows at one moment.

    Attributes:
        used: What finished trials used, by resource; ``wall_time`` counts those that run, too.
        reserved: What running trials hold or ask for; on this machine where it is per host.
        claims: The running trials as the protocol sees them.
        open: All rows that have not finished.
    """

    used: dict[str, float]
    reserved: dict[str, float]
    claims: tuple[Claim, ...]
    open: tuple[Entry, ...]

    def free(self, quota: Quota) -> dict[str, float]:
        """Return what is neither used nor reserved, by resource."""
        return {
            name: max(0.0, total - self.used.get(name, 0.0) - self.reserved.get(name, 0.0))
            for name, total in quota.amounts().items()
        }


class Accounts:
    """Reads the rows of a study and writes the reservations of this process's trials.

    Args:
        study: The study.
        quota: Its quota.
        clock: The clocks to go by.
        beat: Seconds between signs of life of whoever waits or runs.
        gpus: This machine's GPUs, where each trial is given one of them.
    """

    def __init__(
        self, study: Study, quota: Quota, clock: Clock, beat: float, gpus: Sequence[Gpu] = ()
    ) -> None:
        self.quota = quota
        self.ceilings = {**quota.amounts(), **capacities(gpus)}
        self.beat = beat
        self.clock = clock
        reconnect_dead_connections(_optuna.storage_of(study))
        repair_torn_lines(_optuna.storage_of(study))
        self.rows = Rows(study)
        bounds = read_amounts(_optuna.user_attrs_of(study).get(STUDY_LIMITS))
        self._book = Book(quota, bounds, heartbeat=beat)
        self._warned: set[str] = set()
        self._settled: dict[int, Usage] = {}
        self._lock = threading.Lock()
        self._last: Snapshot | None = None

    def read(self) -> Snapshot:
        """Read what has changed and return all rows at this moment."""
        with self._lock:
            self.rows.read_into(self._book)
            open_ids = {entry.trial_id for entry in self._book.open}
            self._settled = {k: v for k, v in self._settled.items() if k in open_ids}
            now = self.clock.time()
            self._warn_of_clocks(now)
            self._last = Snapshot(
                self._book.used(now, this_worker()),
                self._book.reserved(this_worker().machine),
                tuple(self._book.claims),
                self._book.open,
            )
            return self._last

    def _warn_of_clocks(self, now: float) -> None:
        if self.quota.wall_time is None:
            return
        here = this_worker().machine
        for entry in self._book.open:
            held = entry.reservation
            if held is None or held.worker is None or held.beat is None:
                continue
            host, machine, ahead = held.worker.host, held.worker.machine, held.beat - now
            if machine == here or machine in self._warned or ahead < _CLOCK_TOLERANCE:
                continue
            self._warned.add(machine)
            _logger.warning(
                f"The clock of host {host} is {format_seconds(ahead)} ahead of this host's: "
                "`wall_time` may count trials that run at the same time on both twice, for up to "
                "that long. Synchronize the clocks."
            )

    @property
    def last(self) -> Snapshot | None:
        """All rows as they were last read."""
        return self._last

    def wall_time(self, now: float) -> float:
        """Return the study's clock time by the rows as last read, as a trial starts here."""
        with self._lock:
            return self._book.wall_time(now, this_worker())

    @property
    def earlier(self) -> Mapping[str, float]:
        """What rows come to that no ledger admitted; see :attr:`Book.earlier`."""
        return self._book.earlier

    def write(self, trial_id: int, reservation: Reservation) -> None:
        """Write the reservation of one of this process's trials.

        Raises:
            optuna.exceptions.UpdateFinishedTrialError: If someone took this worker for dead.
        """
        self.rows.write(trial_id, self._own(trial_id, reservation))

    def take(self, trial_id: int) -> bool:
        """Return whether an enqueued trial is this worker's, and nobody else's already."""
        return self.rows.take(trial_id, self._own(trial_id, Reservation()))

    def _own(self, trial_id: int, reservation: Reservation) -> Reservation:
        beat = self.clock.time()
        return replace(reservation, trial_id=trial_id, worker=this_worker(), beat=beat)

    def charge(self, trial_id: int, usage: Usage) -> None:
        """Take in what a trial used whose row is about to finish."""
        with self._lock:
            self._settled[trial_id] = usage

    def with_settled(self, snapshot: Snapshot) -> dict[str, float]:
        """Return what is used by resource, with what was settled in rows still open."""
        used = dict(snapshot.used)
        with self._lock:
            settled = [self._settled.get(entry.trial_id) for entry in snapshot.open]
        for usage in settled:
            if usage is not None:
                for name, amount in self._amounts(usage).items():
                    used[name] = used.get(name, 0.0) + amount
        return used

    def _amounts(self, usage: Usage) -> dict[str, float]:
        amounts = {name: usage.get(name) for name in CHARGED_RESOURCES}
        return {**{k: v or 0.0 for k, v in amounts.items()}, "cost": self.quota.price(amounts)}


# Seconds between questions to a storage that has heartbeats: the answer costs a query.
_ASK_EVERY = 5.0


class Undertaker:
    """Finds and ends the rows of workers that are gone, whenever rows are read.

    Args:
        accounts: The study's accounts.
        lease: Seconds; see :class:`Leases`.
        on_failed: Called with the id of each trial that was ended.
    """

    def __init__(self, accounts: Accounts, lease: float, on_failed: Callable[[int], None]) -> None:
        self._accounts = accounts
        # A method of whom this belongs to: nothing is to wait for the garbage collector.
        self._on_failed = WeakMethod(on_failed)
        self._leases = Leases(lease, is_alive)
        self._lock = threading.Lock()
        self._asked: float | None = None

    def look(self) -> Snapshot:
        """Read the rows, end those whose workers are gone, and return what is left."""
        seen = self._accounts.read()
        return self._accounts.read() if self.tend(seen) else seen

    def tend(self, seen: Snapshot) -> bool:
        """End rows whose workers are gone among those read; return whether there were any."""
        now = self._accounts.clock.monotonic()
        with self._lock:
            deaths = self._leases.deaths(seen.open, now, self._stale(now))
        if deaths:
            self.bury(*deaths)
        return bool(deaths)

    def bury(self, *deaths: Death) -> None:
        """End rows."""
        on_failed = self._on_failed()
        for trial_id in bury(self._accounts.rows, deaths, self._accounts.clock.time()):
            if on_failed is not None:
                on_failed(trial_id)

    def _stale(self, now: float) -> list[int]:
        if self._asked is not None and now - self._asked < _ASK_EVERY:
            return []
        self._asked = now
        return self._accounts.rows.stale()


_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.25


def pauses() -> Iterator[float]:
    """Yield seconds to wait between looks, longer and longer, never in step with others."""
    pause = _FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(_LONGEST_PAUSE, 1.5 * pause)


def ask(
    accounts: Accounts,
    trial_id: int,
    number: int,
    held: Reservation,
    wants: Mapping[str, Want],
    look: Callable[[], Snapshot],
    *,
    queue: bool,
) -> tuple[Decision, Snapshot]:
    """Return what a trial is granted, and the rows by which that was decided.

    A grant is left for the caller to write into the row.

    Args:
        accounts: The study's accounts.
        trial_id: The trial.
        number: Its number.
        held: What its row says now; the row says so again after a withdrawal.
        wants: What it wants.
        look: Reads the rows and buries the dead, whose claims nobody would answer for.
        queue: Whether it queues up behind those that wait.
    """
    if not wants:
        return Decision("grant"), look()
    asking = claimed(held, wants)
    accounts.write(trial_id, asking)
    written = accounts.clock.monotonic()
    for pause in pauses():
        seen = look()
        decision = judge(accounts, number, asking, wants, seen, queue=queue)
        if decision.action != "wait":
            break
        accounts.clock.sleep(pause)
        if accounts.clock.monotonic() - written > accounts.beat:
            accounts.write(trial_id, asking)
            written = accounts.clock.monotonic()
    if decision.action == "withdraw":
        accounts.write(trial_id, answered(asking, decision))
    return decision, seen


def judge(
    accounts: Accounts,
    number: int,
    held: Reservation,
    wants: Mapping[str, Want],
    seen: Snapshot,
    *,
    queue: bool,
) -> Decision:
    """Return what the protocol decides by what was seen; see :func:`ask`."""
    me = Claim(number, this_worker().machine, held.granted, held.asked, held.waits)
    return decide(me, wants, seen.claims, seen.used, accounts.ceilings, queue=queue)
