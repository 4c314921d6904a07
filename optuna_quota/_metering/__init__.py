"""Measures what trials use: process trees, GPUs and users' own meters, in one loop per process."""

from __future__ import annotations

import atexit
import os
import threading

from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial

from optuna_quota._metering import gpu_meter
from optuna_quota._metering.loop import *  # noqa: F403 - all of its public names
from optuna_quota._metering.loop import MeteringLoop
from optuna_quota._metering.meter import *  # noqa: F403
from optuna_quota._metering.monitored_trial import *  # noqa: F403
from optuna_quota._metering.monitored_trial import Key
from optuna_quota._optuna import number_of, storage_of, trial_id_of


def key_of(study: Study, trial: BaseTrial | FrozenTrial) -> Key:
    """Return a trial's key in this process: the number of its storage, and its id there."""
    return (number_of(storage_of(study)), trial_id_of(trial))


_loop: MeteringLoop | None = None
_loop_lock = threading.Lock()


def metering_loop() -> MeteringLoop:
    global _loop
    with _loop_lock:
        if _loop is None:
            _loop = MeteringLoop()
            atexit.register(_loop.stop)
        return _loop


def replace_loop(loop: MeteringLoop | None) -> MeteringLoop | None:
    """Replace this process's loop, for tests; return the previous one."""
    global _loop
    with _loop_lock:
        before, _loop = _loop, loop
        return before


def _after_fork_in_child() -> None:
    global _loop, _loop_lock
    _loop_lock = threading.Lock()
    gpu_meter.reset_after_fork()
    if _loop is not None:
        _loop.reset_after_fork()
        _loop = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
