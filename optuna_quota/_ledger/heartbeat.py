"""Signs of life: this process's running trials, their heartbeats, and workers that lack them.

A thread renews and extends the reservations of this process's trials. The trials of dead workers
are charged to the quota, and other running workers are found.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
import logging
import os
import threading
import time
from weakref import finalize, WeakMethod

from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _optuna
from optuna_quota._ledger import protocol
from optuna_quota._ledger.grant import RequestedBy
from optuna_quota._ledger.protocol import HEARTBEAT, Reservation, Worker
from optuna_quota._ledger.totals import Entry, LONGEST_GAP
from optuna_quota._limits import Limits
from optuna_quota._metering import TrialMonitor
from optuna_quota._metering.host import cpu_count, DEVICE
from optuna_quota._records import parse_record, RESERVATION, TrialRecord
from optuna_quota._resources import CHARGED_RESOURCES, USAGE_RESOURCES
from optuna_quota._units import format_seconds
from optuna_quota._usage import Usage


_logger = logging.getLogger("optuna.quota.ledger")

# Seconds that the thread outlives the last trial: starting a thread costs more than admitting a
# trial.
_LINGER = 2.0

HEARTBEATS_PER_LEASE = 4
# Seconds without a heartbeat after which a worker on another machine counts as dead.
LEASE = HEARTBEATS_PER_LEASE * HEARTBEAT
# A worker without a ledger may write into its new row late.
_LEASES_OF_UNTOUCHED = 10

_this_thread = threading.local()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within the block, refuse trials of this thread that would have to wait."""
    _this_thread.must_not_wait = True
    try:
        yield
    finally:
        _this_thread.must_not_wait = False


@dataclass
class RunningTrial:
    """One admitted trial of this process."""

    trial_id: int
    number: int
    reservation: Reservation  # What its row says
    limits: Limits
    in_optimize: bool  # Whether ``optimize`` runs it in that thread
    deadline: float | None = None  # Seconds from its start until the study's clock time is used up
    monitor: TrialMonitor | None = None  # Its metering; None before that starts
    start: float = 0.0  # When it started, on this process's monotonic clock
    thread: int = field(default_factory=threading.get_ident)  # The thread that asked for it

    @property
    def began(self) -> float:
        """The start, moved by the time for which this process was suspended since."""
        return self.start + (0.0 if self.monitor is None else self.monitor.paused)

    @property
    def left(self) -> Mapping[str, float]:
        """What it may use of totals for now, by resource."""
        granted = self.reservation.granted
        left = {k: v for k, v in granted.items() if k != "n_trials" and not k.startswith(DEVICE)}
        if self.deadline is not None:
            left["wall_time"] = self.deadline
        return left


class RunningTrials(dict[int, RunningTrial]):
    """This process's running trials by id, and which threads call ``ask`` and ``tell`` for them.

    Hold ``lock`` while changing a running trial.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()
        # Whether another thread made the last `tell` of a trial from `ask`; None before the first.
        self._told_elsewhere: bool | None = None

    def finish(self, trial_id: int) -> RunningTrial | None:
        """Remove and return a trial for which this thread calls ``tell``, None if unknown."""
        running = self.pop(trial_id, None)
        if running is not None and not running.in_optimize:
            self._told_elsewhere = running.thread != threading.get_ident()
        return running

    def asked_here(self) -> list[int]:
        """Return the numbers of running trials that this thread got from ``ask``."""
        with self.lock:
            # The row of a point that was rejected in `ask` has ended without a `tell`.
            for running in self._of_this_thread():
                if running.monitor is not None and running.monitor.closed:
                    del self[running.trial_id]
            return [r.number for r in self._of_this_thread() if not r.in_optimize]

    def requested_by(self, in_optimize: bool) -> RequestedBy:
        if in_optimize:
            return "optimize"
        return "ask in a batch" if self.asked_here() else "ask"

    def must_not_wait(self, in_optimize: bool) -> bool:
        """Return whether waiting would be a deadlock, as this thread has to call ``tell`` first.

        Before the first ``tell``, any other thread may be the one to call it; later, the last
        caller shows.
        """
        if getattr(_this_thread, "must_not_wait", False):
            return True
        if in_optimize:
            return False
        if self.in_optimize_here():  # an objective has called `ask`
            return True
        if not self.asked_here():
            return False
        if self._told_elsewhere is not None:
            return not self._told_elsewhere
        here = threading.current_thread()
        others = [thread for thread in threading.enumerate() if thread is not here]
        return all(thread.name.startswith("optuna-quota-") for thread in others)

    def in_optimize_here(self) -> list[RunningTrial]:
        """Return the trials of this thread's ``optimize`` that have not reached ``tell``."""
        with self.lock:
            return [running for running in self._of_this_thread() if running.in_optimize]

    def _of_this_thread(self) -> list[RunningTrial]:
        here = threading.get_ident()
        # Another thread may add one meanwhile.
        return [running for running in tuple(self.values()) if running.thread == here]


class Heartbeat:
    """A daemon thread that calls two methods when they are due; it ends after the last trial.

    It refers weakly to the owner of the methods, and ends with it.
    """

    def __init__(
        self, extend: Callable[[int], None], beat: Callable[[int], None], interval: float
    ) -> None:
        self._extend, self._beat = WeakMethod(extend), WeakMethod(beat)
        # The owner may be freed by any thread, at any moment.
        finalize(extend.__self__, self._close).atexit = False  # type: ignore[attr-defined]
        # The longest time that a thread can wait.
        self._interval = min(interval, threading.TIMEOUT_MAX)
        self._pid = os.getpid()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._due: dict[int, float] = {}
        self._low: dict[int, None] = {}
        self._is_closed = False

    def add(self, trial_id: int) -> None:
        with self._wake:
            self._due[trial_id] = time.monotonic() + self._interval
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._run, name="optuna-quota-ledger", daemon=True
                )
                self._thread.start()
            elif len(self._due) == 1:
                self._wake.notify()

    def remove(self, trial_id: int) -> None:
        with self._wake:
            self._due.pop(trial_id, None)
            self._low.pop(trial_id, None)

    def _close(self) -> None:
        # A fork has no such thread, but maybe its lock, held.
        if os.getpid() != self._pid:
            return
        with self._wake:
            self._due.clear()
            self._low.clear()
            self._is_closed = True
            self._wake.notify()

    def request_extension(self, trial_id: int) -> None:
        """Have the thread call ``extend`` for a trial; returns at once."""
        with self._wake:
            if trial_id in self._due:
                self._low[trial_id] = None
                self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._due and not self._wake.wait_for(
                    lambda: bool(self._due) or self._is_closed, _LINGER
                ):
                    self._thread = None
                    return
                if not self._low and self._due:
                    self._wake.wait(max(0.0, min(self._due.values()) - time.monotonic()))
                if self._is_closed:
                    self._thread = None
                    return
                low, self._low = list(self._low), {}
                now = time.monotonic()
                due = [trial_id for trial_id, at in self._due.items() if at <= now]
                self._due.update(dict.fromkeys(due, now + self._interval))
            for trial_id in low:
                _call(self._extend(), trial_id)
            for trial_id in due:
                _call(self._beat(), trial_id)


def _call(action: Callable[[int], None] | None, trial_id: int) -> None:
    if action is None:
        return
    try:
        action(trial_id)
    except Exception as fault:  # noqa: BLE001 - any storage's own; other trials go on
        _logger.warning(
            f"The reservation of the trial with id {trial_id} could not be renewed: {fault!r}. If "
            "this continues, other workers consider this one dead and mark the trial as failed."
        )


# Workers that show no sign of life, and those that do.


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
    held = protocol.parse_reservation(
        trial.system_attrs.get(RESERVATION), _optuna.trial_id_of(trial)
    )
    if held is None or held.worker is None or held.worker == protocol.this_worker():
        return False
    ended = trial.datetime_complete
    # Optuna's times are local and naive.
    if ended is not None and now - ended.timestamp() > LONGEST_GAP:
        return False
    alive = protocol.is_alive(held.worker)
    if alive is None and ended is None:
        return held.beat is not None and now - held.beat < HEARTBEATS_PER_LEASE * held.every
    return alive is not False
