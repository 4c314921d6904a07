"""Whether other workers run trials of a study now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from optuna_quota import _optuna
from optuna_quota._ledger.dead_workers import LEASE
from optuna_quota._ledger.reservation import is_alive, parse_reservation, this_worker
from optuna_quota._ledger.totals import LONGEST_GAP
from optuna_quota._records import RESERVATION
from optuna_quota._storage_retry import retry


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial


def others_run(study: Study) -> bool:
    """Return whether another process runs trials of a study, or did a moment ago.

    A worker between two trials counts, as it draws the point of the next one. One on another
    machine, whose process can't be seen, counts while its last sign of life is recent.
    """
    storage, study_id = _optuna.storage_of(study), _optuna.study_id_of(study)
    trials = retry(lambda: storage.get_all_trials(study_id, deepcopy=False))
    now = time.time()
    return any(_is_run_elsewhere(trial, now) for trial in reversed(trials))


def _is_run_elsewhere(trial: FrozenTrial, now: float) -> bool:
    held = parse_reservation(trial.system_attrs.get(RESERVATION), _optuna.trial_id_of(trial))
    if held is None or held.worker is None or held.worker == this_worker():
        return False
    if trial.datetime_complete is not None:
        # Optuna's times are local and naive.
        if now - trial.datetime_complete.timestamp() > LONGEST_GAP:
            return False
        return is_alive(held.worker) is not False
    alive = is_alive(held.worker)
    if alive is None:
        return held.beat is not None and now - held.beat < LEASE
    return alive
