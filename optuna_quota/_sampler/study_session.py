"""One study as a sampler goes through it in this process: its trials from start to end."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import gc
import logging
import os
import threading
from typing import Any
from typing import NoReturn
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary
from weakref import WeakValueDictionary

from optuna.trial import TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement.active_trials import find_watch
from optuna_quota._enforcement.active_trials import start_watch
from optuna_quota._enforcement.constraints import constraints_warning
from optuna_quota._enforcement.interrupt import Interrupter
from optuna_quota._enforcement.nesting import quota_pruners
from optuna_quota._enforcement.trial_result import record_rejection
from optuna_quota._enforcement.trial_result import record_result
from optuna_quota._ledger import gpus_here
from optuna_quota._ledger import Grant
from optuna_quota._ledger import Ledger
from optuna_quota._ledger import Refusal
from optuna_quota._metering import Meter
from optuna_quota._metering import Verdict
from optuna_quota._records import read_record
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota
from optuna_quota._resources import Usage
from optuna_quota._sampler.candidates import Proposals
from optuna_quota._sampler.study_projection import EarlyWarning
from optuna_quota.exceptions import QuotaExhausted
from optuna_quota.exceptions import TrialRejected


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial


_logger = logging.getLogger("optuna.quota.sampler")


class Session:
    """One study in this process.

    Args:
        study: The study.
        quota: Its quota.
        one_gpu: Whether each trial is given one GPU of this machine.
        metering: Whether trials are measured in this process.
        lease: Seconds after which a silent worker on another machine is taken for dead.
        proposals: Admits its points.
        stops: Whether ``optimize`` ends quietly once a total quota is used up.

    Attributes:
        ledger: What the study has used and reserved, across workers.
        warning: Tells when the quota will not do.
        decided: Whether it was decided that the study as a whole fits.
    """

    def __init__(
        self,
        study: Study,
        quota: Quota,
        proposals: Proposals,
        *,
        lease: float,
        stops: bool,
        one_gpu: bool = False,
        metering: bool = True,
    ) -> None:
        self.ledger = Ledger(study, quota, lease=lease, gpus=gpus_here() if one_gpu else ())
        self.proposals = proposals
        self.decided = False
        self.warning = EarlyWarning()
        self._quota = quota
        self._stops = stops
        self._metering = metering
        self._refused: set[int] = set()
        self._interrupters: dict[int, Interrupter] = {}
        self._lock = threading.Lock()
        self._told = False
        self._unanswered = False
        self._litter = False

    def is_refused(self, trial: FrozenTrial) -> bool:
        """Return whether a trial was drawn when nothing could be admitted any more."""
        return _optuna.trial_id_of(trial) in self._refused

    def start(
        self,
        study: Study,
        trial: FrozenTrial,
        grant: Grant,
        limits: Limits,
        meters: Sequence[Meter],
    ) -> None:
        """Start the metering of an admitted trial."""
        self._tidy_up(limits)
        trial_id = _optuna.trial_id_of(trial)
        watch = start_watch(
            study,
            trial,
            "sampler",
            limits=limits,
            left=grant.left,
            meters=meters,
            holder=trial,
            here=self._metering,
        )
        self.ledger.keep(trial_id, watch)
        if any(pruner.interrupt for pruner in quota_pruners(study.pruner)):
            interrupter = Interrupter.arm(watch)
            if interrupter is not None:
                self._interrupters[trial_id] = interrupter

    def promise(self, trial: FrozenTrial, drawn: Mapping[str, Any]) -> None:
        """Have a trial hold what its point needs of what is held at one moment.

        Args:
            trial: The trial.
            drawn: What was drawn of its point now.
        """
        if self._quota.held:
            bounds = self.proposals.bounds_at(trial, drawn)
            if bounds:
                self.ledger.promise(_optuna.trial_id_of(trial), bounds)

    def _tidy_up(self, limits: Limits) -> None:
        """Free what the last trial left behind, so that it does not count for the next one.

        An exception and the frames it passed through refer to each other: what a pruned or failed
        objective held lives on until cyclic garbage is collected.
        """
        held = limits.memory is not None or self._quota.memory is not None
        if held and self._litter:
            self._litter = False
            gc.collect()

    def finish_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        limits: Limits,
        error: BaseException | None = None,
        told: _optuna.TellCall | None = None,
    ) -> None:
        """Close a trial's metering, write its record, and tell the ledger what it used."""
        trial_id = _optuna.trial_id_of(trial)
        usage = Usage()
        try:
            interrupter = self._interrupters.pop(trial_id, None)
            if interrupter is not None:
                interrupter.disarm()
            watch = find_watch(study, trial)
            if watch is not None and watch.isolation is None:
                # Nobody here saw it run: what its row says of itself is all there is to know.
                watch.add_usage(read_record(trial).usage)
            here = watch is not None and watch.isolation in ("thread", "shared")
            self._litter = self._litter or (here and state != TrialState.COMPLETE)
            own = limits if watch is None else watch.limits
            verdict = self.proposals.rejection(trial)
            if watch is not None and verdict is not None:
                watch.verdict = Verdict("rejected", verdict.reason)
            completed = state == TrialState.COMPLETE
            footprint, expected = self.proposals.finish(trial, completed=completed)
            usage = record_result(
                study,
                trial,
                watch,
                state,
                limits=own,
                footprint=footprint,
                expected=expected,
                error=error,
                told=told,
            ).usage
        finally:
            self.ledger.charge(trial_id, usage)

    def end_when_exhausted(self, study: Study) -> None:
        """End ``optimize`` when a total quota is used up."""
        if not self._stops or not _optuna.in_optimize_loop(study):
            return
        refusal = self.ledger.exhausted()
        if refusal is not None:
            self._tell_once(refusal.reason)
            study.stop()

    def refuse(self, study: Study, trial: FrozenTrial, refusal: Refusal) -> None:
        """See to it that a trial does not run for which nothing is left.

        Inside ``optimize`` the trial is let go ahead to the first thing it asks for, which ends
        it, and the study with it. Elsewhere, and for an objective that asks for nothing, raises.

        Raises:
            QuotaExhausted: If the trial can't be ended quietly.
        """
        figures = {"resource": refusal.resource, "quota": refusal.quota, "observed": refusal.used}
        if not refusal.late and not (
            self._stops and _optuna.in_optimize_loop(study) and asks_for_something(study)
        ):
            raise QuotaExhausted(refusal.reason, **figures)  # type: ignore[arg-type]
        self._refused.add(_optuna.trial_id_of(trial))
        record_rejection(study, trial, refusal.reason)

        def raise_rejected() -> NoReturn:
            raise TrialRejected(refusal.reason, **figures)  # type: ignore[arg-type]

        _optuna.raise_on_next_suggest(trial, raise_rejected)
        if refusal.late:
            return
        self._tell_once(refusal.reason)
        study.stop()

    def warn_of_constraints(self, trial: FrozenTrial, error: Exception) -> None:
        """Say once that the user's constraints of a trial that did not complete are unknown."""
        with self._lock:
            told, self._unanswered = self._unanswered, True
        if not told:
            _logger.warning(constraints_warning(trial.number, error))

    def _tell_once(self, reason: str) -> None:
        with self._lock:
            told, self._told = self._told, True
        if not told:
            _logger.warning(f"{reason} The study ends here: no further trial is started.")


def asks_for_something(study: Study) -> bool:
    """Return whether the objective would notice that it is refused, by the trials so far.

    It does where it suggests parameters. One that is isolated looks before it starts.
    """
    trials = [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished() and trial.state != TrialState.FAIL
    ]
    return not trials or any(
        trial.params or read_record(trial).isolation == "process" for trial in trials
    )


class Sessions:
    """Finds the session of a study, which all ``Study`` objects on one storage object share.

    A service that loads its study again for each request makes a storage each time. A session
    holds on to the storage, and so to its connections, but not to the study.
    """

    def __init__(self) -> None:
        self._by_study: WeakKeyDictionary[Study, Session] = WeakKeyDictionary()
        self._by_place: WeakValueDictionary[tuple[int, int, int], Session] = WeakValueDictionary()

    def find(self, study: Study) -> Session | None:
        """Return the session of a study, None where there is none in this process."""
        session = self._by_place.get(_place(study))
        if session is not None and self._by_study.get(study) is not session:
            self.add(study, session)
        return session

    def add(self, study: Study, session: Session) -> None:
        """Keep a session for as long as a ``Study`` object lives."""
        self._by_study[study] = session
        self._by_place[_place(study)] = session
        session.ledger.serve(study)


def _place(study: Study) -> tuple[int, int, int]:
    # A forked process keeps nothing of its parent's.
    return os.getpid(), id(_optuna.storage_of(study)), _optuna.study_id_of(study)
