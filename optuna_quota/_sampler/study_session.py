"""One study in one process: starts, finishes and refuses trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
import logging
import os
import threading
import time
from types import MappingProxyType
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, WeakValueDictionary

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from optuna_quota import _optuna, _records
from optuna_quota._enforcement import nesting
from optuna_quota._enforcement.active_trials import (
    find_monitor,
    note_garbage,
    resolve_cores,
    start_monitor,
)
from optuna_quota._enforcement.preemption import enqueue_again, preemption_of
from optuna_quota._enforcement.pruner import Interrupter
from optuna_quota._enforcement.study_warnings import warn_of_ceilings
from optuna_quota._enforcement.trial_result import (
    constraints_warning,
    record_rejection,
    record_result,
)
from optuna_quota._ledger.grant import check_gpus_per_trial, left_for_trial, Refusal, refuse_late
from optuna_quota._ledger.ledger import Ledger
from optuna_quota._ledger.status import store_study_settings
from optuna_quota._limits import Limits
from optuna_quota._metering import Meter, Verdict
from optuna_quota._metering.host import gpus_here
from optuna_quota._sampler.admission import PointVerdict
from optuna_quota._sampler.candidates import CandidateFilter
from optuna_quota._sampler.options import SamplerOptions
from optuna_quota._sampler.ranking import Ranking
from optuna_quota._sampler.study_projection import (
    admit_strategy,
    project_study,
    QuotaOutlook,
    rejection,
)
from optuna_quota._usage import Usage
from optuna_quota.exceptions import QuotaExhausted, TrialRejected


_logger = logging.getLogger("optuna.quota.sampler")

# The study ends after this many points in a row were rejected by what is left of the quota.
_MOST_UNFIT = 20


class StudySession:
    """One study in this process."""

    def __init__(self, study: Study, options: SamplerOptions) -> None:
        gpus = () if options.gpus_per_trial is None else gpus_here()
        count = options.gpus_per_trial or 1
        check_gpus_per_trial(gpus, count)
        # What the study has used and reserved, across workers.
        self.ledger = Ledger(
            study, options.quota, lease=options.lease, gpus=gpus, gpus_per_trial=count
        )
        ranking = Ranking(study, options.n_candidates) if options.n_candidates > 1 else None
        self.candidates = CandidateFilter(options, ranking)  # Filters its points
        # Logs how much of the quota the study will most likely use.
        self._outlook = QuotaOutlook(
            (options.quota, options.strategy), learns=self.candidates.footprint.given is None
        )
        # Whether the study was admitted; None before the first trial here.
        self.decided: bool | None = None
        self._preemption = preemption_of(study)
        # The sampler itself must not be kept alive.
        self._options, self._quota = options, options.quota
        self._refused: set[int] = set()
        self._promised: set[int] = set()  # The trials that reserve what their points need
        # Rejections by what is left of the quota since the last trial that ran.
        self._unfit: list[PointVerdict] = []
        self._interrupters: dict[int, Interrupter] = {}
        self._lock = threading.Lock()
        self._logged: set[str] = set()
        self._sharing = threading.Lock()
        # The limits that the study and this worker agree on; None while they differ.
        self._shared_limits: Limits | None = None

    def admit(
        self, seen: Study, study: Study, trial: FrozenTrial, limits: Limits, own: Sequence[Meter]
    ) -> None:
        """Admit a trial and start its metering, or keep it from running.

        ``seen`` is the study as Optuna passed it, ``own`` are the sampler's own meters.
        """
        options, stated = self._options, self._options.footprint
        footprint, fixed = self.candidates.footprint, _optuna.fixed_params_of(trial)
        if self.decided is None:
            # Logged once: which earlier trials count, and limits that can't take effect.
            self.ledger.describe_past()
            has_purpose = options.deadline is not None or options.gpus_per_trial is not None
            warn_of_ceilings(study, limits, self._quota, has_purpose=has_purpose)
        self.share_settings(study, limits)
        n_jobs = None if options.strategy is None else options.strategy.n_jobs
        limits = resolve_cores(limits, n_jobs)
        if not self.decided:
            resumed = footprint if self.decided is None else None
            self.decided = admit_strategy(options, limits, study, resumed)
        refusal = self._refuse_late(fixed) or self._refuse_unfit(fixed)
        running = refusal or self.ledger.reserve(
            trial,
            limits=limits,
            footprint=stated.amounts() if isinstance(stated, Usage) else {},
            bounds=footprint.bounds_before_start(self._quota.held, fixed),
            needs=self._needs,
            n_jobs=n_jobs,
            is_over=lambda: self._is_ending(study) and objective_uses_trial(study),
        )
        if isinstance(running, Refusal):
            self._refuse(study, trial, running)
            return
        self._check_outlook(study, limits)
        options.base_sampler.before_trial(seen, trial)
        self._begin_point(study, trial, limits.tightened(self._quota.held))
        pruners = nesting.quota_pruners(study.pruner)
        meters = {each.name: each for each in (*nesting.pruner_meters(pruners), *own)}
        # Last, so that fits and imports do not count as the trial's usage.
        monitor = start_monitor(
            study,
            trial,
            "sampler",
            limits=limits,
            left=running.left,
            meters=tuple(meters.values()),
            holder=trial,
            here=options.metering not in (False, "reported"),
        )
        self.ledger.attach_monitor(running.trial_id, monitor)
        _optuna.tolerate_finished_row(study, running.trial_id)
        if any(pruner.interrupt for pruner in pruners):
            interrupter = Interrupter.arm(monitor)
            if interrupter is not None:
                self._interrupters[running.trial_id] = interrupter

    def share_settings(self, study: Study, limits: Limits) -> None:
        """Store the quota and these limits as the study's, once no other worker runs."""
        with self._sharing:
            if self._shared_limits == limits:
                return
            shared = store_study_settings(
                study, self._quota, limits, warn="settings" not in self._logged
            )
            self._shared_limits = limits if shared else None
            if shared:
                self.ledger.set_bounds(limits)
            else:
                self._logged.add("settings")

    def _check_outlook(self, study: Study, limits: Limits) -> None:
        """Log early what the strategy will most likely use, and apply ``on_projected``."""
        options = self._options
        if options.strategy is None or not self._quota.totals.keys() - {"n_trials"}:
            return
        footprint = self.candidates.footprint
        footprint.learn(self.ledger.trials)
        n_trials = footprint.learner.n_observations
        project = partial(project_study, options, limits, study, footprint)
        projection = self._outlook.check(study, n_trials, project)
        if projection is None or options.on_projected == "continue":
            return
        if options.on_projected == "raise":
            raise rejection(projection)
        if _optuna.in_optimize_loop(study):
            study.stop()

    def is_refused(self, trial: FrozenTrial) -> bool:
        return _optuna.trial_id_of(trial) in self._refused

    def _begin_point(self, study: Study, trial: FrozenTrial, ceilings: Limits) -> None:
        if self._options.on_crowded == "smaller":
            ceilings = ceilings.tightened(self.ledger.room(trial))
        self._promise_earlier(_optuna.trial_id_of(trial))
        totals, n_beside = self.ledger.left(trial)
        is_near_end = self._least_needs(totals, n_beside)
        left = self.candidates.footprint.margins().within(totals) if is_near_end else {}
        self.candidates.begin(study, trial, ceilings, self.ledger.trials, left, totals)

    def _needs(self, free: Mapping[str, float], n_beside: int) -> Mapping[str, float]:
        """Return the smallest needs of any point, empty while much of the totals is free."""
        left = left_for_trial(self._quota, dict.fromkeys(free, 0.0), free)
        return self._least_needs(left, n_beside)

    def judge_again(self, study: Study, trial: FrozenTrial, *, free: bool) -> None:
        """Judge a trial's point by what is left of totals; without ``free``, by what it holds."""
        totals, _ = self.ledger.left(trial, free=free)
        left = self.candidates.footprint.margins().within(totals)
        self.candidates.set_left(study, trial, left)

    def _least_needs(self, left: Mapping[str, float], n_beside: int) -> Mapping[str, float]:
        footprint = self.candidates.footprint
        if left:
            # The trial before this one may have ended since.
            footprint.learn(self.ledger.trials)
        return footprint.least_needs(left, n_beside)

    def promise(
        self, trial: FrozenTrial, drawn: Mapping[str, Any], *, is_complete: bool = False
    ) -> bool:
        """Reserve what a trial's point needs; return whether enough is left of totals."""
        if not self._quota.held and not self.candidates.reserves(trial):
            return True
        bounds, expected = self.candidates.bounds_at(trial, drawn, is_complete=is_complete)
        if not bounds:
            return True
        trial_id = _optuna.trial_id_of(trial)
        self._promised.add(trial_id)
        return self.ledger.revise_promise(trial_id, bounds, expected)

    def _promise_earlier(self, trial_id: int) -> None:
        """Reserve what trials need that began before it was known which points are complete."""
        if self.candidates.footprint.given is None:
            return
        for row, asked in self.ledger.running_rows(self._promised | {trial_id}):
            # In a batch, a trial has its parameters by the time that the next is asked for.
            self.promise(row, {}, is_complete=asked)

    def finish_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, limits: Callable[[], Limits]
    ) -> None:
        trial_id = _optuna.trial_id_of(trial)
        self._promised.discard(trial_id)
        usage, n_trials = Usage(), 1
        try:
            interrupter = self._interrupters.pop(trial_id, None)
            if interrupter is not None:
                interrupter.disarm()
            monitor = find_monitor(study, trial)
            if monitor is not None and monitor.isolation is None:
                # It ran where this process can't measure it: its row may report its usage.
                monitor.add_usage(_records.read_record(trial).usage)
            in_process = monitor is not None and monitor.isolation in ("thread", "shared")
            if in_process and state != TrialState.COMPLETE:
                note_garbage()
            verdict, footprint, expected = self.candidates.finish(
                trial, completed=state == TrialState.COMPLETE
            )
            if verdict is None:
                self._unfit = []
            elif verdict.by_quota and not _optuna.fixed_params_of(trial):
                self._unfit = [*self._unfit, verdict]
            if monitor is not None and verdict is not None:
                monitor.verdict = Verdict("rejected", verdict.reason)
            record = record_result(
                study,
                trial,
                monitor,
                state,
                limits=limits() if monitor is None else None,
                footprint=footprint,
                expected=expected,
                error=_optuna.objective_error(),
                tell_call=_optuna.find_tell_call(),
                of_rejected=partial(self.ledger.charges_of_rejected, trial_id),
            )
            usage = record.usage if monitor is None else monitor.usage()
            n_trials = int(record.outcome not in ("rejected", "preempted"))
        finally:
            self.ledger.charge(trial_id, usage, n_trials=n_trials)

    def end_when_exhausted(self, study: Study) -> None:
        if not _optuna.in_optimize_loop(study):
            return
        refusal = self._refuse_late()
        if refusal is None and self._options.on_exhausted == "stop":
            refusal = self.ledger.exhausted(self._needs) or self._refuse_unfit()
        if refusal is not None:
            if not _optuna.is_last_of_optimize():
                self._log_end(refusal.reason)
            study.stop()

    def _refuse_late(self, fixed: Mapping[str, Any] = MappingProxyType({})) -> Refusal | None:
        """Return a refusal if a trial with these fixed parameters would be late, else None."""
        if self._preemption.deadline_of is not self._options:
            # Trials of another sampler ran meanwhile.
            self._preemption.set_deadline(self._options.deadline)
            self._preemption.deadline_of = self._options
        deadline = self._preemption.deadline
        if deadline is None:
            return None
        likely = self.candidates.footprint.likely_seconds(self.ledger.trials, fixed)
        return refuse_late(deadline, time.time(), likely, self._preemption.margin)

    def _refuse_unfit(self, fixed: Mapping[str, Any] = MappingProxyType({})) -> Refusal | None:
        """Return a refusal if too many points in a row did not fit what is left, else None."""
        unfit = self._unfit
        # Enumerating samplers end by themselves, and a smaller point may come later.
        if len(unfit) < _MOST_UNFIT or fixed or self.candidates.enumerates:
            return None
        last = unfit[-1]
        reason = f"The last {len(unfit)} points did not fit what is left. {last.reason}"
        median, left = last.median or 0.0, last.limit or 0.0
        return Refusal(last.resource or "", median, left, median, reason=reason, final=True)

    def _is_ending(self, study: Study) -> bool:
        return _optuna.is_optimize_ending(study) or self._preemption.is_late

    def _refuse(self, study: Study, trial: FrozenTrial, refusal: Refusal) -> None:
        """Keep a trial from running for which too little of the quota is left.

        Inside ``optimize``, the first method of the trial that the objective calls raises, and the
        study ends. Elsewhere, and for an objective that calls none, raises QuotaExhausted. An
        enqueued trial returns to the queue if another worker or a later ``ask`` may run it.
        """
        if refusal.of_any:
            enqueue_again(study, trial, "could not start here")
        figures: dict[str, Any] = {"resource": refusal.resource, "quota": refusal.quota}
        figures |= {"observed": refusal.used, "temporary": refusal.temporary}
        is_quiet = refusal.by_deadline or self._options.on_exhausted == "stop"
        by_optimize = _optuna.in_optimize_loop(study) and not _optuna.is_asked_by_user()
        may_stop = is_quiet and by_optimize
        if not (refusal.late or (may_stop and objective_uses_trial(study))):
            raise QuotaExhausted(refusal.reason, **figures)
        self._refused.add(_optuna.trial_id_of(trial))
        record_rejection(study, trial, refusal.reason)

        def raise_rejected() -> NoReturn:
            raise TrialRejected(refusal.reason, **figures)

        _optuna.raise_on_next_suggest(trial, raise_rejected)
        if refusal.late:
            return
        self._log_end(refusal.reason)
        study.stop()

    def skip_if_finished(self, study: Study, trial: FrozenTrial, error: BaseException) -> bool:
        """Let ``optimize`` go on without a trial whose row was finished before it was admitted.

        Returns whether that is why its start failed.
        """
        trial_id = _optuna.trial_id_of(trial)
        if not isinstance(error, UpdateFinishedTrialError) or not _optuna.in_optimize_loop(study):
            return False
        end = _optuna.describe_end(study, trial_id)
        if end is None:
            return False
        self.ledger.forget(trial_id)
        self._refused.add(trial_id)
        _optuna.tolerate_finished_row(study, trial_id)

        def raise_finished() -> NoReturn:
            raise UpdateFinishedTrialError(f"Trial {trial.number} did not start. {end}")

        _optuna.raise_on_next_suggest(trial, raise_finished)
        return True

    def warn_of_constraints(self, trial: FrozenTrial, error: Exception) -> None:
        self._warn_once("constraints", constraints_warning(trial.number, error))

    def _log_end(self, reason: str) -> None:
        self._warn_once("end", f"{reason} The study ends here: no further trial is started.")

    def _warn_once(self, topic: str, message: str) -> None:
        with self._lock:
            logged = topic in self._logged
            self._logged.add(topic)
        if not logged:
            _logger.warning(message)


def objective_uses_trial(study: Study) -> bool:
    """Return whether the objective would notice a refusal, given the trials so far.

    It does if it suggests parameters, or did notice. An isolated one checks before it starts.
    """
    trials = [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished() and trial.state != TrialState.FAIL
    ]
    return not trials or any(
        trial.params
        or (trial.state == TrialState.PRUNED and _records.is_rejected(trial.user_attrs))
        or _records.read_record(trial).isolation == "process"
        for trial in trials
    )


class StudySessions:
    """Finds the session of a study, which all ``Study`` objects on one storage object share.

    A service may load its study, and create a storage, for each request. So a session refers to
    the storage and its connections, but not to the study, and lives as long as any ``Study``
    object that uses it.
    """

    def __init__(self) -> None:
        self._by_study: WeakKeyDictionary[Study, StudySession] = WeakKeyDictionary()
        self._by_key: WeakValueDictionary[tuple[int, int, int], StudySession] = (
            WeakValueDictionary()
        )

    def find(self, study: Study) -> StudySession | None:
        session = self._by_key.get(_session_key(study))
        if session is not None and self._by_study.get(study) is not session:
            self.add(study, session)
        return session

    def add(self, study: Study, session: StudySession) -> None:
        """Keep a session for as long as a ``Study`` object lives."""
        self._by_study[study] = session
        self._by_key[_session_key(study)] = session
        session.ledger.add_study(study)


def _session_key(study: Study) -> tuple[int, int, int]:
    # With the process, as a forked one keeps no session of its parent.
    return os.getpid(), _optuna.number_of(_optuna.storage_of(study)), _optuna.study_id_of(study)
