"""Finds out what ``optimize``, ``ask`` and ``tell`` are doing, by stack frames and flags."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
from dataclasses import dataclass
from datetime import datetime
import logging
import sys
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import _optimize, _tell, Study, study as _study
from optuna.trial import BaseTrial, FrozenTrial, Trial, TrialState

from optuna_quota._limits import Limits, Quota
from optuna_quota._optuna.samplers import raised_by_constraints_func
from optuna_quota._optuna.storages import describe_end, number_of, unwrap_study


_logger = logging.getLogger("optuna.quota.optuna")

_OPTIMIZE = _optimize.__name__


def is_distributed(trial: BaseTrial) -> bool:
    """Return whether a trial is a ``TorchDistributedTrial``: its processes act together."""
    return callable(getattr(type(trial), "_call_and_communicate_obj", None))


def call_at_rank_0(trial: BaseTrial, function: Callable[[], Any]) -> Any:
    """Call a function in the process of rank 0 and return its result in all processes."""
    return trial._call_and_communicate_obj(function)  # type: ignore[attr-defined]


# Frames of this thread: Optuna's hooks don't know what they are called for, and by whom.


def _find_frame(name: str, module: str = _OPTIMIZE) -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name and frame.f_globals.get("__name__") == module:
            return frame
        frame = frame.f_back
    return None


def _find_locals(name: str) -> dict[str, Any]:
    frame = _find_frame(name)
    return {} if frame is None else frame.f_locals


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def in_optimize_loop(study: Study) -> bool:
    """Return whether this thread runs ``optimize``; elsewhere, ``study.stop()`` raises."""
    return bool(study._thread_local.in_optimize_loop)


def stop_optimize(study: Study) -> None:
    """Let ``optimize`` start no further trial; from any thread, unlike ``study.stop()``."""
    study._stop_flag = True


def is_run_by_optimize(trial: Trial) -> bool:
    """Return whether ``optimize`` runs this trial in this thread, and will finish its row.

    Inside an objective, a trial may also come from ``ask``, whose caller finishes it.
    """
    running = _find_locals("_run_trial").get("trial")
    return (
        running is not None
        and running._trial_id == trial._trial_id
        and running.study._storage is trial.study._storage
    )


def n_jobs_of_optimize() -> int:
    """Return the ``n_jobs`` of the ``optimize`` that runs in this thread, 1 without one.

    Its threads belong to an executor of that many workers, which only their frames refer to.
    """
    frame = _find_frame("_optimize_sequential")
    item = None if frame is None else frame.f_back
    worker = None if item is None else item.f_back
    if worker is None or _module_of(worker) != "concurrent.futures.thread":
        return 1
    executor = worker.f_locals.get("executor_reference", lambda: None)()
    return int(getattr(executor, "_max_workers", 1))


def is_optimize_ending(study: Study) -> bool:
    """Return whether ``optimize`` starts no further trial in this thread.

    A trial may have waited for its admission while ``optimize`` was stopped or timed out.
    """
    if not in_optimize_loop(study):
        return False
    known = _find_locals("_optimize_sequential")
    timeout, start = known.get("timeout"), known.get("time_start")
    if timeout is None or start is None:
        return bool(study._stop_flag)
    return bool(study._stop_flag) or (datetime.now() - start).total_seconds() >= timeout


def is_last_of_optimize() -> bool:
    """Return whether the ``optimize`` of this thread ends after this trial anyway.

    With ``n_jobs``, where each trial has a loop of its own, that is not known: False.
    """
    known = _find_locals("_optimize_sequential")
    n_trials, begun = known.get("n_trials"), known.get("i_trial")
    return n_trials is not None and begun is not None and begun >= n_trials > 1


def in_ask() -> bool:
    """Return whether this thread is inside ``Study.ask``: its caller has no trial to finish."""
    return _find_frame("ask", _study.__name__) is not None


def is_asked_by_user() -> bool:
    """Return whether an ``ask`` of this thread is not that of ``optimize``.

    An objective and a callback may call ``ask`` within ``optimize``.
    """
    frame = _find_frame("ask", _study.__name__)
    return frame is not None and frame.f_back is not None and _module_of(frame.f_back) != _OPTIMIZE


def take_another_row(study: Study) -> FrozenTrial:
    """Give the ``Trial`` that ``Study.ask`` is creating the next waiting row, or a new one.

    Used if another worker got the same row. ``Trial`` reads its row again after the hook.
    """
    frame = _find_frame("__init__", "optuna.trial._trial")
    assert frame is not None
    trial = frame.f_locals["self"]
    storage = study._storage
    waiting = study._pop_waiting_trial_id()
    trial._trial_id = storage.create_new_trial(study._study_id) if waiting is None else waiting
    found: FrozenTrial = storage.get_trial(trial._trial_id)
    trial._cached_frozen_trial = found
    _logger.info(
        f"Another worker was given the same enqueued trial: this one runs trial {found.number}."
    )
    return found


def objective_error() -> BaseException | None:
    """Return the objective's error, inside ``after_trial``, which does not receive it."""
    error = _find_locals("_run_trial").get("func_err")
    return error if isinstance(error, BaseException) else None


def in_objective(frame: FrameType | None) -> bool:
    """Return whether a frame belongs to an objective under ``optimize``, outside Optuna's code."""
    depth = 0
    while frame is not None:
        module = _module_of(frame)
        if module == _OPTIMIZE:
            return frame.f_code.co_name == "_run_trial" and depth > 0
        wraps_objective = depth > 0 and frame.f_code.co_name == "run_preemptible"
        if (
            module.split(".")[0] in {"optuna", "optuna_quota", "sqlalchemy"}
            and not wraps_objective
        ):
            return False
        frame, depth = frame.f_back, depth + 1
    return False


# Where a study is created with our sampler or pruner.


class StudyPart:
    """A sampler or pruner that notices where a study is created with it."""

    def __bool__(self) -> bool:
        """Return True; ``Study`` takes ``sampler or TPESampler()``, and so asks for it."""
        frame = sys._getframe(1)
        if frame.f_code.co_name == "__init__" and _module_of(frame) == _study.__name__:
            known = frame.f_locals
            for name, other in (("sampler", BasePruner), ("pruner", BaseSampler)):
                given = known[name]
                if isinstance(given, other):
                    raise TypeError(
                        f"`{name}` must be a {name} but got {given}.{misplaced(given)}"
                    )
            if known["sampler"] is self:
                _with_sampler.setdefault(known["storage"], set()).add(known["study_id"])
            watch_tell()
        return True


# Studies that were created with a sampler of this class, by their storage.
_with_sampler: WeakKeyDictionary[BaseStorage, set[int]] = WeakKeyDictionary()


def was_created_with_sampler(study: Study) -> bool:
    return study._study_id in _with_sampler.get(study._storage, ())


def misplaced(given: object) -> str:
    """Return a hint where an argument that was passed elsewhere belongs, or ""."""
    if isinstance(given, (Limits, Quota)):
        name = type(given).__name__
        return f" Pass it as `{name.lower()}={name}(…)`."
    for name, kind in (("sampler", BaseSampler), ("pruner", BasePruner)):
        if isinstance(given, kind):
            wrapper = "" if isinstance(given, StudyPart) else f" or to Quota{name.capitalize()}"
            return f" It is a {name}: pass it as `{name}={type(given).__name__}(…)`{wrapper}."
    return ""


# The end of a trial.


@dataclass(frozen=True)
class TellCall:
    """What ``tell`` was called with."""

    by_user: bool  # Whether the user called it; False for ``optimize``
    state: TrialState | None = None  # The state that was given, None where the values decide
    problem: str | None = None  # Why the values are invalid, None if they are valid


def find_tell_call() -> TellCall | None:
    """Return what ``tell`` was called with, inside ``after_trial``; None if unknown."""
    frame = _find_frame("_tell_with_warning", _tell.__name__)
    caller = None if frame is None else frame.f_back
    if frame is None or caller is None:
        return None
    while _module_of(caller).startswith("optuna_quota.") and caller.f_back:
        # See `replace_tell`.
        caller = caller.f_back
    # In `frame`, Optuna has replaced the state by the one that follows from the values.
    state = caller.f_locals.get("state")
    problem = None
    if frame.f_locals.get("state") == TrialState.FAIL and state is None:
        value = frame.f_locals.get("value_or_values")
        problem = frame.f_locals.get("values_conversion_failure_message") or repr(value)
    given = state if isinstance(state, TrialState) else None
    return TellCall(_module_of(caller) != _OPTIMIZE, given, problem)


# What `tell` returns inside of Optuna: the state, the values and a warning.
TellResult = tuple[TrialState, "list[float] | None", "str | None"]
# Called with Optuna's own `tell`, the value and the state.
TellReplacement = Callable[
    [Callable[[Any, "TrialState | None"], TellResult], Any, "TrialState | None"], TellResult
]
# Called once a trial has ended, with the study and the trial's id.
TellListener = Callable[[Study, int], None]
_replacements: dict[tuple[int, int], TellReplacement] = {}
_tolerant: set[tuple[int, int]] = set()
_listeners: list[TellListener] = []
_original_tell = _tell._tell_with_warning


def replace_tell(study: Study, trial_id: int, replacement: TellReplacement) -> None:
    """End a running trial by a function instead of ``tell``.

    ``optimize`` would store a state by what the objective returned or raised, which is wrong for a
    trial that runs again.
    """
    _replacements[number_of(study._storage), trial_id] = replacement
    watch_tell()


def tolerate_finished_row(study: Study, trial_id: int) -> None:
    """Let ``optimize`` continue after a trial whose row was finished or deleted from outside.

    Otherwise it ends with "Cannot tell a FAIL trial". Other callers of ``tell`` get the error.
    """
    if in_optimize_loop(unwrap_study(study)):
        _tolerant.add((number_of(study._storage), trial_id))
        watch_tell()


def on_tell(listener: TellListener) -> None:
    """Call a function after each ``tell`` of this process that has ended a trial.

    That is the only way to notice trials of a tool that replaces a study's sampler.
    """
    _listeners.append(listener)


def watch_tell() -> None:
    """Wrap Optuna's ``tell``, to observe its calls in this process."""
    for module in (_optimize, _study):
        module._tell_with_warning = _tell_or_replacement  # type: ignore[attr-defined]


def _tell_or_replacement(
    study: Study, trial: Any, value_or_values: Any = None, state: Any = None, **options: Any
) -> TellResult:
    def tell(value: Any, state: TrialState | None) -> TellResult:
        return _original_tell(study, trial, value, state, **options)

    key = _key_of_told(study, trial)
    replacement = _replacements.pop(key, None)
    # An objective may call `tell` as well, before `optimize` does.
    by_optimize = _module_of(sys._getframe(1)) == _OPTIMIZE
    is_tolerant = by_optimize and key in _tolerant
    if by_optimize:
        _tolerant.discard(key)
    try:
        if replacement is None:
            result = tell(value_or_values, state)
        else:
            result = replacement(tell, value_or_values, state)
    except (KeyError, ValueError, UpdateFinishedTrialError) as error:
        # After an error of `constraints_func`, the row was finished here.
        may_go_on = is_tolerant and not raised_by_constraints_func(error)
        end = describe_end(study, key[1]) if may_go_on else None
        if end is None:
            raise
        return _result_of_finished_row(end, state, error)
    except Exception as error:
        if by_optimize:
            end = f"value {value_or_values!r}" if state is None else f"state {state.name}"
            _logger.error(
                f"Trial {trial.number} ended with the {end}, which may be lost: {error!r}."
            )
        raise
    for listener in _listeners:
        listener(study, key[1])
    return result


def _key_of_told(study: Study, trial: Any) -> Any:
    trial_id = getattr(trial, "_trial_id", None)
    if isinstance(trial, int):
        # Optuna has a message of its own for a number that does not exist.
        with contextlib.suppress(KeyError):
            trial_id = study._storage.get_trial_id_from_study_id_trial_number(
                study._study_id, trial
            )
    return number_of(study._storage), trial_id


def _result_of_finished_row(end: str, state: TrialState | None, error: Exception) -> TellResult:
    """Return a result with which ``optimize`` continues after a row finished from outside."""
    # Errors of a trial whose row has ended; KeyError if the row was deleted.
    is_gone = isinstance(error, KeyError)
    follows = (UpdateFinishedTrialError, KeyError) if is_gone else UpdateFinishedTrialError
    if state == TrialState.PRUNED or isinstance(objective_error(), follows):
        # For a failed trial, `optimize` would raise it.
        return TrialState.PRUNED, None, None
    return TrialState.FAIL, None, end
