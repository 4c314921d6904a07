"""Pickle an objective for a trial's process: by name, by value, or as a proxy.

Functions and classes that the trial's ``__main__`` has go by name, others of it and closures by
value, those of modules by name. A study, storage or trial that the objective refers to stays in
the study's process and is replaced by a proxy. Large arrays are not copied into the pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
import contextlib
import contextvars
import ctypes
from dataclasses import dataclass
import functools
import importlib
import inspect
import io
import mmap
from multiprocessing import context
from multiprocessing.reduction import ForkingPickler
from multiprocessing.synchronize import SemLock
import operator
import os
import pickle
import queue
import socket
import sys
import threading
import types
from typing import Any

import cloudpickle

from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.generators import (
    is_generator,
    reduce_generator,
    values_within_reach,
)
from optuna_quota._isolation.main_module import global_names, MAIN_NAMES, MainModule
from optuna_quota._isolation.modules import (
    modules_being_imported,
    plain_attributes,
    set_main_state,
    set_module_parts,
)
from optuna_quota._isolation.rpc import is_remote, proxy_at, RemoteObjects
from optuna_quota._isolation.tensors import reduce_tensor


# Smaller buffers are copied into the pickle; a message of its own for each would cost more.
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


@dataclass(frozen=True)
class Payload:
    """A pickled objective, with what is kept out of the pickle."""

    # The objective's, then those of calls that set up the modules it refers to, then that of None
    pickles: bytes
    # The memory of large arrays. It is sent from where it is and received where it stays, so that
    # it is held only once
    buffers: Sequence[pickle.PickleBuffer]
    descriptors: Sequence[int]  # Open files, which the pickle refers to by index

    @property
    def sizes(self) -> tuple[tuple[int, bool], ...]:
        return tuple((b.raw().nbytes, b.raw().readonly) for b in self.buffers)

    def send_buffers(self, channel: Channel) -> None:
        for buffer in self.buffers:
            channel.send_raw(buffer.raw())


def receive_buffers(channel: Channel, sizes: Iterable[tuple[int, bool]]) -> list[memoryview]:
    buffers = []
    for size, readonly in sizes:
        # Not on the heap: it goes back to the system when it is no longer used.
        buffer = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        channel.receive_raw(buffer)
        buffers.append(buffer.toreadonly() if readonly else buffer)
    return buffers


def load_objective(pickles: bytes, buffers: Iterable[memoryview]) -> Any:
    unpickler = pickle.Unpickler(io.BytesIO(pickles), buffers=buffers)
    objective = unpickler.load()
    while (call := unpickler.load()) is not None:
        function, *arguments = call
        function(*arguments)
    return objective


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
    """One attempt to pickle an objective, with globals that the trial's main module makes itself.

    ``failed`` is the name of a further one, such as a lock, that can't be pickled; without one,
    ``unpicklable`` names the variables of the script's functions that can't be.
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
        self._reducers = dict(_multiprocessing_reducers())
        self._buffers: list[pickle.PickleBuffer] = []
        self._spawning = _Spawning()
        self._own_locks: set[int] = set()
        self._seen: set[int] = set()
        self._by_name: dict[int, Any] = {}
        self._by_value: dict[str, Any] = {}

    def dump_payload(self, objective: Any) -> Payload:
        modules = modules_being_imported()
        _pickle_by_value(modules)
        # The script's may guard what all trials share, such as a file.
        reached = values_within_reach(objective)
        self._own_locks = {id(value) for value in reached if type(value) in _LOCKS}
        context.set_spawning_popen(self._spawning)  # type: ignore[arg-type]  # passes for one
        try:
            self.dump(objective)
            self._dump_main_state()
            self._dump_parts(modules)
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
        return Payload(self._file.getvalue(), self._buffers, self._spawning.descriptors)

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
            is_array = kind is _ARRAY_TYPE and hasattr(value, "_length_")  # not ctypes.Array
            if is_array and value is value._type_ * value._length_:
                return operator.mul, (value._type_, value._length_)
        elif kind in self._reducers:
            return self._reducers[kind](value)
        elif kind in _LOCKS and id(value) not in self._own_locks:
            # A library's object guards its own memory with it, of which the trial has a copy.
            return _LOCKS[kind], ()
        elif kind in _LIBRARIES or isinstance(value, _BETWEEN_THREADS):
            raise TypeError(f"cannot pickle '{kind.__module__}.{kind.__name__}' object")
        elif kind is contextvars.ContextVar:
            with contextlib.suppress(LookupError):
                return make_context_variable, (value.name, value.get())
            return contextvars.ContextVar, (value.name,)
        elif is_generator(value):
            return reduce_generator(value)
        elif isinstance(value, types.ModuleType) and kind is not types.ModuleType:
            # Cloudpickle knows plain modules alone. It takes `classes` in a function's code for
            # `torch.classes` where torch is loaded.
            if sys.modules.get(value.__name__) is value:
                return importlib.import_module, (value.__name__,)
        elif kind.__module__ in ("torch", "torch.storage"):
            reduced = reduce_tensor(value)
            if reduced is not None:
                return reduced
        return super().reducer_override(value)

    def _dump_main_state(self) -> None:
        """Dump the globals of what went by name, until nothing new does."""
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
        """Dump the functions and classes that were sent by value of modules being imported."""
        for module in modules:
            parts = {
                name: value
                for name, value in vars(module).copy().items()
                if id(value) in self._seen
                and getattr(value, "__module__", None) == module.__name__
            }
            if parts:
                self.dump((set_module_parts, module.__name__, parts))

    def _find_unpicklable(self, objective: Any) -> list[str]:
        found, functions = dict[str, None](), [objective]
        for function in functions:
            variables = {
                n: self._globals[n] for n in global_names(function) & self._globals.keys()
            }
            if isinstance(function, types.FunctionType):
                with contextlib.suppress(ValueError):  # a variable that is yet to be set
                    variables |= inspect.getclosurevars(function).nonlocals
            for name in sorted(variables):
                value = variables[name]
                if isinstance(value, _FUNCTIONS):
                    functions += [value] if value not in functions else []
                elif not isinstance(value, (type, types.ModuleType)) and self._fails(value):
                    found[name] = None
        return list(found)

    def _can_be_left_out(self, name: str) -> bool:
        """Return whether a global is one that can't be pickled and that the trial makes anew."""
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
        """Return whether the trial's main module has an equal global without its being sent."""
        if getattr(value, "__module__", None) in MAIN_NAMES:
            return self._is_named(value)
        return isinstance(value, (types.ModuleType, type, *_FUNCTIONS, types.BuiltinFunctionType))

    def _is_named(self, value: Any) -> bool:
        """Return whether the trial's main module has the same under the same name."""
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
        is_large = buffer.raw().nbytes >= _MIN_BUFFER
        if is_large:
            self._buffers.append(buffer)
        return not is_large


def _pickle_by_value(modules: Iterable[types.ModuleType]) -> None:
    """Let cloudpickle send the functions and classes of these modules by value, of no others.

    Trials in all threads find the same modules, so what one registers, another needs too.
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


# The latter is what a cached function is.
_FUNCTIONS = (types.FunctionType, type(functools.cache(len)))


def _is_of_fork_context(lock: Any) -> bool:
    """Return whether no other process can open a lock of multiprocessing's by its name.

    Python itself notices from 3.11.5 on; before, a process that was sent one crashes.
    """
    return os.name == "posix" and lock._semlock.name is None


_LOCKS = {type(make()): make for make in (threading.Lock, threading.RLock)}
# The class of ctypes' array types, which have no name of their own to be found by.
_ARRAY_TYPE = type(ctypes.c_char * 1)
_LIBRARIES = (ctypes.CDLL, ctypes.PyDLL)
# Copies of these would not do what they are for.
_BETWEEN_THREADS = (
    queue.Queue,
    threading.Barrier,
    threading.Condition,
    threading.Event,
    threading.Semaphore,
)


class InheritedDescriptor:
    """An open file on its way to a trial's process, by its index in the payload."""

    def __init__(self, index: int) -> None:
        self._index = index

    def detach(self) -> int:
        return inherited_descriptors[self._index]


# Filled in a trial's process.
inherited_descriptors: list[int] = []


class _Spawning:
    """Passes for the process that multiprocessing is about to spawn, to which locks may go."""

    method = "forkserver"
    DupFd = InheritedDescriptor

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def duplicate_for_child(self, descriptor: int) -> int:
        self.descriptors.append(descriptor)
        return len(self.descriptors) - 1


def _multiprocessing_reducers() -> dict[type, Callable[[Any], Any]]:
    """Return how multiprocessing alone pickles connections, sockets, shared memory.

    Not the tensors that torch adds there: one would be moved into shared memory, and the trial
    would write into the study's own.
    """
    found = {}
    for kind, reduce in ForkingPickler._extra_reducers.items():  # type: ignore[attr-defined]
        package, _, module = str(getattr(reduce, "__module__", "")).partition(".")
        if kind is socket.socket or (package == "multiprocessing" and module != "reduction"):
            found[kind] = reduce
    return found


def global_of_main(name: str) -> Any:
    return vars(sys.modules["__main__"])[name]


def make_context_variable(name: str, value: Any) -> contextvars.ContextVar[Any]:
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar(name)
    variable.set(value)
    return variable
