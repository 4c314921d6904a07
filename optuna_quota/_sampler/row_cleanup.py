"""Finishes rows whose sampler hook raised, and clears attributes copied by a retry."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import logging
import socket
from typing import Any

from optuna.exceptions import TrialPruned
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from optuna_quota import _optuna, _records
from optuna_quota._enforcement.active_trials import find_monitor
from optuna_quota._enforcement.trial_result import save_record
from optuna_quota._ledger import protocol
from optuna_quota._records import TrialRecord
from optuna_quota._resources import Outcome
from optuna_quota._storage_retry import is_transient, retry
from optuna_quota._usage import Usage
from optuna_quota.exceptions import QuotaExhausted, StudyRejected, TrialRejected


_logger = logging.getLogger("optuna.quota.sampler")

_REJECTIONS = (StudyRejected, QuotaExhausted, TrialRejected)


@contextlib.contextmanager
def fail_unfinished_trial(study: Study, trial: FrozenTrial) -> Iterator[None]:
    """Finish a trial's row when sampling raises and Optuna does not finish it.

    Under ``optimize`` Optuna catches exceptions and KeyboardInterrupt, and finishes the row. A
    caller of ``ask`` has the trial and can finish it, except with ``fixed_distributions``: these
    are sampled before ``ask`` returns.
    """
    try:
        yield
    except BaseException as error:
        if _optuna.in_ask() or not isinstance(error, (Exception, KeyboardInterrupt)):
            finish_failed_row(_optuna.unwrap_study(study), trial, error, admitted=True)
        raise


def finish_failed_row(
    study: Study, trial: FrozenTrial, error: BaseException, *, admitted: bool
) -> None:
    """Finish the row of a trial whose hook raised; the usage of an admitted trial counts."""
    monitor = find_monitor(study, trial)
    usage = None if monitor is None else monitor.close()
    outcome: Outcome = "rejected" if isinstance(error, _REJECTIONS) else "failed"
    reason = str(error) if outcome == "rejected" else f"The trial failed to start: {error!r}."
    if usage is None or outcome == "rejected":
        usage = Usage()
    record = TrialRecord(usage, outcome, reason, host=socket.gethostname())
    state = TrialState.PRUNED if isinstance(error, TrialPruned) else TrialState.FAIL
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    system = {}
    if monitor is None and not admitted:
        system[_records.RESERVATION] = protocol.reservation_object(
            protocol.Reservation(trial_id, worker=protocol.this_worker())
        )
    # Attributes first: a finished row can't be changed.
    if not _records.is_rejected(trial.user_attrs):
        save_record(study, trial, record, system)
    # Try twice, for any error: a row left RUNNING would keep its reservation.
    for is_last in (False, True):
        try:
            retry(lambda: _optuna.finish_row(storage, trial_id, state))
            return
        except Exception as fault:  # noqa: BLE001 - any backend's own; the hook's error goes first
            if is_last or is_transient(fault):
                _logger.warning(
                    f"Trial {trial.number} did not start, and its row could not be finished: "
                    f"{fault!r}. Its part of the quota is free again once this worker has ended."
                )
                return


def clear_copied_attributes(study: Study, trial: FrozenTrial) -> None:
    """Clear attributes copied from a failed trial by Optuna's retry callback.

    Also in Optuna's object of the trial.
    """
    trial_id = _optuna.trial_id_of(trial)
    if (
        protocol.parse_reservation(trial.system_attrs.get(_records.RESERVATION), trial_id)
        is not None
    ):
        # It began earlier: the attributes are its own.
        return
    copied: dict[str, Any] = {
        key: None
        for key in trial.user_attrs
        if key.startswith(_records.PREFIX) and key not in (_records.RETRY_OF, _records.CHECKPOINT)
    }
    system: dict[str, Any] = {
        key: None
        for key in (_records.BREACH_TIMELINE, _records.TIMELINE)
        if key in trial.system_attrs
    }
    if copied or system:
        storage = _optuna.storage_of(study)
        _records.write_attributes(storage, trial_id, user=copied, system=system)
        trial.user_attrs = {**trial.user_attrs, **copied}
