"""This process's running trials, and the thread that renews and extends their reservations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
import logging
import os
import threading
import time
from weakref import finalize, WeakMethod

from optuna_quota._ledger.grant import RequestedBy
from optuna_quota._ledger.protocol import DEVICE, Reservation
from optuna_quota._limits import Limits
from optuna_quota._metering import TrialMonitor


_logger = logging.getLogger("optuna.quota.ledger")

# Seconds that the thread outlives the last trial: starting a thread costs more than admitting a
# trial.
_LINGER = 2.0

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

    def numbers(self, without: Collection[int]) -> list[tuple[int, bool]]:
        """Return the numbers of all but some, by id, and whether this thread asked for each."""
        with self.lock:
            asked = self.asked_here()
            others = [each for each in self.values() if each.trial_id not in without]
            return [(each.number, each.number in asked) for each in others]

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
        if in_optimize or not self.asked_here():
            return False
        if self._told_elsewhere is not None:
            return not self._told_elsewhere
        here = threading.current_thread()
        others = [thread for thread in threading.enumerate() if thread is not here]
        return all(thread.name.startswith("optuna-quota-") for thread in others)

    def left_behind(self) -> list[RunningTrial]:
        """Return earlier trials of this thread's ``optimize`` that never reached ``tell``."""
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
