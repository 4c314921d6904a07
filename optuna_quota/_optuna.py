"""Private parts of Optuna that can't be avoided, and what differs between its versions.

No other module uses a private name of Optuna. ``tests/test_optuna.py`` fails when Optuna changes
any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import copy
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
import json
import logging
import sys
import threading
from types import FrameType
from typing import Any, cast, NoReturn, TYPE_CHECKING
from weakref import WeakKeyDictionary

from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, HyperbandPruner
from optuna.samplers import BaseSampler, PartialFixedSampler
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat, is_heartbeat_enabled
from optuna.storages.journal import JournalFileBackend
from optuna.study import _optimize, _tell, Study, study as _study
from optuna.trial import create_trial, FrozenTrial, TrialState

from optuna_quota._resources import Limits, Quota


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.storages.journal._file import BaseJournalFileLock
    from optuna.trial import BaseTrial, Trial


_logger = logging.getLogger("optuna.quota.optuna")

# The system attribute of the list of constraints; optuna-dashboard does not read the newer
# `constraints:<key>`.
CONSTRAINTS = "constraints"
# Optuna 5 has constraints by key in each trial, and its samplers read them. In Optuna 4 they are a
# list that is read only by samplers with a `constraints_func`, and a trial without the list is
# infeasible as soon as another one has it.
_BY_KEY = hasattr(FrozenTrial, "constraints")
# Samplers that raise unless all completed trials have as many constraints; in Optuna 4 NSGA too.
_UNIFORM = ("GPSampler", "BoTorchSampler")
_UNIFORM_IN_4 = ("NSGAIISampler", "NSGAIIISampler")
_FIXED_PARAMS = "fixed_params"
# Where Optuna's callback for retries has the number of the first attempt.
_FIRST_TRIAL = "failed_trial"
_TPE_PARAMS = "tpe:relative_params"
_TPE_CHUNK = 2045
# SQLAlchemy's dialects with an upsert.
_UPSERTING = ("mysql", "postgresql", "sqlite")


def storage_of(study: Study) -> BaseStorage:
    """Return the study's storage, through which attributes of running trials are written."""
    return study._storage


def study_id_of(study: Study) -> int:
    """Return the study's id in its storage."""
    return study._study_id


def trial_id_of(trial: Trial | FrozenTrial | BaseTrial) -> int:
    """Return the trial's id in its storage, unique over all studies there."""
    return trial._trial_id  # type: ignore[union-attr]


def cached_row(trial: Trial | FrozenTrial) -> FrozenTrial:
    """Return a trial's row as Optuna has it in memory."""
    cached: FrozenTrial | None = getattr(trial, "_cached_frozen_trial", None)
    return cached or cast("FrozenTrial", trial)


def is_distributed(trial: BaseTrial) -> bool:
    """Return whether a trial is a ``TorchDistributedTrial``: its processes act together."""
    return callable(getattr(type(trial), "_call_and_communicate_obj", None))


def call_at_rank_0(trial: BaseTrial, function: Callable[[], Any]) -> Any:
    """Call a function in the process of rank 0 and return its result in all processes."""
    return trial._call_and_communicate_obj(function)  # type: ignore[attr-defined]


def unwrap_study(study: Study) -> Study:
    """Return the study under a view of it, such as on one bracket of Hyperband.

    Views refuse most attributes and don't show whether ``optimize`` runs.
    """
    while (inner := getattr(study, "_study", None)) is not None:
        study = inner
    return study


def in_optimize_loop(study: Study) -> bool:
    """Return whether this thread runs ``optimize``; elsewhere, ``study.stop()`` raises."""
    return bool(study._thread_local.in_optimize_loop)


def is_run_by_optimize(trial: Trial) -> bool:
    """Return whether ``optimize`` runs this trial in this thread, and will finish its row.

    Inside an objective, a trial may also come from ``ask``, whose caller finishes it.
    """
    frame = _find_frame("_run_trial", "optuna.study._optimize")
    running = None if frame is None else frame.f_locals.get("trial")
    return (
        running is not None
        and running._trial_id == trial._trial_id
        and running.study._storage is trial.study._storage
    )


def n_jobs_of_optimize() -> int:
    """Return the ``n_jobs`` of the ``optimize`` that runs in this thread, 1 without one.

    Its threads belong to an executor of that many workers, which only their frames refer to.
    """
    frame = _find_frame("_optimize_sequential", "optuna.study._optimize")
    item = None if frame is None else frame.f_back
    worker = None if item is None else item.f_back
    if worker is None or worker.f_globals.get("__name__") != "concurrent.futures.thread":
        return 1
    executor = worker.f_locals.get("executor_reference", lambda: None)()
    return int(getattr(executor, "_max_workers", 1))


def is_optimize_ending(study: Study) -> bool:
    """Return whether ``optimize`` starts no further trial in this thread.

    A trial may have waited for its admission while ``optimize`` was stopped or timed out.
    """
    if not in_optimize_loop(study):
        return False
    frame = _find_frame("_optimize_sequential", "optuna.study._optimize")
    known = {} if frame is None else frame.f_locals
    timeout, start = known.get("timeout"), known.get("time_start")
    if timeout is None or start is None:
        return bool(study._stop_flag)
    elapsed = (datetime.now() - start).total_seconds()
    return bool(study._stop_flag) or elapsed >= timeout


def is_last_of_optimize() -> bool:
    """Return whether the ``optimize`` of this thread was to end after this trial anyway.

    With ``n_jobs``, where each trial has a loop of its own, that is not known: False.
    """
    frame = _find_frame("_optimize_sequential", "optuna.study._optimize")
    known = {} if frame is None else frame.f_locals
    n_trials, begun = known.get("n_trials"), known.get("i_trial")
    return n_trials is not None and begun is not None and begun >= n_trials > 1


def user_attrs_of(study: Study) -> dict[str, Any]:
    """Return the study's user attributes without the deep copy that ``Study`` makes."""
    return study._storage.get_study_user_attrs(study._study_id)


def stale_trial_ids(storage: BaseStorage, study_id: int) -> list[int]:
    """Return the ids of running trials whose heartbeat is overdue by the storage's own clock."""
    if not is_heartbeat_enabled(storage):
        return []
    assert isinstance(storage, BaseHeartbeat)
    return storage._get_stale_trial_ids(study_id)


def call_stale_trial_callback(study: Study, trial_id: int) -> None:
    """Call the storage's callback for trials that ended with their worker.

    Optuna calls it only for trials that it has failed itself.
    """
    storage = study._storage
    if not is_heartbeat_enabled(storage):
        return
    # Optuna 4.9 gave it another name.
    names = ("get_heartbeat_stale_trial_callback", "get_failed_trial_callback")
    callback = next(getattr(storage, name) for name in names if hasattr(storage, name))()
    if callback is not None:
        callback(study, copy.deepcopy(storage.get_trial(trial_id)))


def engine_of(storage: BaseStorage) -> Any:
    """Return the SQLAlchemy engine of a storage, None if it has none."""
    backend = getattr(storage, "_backend", storage)
    return backend.engine if isinstance(backend, RDBStorage) else None


def stores_microseconds(storage: BaseStorage) -> bool:
    """Return whether datetimes are known to be stored exactly; MySQL rounds them to seconds."""
    engine = engine_of(storage)
    if engine is not None:
        return engine.dialect.name in ("sqlite", "postgresql")
    return isinstance(storage, (InMemoryStorage, JournalStorage))


def address_of(storage: BaseStorage) -> str:
    """Return what is the same for all objects of one storage in a process, as far as known."""
    engine = engine_of(storage)
    path = getattr(getattr(storage, "_backend", None), "_file_path", None)
    return f"{id(storage) if engine is None else engine.url}" if path is None else str(path)


def wrap_journal_lock(
    storage: BaseStorage, wrap: Callable[[BaseJournalFileLock, str], BaseJournalFileLock]
) -> None:
    """Replace the lock of a journal file, if there is one, by ``wrap(lock, path)``."""
    backend = getattr(storage, "_backend", None)
    if isinstance(backend, JournalFileBackend):
        backend._lock = wrap(backend._lock, backend._file_path)


def in_ask() -> bool:
    """Return whether this thread is inside ``Study.ask``: its caller has no trial to finish."""
    return _find_frame(Study.ask.__code__.co_name, "optuna.study.study") is not None


def take_another_row(study: Study) -> FrozenTrial:
    """Give the ``Trial`` that ``Study.ask`` is creating the next waiting row, or a new one.

    For a row that another worker got too. ``Trial`` reads its row again after the hook.
    """
    frame = _find_frame("__init__", "optuna.trial._trial")
    assert frame is not None
    trial = frame.f_locals["self"]
    storage = study._storage
    waiting = study._pop_waiting_trial_id()
    new = storage.create_new_trial(study._study_id) if waiting is None else waiting
    trial._trial_id = new
    trial._cached_frozen_trial = storage.get_trial(trial._trial_id)
    found: FrozenTrial = trial._cached_frozen_trial
    _logger.info(
        f"Another worker runs the enqueued trial too; this one goes on with trial {found.number}."
    )
    return found


def objective_error() -> BaseException | None:
    """Return what the objective raised, inside ``after_trial``, which is not passed it."""
    frame = _find_frame("_run_trial", "optuna.study._optimize")
    error = None if frame is None else frame.f_locals.get("func_err")
    return error if isinstance(error, BaseException) else None


@dataclass(frozen=True)
class TellCall:
    """What ``tell`` was called with.

    Attributes:
        by_user: Whether the user called it; False for ``optimize``.
        state: The state that was given, None where the values decide.
        problem: Why the values are invalid, None if they are valid.
    """

    by_user: bool
    state: TrialState | None = None
    problem: str | None = None


def find_tell_call() -> TellCall | None:
    """Return what ``tell`` was called with, inside ``after_trial``; None if unknown."""
    frame = _find_frame("_tell_with_warning", "optuna.study._tell")
    caller = None if frame is None else frame.f_back
    if frame is None or caller is None:
        return None
    while caller.f_globals.get("__name__", "").startswith("optuna_quota.") and caller.f_back:
        # See `replace_tell`.
        caller = caller.f_back
    by_user = caller.f_globals.get("__name__") != "optuna.study._optimize"
    # In `frame`, Optuna has replaced the state by the one that follows from the values.
    state = caller.f_locals.get("state")
    problem = None
    if frame.f_locals.get("state") == TrialState.FAIL and state is None:
        value = frame.f_locals.get("value_or_values")
        problem = frame.f_locals.get("values_conversion_failure_message") or repr(value)
    return TellCall(by_user, state if isinstance(state, TrialState) else None, problem)


# What `tell` returns inside of Optuna: the state, the values and a warning.
TellResult = tuple[TrialState, "list[float] | None", "str | None"]
# Called with Optuna's own `tell`, the value and the state.
TellReplacement = Callable[
    [Callable[[Any, "TrialState | None"], TellResult], Any, "TrialState | None"], TellResult
]
_replacements: dict[tuple[int, int], TellReplacement] = {}
_tolerant: set[tuple[int, int]] = set()
_original_tell = _tell._tell_with_warning


def replace_tell(study: Study, trial_id: int, replacement: TellReplacement) -> None:
    """End a running trial by a function, in the place of ``tell``.

    What ``optimize`` stores follows from what the objective returned or raised, which is wrong for
    a trial that is to run again.
    """
    _replacements[id(study._storage), trial_id] = replacement
    watch_tell()


def tolerate_finished_row(study: Study, trial_id: int) -> None:
    """Let ``optimize`` go on after a trial whose row was finished or deleted from outside.

    Otherwise it ends with "Cannot tell a FAIL trial". Other callers of ``tell`` get the error.
    """
    if in_optimize_loop(unwrap_study(study)):
        _tolerant.add((id(study._storage), trial_id))
        watch_tell()


# Called once a trial has ended, with the study and the trial's id.
TellListener = Callable[[Study, int], None]
_listeners: list[TellListener] = []


def on_tell(listener: TellListener) -> None:
    """Call a function after each ``tell`` of this process that has ended a trial.

    A tool that replaces a study's sampler leaves no other place where its trials show.
    """
    _listeners.append(listener)


def watch_tell() -> None:
    """See each ``tell`` of this process from now on."""
    for module in (_optimize, _study):
        module._tell_with_warning = _tell_or_replacement  # type: ignore[attr-defined]


def _tell_or_replacement(
    study: Study, trial: Any, value_or_values: Any = None, state: Any = None, **options: Any
) -> TellResult:
    def tell(value: Any, state: TrialState | None) -> TellResult:
        return _original_tell(study, trial, value, state, **options)

    storage = study._storage
    trial_id = getattr(trial, "_trial_id", None)
    if isinstance(trial, int):
        # Optuna has a message of its own for a number that does not exist.
        with contextlib.suppress(KeyError):
            trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, trial)
    key: Any = (id(storage), trial_id)
    replacement = _replacements.pop(key, None)
    # An objective may call `tell` as well, before `optimize` does.
    by_optimize = sys._getframe(1).f_globals.get("__name__") == "optuna.study._optimize"
    is_tolerant = by_optimize and key in _tolerant
    if by_optimize:
        _tolerant.discard(key)
    try:
        if replacement is None:
            result = tell(value_or_values, state)
        else:
            result = replacement(tell, value_or_values, state)
    except (KeyError, ValueError, UpdateFinishedTrialError) as error:
        if raised_by_constraints_func(error):
            # The row was finished here, in spite of it.
            raise
        end = describe_end(study, key[1]) if is_tolerant else None
        if end is None:
            raise
        if state is None or isinstance(objective_error(), KeyboardInterrupt):
            return TrialState.FAIL, None, end
        # For a failed trial, `optimize` would raise what its objective raised.
        return TrialState.PRUNED, None, None
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


class StudyPart:
    """A sampler or pruner that notices where a study is created with it."""

    def __bool__(self) -> bool:
        """Return True; ``Study`` takes ``sampler or TPESampler()``, and so asks for it."""
        frame = sys._getframe(1)
        if (frame.f_code.co_name, frame.f_globals.get("__name__")) == (
            "__init__",
            _study.__name__,
        ):
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


def misplaced(given: object) -> str:
    """Return where what was passed as something else belongs, or nothing."""
    if isinstance(given, (Limits, Quota)):
        name = type(given).__name__
        return f" Pass it as `{name.lower()}={name}(…)`."
    for name, kind in (("sampler", BaseSampler), ("pruner", BasePruner)):
        if isinstance(given, kind):
            wrapper = "" if isinstance(given, StudyPart) else f" or to Quota{name.capitalize()}"
            return f" It is a {name}: pass it as `{name}={type(given).__name__}(…)`{wrapper}."
    return ""


def was_created_with_sampler(study: Study) -> bool:
    """Return whether a study was created in this process with a sampler of this class."""
    return study._study_id in _with_sampler.get(study._storage, ())


def describe_end(study: Study, trial_id: int) -> str | None:
    """Return how a row has ended, one sentence; None while it is running."""
    try:
        state = study._storage.get_trial(trial_id).state
    except KeyError:
        return "Its row was deleted."
    return f"Its row was marked as {state.name} from outside." if state.is_finished() else None


def enqueue_retry(study: Study, trial: FrozenTrial, user_attrs: Mapping[str, Any]) -> None:
    """Enqueue the parameters of a trial again, as a retry of Optuna's own callbacks does."""
    system_attrs = {
        _FIXED_PARAMS: {**fixed_params_of(trial), **trial.params},
        _FIRST_TRIAL: first_attempt(trial),
    }
    study.add_trial(
        create_trial(
            state=TrialState.WAITING, user_attrs=dict(user_attrs), system_attrs=system_attrs
        )
    )


def first_attempt(trial: FrozenTrial) -> int:
    """Return the number of the trial that this one repeats, its own where it is the first."""
    number = trial.system_attrs.get(_FIRST_TRIAL)
    return number if isinstance(number, int) else trial.number


def stop_optimize(study: Study) -> None:
    """Let ``optimize`` start no further trial; from any thread, unlike ``study.stop()``."""
    study._stop_flag = True


def replace_constraints_func(sampler: BaseSampler, replace: Callable[[Any], Any]) -> list[Any]:
    """Replace a sampler's ``constraints_func`` if it has one; return the new ones.

    NSGA-II and NSGA-III keep it in a strategy object.
    """
    found = []
    for holder in (sampler, getattr(sampler, "_after_trial_strategy", None)):
        function = getattr(holder, "_constraints_func", None)
        if function is not None and function is not _recorded:
            holder._constraints_func = replace(function)  # type: ignore[union-attr]
            found.append(holder._constraints_func)  # type: ignore[union-attr]
    return found


def raised_by_constraints_func(error: BaseException) -> bool:
    """Return whether an error comes from the user's ``constraints_func`` or from its result."""
    traceback = error.__traceback__
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_name
        traceback = traceback.tb_next
        if name == "_process_constraints_after_trial":
            # That function of Optuna writes into the storage as well.
            raised_in = "" if traceback is None else traceback.tb_frame.f_globals["__name__"]
            return not str(raised_in).startswith("optuna.storages")
    return False


def in_objective(frame: FrameType | None) -> bool:
    """Return whether a frame belongs to an objective under ``optimize``, outside Optuna's code."""
    depth = 0
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module == "optuna.study._optimize":
            return frame.f_code.co_name == "_run_trial" and depth > 0
        package = module.split(".")[0]
        wraps_objective = depth > 0 and frame.f_code.co_name == "run_preemptible"
        if package in {"optuna", "optuna_quota", "sqlalchemy"} and not wraps_objective:
            return False
        frame, depth = frame.f_back, depth + 1
    return False


def _find_frame(name: str, module: str) -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name and frame.f_globals.get("__name__") == module:
            return frame
        frame = frame.f_back
    return None


def finish_row(storage: BaseStorage, trial_id: int, state: TrialState) -> None:
    """Finish a row unless it is finished already."""
    if not storage.get_trial(trial_id).state.is_finished():
        storage.set_trial_state_values(trial_id, state)


def has_row_locks(storage: BaseStorage) -> bool:
    """Return whether Optuna gives an enqueued trial to one worker, and lets one finish a row.

    SQLite has no row locks.
    """
    engine = engine_of(storage)
    return engine is None or engine.dialect.name != "sqlite"


def swap_system_attr_on_sqlite(
    storage: BaseStorage, trial_id: int, key: str, old: Any, new: Any
) -> bool:
    """Set a trial's system attribute if it is still ``old``, None for absent; return whether."""
    from optuna.storages._rdb.models import TrialSystemAttributeModel
    from sqlalchemy import update
    from sqlalchemy.dialects.sqlite import insert

    values = {"trial_id": trial_id, "key": key, "value_json": json.dumps(new)}
    if old is None:
        statement: Any = insert(TrialSystemAttributeModel).values(values).on_conflict_do_nothing()
    else:
        statement = update(TrialSystemAttributeModel).values(values)
        statement = statement.filter_by(trial_id=trial_id, key=key, value_json=json.dumps(old))
    return _has_changed_a_row(storage, statement)


def fail_row_on_sqlite(storage: BaseStorage, trial_id: int) -> bool:
    """Finish a row as failed if it has not finished; return whether it had not."""
    from optuna.storages._rdb.models import TrialModel
    from sqlalchemy import update

    running = update(TrialModel).filter_by(trial_id=trial_id, state=TrialState.RUNNING)
    statement = running.values(state=TrialState.FAIL, datetime_complete=datetime.now())
    return _has_changed_a_row(storage, statement)


def _has_changed_a_row(storage: Any, statement: Any) -> bool:
    from optuna.storages._rdb.storage import _create_scoped_session

    with _create_scoped_session(getattr(storage, "_backend", storage).scoped_session) as session:
        result: Any = session.execute(statement, execution_options={"synchronize_session": False})
        return bool(result.rowcount)


def write_attributes(
    storage: BaseStorage, trial_id: int, user: Mapping[str, Any], system: Mapping[str, Any]
) -> None:
    """Write attributes into an unfinished row: all at once if the storage can.

    Written one by one, each is a commit or a lock of a file. For eleven attributes that took
    190 ms instead of 24 on PostgreSQL, 200 instead of 19 on MySQL, 308 instead of 29 on SQLite and
    60 instead of 6 in a journal file.
    """
    write_batch = _BATCH_WRITERS.get(type(storage).__name__)
    if write_batch is not None:
        try:
            write_batch(storage, trial_id, user, system)
            return
        except (AttributeError, TypeError) as error:
            _logger.debug(f"This version of Optuna can't write a batch: {error!r}.")
    for key, value in user.items():
        storage.set_trial_user_attr(trial_id, key, value)
    for key, value in system.items():
        storage.set_trial_system_attr(trial_id, key, value)


def _write_in_one_transaction(
    storage: Any, trial_id: int, user: Mapping[str, Any], system: Mapping[str, Any]
) -> None:
    from optuna.storages._rdb import models
    from optuna.storages._rdb.storage import _create_scoped_session

    backend = getattr(storage, "_backend", storage)
    tables = {models.TrialUserAttributeModel: user, models.TrialSystemAttributeModel: system}
    with _create_scoped_session(backend.scoped_session) as session:
        row = models.TrialModel.find_or_raise_by_id(trial_id, session)
        backend.check_trial_is_updatable(trial_id, row.state)
        for table, attributes in tables.items():
            _set_attributes(session, backend, table, trial_id, attributes)


def _set_attributes(
    session: Any, backend: Any, table: Any, trial_id: int, attributes: Mapping[str, Any]
) -> None:
    """Write all attributes with one upsert; without one, two statements for each."""
    dialect = backend.engine.dialect.name
    if dialect not in _UPSERTING:
        for key, value in attributes.items():
            backend._set_trial_attr_without_commit(session, table, trial_id, key, value)
        return
    rows = [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for key, value in attributes.items()
    ]
    if not rows:
        return
    insert = import_module(f"sqlalchemy.dialects.{dialect}").insert(table.__table__)
    if dialect == "mysql":
        upsert = insert.on_duplicate_key_update(value_json=insert.inserted.value_json)
    else:
        upsert = insert.on_conflict_do_update(
            index_elements=[table.trial_id, table.key],
            set_={"value_json": insert.excluded.value_json},
        )
    session.execute(upsert, rows)


def _write_in_one_append(
    storage: Any, trial_id: int, user: Mapping[str, Any], system: Mapping[str, Any]
) -> None:
    from optuna.storages.journal._storage import JournalOperation

    operations = (
        (JournalOperation.SET_TRIAL_USER_ATTR, "user_attr", user),
        (JournalOperation.SET_TRIAL_SYSTEM_ATTR, "system_attr", system),
    )
    with storage._thread_lock:
        worker = storage._replay_result.worker_id
        logs = [
            {"op_code": op, "worker_id": worker, "trial_id": trial_id, name: {key: value}}
            for op, name, attributes in operations
            for key, value in attributes.items()
        ]
        storage._backend.append_logs(logs)
        # For a finished or deleted row, reading each of these lines raises, and ends the reading
        # there: a line that is left would raise in a later call for another trial.
        refused: Exception | None = None
        for _ in range(len(logs) + 1):
            try:
                storage._sync_with_backend()
                break
            except (KeyError, UpdateFinishedTrialError) as error:
                refused = error
        if refused is not None:
            raise refused


_BATCH_WRITERS: dict[str, Callable[[Any, int, Mapping[str, Any], Mapping[str, Any]], None]] = {
    "_CachedStorage": _write_in_one_transaction,
    "RDBStorage": _write_in_one_transaction,
    "JournalStorage": _write_in_one_append,
}


def may_write_constraints(sampler: BaseSampler) -> bool:
    """Return whether a sampler may write constraints, so that the row has to be read again."""
    if type(sampler).after_trial is BaseSampler.after_trial:
        return False
    return getattr(sampler, "_constraints_func", sampler) is not None


def demands_uniform_constraints(sampler: BaseSampler) -> bool:
    """Return whether a sampler raises unless all completed trials have as many constraints.

    It is found by name, so that it is not imported where it is not used.
    """
    names = _UNIFORM if _BY_KEY else _UNIFORM + _UNIFORM_IN_4
    return any(each.__name__ in names for each in type(sampler).__mro__)


def reads_constraints(sampler: BaseSampler) -> bool:
    """Return whether a sampler that can learn from the constraints in the rows does."""
    function = getattr(sampler, "_constraints_func", None)
    return _BY_KEY or (function is not None and function is not _recorded)


def feasible_attributes(existing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the system attributes by which a completed trial counts as feasible.

    Args:
        existing: Those that its row has.
    """
    return {} if _BY_KEY or CONSTRAINTS in existing else {CONSTRAINTS: []}


@contextlib.contextmanager
def learn_constraints(
    study: Study,
    samplers: Sequence[BaseSampler],
    constrain: Callable[[Sequence[FrozenTrial]], Sequence[Mapping[str, float]]] | None,
    *,
    limited: Callable[[], bool],
) -> Iterator[Study]:
    """Return a view of a study from which samplers learn the constraints of its trials.

    Args:
        study: The study, or a view of it.
        samplers: The samplers that will be called with it.
        constrain: As for :class:`ConstrainedStudy`; None for the constraints in the rows.
        limited: Returns whether trials have limits now: without, samplers of Optuna 4 are not to
            know of constraints.
    """
    if _BY_KEY:
        yield cast("Study", ConstrainedStudy(study, constrain)) if constrain else study
    elif limited():
        with _reading_rows(samplers):
            yield cast("Study", ConstrainedStudy(study, constrain))
    else:
        yield study


_readers: dict[int, int] = {}
_readers_lock = threading.Lock()


@contextlib.contextmanager
def _reading_rows(samplers: Sequence[BaseSampler]) -> Iterator[None]:
    """Have samplers of Optuna 4 read the constraints in the rows, in all threads meanwhile.

    Outside of this they are as the user made them, for studies without limits.
    """
    with _readers_lock:
        for sampler in samplers:
            _readers[id(sampler)] = _readers.get(id(sampler), 0) + 1
            _replace_everywhere(sampler, None, _recorded)
    try:
        yield
    finally:
        with _readers_lock:
            for sampler in samplers:
                _readers[id(sampler)] -= 1
                if not _readers[id(sampler)]:
                    del _readers[id(sampler)]
                    _replace_everywhere(sampler, _recorded, None)


def _replace_everywhere(sampler: BaseSampler, old: Any, new: Any) -> None:
    """Replace the ``constraints_func`` of a sampler of Optuna's; NSGA has it in its parts too."""
    if any(each.__module__.startswith("optuna.samplers.") for each in type(sampler).__mro__[:-2]):
        for holder in (sampler, *vars(sampler).values()):
            if hasattr(holder, "_constraints_func") and holder._constraints_func is old:
                holder._constraints_func = new


def _recorded(trial: FrozenTrial) -> tuple[float, ...]:
    """Return the constraints in a trial's row, as a ``constraints_func``."""
    return tuple(trial.system_attrs.get(CONSTRAINTS) or ())


class ConstrainedStudy:
    """A view of a study whose completed trials have other constraints than in their rows.

    For samplers, which get views of studies from Optuna too, as on a bracket of Hyperband.

    Args:
        study: The study, or a view of it.
        constrain: Returns the constraints of each of the given completed trials; None for those
            in their rows.
    """

    def __init__(
        self,
        study: Study,
        constrain: Callable[[Sequence[FrozenTrial]], Sequence[Mapping[str, float]]] | None,
    ) -> None:
        self._study = study
        self._constrain = constrain
        self._storage: Any = study._storage
        if not _BY_KEY:
            # GPSampler of Optuna 4 reads constraints from the storage.
            self._storage = _ConstrainedStorage(study._storage)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials."""
        return self.get_trials()

    def get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        """Return trials as :meth:`optuna.Study.get_trials` does."""
        return self._constrained(self._study.get_trials(*args, **kwargs))

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        return self._constrained(self._study._get_trials(*args, **kwargs))

    def _constrained(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        changed: dict[int, FrozenTrial] = {}
        if self._constrain is not None:
            completed = [trial for trial in trials if trial.state == TrialState.COMPLETE]
            changed = {
                trial.number: _with_constraints(trial, constraints)
                for trial, constraints in zip(completed, self._constrain(completed), strict=True)
            }
        seen = [changed.get(trial.number, trial) for trial in trials]
        return seen if _BY_KEY else [self._listed(trial) for trial in seen]

    def _listed(self, trial: FrozenTrial) -> FrozenTrial:
        """Return a trial with a list of constraints, as Optuna 4 demands, empty if it has none."""
        if CONSTRAINTS not in trial.system_attrs:
            trial = copy.copy(trial)
            trial.system_attrs = {**trial.system_attrs, CONSTRAINTS: []}
        self._storage.known[trial._trial_id] = trial.system_attrs
        return trial


class _ConstrainedStorage:
    """A view of a storage with the trials' system attributes that a sampler has been shown."""

    def __init__(self, storage: BaseStorage) -> None:
        self._of_all = storage
        self.known: dict[int, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of_all, name)

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        """Return the system attributes of a trial."""
        return self.known.get(trial_id) or self._of_all.get_trial_system_attrs(trial_id)


def _with_constraints(trial: FrozenTrial, constraints: Mapping[str, float]) -> FrozenTrial:
    prefix = f"{CONSTRAINTS}:"
    kept = {
        key: value
        for key, value in trial.system_attrs.items()
        if key != CONSTRAINTS and not key.startswith(prefix)
    }
    trial = copy.copy(trial)
    # All versions of Optuna read the list.
    trial.system_attrs = {**kept, CONSTRAINTS: list(constraints.values())} if constraints else kept
    return trial


def constraints_of(trial: FrozenTrial) -> dict[str, float]:
    """Return a trial's constraints by key; those of a list have their index as key."""
    if _BY_KEY:
        found: dict[str, float] = trial.constraints
        return found
    prefix = f"{CONSTRAINTS}:"
    listed = enumerate(trial.system_attrs.get(CONSTRAINTS) or ())
    return {str(index): value for index, value in listed} | {
        key.removeprefix(prefix): value
        for key, value in trial.system_attrs.items()
        if key.startswith(prefix)
    }


def forget_constraint_models(sampler: BaseSampler, n_constraints: int, n_params: int) -> None:
    """Let GPSampler fit new models of constraints if their number or shape has changed.

    It starts each fit from the previous trial's model, and raises if there are fewer.
    """
    models = getattr(sampler, "_constraints_gprs_cache_list", None)
    if models and (
        len(models) != n_constraints
        or any(len(each.inverse_squared_lengthscales) != n_params for each in models)
    ):
        sampler._constraints_gprs_cache_list = None  # type: ignore[attr-defined]


def raise_on_next_suggest(trial: FrozenTrial, refuse: Callable[[], NoReturn]) -> None:
    """Call ``refuse`` at the next ``suggest_*`` of a running trial.

    ``Trial`` calls ``before_trial``, then reads the enqueued parameters from this same object,
    and at each ``suggest_*`` looks there first.
    """
    trial.system_attrs = _RaisingAttributes(trial.system_attrs, refuse)


def may_be_enqueued(trial: FrozenTrial) -> bool:
    """Return whether the row of a trial that starts may have been waiting in the queue."""
    return bool(trial.params or trial.user_attrs or trial.system_attrs)


def fixed_params_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return the parameters that a trial was enqueued with."""
    fixed = trial.system_attrs.get(_FIXED_PARAMS)
    return dict(fixed) if isinstance(fixed, dict) else {}


def unwrap_partial_fixed(sampler: BaseSampler) -> BaseSampler:
    """Return the sampler inside PartialFixedSamplers, or the sampler itself."""
    while isinstance(sampler, PartialFixedSampler):
        sampler = sampler._base_sampler
    return sampler


def partial_fixed_params(sampler: BaseSampler) -> dict[str, Any]:
    """Return the parameters that nested PartialFixedSamplers fix."""
    if not isinstance(sampler, PartialFixedSampler):
        return {}
    return {**partial_fixed_params(sampler._base_sampler), **sampler._fixed_params}


def write_param(
    study: Study, trial: FrozenTrial, name: str, value: Any, distribution: BaseDistribution
) -> None:
    """Write a parameter into the row of a trial that ends before it is suggested."""
    internal = distribution.to_internal_repr(value)
    study._storage.set_trial_param(trial._trial_id, name, internal, distribution)


def needs_drawn_point(sampler: BaseSampler) -> bool:
    """Return whether a sampler learns from the point it drew, whatever the trial ran with.

    CMA-ES with margin keeps the continuous point that it drew in the row.
    """
    return bool(getattr(sampler, "_with_margin", False))


def share_relative_params(study: Study, trial: FrozenTrial, params: Mapping[str, Any]) -> None:
    """Let TPESampler share the point that a trial runs with, not the one that it drew.

    It keeps the point of each running trial in the row, as chunks of JSON text, so that other
    workers avoid it. Blanks fill chunks that are left over.
    """
    storage, trial_id = study._storage, trial._trial_id
    attributes = storage.get_trial(trial_id).system_attrs
    count = sum(key.startswith(f"{_TPE_PARAMS}:") for key in attributes)
    if not count:
        return
    text = json.dumps(dict(params))
    chunks = [text[i : i + _TPE_CHUNK] for i in range(0, len(text), _TPE_CHUNK)]
    chunks += [" "] * (count - len(chunks))
    for index, chunk in enumerate(chunks):
        storage.set_trial_system_attr(trial_id, f"{_TPE_PARAMS}:{index}", chunk)


class _RaisingAttributes(dict[str, Any]):
    def __init__(self, attributes: Mapping[str, Any], refuse: Callable[[], NoReturn]) -> None:
        super().__init__(attributes)
        self._refuse = refuse

    def get(self, key: str, default: Any = None) -> Any:
        if key == _FIXED_PARAMS:
            return _RaisingParams(self._refuse)
        return super().get(key, default)


class _RaisingParams(dict[str, Any]):
    def __init__(self, refuse: Callable[[], NoReturn]) -> None:
        super().__init__()
        self._refuse = refuse

    def __contains__(self, key: object) -> bool:
        self._refuse()


class HyperbandInterface(HyperbandPruner):
    """The methods by which Optuna gives each sampler hook a view of the trial's bracket.

    Optuna recognises a Hyperband pruner by its class.
    """

    base_pruner: BasePruner | None

    def _get_bracket_id(self, study: Study, trial: FrozenTrial) -> int:
        base = self.base_pruner
        assert isinstance(base, HyperbandPruner)
        return base._get_bracket_id(study, trial)

    def _create_bracket_study(self, study: Study, bracket_id: int) -> Study:
        base = self.base_pruner
        assert isinstance(base, HyperbandPruner)
        return base._create_bracket_study(study, bracket_id)
