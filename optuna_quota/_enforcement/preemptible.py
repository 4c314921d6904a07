"""``preemptible``: on a signal, a worker stops its trials and enqueues them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import functools
import hashlib
import inspect
import logging
import os
from pathlib import Path
import queue
import re
import shutil
import signal
import threading
import time
from types import FrameType
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement.nesting import quota_pruners
from optuna_quota._enforcement.preemption import (
    find_preemption,
    Preemption,
    preemption_of,
    runs_again,
)
from optuna_quota._enforcement.pruner import QuotaPruner
from optuna_quota._limits import Limits
from optuna_quota._records import CHECKPOINT, write_attributes
from optuna_quota._storage_retry import survive_outages
from optuna_quota._units import check_flags, format_signal
from optuna_quota.exceptions import TrialPreempted


_logger = logging.getLogger("optuna.quota.preemption")

# Sent by workload managers before SIGKILL; Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# Seconds within which signals count as one: a process may get a job's signal several times.
_ONE_SIGNAL = 0.1
# Seconds between requests to end `optimize`: it ignores one that comes while it starts.
_REPEAT = 0.02


def preemptible(
    study: Study,
    signals: Sequence[int] = SIGNALS,
    requeue: bool = True,
    *,
    checkpoints: str | os.PathLike[str] | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Let a worker end early on a signal without losing its trials.

    On one of the signals no further trial starts, and running ones are asked to stop:
    :class:`~optuna_quota.TrialPreempted`, a ``LimitBreached``, is raised in isolated trials, which
    then have their grace period, and ``should_prune`` and ``check`` stop the others. They end as
    failed with the outcome ``preempted`` and are enqueued again with the same parameters, and
    ``optimize`` returns. A trial that still returns a value is completed. A second signal kills
    what still runs.

    Signals that a workload manager sends to all processes of a job have no effect on the processes
    of isolated trials.

    Example:

        .. code-block:: python

            with preemptible(study, checkpoints="checkpoints"):
                study.optimize(isolated(objective), n_trials=100)

    Args:
        study: The study.
        signals: Numbers of the signals.
        requeue: Whether preempted trials are enqueued again.
        checkpoints: A folder, on storage that all workers share. Each trial gets a folder in it,
            the same as the trial that it repeats: ``trial.user_attrs["quota:checkpoint"]``. It is
            deleted when the trial completes or is pruned.

    Raises:
        TypeError: If ``study`` is no study, but an objective, say.
        ValueError: If one of ``signals`` can't be handled.
        RuntimeError: On entering the block, if this is not the main thread, the only one that
            gets signals.
    """
    if not isinstance(study, Study):
        raise TypeError(
            f"`study` must be a study but got {study!r}. Use `with preemptible(study):` around "
            "`study.optimize(objective)`."
        )
    check_flags(requeue=requeue)
    if not isinstance(signals, Iterable) or not all(map(_can_handle, signals)):
        raise ValueError(
            f"`signals` must be numbers of signals that can be handled but got {signals!r}."
        )
    folder = None if checkpoints is None else Path(checkpoints)
    return _preemptible(study, tuple(signals), requeue, folder)


def _can_handle(number: Any) -> bool:
    return (
        isinstance(number, int)
        and number in signal.valid_signals()
        and number not in (getattr(signal, "SIGKILL", None), getattr(signal, "SIGSTOP", None))
    )


@contextlib.contextmanager
def _preemptible(
    study: Study, signals: Sequence[int], requeue: bool, checkpoints: Path | None
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "`preemptible` must be used in the main thread, as Python handles signals there, but "
            f"this is thread {threading.current_thread().name!r}."
        )
    survive_outages(_optuna.storage_of(study))
    preemption, pruner = preemption_of(study), study.pruner
    before = preemption.requeue, preemption.signals
    outer = vars(study).get("optimize")
    if not quota_pruners(pruner):
        # Its `should_prune` is what stops trials in process.
        study.pruner = QuotaPruner(pruner, limits=Limits())
    folders = None if checkpoints is None else _Checkpoints(study, checkpoints)
    preemption.requeue, preemption.signals = requeue, (*preemption.signals, *signals)
    study.optimize = _Optimize(study, folders)  # type: ignore[method-assign]
    try:
        with _Watcher(study, preemption) as watcher, _handled(signals, watcher.on_signal):
            yield
    finally:
        vars(study).pop("optimize", None)
        if outer is not None:
            study.optimize = outer  # type: ignore[method-assign]
        if study.pruner is not pruner and not quota_pruners(pruner):
            study.pruner = pruner
        preemption.requeue, preemption.signals = before
        if not isinstance(outer, _Optimize):
            # Within another block, a signal ends that one too.
            preemption.reason = None


@contextlib.contextmanager
def _handled(signals: Sequence[int], handler: Callable[..., None]) -> Iterator[None]:
    before: dict[int, Any] = {}
    _before.append(before)
    try:
        for number in signals:
            before[number] = signal.signal(number, handler)
        yield
    finally:
        _restore(before)
        _before.remove(before)


# The handlers from before each block under way, outer ones first.
_before: list[dict[int, Any]] = []


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        # None stands for a handler that was not set from Python.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _leave_to_parent() -> None:
    """Let what an objective has forked, such as a pool's worker, end on signals."""
    while _before:
        _restore(_before.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


class _Watcher:
    """Acts on signals, in a thread: their handlers must take no lock."""

    def __init__(self, study: Study, preemption: Preemption) -> None:
        self._study = study
        self._preemption = preemption
        self._signalled: float | None = None
        self._commands: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, name="optuna-quota-preemption", daemon=True
        )

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.put("end")
        self._thread.join()

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
            self._preemption.reason = f"The worker received {format_signal(signum)} and ends."
            _optuna.stop_optimize(self._study)
            self._commands.put("stop")
        elif now - self._signalled > _ONE_SIGNAL:
            self._commands.put("kill")
            if _optuna.in_objective(frame):
                # Nothing else stops a trial in this process that never checks its limits.
                raise TrialPreempted(self._preemption.reason or "")

    def _run(self) -> None:
        wait = None
        while True:
            with contextlib.suppress(queue.Empty):
                command = self._commands.get(timeout=wait)
                if command == "end":
                    return
                if command == "kill":
                    _logger.warning("A second signal: running trials are killed.")
                    self._preemption.kill()
                elif self._preemption.reason is not None:
                    wait = _REPEAT
                    _logger.warning(
                        f"{self._preemption.reason} No further trial is started, and running ones "
                        "are asked to stop. A second signal kills them."
                    )
                    self._preemption.request(self._preemption.reason)
            _optuna.stop_optimize(self._study)


class _Optimize:
    def __init__(self, study: Study, folders: _Checkpoints | None) -> None:
        self._study = study
        self._folders = folders

    def __call__(self, func: Callable[[Trial], Any], *args: Any, **kwargs: Any) -> None:
        """Call the study's own ``optimize``; do nothing once the worker is shutting down."""
        study, folders = self._study, self._folders
        if preemption_of(study).reason is not None:
            return

        @functools.wraps(func, updated=())
        def run_preemptible(trial: Trial) -> Any:
            error = find_preemption(study, trial)
            if error is not None:
                _optuna.stop_optimize(study)
                raise error
            if folders is not None:
                folders.provide(trial)
            try:
                return func(trial)
            except TrialPreempted:
                find_preemption(study, trial)
                raise

        optimize = type(study).optimize
        bound = inspect.signature(optimize).bind(study, run_preemptible, *args, **kwargs)
        if folders is not None:
            callbacks = bound.arguments.get("callbacks") or ()
            bound.arguments["callbacks"] = [folders.clear, *callbacks]
        optimize(*bound.args, **bound.kwargs)


class _Checkpoints:
    def __init__(self, study: Study, base: Path) -> None:
        name = re.sub(r"[^\w.-]", "_", study.study_name).strip(".")
        if name != study.study_name:
            # Another folder for each study.
            name += f"-{hashlib.sha256(study.study_name.encode()).hexdigest()[:8]}"
        self._base = base.absolute() / name

    def provide(self, trial: Trial) -> None:
        row = _optuna.cached_row(trial)
        folder = self._folder(row)
        if _optuna.first_attempt(row) == row.number:
            # A deleted study of this name may have left one, of other parameters.
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        storage, trial_id = _optuna.storage_of(trial.study), _optuna.trial_id_of(trial)
        write_attributes(storage, trial_id, user={CHECKPOINT: str(folder)})
        # Optuna does not read the row again.
        row.user_attrs = {**row.user_attrs, CHECKPOINT: str(folder)}

    def clear(self, study: Study, trial: FrozenTrial) -> None:
        """Delete the folder of a trial that does not run again; a callback of ``optimize``."""
        is_over = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        if is_over and not runs_again(study, trial):
            # By its number and not as the row says, which others may have written.
            shutil.rmtree(self._folder(trial), ignore_errors=True)

    def _folder(self, trial: FrozenTrial) -> Path:
        return self._base / f"trial-{_optuna.first_attempt(trial)}"
