"""The ledger of one study as one process keeps it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
import logging
import math
import os
import threading
from types import MappingProxyType
from typing import TYPE_CHECKING
from weakref import WeakSet

from optuna.exceptions import UpdateFinishedTrialError

from optuna_quota import _optuna
from optuna_quota._ledger.dead_workers import Death
from optuna_quota._ledger.gpus import Gpu
from optuna_quota._ledger.gpus import gpu_in
from optuna_quota._ledger.gpus import want_of_gpu
from optuna_quota._ledger.grant import Asked
from optuna_quota._ledger.grant import beyond
from optuna_quota._ledger.grant import first_wants
from optuna_quota._ledger.grant import Grant
from optuna_quota._ledger.grant import hopeless
from optuna_quota._ledger.grant import more_wants
from optuna_quota._ledger.grant import PATIENCE
from optuna_quota._ledger.grant import Refusal
from optuna_quota._ledger.grant import revised_promise
from optuna_quota._ledger.grant import standstill
from optuna_quota._ledger.grant import too_late
from optuna_quota._ledger.heartbeat import Keeper
from optuna_quota._ledger.heartbeat import Running
from optuna_quota._ledger.protocol import answered
from optuna_quota._ledger.protocol import Decision
from optuna_quota._ledger.protocol import queued
from optuna_quota._ledger.protocol import Shortage
from optuna_quota._ledger.protocol import Want
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._ledger.reservation import this_worker
from optuna_quota._ledger.state import Accounts
from optuna_quota._ledger.state import ask
from optuna_quota._ledger.state import Clock
from optuna_quota._ledger.state import judge
from optuna_quota._ledger.state import pauses
from optuna_quota._ledger.state import Snapshot
from optuna_quota._ledger.state import SystemClock
from optuna_quota._ledger.state import Undertaker
from optuna_quota._ledger.totals import describe_earlier
from optuna_quota._resources import get_resource
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota
from optuna_quota._resources import Usage


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from optuna_quota._metering import TrialMonitor


_logger = logging.getLogger("optuna.quota.ledger")

# Seconds without a sign of life after which a worker on another machine is taken for dead.
LEASE = 120.0
_BEATS_PER_LEASE = 4


class Ledger:
    """Admits trials to a study's quota, together with all other workers of the study.

    Everything is derived from trial rows; this object only remembers what it has read.

    Args:
        study: The study.
        quota: Its quota.
        clock: The clocks to go by.
        lease: Seconds without a sign of life after which a worker on another machine is taken
            for dead and its trial ended.
        gpus: This machine's GPUs, to give each trial the one with the most room.
    """

    def __init__(
        self,
        study: Study,
        quota: Quota,
        *,
        clock: Clock | None = None,
        lease: float = LEASE,
        gpus: Sequence[Gpu] = (),
    ) -> None:
        self.quota = quota
        self._gpus = tuple(gpus)
        # A study's connections are to be closed when its user lets go of it.
        self._studies: WeakSet[Study] = WeakSet((study,))
        self._clock = clock or SystemClock()
        self._lease = lease
        self._open(study)

    def serve(self, study: Study) -> None:
        """Get to know another object for the same study."""
        self._studies.add(study)

    def _in_optimize_loop(self) -> bool:
        return any(_optuna.in_optimize_loop(study) for study in tuple(self._studies))

    def _open(self, study: Study) -> None:
        self._pid = os.getpid()
        beat = self._lease / _BEATS_PER_LEASE
        self._accounts = Accounts(study, self.quota, self._clock, beat, self._gpus)
        self._undertaker = Undertaker(self._accounts, self._lease, self._call_back)
        self._keeper = Keeper(self._renew, self._beat, beat)
        self._running: dict[int, Running] = {}
        self._told_of_earlier = self._told_of_unknown = False
        # One thread at a time changes what this process's running trials hold.
        self._changing = threading.RLock()

    def _open_in_child(self) -> None:
        if self._pid != os.getpid():
            # The locks and threads of a parent are of no use in its child.
            self._open(next(iter(self._studies)))

    def _call_back(self, trial_id: int) -> None:
        """Have a trial tried again, where the user asked Optuna for it."""
        study = next(iter(self._studies), None)
        if study is None:
            return
        try:
            _optuna.call_stale_trial_callback(study, trial_id)
        except Exception as fault:  # noqa: BLE001 - the user's own; this trial has no part in it
            _logger.warning(
                f"The storage's callback for the trial with id {trial_id} failed: {fault!r}."
            )

    def take(self, trial: FrozenTrial) -> bool:
        """Return whether an enqueued trial is this worker's, and nobody else's already."""
        self._open_in_child()
        return self._accounts.take(_optuna.trial_id_of(trial))

    def reserve(
        self,
        trial: FrozenTrial,
        *,
        limits: Limits,
        footprint: Mapping[str, float],
        bounds: Mapping[str, float] = MappingProxyType({}),
        n_jobs: int | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Grant | Refusal:
        """Admit a trial or refuse it; waits while others hold what it needs for now.

        Args:
            trial: The trial, whose row must be running.
            limits: Its limits.
            footprint: Upper bounds of what it will use, by resource, where the user stated them.
            bounds: Upper bounds of what it will hold at one moment, where they were learned.
            n_jobs: Trials that run at once, where known.
            is_over: Returns whether a trial that waits need not run any more.
        """
        self._open_in_child()
        self._bury_left_behind()
        trial_id, number = _optuna.trial_id_of(trial), trial.number
        held, seen, waiting = Reservation(), self._accounts.last, False
        since, told = self._clock.monotonic(), False
        short: Shortage | None = None
        for pause in pauses():
            if short is not None and is_over():
                self._accounts.write(trial_id, Reservation())
                return too_late(short)
            seen = self._undertaker.look() if seen is None or waiting else seen
            self._tell_of_earlier()
            beside = _beside(seen, number)
            wants = first_wants(
                self.quota,
                limits,
                footprint,
                seen.free(self.quota),
                beside,
                bounds=bounds,
                n_jobs=n_jobs,
                asked=self._asked(),
            )
            need = footprint.get("gpu_memory", limits.gpu_memory)
            machine = this_worker().machine
            wants.update(want_of_gpu(self._gpus, seen.claims, machine, need))
            # Who waits looks before it asks: a claim in vain would only disturb the others.
            decision = judge(self._accounts, number, held, wants, seen, queue=True)
            if not waiting or decision.action != "withdraw":
                decision, seen = ask(
                    self._accounts,
                    trial_id,
                    number,
                    held,
                    wants,
                    self._undertaker.look,
                    queue=True,
                )
            refusal = beyond(self.quota, seen.used, footprint)
            if refusal is None and decision.action == "grant":
                return self._begin(trial, limits, self._write_grant(trial_id, decision))
            if refusal is None and decision.shortage is not None:
                refusal = hopeless(decision.shortage)
            if refusal is not None:
                self._accounts.write(trial_id, Reservation())
                return refusal
            held = self._queue_up(trial_id, held, wants)
            waiting, short = True, decision.shortage
            self._tell_of_unknown(short)
            if not told and self._clock.monotonic() - since >= PATIENCE:
                told = self._tell_of_standstill(number, decision, seen)
            self._clock.sleep(pause)
        raise AssertionError("The pauses never end.")

    @property
    def trials(self) -> Sequence[FrozenTrial]:
        """All rows of the study as they were last read, by number."""
        return self._accounts.rows.trials

    def room(self, trial: FrozenTrial) -> dict[str, float]:
        """Return what a running trial may hold while the others on its host hold what they do.

        Args:
            trial: One that was granted its start.
        """
        running = self._running.get(_optuna.trial_id_of(trial))
        if running is None:
            return {}
        free, granted = self._accounts.read().free(self.quota), running.reservation.granted
        return {name: free[name] + granted.get(name, 0.0) for name in self.quota.held}

    def keep(self, trial_id: int, watch: TrialMonitor) -> None:
        """Ask for more by itself while a trial under metering runs, and renew its lease."""
        running = self._running.get(trial_id)
        if running is None:
            return
        running.watch = watch
        watch.prices = self.quota.prices if self.quota.cost is not None else {}
        if running.reservation.gpu is not None:
            watch.environment = {"CUDA_VISIBLE_DEVICES": running.reservation.gpu}
        watch.most = {n: a for n, a in self.quota.amounts().items() if n != "wall_time"}
        keeper = self._keeper
        watch.on_low_quota(lambda: keeper.call_for_more(trial_id))
        keeper.keep(trial_id)

    def promise(self, trial_id: int, bounds: Mapping[str, float]) -> None:
        """Give back what a running trial will not hold by its point, or ask for what it lacks.

        Args:
            trial_id: The trial.
            bounds: Upper bounds of what it will hold at one moment, by resource.
        """
        with self._watched(trial_id) as running:
            if running is None or running.watch is None:
                return
            held, used = running.reservation, running.watch.usage().amounts()
            smaller, larger = revised_promise(
                self.quota, running.limits, held.granted, bounds, used
            )
            if smaller:
                self._change(running, replace(held, granted={**held.granted, **smaller}))
            self._extend(running, larger)
            if smaller or larger:
                running.watch.allow(running.left)

    def extend(self, trial_id: int, usage: Usage | None = None) -> Mapping[str, float]:
        """Return what a running trial may use in all, having asked for more where it runs low.

        Args:
            trial_id: The trial.
            usage: What it has used; without it, it asks for more of everything.
        """
        with self._changing:
            running = self._running.get(trial_id)
            if running is None:
                return {}
            return self._extend(running, running.low(usage, self.quota))

    def charge(self, trial_id: int, usage: Usage) -> None:
        """Stop keeping a trial's reservation: its row says what it used and is about to finish."""
        self._keeper.let_go(trial_id)
        with self._changing:
            if self._running.pop(trial_id, None) is not None:
                self._accounts.charge(trial_id, usage)

    def exhausted(self) -> Refusal | None:
        """Return why nothing more can be admitted, None while something can."""
        seen = self._accounts.read()
        granted = {
            name: sum(claim.granted.get(name, 0.0) for claim in seen.claims)
            for name in self.quota.totals
        }
        return beyond(self.quota, self._accounts.with_settled(seen), {}, granted)

    def _tell_of_earlier(self) -> None:
        told, self._told_of_earlier = self._told_of_earlier, True
        text = None if told else describe_earlier(self._accounts.earlier)
        if text is not None:
            _logger.info(text)

    def _tell_of_unknown(self, short: Shortage | None) -> None:
        if short is None or short.wanted < self.quota.held.get(short.resource, math.inf):
            return
        told, self._told_of_unknown = self._told_of_unknown, True
        if not told:
            title = get_resource(short.resource).title
            _logger.info(
                f"As far as is known, a trial may need all {title} of the quota, so that trials "
                f"run one at a time. `Limits({short.resource}=…)` or `Strategy(n_jobs=…)` change "
                "that."
            )

    def _asked(self) -> Asked:
        if self._in_optimize_loop():
            return "by optimize"
        return "in a batch" if self._asked_for_here() else "by hand"

    def _asked_for_here(self) -> list[int]:
        """Return the trials that run and that this thread asked for by hand."""
        here = threading.get_ident()
        with self._changing:
            return [r.number for r in self._running.values() if r.asker == here]

    def _tell_of_standstill(self, number: int, decision: Decision, seen: Snapshot) -> bool:
        warning = standstill(number, decision.shortage, seen.claims, self._asked_for_here())
        if warning is not None:
            _logger.warning(warning)
        return warning is not None

    def _queue_up(
        self, trial_id: int, held: Reservation, wants: Mapping[str, Want]
    ) -> Reservation:
        now, place = self._clock.time(), queued(held, wants)
        due = held.beat is None or now - held.beat > self._accounts.beat
        if place.waits == held.waits and not due:
            return held
        place = replace(place, beat=now)
        self._accounts.write(trial_id, place)
        return place

    def _write_grant(self, trial_id: int, decision: Decision) -> Reservation:
        now, gpu = self._clock.time(), gpu_in(decision.granted)
        held = replace(answered(Reservation(), decision), began=now, beat=now, gpu=gpu)
        self._accounts.write(trial_id, held)
        return held

    def _begin(self, trial: FrozenTrial, limits: Limits, held: Reservation) -> Grant:
        trial_id, now = _optuna.trial_id_of(trial), self._clock.time()
        running = Running(trial_id, trial.number, held, limits, start=held.began)
        if self.quota.wall_time is not None:
            running.deadline = max(0.0, self.quota.wall_time - self._accounts.wall_time(now))
        if self._in_optimize_loop():
            running.thread = threading.get_ident()
        else:
            running.asker = threading.get_ident()
        self._running[trial_id] = running
        return Grant(running.left, gpu=held.gpu)

    def _extend(self, running: Running, needs: Mapping[str, float]) -> Mapping[str, float]:
        for name, amount in needs.items():
            self._extend_one(running, name, amount)
        return running.left

    def _extend_one(self, running: Running, name: str, need: float) -> None:
        seen, held = self._undertaker.look(), running.reservation
        wants = more_wants(
            self.quota,
            running.limits,
            held.granted,
            {name: need},
            seen.free(self.quota),
            _beside(seen, running.number),
        )
        number = running.number
        decision = judge(self._accounts, number, held, wants, seen, queue=False)
        if wants and decision.action != "withdraw":
            decision, _ = ask(
                self._accounts,
                running.trial_id,
                number,
                held,
                wants,
                self._undertaker.look,
                queue=False,
            )
            if decision.action == "grant":
                self._change(running, answered(held, decision))

    def _change(self, running: Running, held: Reservation) -> None:
        running.reservation = replace(held, began=running.began, beat=self._clock.time())
        self._accounts.write(running.trial_id, running.reservation)

    def _renew(self, trial_id: int) -> None:
        with self._watched(trial_id) as running:
            if running is None or running.watch is None:
                return
            watch, usage = running.watch, running.watch.usage()
            needs = {n: max(amount, usage.get(n) or 0.0) for n, amount in watch.needs.items()}
            try:
                self._extend(running, needs)
            finally:
                # Where the storage fails, the trial goes by what it has.
                watch.allow(running.left)

    def _beat(self, trial_id: int) -> None:
        with self._watched(trial_id) as running:
            if running is not None and running.watch is not None:
                used = running.watch.usage().amounts()
                self._change(running, replace(running.reservation, used=used))

    @contextmanager
    def _watched(self, trial_id: int) -> Iterator[Running | None]:
        """Hold on to a trial that still runs; end it when its row was finished by others."""
        with self._changing:
            running = self._running.get(trial_id)
            watch = None if running is None else running.watch
            if running is None or watch is None or watch.closed:
                self._keeper.let_go(trial_id)
                self._running.pop(trial_id, None)
                yield None
                return
            try:
                yield running
            except UpdateFinishedTrialError:
                self._keeper.let_go(trial_id)
                if not watch.closed:
                    _logger.warning(
                        f"Trial {running.number} is stopped: another worker took this one for "
                        "dead and finished its row."
                    )
                    watch.allow({"trial_time": 0.0})

    def _bury_left_behind(self) -> None:
        """End trials that this thread's ``optimize`` has left behind, as on a storage's fault."""
        if not self._in_optimize_loop():
            return
        here = threading.get_ident()
        with self._changing:
            left_behind = [r for r in self._running.values() if r.thread == here]
        for running in left_behind:
            usage = Usage() if running.watch is None else running.watch.close()
            self.charge(running.trial_id, usage)
            for entry in self._undertaker.look().open:
                if entry.trial_id == running.trial_id and entry.reservation is not None:
                    used = replace(entry.reservation, used=usage.amounts())
                    text = "Its worker went on without finishing it."
                    self._undertaker.bury(Death(replace(entry, reservation=used), text, 0.0))


def _beside(seen: Snapshot, number: int) -> int:
    return sum(1 for claim in seen.claims if claim.number != number)
