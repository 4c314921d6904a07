"""One study in one process: starts, finishes and refuses its trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import gc
import logging
import os
import threading
import time
from types import MappingProxyType
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, WeakValueDictionary

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from optuna_quota import _optuna, _records
from optuna_quota._enforcement.active_trials import find_monitor, start_monitor
from optuna_quota._enforcement.preemption import preemption_of
from optuna_quota._enforcement.pruner import Interrupter
from optuna_quota._enforcement.study_warnings import warn_of_ceilings
from optuna_quota._enforcement.trial_result import (
    constraints_warning,
    record_rejection,
    record_result,
)
from optuna_quota._ledger import (
    check_gpus_per_trial,
    gpus_here,
    Ledger,
    left_for_trial,
    others_run,
    Refusal,
    RunningTrial,
)
from optuna_quota._limits import Limits, Quota
from optuna_quota._metering import Meter, Verdict
from optuna_quota._resources import format_amount, get_resource
from optuna_quota._sampler.admission import PointVerdict
from optuna_quota._sampler.candidates import CandidateFilter
from optuna_quota._sampler.deadline import refuse_late
from optuna_quota._sampler.options import SamplerOptions
from optuna_quota._sampler.ranking import Ranking
from optuna_quota._sampler.study_projection import QuotaOutlook
from optuna_quota._usage import Usage
from optuna_quota.exceptions import QuotaExhausted, TrialRejected


_logger = logging.getLogger("optuna.quota.sampler")

# Trials in a row whose points were rejected by what is left of the quota, before the study ends.
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
        # Says how much of the quota the study will most likely use.
        self.outlook = QuotaOutlook(learns=self.candidates.footprint.given is None)
        # Whether the study as a whole was admitted; None before the first trial here.
        self.decided: bool | None = None
        self._preemption = preemption_of(study)
        # The sampler itself must not be kept alive.
        self._options, self._quota = options, options.quota
        self._refused: set[int] = set()
        # Rejections by what is left of the quota since the last trial that ran.
        self._unfit: list[PointVerdict] = []
        self._interrupters: dict[int, Interrupter] = {}
        self._lock = threading.Lock()
        self._logged: set[str] = set()
        self._sharing = threading.Lock()
        self._has_garbage = False
        # The limits that are the study's and this worker's alike; None while they differ.
        self._shared_limits: Limits | None = None

    def describe(self, study: Study, limits: Limits) -> None:
        """Log once what ran before this worker came, and what is odd about the ceilings."""
        if self.decided is None:
            self.ledger.describe_past()
            options = self._options
            has_purpose = options.deadline is not None or options.gpus_per_trial is not None
            warn_of_ceilings(study, limits, self._quota, has_purpose=has_purpose)

    def share_settings(self, study: Study, limits: Limits) -> None:
        """Make the quota and these limits the study's, as soon as no other worker runs."""
        with self._sharing:
            if self._shared_limits == limits:
                return
            shared = store_study_settings(
                study, self._quota, limits, warn="settings" not in self._logged
            )
            self._shared_limits = limits if shared else None
            if not shared:
                self._logged.add("settings")
        if shared:
            self.ledger.set_bounds(limits)

    def is_refused(self, trial: FrozenTrial) -> bool:
        return _optuna.trial_id_of(trial) in self._refused

    def begin_point(self, study: Study, trial: FrozenTrial, ceilings: Limits) -> None:
        totals, n_beside = self.ledger.left(trial)
        left = self._near_end(totals, n_beside)
        self.candidates.begin(study, trial, ceilings, self.ledger.trials, left, totals)

    def start_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        running: RunningTrial,
        limits: Limits,
        meters: Sequence[Meter],
        *,
        interrupt: bool,
    ) -> None:
        limited = limits.memory is not None or self._quota.memory is not None
        if limited and self._has_garbage:
            # An exception and the frames it passed through refer to each other: what a failed
            # objective held would count for the next trial.
            self._has_garbage = False
            gc.collect()
        trial_id = _optuna.trial_id_of(trial)
        monitor = start_monitor(
            study,
            trial,
            "sampler",
            limits=limits,
            left=running.left,
            meters=meters,
            holder=trial,
            here=self._options.metering not in (False, "reported"),
        )
        self.ledger.attach_monitor(trial_id, monitor)
        _optuna.tolerate_finished_row(study, trial_id)
        if interrupt:
            interrupter = Interrupter.arm(monitor)
            if interrupter is not None:
                self._interrupters[trial_id] = interrupter

    def needs(self, free: Mapping[str, float], n_beside: int) -> Mapping[str, float]:
        """Return the least that any point needs of totals, empty while much of them is free."""
        left = left_for_trial(self._quota, dict.fromkeys(free, 0.0), free)
        return self._least_needs(left, n_beside)

    def left(self, trial: FrozenTrial) -> Mapping[str, float]:
        """Return what is left of totals for a trial's point, empty while much is."""
        return self._near_end(*self.ledger.left(trial))

    def _near_end(self, left: Mapping[str, float], n_beside: int) -> Mapping[str, float]:
        if not self._least_needs(left, n_beside):
            return {}
        return self.candidates.footprint.margins().within(left)

    def _least_needs(self, left: Mapping[str, float], n_beside: int) -> Mapping[str, float]:
        footprint = self.candidates.footprint
        if left:
            # The trial before this one may have ended since.
            footprint.learn(self.ledger.trials)
        return footprint.least_needs(left, n_beside)

    def promise(self, trial: FrozenTrial, drawn: Mapping[str, Any]) -> bool:
        """Reserve what a trial's point needs; return whether what is left of totals is enough."""
        if not self._quota.held and not self.candidates.is_near_end(trial):
            return True
        bounds, expected = self.candidates.bounds_at(trial, drawn)
        if not bounds:
            return True
        return self.ledger.revise_promise(_optuna.trial_id_of(trial), bounds, expected)

    def finish_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, limits: Callable[[], Limits]
    ) -> None:
        trial_id = _optuna.trial_id_of(trial)
        usage = Usage()
        try:
            interrupter = self._interrupters.pop(trial_id, None)
            if interrupter is not None:
                interrupter.disarm()
            monitor = find_monitor(study, trial)
            if monitor is not None and monitor.isolation is None:
                # It ran where this process can't see: its row may report its usage.
                monitor.add_usage(_records.read_record(trial).usage)
            in_process = monitor is not None and monitor.isolation in ("thread", "shared")
            self._has_garbage |= in_process and state != TrialState.COMPLETE
            verdict, footprint, expected = self.candidates.finish(
                trial, completed=state == TrialState.COMPLETE
            )
            if verdict is None:
                self._unfit = []
            elif verdict.by_quota and not _optuna.fixed_params_of(trial):
                self._unfit = [*self._unfit, verdict]
            if monitor is not None and verdict is not None:
                monitor.verdict = Verdict("rejected", verdict.reason)
            usage = record_result(
                study,
                trial,
                monitor,
                state,
                limits=limits() if monitor is None else None,
                footprint=footprint,
                expected=expected,
                error=_optuna.objective_error(),
                tell_call=_optuna.find_tell_call(),
            ).usage
        finally:
            self.ledger.charge(trial_id, usage)

    def end_when_exhausted(self, study: Study) -> None:
        if not self._may_stop(study):
            return
        refusal = self.ledger.exhausted(self.needs) or self.refuse_late() or self.refuse_unfit()
        if refusal is not None:
            if not _optuna.is_last_of_optimize():
                self._log_end(refusal.reason)
            study.stop()

    def refuse_late(self, fixed: Mapping[str, Any] = MappingProxyType({})) -> Refusal | None:
        """Return why no trial with these fixed parameters starts before the deadline, if so."""
        if self._preemption.deadline_of is not self._options:
            # Trials of another sampler ran meanwhile.
            self._preemption.set_deadline(self._options.deadline)
            self._preemption.deadline_of = self._options
        deadline = self._preemption.deadline
        if deadline is None:
            return None
        likely = self.candidates.footprint.likely_seconds(self.ledger.trials, fixed)
        return refuse_late(deadline, time.time(), likely, self._preemption.margin)

    def refuse_unfit(self, fixed: Mapping[str, Any] = MappingProxyType({})) -> Refusal | None:
        """Return why no trial starts after points that don't fit what is left; None if one may."""
        unfit = self._unfit
        # Enumerating samplers end by themselves, and a smaller point may come later.
        if len(unfit) < _MOST_UNFIT or fixed or self.candidates.enumerates:
            return None
        last = unfit[-1]
        reason = f"The last {len(unfit)} points did not fit what is left. {last.reason}"
        median, left = last.median or 0.0, last.limit or 0.0
        figures = (median, median, 0.0, left)
        return Refusal(last.resource or "", *figures, reason=reason, final=True)

    def _may_stop(self, study: Study) -> bool:
        return self._options.on_exhausted == "stop" and _optuna.in_optimize_loop(study)

    def is_ending(self, study: Study) -> bool:
        return _optuna.is_optimize_ending(study) or self._preemption.is_late

    def refuse(self, study: Study, trial: FrozenTrial, refusal: Refusal) -> None:
        """Keep a trial from running for which too little of the quota is left.

        Inside ``optimize`` the first method of the trial that the objective calls ends the trial,
        and the study with it. Elsewhere, and for an objective that calls none, raises
        QuotaExhausted.
        """
        figures = {"resource": refusal.resource, "quota": refusal.quota, "observed": refusal.used}
        figures |= {"temporary": refusal.temporary}
        if not (refusal.late or (self._may_stop(study) and objective_uses_trial(study))):
            raise QuotaExhausted(refusal.reason, **figures)  # type: ignore[arg-type]
        self._refused.add(_optuna.trial_id_of(trial))
        record_rejection(study, trial, refusal.reason)

        def raise_rejected() -> NoReturn:
            raise TrialRejected(refusal.reason, **figures)  # type: ignore[arg-type]

        _optuna.raise_on_next_suggest(trial, raise_rejected)
        if refusal.late:
            return
        self._log_end(refusal.reason)
        study.stop()

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
    """Return whether the objective would notice that it is refused, by the trials so far.

    It does where it suggests parameters, or has noticed. An isolated one checks before it starts.
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

    A service that loads its study for each request makes a storage each time. A session refers to
    the storage, and so to its connections, but not to the study, and lives as long as any
    ``Study`` object that it served.
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


def store_study_settings(study: Study, quota: Quota, limits: Limits, *, warn: bool = True) -> bool:
    """Make a worker's quota and limits the study's, unless another worker runs with others.

    Returns whether they are the study's now.
    """
    storage, study_id = _optuna.storage_of(study), _optuna.study_id_of(study)
    stored = storage.get_study_user_attrs(study_id)
    own: dict[str, Mapping[str, float]] = {
        _records.STUDY_QUOTA: _records.amounts_object(quota),
        _records.STUDY_LIMITS: _records.amounts_object(limits),
    }
    if quota.prices or stored.get(_records.STUDY_PRICES):
        own[_records.STUDY_PRICES] = dict(quota.prices)
    differing = [key for key in own if stored.get(key) != own[key]]
    changes = [_change(key, stored[key], own[key]) for key in differing if key in stored]
    if changes and others_run(study):
        if warn:
            _logger.warning(
                f"Other workers of the study {study.study_name!r} run with another quota or other "
                f"limits. {'. '.join(changes)}, but for this worker's trials only: the study's "
                "change once no other worker runs. Give all workers the same."
            )
        return False
    for key in differing:
        storage.set_study_user_attr(study_id, key, own[key])
    if changes:
        _logger.info(f"{'. '.join(changes)}.")
    # Two workers that start at the same moment have both written.
    stored = storage.get_study_user_attrs(study_id) if differing else own
    return all(stored.get(key) == own[key] for key in own)


def _change(key: str, stored: Any, own: Mapping[str, float]) -> str:
    """Return what differs, such as ``"Quota changed from 2 h to 4 h (wall time)"``."""
    other = stored if isinstance(stored, Mapping) else {}
    names = [n for n in dict.fromkeys([*other, *own]) if other.get(n) != own.get(n)]
    parts = [
        f"from {_shown(key, n, other.get(n))} to {_shown(key, n, own.get(n))} "
        f"({get_resource(str(n)).title})"
        for n in names
    ]
    title = {_records.STUDY_QUOTA: "Quota", _records.STUDY_LIMITS: "Limits"}.get(key, "Prices")
    return f"{title} changed {', '.join(parts) or 'from what could not be read'}"


def _shown(key: str, name: Any, value: Any) -> str:
    if value is None:
        return "none"
    is_amount = key != _records.STUDY_PRICES and isinstance(value, (int, float))
    return format_amount(str(name), value) if is_amount else str(value)
