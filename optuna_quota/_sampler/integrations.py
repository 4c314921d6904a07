"""Makes tools that run a study themselves, Ray Tune and Hydra's sweeper, end with its quota.

They would take the end of the quota for an error of the whole run.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import logging
from pathlib import Path
import sys
import time
from typing import Any
from weakref import WeakKeyDictionary

from optuna.study import Study
from optuna.trial import TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement.preemption import enqueue_again
from optuna_quota._ledger.heartbeat import no_waiting
from optuna_quota._metering import key_of, metering_loop
from optuna_quota._metering.monitored_trial import Verdict
from optuna_quota._records import parse_record
from optuna_quota.exceptions import QuotaExhausted, TrialRejected


_logger = logging.getLogger("optuna.quota.sampler")

_RAY_TUNE = "ray.tune.search.optuna.optuna_search"
_FINISHED = "FINISHED"
# Seconds until another `ask`, unless a trial of the search ends before: each `ask` leaves a row.
_PAUSE = 5.0
# Rejected points in a row after which a search or sweep ends.
_MOST_REJECTED = 20
_HYDRA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper"
_NOT_LAUNCHED = "Its batch of jobs was not launched, as another trial of it was refused."


def adapt_tools() -> None:
    """Adapt the tools that are loaded."""
    for module, name, method, adapted in (
        (_RAY_TUNE, "OptunaSearch", "suggest", _suggest_within_quota),
        (_HYDRA, "OptunaSweeper", "sweep", _sweep_within_quota),
    ):
        tool = getattr(sys.modules.get(module), name, None)
        if tool is not None and not hasattr(getattr(tool, method), "__wrapped__"):
            setattr(tool, method, adapted(getattr(tool, method)))


def _suggest_within_quota(suggest: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """Return a ``suggest`` of Ray Tune that ends its search when the quota is exhausted.

    Ray calls ``ask`` and ``tell`` in one thread, so ``ask`` must not wait, and an error ends the
    whole run. By Ray's protocol, ``suggest`` returns None for "not now", or "FINISHED".
    """
    refused: WeakKeyDictionary[Any, tuple[int, float]] = WeakKeyDictionary()
    n_rejected: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    @functools.wraps(suggest)
    def suggest_within_quota(self: Any, trial_id: str) -> Any:
        n_completed, last = len(self._completed_trials), refused.get(self)
        if last is not None and last[0] == n_completed and time.monotonic() < last[1]:
            return None
        try:
            with no_waiting():
                point = suggest(self, trial_id)
        except QuotaExhausted as error:
            if error.temporary:
                refused[self] = n_completed, time.monotonic() + _PAUSE
                return None
            _logger.warning(f"{error} The search ends here: no further trial is started.")
            return _FINISHED
        except TrialRejected as error:
            trial = self._ot_trials.pop(trial_id, None)
            if trial is not None:
                self._ot_study.tell(trial, state=TrialState.PRUNED)
            n_rejected[self] = n_rejected.get(self, 0) + 1
            if n_rejected[self] < _MOST_REJECTED:
                return None
            _logger.warning(
                f"The search ends here: its last {n_rejected[self]} points were rejected. {error}"
            )
            return _FINISHED
        n_rejected.pop(self, None)
        return point

    return suggest_within_quota


def _sweep_within_quota(
    sweep: Callable[[Any, list[str]], None],
) -> Callable[[Any, list[str]], None]:
    """Return a ``sweep`` of Hydra that ends when the quota is exhausted.

    It asks for a batch of trials, launches their jobs, and writes the results last. An error in
    ``ask`` would lose the results, and leave the batch's earlier trials running.
    """

    @functools.wraps(sweep)
    def sweep_within_quota(self: Any, arguments: list[str]) -> None:
        sweeper, n_jobs, rejected = self.sweeper, self.sweeper.n_jobs, (0, 0)
        while True:
            try:
                return sweep(self, arguments)
            except (QuotaExhausted, TrialRejected) as error:
                known = _locals_of_sweep(error, sweeper)
                study, n_left = known.get("study"), known.get("n_trials_to_go")
                if not isinstance(study, Study) or not isinstance(n_left, int):
                    raise
                n_asked = _end_batch(study)
                # The rest of the sweep continues with the same study: another batch, or none.
                sweeper.study_name, sweeper.storage = study.study_name, _optuna.storage_of(study)
                sweeper.n_trials, sweeper.n_jobs = n_left, n_jobs
                if isinstance(error, TrialRejected):
                    n_before, n_run = rejected
                    rejected = (n_before + 1 if n_run == sweeper.job_idx else 1), sweeper.job_idx
                    if rejected[0] < _MOST_REJECTED:
                        continue
                    n_asked = 0
                elif error.temporary and n_asked:
                    sweeper.n_jobs = n_asked
                    continue
                if not (n_asked or study.get_trials(False, (TrialState.COMPLETE,))):
                    # There is no result to write.
                    raise
                sweeper.n_trials = n_asked
                # The first job would have created the folder of the results.
                Path(sweeper.sweep_dir).mkdir(parents=True, exist_ok=True)
                more = f"after {n_asked} more" if n_asked else "here: no further job is started"
                _logger.warning(f"{error} The sweep ends {more}.")

    return sweep_within_quota


def _locals_of_sweep(error: BaseException, sweeper: object) -> dict[str, Any]:
    """Return the local variables of the sweep that raised an error: there is no other access."""
    trace = error.__traceback__
    while trace is not None:
        code, known = trace.tb_frame.f_code, trace.tb_frame.f_locals
        if code.co_name == "sweep" and known.get("self") is sweeper:
            return known
        trace = trace.tb_next
    return {}


def _end_batch(study: Study) -> int:
    """End the trials of a batch that was not launched; return their number."""
    n_asked = 0
    for row in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        monitor = metering_loop().find(key_of(study, row))
        if monitor is None:
            continue
        monitor.verdict = Verdict("rejected", _NOT_LAUNCHED)
        ended = study.tell(row.number, state=TrialState.PRUNED)
        if parse_record(ended.user_attrs).reason == _NOT_LAUNCHED:
            # Not the rejected trial itself.
            enqueue_again(study, ended, "was not launched")
        n_asked += 1
    return n_asked
