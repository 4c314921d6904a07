"""Starts the metering of trials in this process, and ends that of trials that are over.

Nobody tells a pruner that a trial has ended, and a trial that was asked for may never be told. A
watch that stays open is not only a leak: trials that seem to overlap can't have their memory told
apart. So those that are over are let go of before another one starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import logging
import os
import threading
from typing import TYPE_CHECKING
import weakref

from optuna_quota import _optuna
from optuna_quota._metering import Key
from optuna_quota._metering import key_of
from optuna_quota._metering import Meter
from optuna_quota._metering import metering_loop
from optuna_quota._metering import TrialMonitor
from optuna_quota._resources import Limits


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import BaseTrial
    from optuna.trial import FrozenTrial


_logger = logging.getLogger("optuna.quota.enforcement")

# Closed watches of trials that may still be told are kept, this many at most.
_MOST_ENDED = 1000


def start_watch(
    study: Study,
    trial: BaseTrial | FrozenTrial,
    owner: str,
    *,
    limits: Limits,
    left: Mapping[str, float] | None = None,
    meters: Sequence[Meter] = (),
    holder: FrozenTrial | None = None,
    here: bool = True,
) -> TrialMonitor:
    """Start the metering of a trial.

    Args:
        study: The study.
        trial: The trial.
        owner: Who settles it: ``"sampler"`` or ``"pruner"``.
        limits: Its limits.
        left: What is left for it of the study's total quotas, by resource.
        meters: The user's own meters.
        holder: An object that lives as long as the trial does in this process; without it, the
            trial's row tells.
        here: False when the trial runs where this process can't see it.
    """
    _register.let_go_of_what_is_over()
    key = key_of(study, trial)
    watch = metering_loop().monitor(key, limits=limits, left=left, meters=meters, here=here)
    watch.owner = owner
    _register.add(_Entry(study, watch, holder))
    return watch


def find_watch(study: Study, trial: BaseTrial | FrozenTrial) -> TrialMonitor | None:
    """Return the metering of a trial of this process that was not settled, None if there is none.

    It may be closed already when whoever ran the trial has let go of it.
    """
    key = key_of(study, trial)
    return metering_loop().find(key) or _register.take_ended(key)


class _Entry:
    """A watch that someone has to close, and what tells that its trial is over."""

    def __init__(self, study: Study, watch: TrialMonitor, holder: FrozenTrial | None) -> None:
        self.watch = watch
        # The last one stays until another begins: it must not keep a study's connections open.
        self._storage = weakref.ref(_optuna.storage_of(study))
        # No callback: it would run inside of whatever lock its thread holds just then.
        self._holder = None if holder is None else weakref.ref(holder)

    def is_over(self) -> bool:
        """Return whether the trial does not run in this process any more."""
        if self._holder is not None:
            return self._holder() is None
        storage = self._storage()
        if storage is None:
            return True
        try:
            return storage.get_trial(self.watch.key[1]).state.is_finished()
        except KeyError:
            return True
        except Exception as fault:  # noqa: BLE001 - any backend's own; another trial's, maybe
            _logger.debug(f"Whether trial {self.watch.key[1]} is over is unknown: {fault!r}.")
            return False


class _Register:
    """The watches of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Key, _Entry] = {}
        self._ended: dict[Key, TrialMonitor] = {}

    def add(self, entry: _Entry) -> None:
        with self._lock:
            self._open[entry.watch.key] = entry

    def let_go_of_what_is_over(self) -> None:
        with self._lock:
            entries = list(self._open.values())
        for entry in entries:
            if not entry.watch.closed and not entry.is_over():
                continue
            to_be_told = not entry.watch.closed and entry.watch.owner == "sampler"
            entry.watch.close()
            with self._lock:
                self._open.pop(entry.watch.key, None)
                if to_be_told:
                    self._ended[entry.watch.key] = entry.watch
                    while len(self._ended) > _MOST_ENDED:
                        del self._ended[next(iter(self._ended))]

    def take_ended(self, key: Key) -> TrialMonitor | None:
        with self._lock:
            return self._ended.pop(key, None)


_register = _Register()


def _after_fork_in_child() -> None:
    # What runs in the parent is not the child's to let go of; its lock may be held for ever.
    global _register
    _register = _Register()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
