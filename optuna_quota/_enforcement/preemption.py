"""Preemption: trials are stopped, stored as failed and enqueued again.

A signal to the worker preempts all its trials, and so does a near deadline. Trials in process stop
in ``should_prune`` or ``check``, isolated ones are stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
from datetime import datetime
import functools
import logging
import os
import socket
import threading
import time
from typing import Any
from weakref import WeakKeyDictionary

from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement.trial_result import read_row, save_record
from optuna_quota._metering import key_of, metering_loop, Verdict
from optuna_quota._optuna import TellResult
from optuna_quota._records import is_rejected, PREFIX, RETRY_OF, TrialRecord
from optuna_quota._storage_retry import is_transient, retry
from optuna_quota.exceptions import TrialPreempted


_logger = logging.getLogger("optuna.quota.preemption")

# A trial in this process is asked to stop this many seconds before the deadline, or this share of
# the whole time until the deadline, if that is less.
_MARGIN = 5.0
_SHARE = 0.1


class Preemption:
    """Stops the running trials of one study in this process."""

    def __init__(self) -> None:
        # One sentence; None while nothing was requested.
        self.reason: str | None = None
        self.requeue = True  # Whether they are enqueued again
        # Signals that request it; they may reach the trials' processes too.
        self.signals: tuple[int, ...] = ()
        # Seconds since the epoch, None without a deadline.
        self.deadline: float | None = None
        self.deadline_of: object = None  # The object that set the deadline
        self._until_deadline = 0.0
        self._longest_grace: float | None = None
        # How to stop and to kill each trial, by its id.
        self._handlers: dict[int, tuple[Callable[[str], None], Callable[[], None]]] = {}
        self._lock = threading.Lock()

    def set_deadline(self, deadline: float | None) -> None:
        """Stop running trials in time before a deadline, in seconds since the epoch."""
        self.deadline = deadline
        self._until_deadline = max(0.0, (deadline or 0.0) - time.time())

    def forget_deadline(self) -> None:
        """Remove the deadline, for trials of another sampler."""
        self.deadline = self.deadline_of = None

    @property
    def margin(self) -> float:
        """How many seconds before the deadline the first trial is stopped."""
        if self._longest_grace is None:
            return min(_MARGIN, _SHARE * self._until_deadline)
        return self._margin(self._longest_grace)

    def _margin(self, grace_period: float) -> float:
        return min(grace_period, self._until_deadline / 2)

    def grace(self, grace_period: float) -> float:
        """Return the grace period of a trial that is stopped now, at most until the deadline."""
        if self.deadline is None:
            return grace_period
        return min(grace_period, max(0.0, self.deadline - time.time()))

    @property
    def is_late(self) -> bool:
        """Whether the deadline is so near that running trials are stopped."""
        return self.deadline is not None and time.time() >= self.deadline - self.margin

    def find_reason(self) -> str | None:
        """Return why running trials are stopped, None while they are not."""
        return self.reason or (self._deadline_reason() if self.is_late else None)

    def _deadline_reason(self) -> str:
        assert self.deadline is not None
        at = datetime.fromtimestamp(self.deadline)
        return f"The worker has to end by its deadline ({at:%Y-%m-%d %H:%M:%S})."

    def request(self, reason: str) -> None:
        """Stop all trials politely; not to be called from a signal handler."""
        with self._lock:
            self.reason = self.reason or reason
            handlers = list(self._handlers.values())
        for stop, _ in handlers:
            stop(reason)

    def kill(self) -> None:
        with self._lock:
            handlers = list(self._handlers.values())
        for _, kill in handlers:
            kill()

    @contextlib.contextmanager
    def handled_by(
        self,
        trial_id: int,
        stop: Callable[[str], None],
        kill: Callable[[], None],
        grace_period: float,
    ) -> Iterator[None]:
        """Call these, from any thread, to stop a trial within the block and to kill it."""
        with self._lock:
            self._handlers[trial_id] = stop, kill
            self._longest_grace = max(grace_period, self._longest_grace or 0.0)
        timer = None
        reason = self.find_reason()
        if reason is not None:
            stop(reason)
        elif self.deadline is not None:
            seconds = self.deadline - self._margin(grace_period) - time.time()
            # On Windows a thread waits for seven weeks at most.
            wait = min(max(0.0, seconds), threading.TIMEOUT_MAX)
            timer = threading.Timer(wait, stop, [self._deadline_reason()])
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            with self._lock:
                self._handlers.pop(trial_id, None)


_preemptions: WeakKeyDictionary[BaseStorage, dict[int, Preemption]] = WeakKeyDictionary()


def preemption_of(study: Study) -> Preemption:
    """Return the preemption of a study's trials in this process."""
    studies = _preemptions.setdefault(_optuna.storage_of(study), {})
    return studies.setdefault(_optuna.study_id_of(study), Preemption())


if hasattr(os, "register_at_fork"):
    # The trials are the parent's, and its locks may have been held at the fork.
    os.register_at_fork(after_in_child=_preemptions.clear)


def find_preemption(study: Study, trial: BaseTrial | FrozenTrial) -> TrialPreempted | None:
    """Return the error that stops a running trial if it is preempted, else None.

    The trial is stored as failed and enqueued again when its objective has raised.
    """
    study = _optuna.unwrap_study(study)
    trial_id = _optuna.trial_id_of(trial)
    preemption, monitor = preemption_of(study), metering_loop().find(key_of(study, trial))
    if monitor is None or monitor.owner != "sampler":
        # Without a QuotaSampler, any deadline is that of an earlier sampler.
        preemption.forget_deadline()
    reason = preemption.find_reason()
    if reason is None:
        return None
    if monitor is None or monitor.breach is None:
        end_as_preempted(study, trial_id, reason)
        if monitor is not None and monitor.verdict is None:
            monitor.verdict = Verdict("preempted", reason)
    return TrialPreempted(reason)


def end_as_preempted(study: Study, trial_id: int, reason: str) -> None:
    """Make ``tell`` store a trial as failed and enqueue it again, unless it has a value."""
    _optuna.replace_tell(
        study, trial_id, functools.partial(_tell_preempted, study, trial_id, reason)
    )


def _tell_preempted(
    study: Study,
    trial_id: int,
    reason: str,
    tell: Callable[[Any, TrialState | None], TellResult],
    value: Any,
    state: TrialState | None,
) -> TellResult:
    """End a preempted trial instead of ``tell``; ``optimize`` continues and ends by itself."""
    preemption, storage = preemption_of(study), _optuna.storage_of(study)
    row = storage.get_trial(trial_id)
    if row.state.is_finished():
        # Who finished it also enqueued it, if it runs again.
        return TrialState.PRUNED, None, None
    if state is not None:
        record = TrialRecord(outcome="preempted", reason=reason, host=socket.gethostname())
        save_record(study, row, record)
        value, state = None, TrialState.FAIL
    try:
        result = tell(value, state)
    except Exception as error:
        if not is_transient(error):
            raise
        # The outage lasts, or the storage repeats no calls. Its usage is in the row already.
        retry(lambda: _optuna.finish_row(storage, trial_id, TrialState.FAIL))
        # It may have been stored with its value although the answer was lost.
        end = retry(lambda: storage.get_trial(trial_id))
        result = end.state, end.values, reason
    if result[0] != TrialState.FAIL:
        return result
    if preemption.requeue:
        enqueue_again(study, read_row(study, row), "was preempted")
    if state is None or isinstance(_optuna.objective_error(), KeyboardInterrupt):
        return result
    # For a failed trial, `optimize` would raise what its objective raised.
    return TrialState.PRUNED, None, None


def enqueue_again(study: Study, row: FrozenTrial, why: str) -> None:
    """Enqueue a trial again, once, and log why; not without parameters."""
    if not (row.params or _optuna.fixed_params_of(row)):
        return
    kept = {k: v for k, v in row.user_attrs.items() if not k.startswith(PREFIX)}
    kept[RETRY_OF] = row.number

    def enqueue() -> None:
        # The attempt before may have been stored although its answer was lost.
        if not _has_retry(study, row):
            _optuna.enqueue_retry(study, row, kept)

    retry(enqueue)
    _logger.info(f"Trial {row.number} {why} and is enqueued again.")


def runs_again(study: Study, row: FrozenTrial) -> bool:
    """Return whether a trial that ended as pruned was refused its start, and enqueued again."""
    return is_rejected(row.user_attrs) and _has_retry(study, row)


def _has_retry(study: Study, row: FrozenTrial) -> bool:
    trials = study.get_trials(deepcopy=False)
    return any(trial.user_attrs.get(RETRY_OF) == row.number for trial in trials)
