"""Private parts of samplers and pruners: constraints in all versions, points, Hyperband."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import copy
import json
import threading
from typing import Any, cast, NoReturn

from optuna.pruners import BasePruner, HyperbandPruner
from optuna.samplers import BaseSampler, BruteForceSampler, PartialFixedSampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from optuna_quota._optuna.storages import _FIXED_PARAMS


# The system attribute of the list of constraints; optuna-dashboard does not read the newer
# `constraints:<key>`.
CONSTRAINTS = "constraints"
# Optuna 5 has constraints by key in each trial, and its samplers read them. In Optuna 4 they are a
# list that is read only by samplers with a `constraints_func`, and a trial without the list is
# infeasible as soon as another one has it.
_BY_KEY = hasattr(FrozenTrial, "constraints")
# Samplers that raise unless all completed trials have as many constraints; in Optuna 4 NSGA too.
# By name, so that they are not imported where they are not used.
_UNIFORM = {"GPSampler", "BoTorchSampler"} | (
    set() if _BY_KEY else {"NSGAIISampler", "NSGAIIISampler"}
)
_TPE_PARAMS = "tpe:relative_params"
_TPE_CHUNK = 2045

# Returns the constraints of each of the given completed trials.
Constrain = Callable[[Sequence[FrozenTrial]], Sequence[Mapping[str, float]]]


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


def feasible_attributes(existing: Mapping[str, Any]) -> dict[str, Any]:
    """Return system attributes that make a completed trial feasible."""
    return {} if _BY_KEY or CONSTRAINTS in existing else {CONSTRAINTS: []}


def may_write_constraints(sampler: BaseSampler) -> bool:
    """Return whether a sampler may write constraints, so that the row has to be read again."""
    if type(sampler).after_trial is BaseSampler.after_trial:
        return False
    return getattr(sampler, "_constraints_func", sampler) is not None


def demands_uniform_constraints(sampler: BaseSampler) -> bool:
    """Return whether a sampler raises unless all completed trials have as many constraints."""
    return any(each.__name__ in _UNIFORM for each in type(sampler).__mro__)


def reads_constraints(sampler: BaseSampler) -> bool:
    """Return whether a sampler that can learn from the constraints in the rows does."""
    function = getattr(sampler, "_constraints_func", None)
    return _BY_KEY or (function is not None and function is not _recorded)


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


@contextlib.contextmanager
def learn_constraints(
    study: Study,
    samplers: Sequence[BaseSampler],
    trial: FrozenTrial,
    constrain: Constrain | None,
    *,
    limited: Callable[[], bool],
) -> Iterator[Study]:
    """Return a view of a study in which its sampler sees constraints of other trials.

    With ``constrain`` None, those in the rows. Without limits now (``limited``), samplers of
    Optuna 4 see no constraints.
    """
    study = skip_empty_rows(study, samplers, trial)
    if _BY_KEY:
        yield cast("Study", _ConstrainedStudy(study, constrain)) if constrain else study
    elif limited():
        with _reading_rows(samplers):
            yield cast("Study", _ConstrainedStudy(study, constrain))
    else:
        yield study


_readers: dict[int, int] = {}
_readers_lock = threading.Lock()


@contextlib.contextmanager
def _reading_rows(samplers: Sequence[BaseSampler]) -> Iterator[None]:
    """Within the block, make samplers of Optuna 4 read the constraints in the rows.

    In all threads. Outside of the block they are as the user created them, for other studies.
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


def skip_empty_rows(study: Study, samplers: Sequence[BaseSampler], trial: FrozenTrial) -> Study:
    """Return a view of a study without other rows that ended before they had parameters.

    BruteForceSampler takes such a row, of a refused or crashed trial, for the only leaf of its
    tree, and ends the search or raises. (So an objective that always fails before its first
    suggest no longer ends the study.) For other samplers, this is the study itself.
    """
    is_tree = any(isinstance(each, BruteForceSampler) for each in samplers)
    if not is_tree:
        return study
    return cast("Study", _StudyView(study, _StorageOfPoints(study._storage, trial.number)))


def is_empty_row(trial: FrozenTrial, state: TrialState) -> bool:
    """Return whether a trial that ends in a state ends before it had parameters."""
    return not trial.params and state.is_finished() and state != TrialState.COMPLETE


class _View:
    """Has the attributes of the object that it is a view of, and some of its own."""

    def __init__(self, viewed: Any) -> None:
        self._viewed = viewed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._viewed, name)


class _StudyView(_View):
    def __init__(self, study: Study, storage: Any) -> None:
        super().__init__(study)
        self._study, self._storage = study, storage


class _StorageOfPoints(_View):
    def __init__(self, storage: BaseStorage, number: int) -> None:
        super().__init__(storage)
        # The sampler looks for the row of its own trial, which may have ended from outside.
        self._number = number

    def get_all_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self._viewed.get_all_trials(*args, **kwargs)
        return [t for t in trials if t.number == self._number or not is_empty_row(t, t.state)]


class _ConstrainedStudy(_StudyView):
    """A view of a study whose completed trials have other constraints than in their rows.

    For samplers, which get views of studies from Optuna too, as on a bracket of Hyperband.
    """

    def __init__(self, study: Study, constrain: Constrain | None) -> None:
        storage = study._storage
        # GPSampler of Optuna 4 reads constraints from the storage.
        super().__init__(study, storage if _BY_KEY else _ConstrainedStorage(storage))
        self._constrain = constrain

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.get_trials()

    def get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
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
            trial = _with_system_attrs(trial, {**trial.system_attrs, CONSTRAINTS: []})
        self._storage.known[trial._trial_id] = trial.system_attrs
        return trial


class _ConstrainedStorage(_View):
    """A view of a storage with the trials' system attributes that a sampler has been shown."""

    def __init__(self, storage: BaseStorage) -> None:
        super().__init__(storage)
        self.known: dict[int, dict[str, Any]] = {}

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        return self.known.get(trial_id) or self._viewed.get_trial_system_attrs(trial_id)


def _with_constraints(trial: FrozenTrial, constraints: Mapping[str, float]) -> FrozenTrial:
    prefix = f"{CONSTRAINTS}:"
    attributes = {
        key: value
        for key, value in trial.system_attrs.items()
        if key != CONSTRAINTS and not key.startswith(prefix)
    }
    if constraints:
        # All versions of Optuna read the list.
        attributes[CONSTRAINTS] = list(constraints.values())
    return _with_system_attrs(trial, attributes)


def _with_system_attrs(trial: FrozenTrial, attributes: dict[str, Any]) -> FrozenTrial:
    trial = copy.copy(trial)
    trial.system_attrs = attributes
    return trial


# Points.


def raise_on_next_suggest(trial: FrozenTrial, refuse: Callable[[], NoReturn]) -> None:
    """Call ``refuse`` at the next ``suggest_*`` of a running trial.

    ``Trial`` calls ``before_trial``, then reads the enqueued parameters from this same object,
    and at each ``suggest_*`` looks there first.
    """

    class RaisingParams(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            refuse()

    class RaisingAttributes(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            return RaisingParams() if key == _FIXED_PARAMS else super().get(key, default)

    trial.system_attrs = RaisingAttributes(trial.system_attrs)


def unwrap_partial_fixed(sampler: BaseSampler) -> BaseSampler:
    while isinstance(sampler, PartialFixedSampler):
        sampler = sampler._base_sampler
    return sampler


def partial_fixed_params(sampler: BaseSampler) -> dict[str, Any]:
    """Return the parameters that nested PartialFixedSamplers fix."""
    if not isinstance(sampler, PartialFixedSampler):
        return {}
    return {**partial_fixed_params(sampler._base_sampler), **sampler._fixed_params}


def needs_drawn_point(sampler: BaseSampler) -> bool:
    """Return whether a sampler learns from the point that it drew, even if another one ran.

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


class HyperbandInterface(HyperbandPruner):
    """The methods by which Optuna gives each sampler hook a view of the trial's bracket.

    Optuna recognises a Hyperband pruner by its class.
    """

    base_pruner: BasePruner | None

    def _get_bracket_id(self, study: Study, trial: FrozenTrial) -> int:
        return cast("HyperbandPruner", self.base_pruner)._get_bracket_id(study, trial)

    def _create_bracket_study(self, study: Study, bracket_id: int) -> Study:
        return cast("HyperbandPruner", self.base_pruner)._create_bracket_study(study, bracket_id)
