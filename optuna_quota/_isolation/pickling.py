"""Pickle an objective for a trial's process: by name, by value, or as a proxy.

Functions and classes that the trial's ``__main__`` defines too, and those of modules, go by name;
other functions of the script and closures go by value. A study, storage or trial that the
objective refers to is replaced by a proxy. Large arrays are not copied into the pickle.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
import contextlib
import functools
import io
import linecache
from multiprocessing import context
from multiprocessing.synchronize import SemLock
import os
import pickle
import sys
import threading
import types
from typing import Any

import cloudpickle

from optuna_quota._isolation import reducers
from optuna_quota._isolation.main_module import (
    BY_TEXT,
    global_names,
    MAIN_NAMES,
    MainModule,
    names_in_code,
)
from optuna_quota._isolation.module_state import (
    plain_attributes,
    set_main_state,
    set_module_parts,
)
from optuna_quota._isolation.modules import (
    closure_variables,
    modules_being_imported,
    modules_without_import,
)
from optuna_quota._isolation.payload import FileRegion, MappedFiles, Payload
from optuna_quota._isolation.random_generators import values_within_reach
from optuna_quota._isolation.rpc import is_remote, proxy_at, RemoteObjects


# Smaller buffers are copied into the pickle, which is faster than a message for each.
_MIN_BUFFER = 1 << 16


class NeedsFork(TypeError):
    """An objective refers to a lock of multiprocessing's that only a forked process can share."""

    def __init__(self) -> None:
        super().__init__(
            "The objective can't be sent to the trial's process because it refers to a lock or "
            "queue of multiprocessing's fork context. Create it with "
            "multiprocessing.get_context('spawn'), or use "
            "isolated(objective, start_method='fork')."
        )


def dump_objective(objective: Any, remote: RemoteObjects, main: MainModule) -> Payload:
    """Return the pickle of an objective and of what it needs of the main module.

    Raises NeedsFork if it refers to a lock that only a fork can share, TypeError if it refers to
    an object that can't be pickled.
    """
    made_by_trial: set[str] = set()
    while True:
        pickler = _ObjectivePickler(remote, main, made_by_trial)
        try:
            return pickler.dump_payload(objective)
        except NeedsFork:
            raise
        except Exception as error:
            if pickler.failed is not None:
                made_by_trial.add(pickler.failed)
                continue
            names = " and ".join(f"`{name}`" for name in pickler.unpicklable)
            raise TypeError(
                "The objective can't be sent to the trial's process because "
                f"{f'{names} that it refers to' if names else 'it, or what it refers to,'} "
                f"can't be pickled ({error}). Create that object inside the "
                "objective, or use isolated(objective, start_method='fork')."
            ) from error


class _ObjectivePickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped
    """One attempt to pickle an objective, given the globals that the trial creates itself.

    ``failed`` is the name of another such global, as of a lock, that can't be pickled; without
    one, ``unpicklable`` has the script's variables that can't be pickled.
    """

    def __init__(
        self, remote: RemoteObjects, main: MainModule, made_by_trial: Collection[str]
    ) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file, protocol=5, buffer_callback=self._take_buffer)
        self.failed: str | None = None
        self.unpicklable: list[str] = []
        self._remote = remote
        self._main = main
        self._made_by_trial = made_by_trial
        self._globals = vars(sys.modules["__main__"])
        self._by_trial = {id(self._globals[name]): name for name in made_by_trial}
        self._reducers = reducers.multiprocessing_reducers()
        self._buffers: list[memoryview | FileRegion] = []
        self._mapped = MappedFiles()
        self._spawning = reducers.SpawningProcess()
        self._own_locks: set[int] = set()
        self._seen: set[int] = set()
        self._files: set[str] = set()
        self._loaders = getattr(sys.modules.get("torch.utils.data"), "DataLoader", ())
        self._by_name: dict[int, Any] = {}
        self._by_value: dict[str, Any] = {}

    def dump_payload(self, objective: Any) -> Payload:
        modules = [*modules_being_imported(), *modules_without_import()]
        _pickle_by_value(modules)
        # The script's locks may guard what all trials share, such as a file.
        reached = values_within_reach(objective)
        self._own_locks = {id(value) for value in reached if type(value) in _LOCKS}
        context.set_spawning_popen(self._spawning)  # type: ignore[arg-type]  # passes for one
        try:
            self.dump(objective)
            self._dump_main_state()
            self._dump_parts(modules)
            self._dump_sources()
            self.dump(None)
        except Exception as error:
            if not isinstance(error, NeedsFork):
                self.failed = next(filter(self._can_be_left_out, sorted(self._main.names)), None)
                if self.failed is None:
                    self.unpicklable = self._find_unpicklable(objective)
            raise
        finally:
            context.set_spawning_popen(None)
            self.clear_memo()
        return Payload(self._file.getbuffer(), self._buffers, self._spawning.descriptors)

    def reducer_override(self, value: Any) -> Any:
        if is_remote(value):
            return proxy_at, (self._remote.listener.address, self._remote.handle(value))
        if id(value) in self._by_trial:
            return global_of_main, (self._by_trial[id(value)],)
        if isinstance(value, SemLock) and _is_of_fork_context(value):
            raise NeedsFork
        kind = type(value)
        if kind in _FUNCTIONS or isinstance(value, type):
            self._seen.add(id(value))
            if self._is_named(value):
                return value.__qualname__
            reduced = reducers.reduce_array_type(value)
            if reduced is not None:
                return reduced
        elif kind in self._reducers:
            return self._reducers[kind](value)
        elif kind in _LOCKS and id(value) not in self._own_locks:
            # A library's lock guards memory of which the trial has its own copy.
            return _LOCKS[kind], ()
        elif isinstance(value, io.IOBase):
            reduced = reducers.reduce_open_file(value, self._spawning)
            if reduced is not None:
                return reduced
        elif isinstance(value, threading.local):
            return reducers.reduce_local(value, self._fails)
        elif kind is types.CodeType:
            # Cloudpickle leaves out the file, which tracebacks name and TorchScript reads.
            make, arguments = self.dispatch_table[kind](value)
            self._files.add(value.co_filename)
            return make, tuple(value.co_filename if a == _NO_FILE else a for a in arguments)
        elif isinstance(value, self._loaders) and value._iterator is not None:
            # With `persistent_workers`, it refers to worker processes; a trial starts its own.
            make, arguments, state = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)[:3]
            return make, arguments, {**state, "_iterator": None}
        else:
            reduced = reducers.reduce_library_object(value, self._mapped)
            if reduced is not None:
                return reduced
        reduced = super().reducer_override(value)
        if kind is types.FunctionType and isinstance(reduced, tuple):
            _add_globals(reduced[2][1]["__globals__"], value)
        return reduced

    def _dump_main_state(self) -> None:
        """Dump the globals of functions that go by name, until there are no new ones."""
        sent, n_done = set(self._made_by_trial), 0
        while True:
            new = list(self._by_name.values())[n_done:]
            # Picklers within the trial, such as a pool's, look these up by name.
            values = {k: v for k, v in self._by_value.items() if k not in sent}
            if not new and not values:
                return
            n_done += len(new)
            sent |= values.keys()
            names = {name for value in new for name in global_names(value)} - sent
            for name in sorted(names & self._globals.keys()):
                sent.add(name)
                value = self._globals[name]
                if not (name in self._main.names and self._is_made_by_definition(value)):
                    values[name] = value
            attributes = {v.__qualname__: found for v in new if (found := plain_attributes(v))}
            if values or attributes:
                self.dump((set_main_state, values, attributes))

    def _dump_parts(self, modules: Iterable[types.ModuleType]) -> None:
        """Dump the functions and classes of these modules that were sent by value."""
        for module in modules:
            parts = {
                name: value
                for name, value in vars(module).copy().items()
                if id(value) in self._seen
                and getattr(value, "__module__", None) == module.__name__
            }
            if parts:
                self.dump((set_module_parts, module.__name__, parts))

    def _dump_sources(self) -> None:
        """Dump the source of functions that no file has, such as those of a notebook's cells."""
        entries = {file: linecache.cache.get(file, ()) for file in self._files}
        found = {file: entry for file, entry in entries.items() if entry[1:2] == (None,)}
        if found:
            self.dump((add_sources, found))

    def _find_unpicklable(self, objective: Any) -> list[str]:
        owner = getattr(objective, "__self__", None)
        kind = owner if isinstance(owner, type) else type(owner)
        found, functions = dict[str, None](), [objective, kind]
        for function in functions:
            variables = {
                n: self._globals[n] for n in global_names(function) & self._globals.keys()
            }
            if isinstance(function, types.FunctionType):
                variables |= closure_variables(function)
            for name in sorted(variables):
                value = variables[name]
                if isinstance(value, _FUNCTIONS):
                    functions += [value] if value not in functions else []
                elif not isinstance(value, (type, types.ModuleType)) and self._fails(value):
                    found[name] = None
        return list(found)

    def _can_be_left_out(self, name: str) -> bool:
        """Return whether a global can't be pickled, but the trial creates it itself."""
        value = self._globals.get(name)
        if name in self._made_by_trial or isinstance(value, (type, types.ModuleType, *_FUNCTIONS)):
            return False
        return self._fails(value)

    def _fails(self, value: Any) -> bool:
        attempt = type(self)(self._remote, self._main, ())
        attempt._own_locks = self._own_locks
        try:
            attempt.dump(value)
        except Exception as error:  # noqa: BLE001 - a user's __reduce__ may raise anything
            return not isinstance(error, NeedsFork)
        return False

    def _is_made_by_definition(self, value: Any) -> bool:
        """Return whether the trial's main module defines an equal global itself."""
        if getattr(value, "__module__", None) in MAIN_NAMES:
            return self._is_named(value)
        return isinstance(value, (types.ModuleType, type, *_FUNCTIONS, types.BuiltinFunctionType))

    def _is_named(self, value: Any) -> bool:
        """Return whether the trial's main module defines the same object under its name."""
        if id(value) in self._by_name:
            return True
        if getattr(value, "__module__", None) not in MAIN_NAMES:
            return False
        try:
            path = value.__qualname__.split(".")
        except Exception:  # noqa: BLE001 - an object's __getattr__ may raise anything
            return False
        if path[0] not in self._main.names:
            if len(path) == 1:
                self._by_value[path[0]] = value
            return False
        found: Any = sys.modules["__main__"]
        for part in path:
            found = getattr(found, part, None)
        if found is not value:
            return False
        self._by_name[id(value)] = value
        return True

    def _take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Keep a large buffer out of the pickle; return whether to copy it in after all."""
        raw = buffer.raw()
        if raw.nbytes < _MIN_BUFFER:
            return True
        region = self._mapped.find(reducers.memory_address(raw), raw.nbytes, readonly=raw.readonly)
        self._buffers.append(raw if region is None else region)
        return False


def _pickle_by_value(modules: Iterable[types.ModuleType]) -> None:
    """Make cloudpickle send functions and classes of these modules by value, of no others.

    Trials in all threads see the same modules, so a registration serves all of them.
    """
    wanted = {module.__name__: module for module in modules}
    for name in _registered.keys() - wanted.keys():
        module = _registered.pop(name, None)
        with contextlib.suppress(ValueError):
            if module is not None:
                cloudpickle.unregister_pickle_by_value(module)
    known = cloudpickle.list_registry_pickle_by_value()
    for name, module in wanted.items():
        if name not in known:
            _registered[name] = module
            cloudpickle.register_pickle_by_value(module)


_registered: dict[str, types.ModuleType] = {}


# The latter is the class of cached functions.
_FUNCTIONS = (types.FunctionType, type(functools.cache(len)))


def _is_of_fork_context(lock: Any) -> bool:
    """Return whether no other process can open a lock of multiprocessing's by its name.

    Python itself notices from 3.11.5 on; before, a process that was sent one crashes.
    """
    return os.name == "posix" and lock._semlock.name is None


def _add_globals(found: dict[str, Any], function: types.FunctionType) -> None:
    """Add globals that cloudpickle misses: used by a class within the function, or by text."""
    names, known = set(names_in_code(function.__code__)), function.__globals__
    if names & BY_TEXT:  # as in `eval(name)`, where a hyperparameter is "optim.Adam"
        names.update(n for n, v in known.copy().items() if type(v) is types.ModuleType)
    found.update((name, known[name]) for name in sorted(names & known.keys() - found.keys()))


_NO_FILE = "<dynamic-code>"
_LOCKS = {type(make()): make for make in (threading.Lock, threading.RLock)}


def global_of_main(name: str) -> Any:
    return vars(sys.modules["__main__"])[name]


def add_sources(entries: dict[str, Any]) -> None:
    linecache.cache.update(entries)
