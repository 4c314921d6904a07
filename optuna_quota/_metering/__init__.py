"""Measures what trials use: process trees, GPUs, users' own meters; one loop a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_quota._metering.breach import extension_threshold
from optuna_quota._metering.loop import metering_loop
from optuna_quota._metering.loop import MeteringLoop
from optuna_quota._metering.meter import check_names
from optuna_quota._metering.meter import Meter
from optuna_quota._metering.trial_monitor import Key
from optuna_quota._metering.trial_monitor import TrialMonitor
from optuna_quota._metering.trial_monitor import Verdict
from optuna_quota._optuna import storage_of
from optuna_quota._optuna import trial_id_of


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import BaseTrial
    from optuna.trial import FrozenTrial


__all__ = [
    "Key",
    "Meter",
    "MeteringLoop",
    "Verdict",
    "TrialMonitor",
    "extension_threshold",
    "check_names",
    "key_of",
    "metering_loop",
]


def key_of(study: Study, trial: BaseTrial | FrozenTrial) -> Key:
    """Return what a trial is known by in this process: its storage and its id there."""
    return (id(storage_of(study)), trial_id_of(trial))
