"""Rows of trials that are tried again: Optuna's callback copies all attributes of the first."""

from __future__ import annotations

from typing import Any
from typing import TYPE_CHECKING

from optuna_quota import _optuna
from optuna_quota._ledger.reservation import parse_reservation
from optuna_quota._records import PREFIX
from optuna_quota._records import RESERVATION
from optuna_quota._records import TIMELINE
from optuna_quota._storage_retry import retry


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial


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
