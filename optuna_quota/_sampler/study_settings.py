"""The quota, limits and meters in force for a study, and their record in its attributes."""

from __future__ import annotations

from collections.abc import Mapping
import logging
from typing import Any, TYPE_CHECKING

from optuna_quota import _optuna
from optuna_quota._enforcement.nesting import pruner_limits, pruner_meters
from optuna_quota._metering import Meter
from optuna_quota._records import amounts_object, STUDY_LIMITS, STUDY_PRICES, STUDY_QUOTA
from optuna_quota._resources import format_amount, Limits, Quota


if TYPE_CHECKING:
    from optuna.study import Study


_logger = logging.getLogger("optuna.quota.sampler")


def limits_in_force(study: Study, own: Limits | None) -> Limits:
    """Return the limits on each trial: the pruner's, else the sampler's own.

    Raises:
        ValueError: If they disagree.
    """
    theirs = pruner_limits(study.pruner)
    if theirs is not None and own is not None and theirs != own:
        raise ValueError(
            "The limits of QuotaSampler and QuotaPruner must agree but got "
            f"{own!r} and {theirs!r}. Give them to the pruner alone."
        )
    return theirs or own or Limits()


def meters_in_force(study: Study, own: tuple[Meter, ...]) -> tuple[Meter, ...]:
    """Return the user's meters: the sampler's own, then the pruner's with other names."""
    names = {meter.name for meter in own}
    return (*own, *(each for each in pruner_meters(study.pruner) if each.name not in names))


def store_study_settings(study: Study, quota: Quota, limits: Limits) -> None:
    """Write the quota and the limits into the study's attributes, unless they are there.

    Warns a worker whose settings differ from those of the worker that came first.
    """
    storage, study_id = _optuna.storage_of(study), _optuna.study_id_of(study)
    stored = storage.get_study_user_attrs(study_id)
    settings: dict[str, Mapping[str, float]] = {
        STUDY_QUOTA: amounts_object(quota),
        STUDY_LIMITS: amounts_object(limits),
    }
    if quota.prices:
        settings[STUDY_PRICES] = dict(quota.prices)
    for key, value in settings.items():
        if key not in stored:
            storage.set_study_user_attr(study_id, key, value)
    # Read again: two workers that found nothing have both written.
    stored = storage.get_study_user_attrs(study_id)
    for key, value in settings.items():
        if stored.get(key) != value:
            _logger.warning(
                f"Workers of the study {study.study_name!r} disagree about {key!r}: "
                f"{'; '.join(_differences(stored.get(key), value))}. The study displays the "
                "stored values; this worker enforces its own."
            )


def _differences(stored: Any, own: Mapping[str, float]) -> list[str]:
    other = stored if isinstance(stored, Mapping) else {}
    return [
        f"{name} {_shown(name, other.get(name))} stored, {_shown(name, own.get(name))} here"
        for name in sorted({*other, *own})
        if other.get(name) != own.get(name)
    ]


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "unset"
    return format_amount(name, value) if isinstance(value, (int, float)) else repr(value)
