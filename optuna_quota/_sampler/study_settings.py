"""The quota, limits and meters in force for a study, and their record in its attributes."""

from __future__ import annotations

from collections.abc import Mapping
import logging
from typing import Any, TYPE_CHECKING

from optuna_quota import _optuna
from optuna_quota._enforcement.nesting import pruner_limits, pruner_meters
from optuna_quota._ledger import others_run
from optuna_quota._limits import Limits, Quota
from optuna_quota._metering import Meter
from optuna_quota._records import amounts_object, STUDY_LIMITS, STUDY_PRICES, STUDY_QUOTA
from optuna_quota._resources import format_amount, get_resource


if TYPE_CHECKING:
    from optuna.study import Study


_logger = logging.getLogger("optuna.quota.sampler")


def limits_in_force(study: Study, own: Limits | None) -> Limits:
    """Return the limits on each trial: the pruner's, else the sampler's own.

    Raises:
        ValueError: If they disagree.
    """
    theirs = pruner_limits(study.pruner)
    # A pruner without limits may be there for something else: a deadline, a worker to preempt.
    if theirs and own is not None and theirs != own:
        raise ValueError(
            "The limits of QuotaSampler and QuotaPruner must agree but got "
            f"{own!r} and {theirs!r}. Give them to the pruner alone."
        )
    return theirs or own or Limits()


def meters_in_force(study: Study, own: tuple[Meter, ...]) -> tuple[Meter, ...]:
    """Return the user's meters: the sampler's own, then the pruner's with other names."""
    names = {meter.name for meter in own}
    return (*own, *(each for each in pruner_meters(study.pruner) if each.name not in names))


def store_study_settings(study: Study, quota: Quota, limits: Limits, *, warn: bool = True) -> bool:
    """Make a worker's quota and limits the study's, unless another worker runs with others.

    Returns whether they are the study's now.
    """
    storage, study_id = _optuna.storage_of(study), _optuna.study_id_of(study)
    stored = storage.get_study_user_attrs(study_id)
    own: dict[str, Mapping[str, float]] = {
        STUDY_QUOTA: amounts_object(quota),
        STUDY_LIMITS: amounts_object(limits),
    }
    if quota.prices or stored.get(STUDY_PRICES):
        own[STUDY_PRICES] = dict(quota.prices)
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
    title = {STUDY_QUOTA: "Quota", STUDY_LIMITS: "Limits"}.get(key, "Prices")
    return f"{title} changed {', '.join(parts) or 'from what could not be read'}"


def _shown(key: str, name: Any, value: Any) -> str:
    if value is None:
        return "none"
    is_amount = key != STUDY_PRICES and isinstance(value, (int, float))
    return format_amount(str(name), value) if is_amount else str(value)
