"""Finishes the row of a trial that can't go on, so that none is left RUNNING for ever."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import logging
import socket
from typing import Any
from typing import TYPE_CHECKING

from optuna.exceptions import TrialPruned
from optuna.trial import TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement.active_trials import find_watch
from optuna_quota._enforcement.trial_result import write
from optuna_quota._ledger.reservation import parse_reservation
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._ledger.reservation import reservation_object
from optuna_quota._ledger.reservation import this_worker
from optuna_quota._records import is_rejected
from optuna_quota._records import PREFIX
from optuna_quota._records import RESERVATION
from optuna_quota._records import TIMELINE
from optuna_quota._records import TrialRecord
from optuna_quota._resources import Outcome
from optuna_quota._storage_retry import is_transient
from optuna_quota._storage_retry import retry
from optuna_quota.exceptions import QuotaExhausted
from optuna_quota.exceptions import StudyRejected
from optuna_quota.exceptions import TrialRejected


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial


_logger = logging.getLogger("optuna.quota.sampler")

_REJECTIONS = (StudyRejected, QuotaExhausted, TrialRejected)


def abandon(
    study: Study, trial: FrozenTrial, error: BaseException, *, began: bool = False
) -> None:
    """Finish the row of a trial whose hook raised; what is written says why.

    Attributes go first: a finished row can't be changed.

    Args:
        study: The study.
        trial: The trial.
        error: What the hook raised; the caller raises it again.
        began: Whether the trial had been admitted, so that it is charged for.
    """
    watch = find_watch(study, trial)
    usage = None if watch is None else watch.close()
    outcome: Outcome = "rejected" if isinstance(error, _REJECTIONS) else "failed"
    reason = str(error) if outcome == "rejected" else f"It could not be started: {error!r}."
    record = TrialRecord(outcome=outcome, reason=reason, host=socket.gethostname())
    if usage is not None and outcome != "rejected":
        record = TrialRecord(usage, outcome, reason, host=record.host)
    state = TrialState.PRUNED if isinstance(error, TrialPruned) else TrialState.FAIL
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    system = {}
    if watch is None and not began:
        system[RESERVATION] = reservation_object(Reservation(trial_id, worker=this_worker()))
    if not is_rejected(trial.user_attrs):
        write(study, trial, record, system)
    # Twice: whatever else went wrong, a row that stays RUNNING would hold on to what it reserved.
    for last in (False, True):
        try:
            retry(lambda: _optuna.finish_row(storage, trial_id, state))
            return
        except Exception as fault:  # noqa: BLE001 - any backend's own; the hook's error goes first
            if last or is_transient(fault):
                _logger.warning(f"Trial {trial.number} could not be finished: {fault!r}.")
                return


@contextlib.contextmanager
def none_left_running(study: Study, trial: FrozenTrial) -> Iterator[None]:
    """Finish a trial's row where nobody else will when sampling raises.

    Under ``optimize``, Optuna catches exceptions and interrupts by the keyboard, and finishes the
    row. ``ask(fixed_distributions)`` samples before its caller has the trial. Who asked for a
    trial and suggests from it finishes it too.
    """
    try:
        yield
    except BaseException as error:
        handled = isinstance(error, (Exception, KeyboardInterrupt))
        if _optuna.in_ask() or not handled:
            abandon(_optuna.unwrap_study(study), trial, error, began=True)
        raise


def void_copies(study: Study, trial: FrozenTrial) -> None:
    """Make void what the row of a trial that begins says of how another one ended.

    Args:
        study: The study.
        trial: The trial; the object that Optuna keeps for it learns it too.
    """
    trial_id = _optuna.trial_id_of(trial)
    if parse_reservation(trial.system_attrs.get(RESERVATION), trial_id) is not None:
        # It has begun before, and what its row says is its own.
        return
    copied: dict[str, Any] = {key: None for key in trial.user_attrs if key.startswith(PREFIX)}
    hidden: dict[str, Any] = {TIMELINE: None} if TIMELINE in trial.system_attrs else {}
    if copied or hidden:
        storage = _optuna.storage_of(study)
        retry(lambda: _optuna.write_attributes(storage, trial_id, copied, hidden))
        trial.user_attrs = {**trial.user_attrs, **copied}
