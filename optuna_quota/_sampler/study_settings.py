"""Keeps the quota and the limits in force with the study, for readers and other workers."""

from __future__ import annotations

from collections.abc import Mapping
import logging
from typing import Any
from typing import TYPE_CHECKING

from optuna_quota import _optuna
from optuna_quota._records import amounts_object
from optuna_quota._records import STUDY_LIMITS
from optuna_quota._records import STUDY_PRICES
from optuna_quota._records import STUDY_QUOTA
from optuna_quota._resources import format_amount
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota


if TYPE_CHECKING:
    from optuna.study import Study


_logger = logging.getLogger("optuna.quota.sampler")


def announce(study: Study, quota: Quota, limits: Limits) -> None:
    """Keep the quota and the limits in force with the study; tell a worker that disagrees.

    What stands there already stays: the worker that came first decides.
    """
    storage, study_id = _optuna.storage_of(study), _optuna.study_id_of(study)
    known = storage.get_study_user_attrs(study_id)
    wanted: dict[str, Mapping[str, float]] = {
        STUDY_QUOTA: amounts_object(quota),
        STUDY_LIMITS: amounts_object(limits),
    }
    if quota.prices:
        wanted[STUDY_PRICES] = dict(quota.prices)
    for key, value in wanted.items():
        if key not in known:
            storage.set_study_user_attr(study_id, key, value)
    # Read again: of two workers that found nothing, one has overwritten the other.
    kept = storage.get_study_user_attrs(study_id)
    for key, value in wanted.items():
        if kept.get(key) != value:
            _logger.warning(
                f"This worker's {key} differs from what the study {study.study_name!r} has: "
                f"{'; '.join(differences(kept.get(key), value))}. The study keeps its own on "
                "display; this worker goes by what it was given."
            )


def differences(theirs: Any, ours: Mapping[str, float]) -> list[str]:
    """Return in words where two sets of amounts differ, by resource."""
    other = theirs if isinstance(theirs, Mapping) else {}
    names = sorted({*other, *ours})
    return [
        f"{name} {_shown(name, other.get(name))} there, {_shown(name, ours.get(name))} here"
        for name in names
        if other.get(name) != ours.get(name)
    ]


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "unset"
    return format_amount(name, value) if isinstance(value, (int, float)) else repr(value)
