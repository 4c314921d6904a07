"""The trials that this process monitors: start, find and close their monitors.

A pruner is not called when a trial ends, and a trial from ``ask`` may never be told. Its monitor
would leak, and later trials would seem to share their memory with it. So before a trial starts,
the monitors of all finished trials are closed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import gc
import logging
import os
import sys
import threading
from typing import Any
import weakref

from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial

from optuna_quota import _optuna
from optuna_quota._enforcement.study_warnings import is_first_trial, note_start
from optuna_quota._limits import Limits, with_cores
from optuna_quota._metering import Key, key_of, Meter, metering_loop, TrialMonitor
from optuna_quota._metering.host import cpu_count
from optuna_quota._storage_retry import survive_outages


_logger = logging.getLogger("optuna.quota.enforcement")

# Closed monitors that are kept for a late `tell`.
_MOST_CLOSED = 1000


def start_monitor(
    study: Study,
    trial: BaseTrial | FrozenTrial,
    owner: str,
    *,
    limits: Limits,
    left: Mapping[str, float] | None = None,
    meters: Sequence[Meter],
    holder: FrozenTrial | None = None,
    here: bool = True,
) -> TrialMonitor:
    """Start monitoring a trial; its owner, ``"sampler"`` or ``"pruner"``, records the result.

    ``left`` is what is left of the study's totals. ``holder`` is an object that lives as long as
    the trial in this process; without it, the trial's row shows when the trial has finished.
    ``here`` is False if the trial runs where this process can't measure it.
    """
    limits = resolve_cores(limits)
    survive_outages(_optuna.storage_of(study))
    ceilings = {**limits.amounts(), **(left or {})}
    _register.close_finished()
    if "memory" in ceilings and (_register.has_garbage or is_first_trial(study)):
        _register.has_garbage = False
        gc.collect()
    held_on_gpu = release_gpu_cache() if here and "gpu_memory" in ceilings else 0.0
    key = key_of(study, trial)
    monitor = metering_loop().monitor(key, limits=limits, left=left, meters=meters, here=here)
    monitor.owner, monitor.held_on_gpu = owner, held_on_gpu
    if owner == "pruner":
        # The trial has run for a while: memory of this process may be the trial's.
        monitor.held = None
    note_start(study, monitor)
    _optuna.watch_tell()
    if holder is None:
        _register.add(monitor, _end_of_row(study, key[1]))
    else:
        # No callback: it would run in any thread, under any lock that this thread holds.
        find_holder = weakref.ref(holder)
        _register.add(monitor, lambda: find_holder() is None)
    return monitor


def resolve_cores(limits: Limits, n_jobs: int | None = None) -> Limits:
    """Return limits with a number for ``cpu_cores="auto"``: the cores divided by the trials."""
    if limits.cpu_cores != "auto":
        return limits
    return with_cores(limits, cpu_count() / max(n_jobs or 1, _optuna.n_jobs_of_optimize()))


def find_monitor(study: Study, trial: BaseTrial | FrozenTrial) -> TrialMonitor | None:
    """Return a trial's monitor if its result is not recorded yet; it may be closed already."""
    key = key_of(study, trial)
    return metering_loop().find(key) or _register.take_closed(key)


def note_garbage() -> None:
    """Collect garbage before a trial in this process whose memory is limited.

    A failed trial's exception and the frames that it passed through refer to each other, as may
    objects of the script: uncollected, they would count for that trial.
    """
    _register.has_garbage = True


class _Register:
    def __init__(self) -> None:
        self.has_garbage = False
        self._lock = threading.Lock()
        self._open: dict[Key, tuple[TrialMonitor, Callable[[], bool]]] = {}
        self._closed: dict[Key, TrialMonitor] = {}

    def add(self, monitor: TrialMonitor, is_over: Callable[[], bool]) -> None:
        with self._lock:
            self._open[monitor.key] = monitor, is_over

    def close_finished(self) -> None:
        """Close the monitors of finished trials."""
        with self._lock:
            entries = list(self._open.values())
        for monitor, is_over in entries:
            if not monitor.closed and not is_over():
                continue
            self.has_garbage |= monitor.owner == "pruner" and monitor.verdict is not None
            may_be_told = not monitor.closed and monitor.owner == "sampler"
            monitor.close()
            with self._lock:
                self._open.pop(monitor.key, None)
                if may_be_told:
                    self._closed[monitor.key] = monitor
                    while len(self._closed) > _MOST_CLOSED:
                        del self._closed[next(iter(self._closed))]

    def take_closed(self, key: Key) -> TrialMonitor | None:
        with self._lock:
            return self._closed.pop(key, None)


def _end_of_row(study: Study, trial_id: int) -> Callable[[], bool]:
    # The last monitor stays until another trial starts: it must not keep connections open.
    find_storage = weakref.ref(_optuna.storage_of(study))

    def is_over() -> bool:
        storage = find_storage()
        if storage is None:
            return True
        try:
            return storage.get_trial(trial_id).state.is_finished()
        except KeyError:
            return True
        except Exception as error:  # noqa: BLE001 - any backend's own; must not end another trial
            _logger.debug(f"Whether trial {trial_id} is over is unknown: {error!r}.")
            return False

    return is_over


_register = _Register()


def _after_fork_in_child() -> None:
    # The trials are the parent's, and its lock may have been held at the fork.
    global _register
    _register = _Register()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def release_gpu_cache() -> float:
    """Empty torch's GPU cache; return the bytes that live tensors hold."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return 0.0
    try:
        if not torch.cuda.is_initialized():
            return 0.0
        # The error of a trial that was stopped and the frames that it passed through refer to
        # each other.
        gc.collect()
        torch.cuda.empty_cache()
        devices = range(torch.cuda.device_count())
        return float(sum(torch.cuda.memory_allocated(device) for device in devices))
    except (AttributeError, RuntimeError) as error:
        _logger.info(f"Torch could not give back its cached GPU memory: {error}")
        return 0.0
