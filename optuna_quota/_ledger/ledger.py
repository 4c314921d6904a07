"""The ledger of one study in one process: admits trials and tracks them while they run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
import logging
import math
import os
import time
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _optuna
from optuna_quota._ledger import grant, protocol
from optuna_quota._ledger.grant import find_gpus, GpuChoice, Needs, Refusal
from optuna_quota._ledger.heartbeat import (
    Heartbeat,
    LEASE,
    OrphanedTrial,
    RunningTrial,
    RunningTrials,
)
from optuna_quota._ledger.protocol import Decision, Reservation, ResourceRequest
from optuna_quota._ledger.state import Clock, LedgerState, pauses, Snapshot
from optuna_quota._ledger.totals import describe_unadmitted
from optuna_quota._limits import Limits, Quota
from optuna_quota._metering import TrialMonitor
from optuna_quota._metering.host import Gpu, memory_in_use
from optuna_quota._resources import CHARGED_RESOURCES
from optuna_quota._usage import Usage


_logger = logging.getLogger("optuna.quota.ledger")

# The end of the quota is far while less than this share of each total is used or reserved.
_FAR = 0.5

# How often a trial asks for other GPUs, as others ask for the same.
_MOST_MOVES = 20

# Seconds of waiting after which a thread that may be waiting for itself is warned.
_DEADLOCK_WARNING_AFTER = 10.0


class Ledger:
    """Admits trials to a study's quota, together with all other workers of the study.

    Everything is derived from trial rows; this object only caches what it has read. A worker on
    another machine counts as dead after ``lease`` seconds without a heartbeat. Of this machine's
    ``gpus``, each trial gets those with the most room.
    """

    def __init__(
        self,
        study: Study,
        quota: Quota,
        *,
        clock: Clock | None = None,
        lease: float = LEASE,
        gpus: Sequence[Gpu] = (),
        gpus_per_trial: int = 1,
    ) -> None:
        self.quota = quota
        self._gpus_per_trial = gpus_per_trial
        self._gpus = tuple(gpus)
        self._studies: WeakSet[Study] = WeakSet((study,))
        self._clock = clock or time
        self._lease = lease
        self._open(study)

    def add_study(self, study: Study) -> None:
        self._studies.add(study)

    def set_bounds(self, limits: Limits) -> None:
        self._reopen_after_fork()
        self._state.set_bounds(limits)

    def _open(self, study: Study) -> None:
        self._pid = os.getpid()
        self._state = LedgerState(
            study, self.quota, self._clock, self._lease, self._studies, self._gpus
        )
        self._heartbeat = Heartbeat(self._renew, self._beat, self._state.heartbeat)
        self._running = RunningTrials()
        self._logged: set[str] = set()

    def _reopen_after_fork(self) -> None:
        if self._pid != os.getpid():
            # A fork can't use its parent's locks and threads.
            self._open(next(iter(self._studies)))

    def describe_past(self) -> None:
        """Log once which earlier trials count toward the quota."""
        self._reopen_after_fork()
        seen = self._state.read()
        self._log_once("unadmitted", describe_unadmitted(self._state.unadmitted))
        if not seen.claims:
            self._log_once("resumed", grant.describe_resumed(self.quota, seen.used))

    def take_enqueued(self, trial: FrozenTrial) -> bool:
        self._reopen_after_fork()
        return self._state.take_enqueued(_optuna.trial_id_of(trial))

    def reserve(
        self,
        trial: FrozenTrial,
        *,
        limits: Limits,
        footprint: Mapping[str, float],
        bounds: Mapping[str, float] = MappingProxyType({}),
        needs: Needs = lambda free, n_beside: {},
        n_jobs: int | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> RunningTrial | Refusal:
        """Admit a trial or refuse it; wait while others hold what it needs, until ``is_over``.

        ``footprint`` has upper bounds that the user stated, ``bounds`` learned ones of memory and
        the like; ``n_jobs`` is the number of trials at once, if known.
        """
        self._reopen_after_fork()
        self._fail_left_behind()
        trial_id, number = _optuna.trial_id_of(trial), trial.number
        held, seen, short = Reservation(), self._state.last, None
        by_optimize, asked_at = self._asked_by_optimize(), self._clock.monotonic()
        for pause in pauses():
            if short is not None and is_over():
                return self._withdraw(trial_id, grant.refuse_study_ended(short))
            seen = self._state.refresh() if seen is None or short is not None else seen
            self._log_once("unadmitted", describe_unadmitted(self._state.unadmitted))
            free, beside = seen.free(self.quota), seen.count_beside(number)
            requests = grant.initial_requests(
                self.quota,
                limits,
                footprint,
                free,
                beside,
                bounds=bounds,
                needs=needs(free, beside),
                n_jobs=n_jobs,
                requested_by=self._running.requested_by(by_optimize),
            )
            choice = GpuChoice(
                self._gpus,
                protocol.this_worker().machine,
                footprint.get("gpu_memory", limits.gpu_memory),
                self._gpus_per_trial,
                memory_in_use(self._gpus),
            )
            requests |= choice.request(seen.claims)
            # A waiting trial reads before it asks: a claim that can't be granted would only
            # delay the others.
            decision = self._state.judge(number, held, requests, seen, queue=True)
            if short is None or decision.action != "withdraw":
                decision, seen = self._ask(trial_id, number, held, requests, choice)
            least = needs(seen.free(self.quota), seen.count_beside(number))
            refusal = grant.refuse_exhausted(self.quota, seen.used, footprint, needs=least)
            if refusal is None and decision.action == "grant":
                return self._begin(trial, limits, decision)
            short = decision.shortage
            if refusal is None and short is not None:
                refusal = grant.refuse_never_fitting(short)
                if refusal is None and self._running.must_not_wait(by_optimize):
                    refusal = grant.refuse_to_wait(short, seen.claims, number)
            if refusal is not None:
                return self._withdraw(trial_id, refusal)
            assert short is not None
            held = self._queue(trial_id, held, requests)
            self._log_once("serial", grant.describe_serial(short, self.quota))
            if self._clock.monotonic() - asked_at >= _DEADLOCK_WARNING_AFTER:
                own = self._running.asked_here()
                warning = grant.deadlock_warning(number, short, seen.claims, own)
                self._log_once(f"deadlock of {number}", warning, level=logging.WARNING)
            self._clock.sleep(pause)
        raise AssertionError("The pauses never end.")

    def _ask(
        self,
        trial_id: int,
        number: int,
        held: Reservation,
        requests: Mapping[str, ResourceRequest],
        choice: GpuChoice,
    ) -> tuple[Decision, Snapshot]:
        for _, pause in zip(range(_MOST_MOVES), pauses(), strict=False):
            decision, seen = self._state.ask(trial_id, number, held, requests, queue=True)
            revised = choice.revise(requests, number, seen.claims)
            if revised is None or decision.action != "grant":
                break
            requests = revised
            self._clock.sleep(pause)
        return decision, seen

    def _withdraw(self, trial_id: int, refusal: Refusal) -> Refusal:
        self._state.write(trial_id, Reservation())
        return refusal

    @property
    def trials(self) -> Sequence[FrozenTrial]:
        """All rows of the study by number, as last read."""
        return self._state.rows.trials

    def running_rows(self, without: Collection[int]) -> list[tuple[FrozenTrial, bool]]:
        """Return the rows of this process's running trials, and whether this thread asked."""
        rows, asked = self.trials, self._running.asked_here()
        # Another thread may add one meanwhile.
        found = [r.number for r in tuple(self._running.values()) if r.trial_id not in without]
        return [(rows[n], n in asked) for n in found if n < len(rows)]

    def room(self, trial: FrozenTrial) -> dict[str, float]:
        """Return what a running trial may hold beside others on its host; positive."""
        running = self._running.get(_optuna.trial_id_of(trial))
        if running is None:
            return {}
        free, granted = self._state.read().free(self.quota), running.reservation.granted
        # A trial that holds nothing may be granted nothing.
        held = {name: free[name] + granted.get(name, 0.0) for name in self.quota.held}
        return {name: max(amount, 1e-9) for name, amount in held.items()}

    def attach_monitor(self, trial_id: int, monitor: TrialMonitor) -> None:
        """Renew and extend a trial's reservation by its metering while it runs."""
        running = self._running.get(trial_id)
        if running is None:
            return
        running.monitor = monitor
        monitor.prices = self.quota.prices if self.quota.cost is not None else {}
        if running.reservation.gpu is not None:
            monitor.environment = {"CUDA_VISIBLE_DEVICES": running.reservation.gpu}
        monitor.most = {n: a for n, a in self.quota.amounts().items() if n != "wall_time"}
        monitor.on_low_quota(partial(self._heartbeat.request_extension, trial_id))
        self._heartbeat.add(trial_id)

    def left(self, trial: FrozenTrial, *, free: bool = True) -> tuple[dict[str, float], int]:
        """Return a running trial's part of totals, and what is free, and the number of others."""
        running = self._running.get(_optuna.trial_id_of(trial))
        if running is None:
            return {}, 0
        # The rows were just read for its reservation.
        seen = self._state.last or self._state.read()
        more = seen.free(self.quota) if free else {}
        left = grant.left_for_trial(self.quota, running.reservation.granted, more)
        if running.deadline is not None:
            left["wall_time"] = min(running.deadline, left.get("wall_time", math.inf))
        return left, seen.count_beside(trial.number)

    def revise_promise(
        self, trial_id: int, bounds: Mapping[str, float], expected: Mapping[str, float]
    ) -> bool:
        """Release what a running trial does not need at its point, or request what it lacks.

        ``bounds`` are upper bounds of what it will hold, ``expected`` is its expected usage of
        totals. Returns whether it was granted all of ``expected``.
        """
        with self._monitored(trial_id) as running:
            if running is None or running.monitor is None:
                return True
            held, used = running.reservation, running.monitor.usage().amounts()
            needs = {n: a for n, a in expected.items() if n not in self.quota.held}
            needs |= {n: a for n, a in bounds.items() if n in self.quota.held}
            smaller, larger = grant.revise_grant(
                self.quota, running.limits, held.granted, needs, used
            )
            if smaller:
                self._change(running, replace(held, granted={**held.granted, **smaller}))
            for name, need in larger.items():
                self._extend(running, {name: need}, exactly=name not in self.quota.held)
            if smaller or larger:
                running.monitor.allow(running.left)
            granted = running.reservation.granted
            return all(granted[n] >= larger[n] for n in larger.keys() - self.quota.held.keys())

    def charge(self, trial_id: int, usage: Usage, *, n_trials: int = 1) -> None:
        """Stop tracking a trial whose row has its usage and is about to be finished.

        ``n_trials`` is 0 for one that does not count as a trial: it was rejected, or runs again.
        """
        self._heartbeat.remove(trial_id)
        with self._running.lock:
            if self._running.finish(trial_id) is not None:
                self._state.charge(trial_id, usage, n_trials=n_trials)

    def forget(self, trial_id: int) -> None:
        """Stop tracking an admitted trial whose row was finished without ``tell``."""
        self._heartbeat.remove(trial_id)
        with self._running.lock:
            self._running.pop(trial_id, None)

    def charges_of_rejected(self, trial_id: int, usage: Usage) -> dict[str, Any]:
        """Return system attributes that charge a rejected trial for its usage so far."""
        running = self._running.get(trial_id)
        if running is None:
            return {}
        charged = {n: used for n in CHARGED_RESOURCES if (used := usage.get(n)) is not None}
        return self._state.attribute(trial_id, replace(running.reservation, charged=charged))

    def exhausted(self, needs: Needs = lambda free, n_beside: {}) -> Refusal | None:
        """Return why nothing more can be admitted; None if something can."""
        if self._is_far_from_end(self._state.last):
            # Reading the rows costs as much as a bare `ask`. If others use that much meanwhile,
            # the next trial is refused.
            return None
        seen = self._state.read()
        used, running = self._state.with_charged(seen)
        totals = self.quota.totals
        granted = {n: sum(claim.granted.get(n, 0.0) for claim in running) for n in totals}
        least = needs(seen.free(self.quota), len(running))
        return grant.refuse_exhausted(self.quota, used, {}, granted, least)

    def _is_far_from_end(self, seen: Snapshot | None) -> bool:
        if seen is None:
            return False
        used, _ = self._state.with_charged(seen)
        return all(
            used.get(name, 0.0) + seen.reserved.get(name, 0.0) < _FAR * total
            for name, total in self.quota.totals.items()
        )

    def _log_once(self, name: str, text: str | None, *, level: int = logging.INFO) -> None:
        if text is not None and name not in self._logged:
            self._logged.add(name)
            _logger.log(level, text)

    def _asked_by_optimize(self) -> bool:
        in_loop = any(_optuna.in_optimize_loop(study) for study in tuple(self._studies))
        return in_loop and not _optuna.is_asked_by_user()

    def _queue(
        self, trial_id: int, held: Reservation, requests: Mapping[str, ResourceRequest]
    ) -> Reservation:
        now, place = self._state.now(), protocol.with_queue_place(held, requests)
        is_due = held.beat is None or now - held.beat > self._state.heartbeat
        if place.queued_for == held.queued_for and not is_due:
            return held
        place = replace(place, beat=now)
        self._state.write(trial_id, place)
        return place

    def _begin(self, trial: FrozenTrial, limits: Limits, decision: Decision) -> RunningTrial:
        trial_id, start = _optuna.trial_id_of(trial), self._clock.monotonic()
        held = Reservation(began=self._state.now(start), gpu=find_gpus(decision.granted))
        held = protocol.with_decision(held, decision)
        self._state.write(trial_id, held)
        in_optimize = self._asked_by_optimize()
        running = RunningTrial(trial_id, trial.number, held, limits, in_optimize, start=start)
        if self.quota.wall_time is not None:
            running.deadline = max(0.0, self.quota.wall_time - self._state.wall_time())
        self._running[trial_id] = running
        return running

    def _extend(
        self, running: RunningTrial, needs: Mapping[str, float], *, exactly: bool = False
    ) -> None:
        # One by one: lack of one resource must not keep the trial from another.
        for name, amount in needs.items():
            seen, held, number = self._state.refresh(), running.reservation, running.number
            requests = grant.extension_requests(
                self.quota,
                running.limits,
                held.granted,
                {name: amount},
                seen.free(self.quota),
                seen.count_beside(number),
                exactly=exactly,
            )
            decision = self._state.judge(number, held, requests, seen, queue=False)
            if requests and decision.action != "withdraw":
                decision, _ = self._state.ask(
                    running.trial_id, number, held, requests, queue=False
                )
                if decision.action == "grant":
                    self._change(running, protocol.with_decision(held, decision))

    def _change(self, running: RunningTrial, held: Reservation) -> None:
        running.reservation = replace(held, began=self._state.now(running.began))
        self._state.write(running.trial_id, running.reservation)

    def _renew(self, trial_id: int) -> None:
        with self._monitored(trial_id) as running:
            if running is None or running.monitor is None:
                return
            monitor, usage = running.monitor, running.monitor.usage()
            needs = {n: max(amount, usage.get(n) or 0.0) for n, amount in monitor.needs.items()}
            try:
                self._extend(running, needs)
            finally:
                # If the storage fails, the trial continues with its grant.
                monitor.allow(running.left)

    def _beat(self, trial_id: int) -> None:
        with self._monitored(trial_id) as running:
            if running is not None and running.monitor is not None:
                if self.quota.wall_time is not None:
                    # Follows the clock of a worker that started while this trial ran.
                    self._state.read()
                used = running.monitor.usage().amounts()
                self._change(running, replace(running.reservation, used=used))

    @contextmanager
    def _monitored(self, trial_id: int) -> Iterator[RunningTrial | None]:
        """Lock a trial that still runs; stop it if another worker has finished its row."""
        with self._running.lock:
            running = self._running.get(trial_id)
            monitor = None if running is None else running.monitor
            if running is None or monitor is None or monitor.closed:
                self._heartbeat.remove(trial_id)
                yield None
                return
            try:
                yield running
            except UpdateFinishedTrialError:
                self._heartbeat.remove(trial_id)
                if not monitor.closed:
                    _logger.warning(
                        f"Trial {running.number} is stopped. Its row was finished from outside, "
                        "maybe by another worker that considered this one dead."
                    )
                    monitor.allow({"trial_time": 0.0})

    def _fail_left_behind(self) -> None:
        """Fail trials that this thread's ``optimize`` left unfinished after a storage error."""
        if not self._asked_by_optimize():
            return
        for running in self._running.in_optimize_here():
            usage = Usage() if running.monitor is None else running.monitor.close()
            self.charge(running.trial_id, usage)
            for entry in self._state.refresh().open:
                if entry.trial_id == running.trial_id and entry.reservation is not None:
                    held = replace(entry.reservation, used=usage.amounts())
                    entry = replace(entry, reservation=held)
                    text = "Its worker continued without finishing it."
                    self._state.fail_orphaned(OrphanedTrial(entry, text, 0.0))
