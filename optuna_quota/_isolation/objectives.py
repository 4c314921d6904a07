"""The objective on its way to a trial's process: what goes by name, by value, or stays here."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import contextvars
import functools
import io
from multiprocessing import context
from multiprocessing.reduction import ForkingPickler
from multiprocessing.synchronize import SemLock
import pickle
import socket
import sys
import types
from typing import Any

import cloudpickle
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import Trial

from optuna_quota._isolation.calls import Handle
from optuna_quota._isolation.child import proxy_of
from optuna_quota._isolation.main_module import MAIN_NAMES
from optuna_quota._isolation.main_module import MainModule
from optuna_quota._isolation.module_state import plain_attributes
from optuna_quota._isolation.modules import modules_under_way
from optuna_quota._isolation.payload import InheritedDescriptor
from optuna_quota._isolation.payload import Payload
from optuna_quota._isolation.process_context import global_of_main
from optuna_quota._isolation.process_context import MainState
from optuna_quota._isolation.process_context import make_context_variable
from optuna_quota._isolation.process_context import ModuleParts
from optuna_quota._isolation.tensors import reduce_tensor


# Smaller buffers are copied into the pickle; a message of its own for each would cost more.
_LEAST_BUFFER = 1 << 16


class NeedsFork(TypeError):
    """An objective refers to a lock of multiprocessing's that only a forked process can share."""

    def __init__(self) -> None:
        super().__init__(
            "The objective can't be sent to the trial's process because it refers to a lock or "
            "queue of multiprocessing's fork context. Make it by "
            "multiprocessing.get_context('spawn'), or use "
            "isolated(objective, start_method='fork')."
        )


class RemoteObjects:
    """The objects of one trial that stay in the study's process and are called from the child.

    Args:
        trial: The trial, which is the first of them.
    """

    def __init__(self, trial: Any) -> None:
        self._objects: list[Any] = [trial]

    def handle(self, found: Any) -> Handle:
        """Return the handle of an object, which stays."""
        for index, known in enumerate(self._objects):
            if known is found:
                return Handle(index, type(found))
        self._objects.append(found)
        return Handle(len(self._objects) - 1, type(found))

    def __getitem__(self, index: int) -> Any:
        return self._objects[index]


def is_remote(value: Any) -> bool:
    """Return whether an object belongs to the study's process: a copy of it would be another."""
    return isinstance(value, (Study, BaseStorage, Trial))


def dump_objective(objective: Any, remote: RemoteObjects, main: MainModule) -> Payload:
    """Return the pickle of an objective and of what it needs of the main module.

    Functions and classes that the trial's main module has go by name, others of it and closures
    by value, those of modules by name. Large arrays are not copied: the payload refers to them. A
    study that the objective refers to stays here, and the child gets a proxy. What only
    multiprocessing can send (queues, locks, connections) goes as to a child of its own.

    Raises:
        NeedsFork: If it refers to a lock or queue that only a fork can share.
        TypeError: If the objective refers to what can't be pickled.
    """
    missing: set[str] = set()
    while True:
        dump = _Dump(objective, remote, main, missing)
        try:
            return dump.run()
        except NeedsFork:
            raise
        except Exception as error:
            if dump.failed is not None:
                # The trial's main module makes its own, such as a lock.
                missing.add(dump.failed)
                continue
            raise TypeError(
                "The objective can't be sent to the trial's process because it, or something "
                f"that it refers to, can't be pickled ({error}). Create it inside the objective, "
                "or use isolated(objective, start_method='fork')."
            ) from error


class _Dump:
    """One attempt to pickle an objective.

    Attributes:
        failed: The global variable that could not be pickled although the trial's main module
            makes one itself; None when it was something else.
    """

    def __init__(
        self, objective: Any, remote: RemoteObjects, main: MainModule, without: set[str]
    ) -> None:
        self.failed: str | None = None
        self._remote = remote
        self._objective = objective
        self._main = main
        self._without = without
        self._file = io.BytesIO()
        self._buffers: list[pickle.PickleBuffer] = []
        self._spawning = _Spawning()
        self._named: dict[int, Any] = {}
        self._by_value: dict[str, Any] = {}
        module = vars(sys.modules["__main__"])
        left = {id(module[name]): name for name in without}
        self._pickler = _Pickler(self._file, remote, self._is_named, self._take_buffer, left)

    def run(self) -> Payload:
        modules = modules_under_way()
        _send_by_value(modules)
        context.set_spawning_popen(self._spawning)  # type: ignore[arg-type]  # passes for one
        try:
            self._pickler.dump(self._objective)
            count = self._dump_main_state() + self._dump_parts(modules)
        except NeedsFork:
            raise
        except Exception:
            self.failed = next(filter(self._can_do_without, sorted(self._main.names)), None)
            raise
        finally:
            context.set_spawning_popen(None)
        return Payload(
            self._file.getvalue(), count, tuple(self._buffers), tuple(self._spawning.descriptors)
        )

    def _dump_main_state(self) -> int:
        """Dump the globals of what went by name, until nothing new does; return how often."""
        module = sys.modules["__main__"]
        sent: set[str] = set(self._without)
        done: set[int] = set()
        count = 0
        while True:
            new = [v for k, v in list(self._named.items()) if k not in done]
            # Picklers within the trial, such as a pool's, look these up by name.
            values = {k: v for k, v in self._by_value.items() if k not in sent}
            if not new and not values:
                return count
            done |= {id(value) for value in new}
            sent |= values.keys()
            names = {name for value in new for name in global_names(value)} - sent
            for name in sorted(names & vars(module).keys()):
                sent.add(name)
                value = vars(module)[name]
                if not (name in self._main.names and self._is_made_there(value)):
                    values[name] = value
            attributes = {v.__qualname__: found for v in new if (found := plain_attributes(v))}
            if values or attributes:
                self._pickler.dump(MainState(values, attributes))
                count += 1

    def _dump_parts(self, modules: Iterable[types.ModuleType]) -> int:
        """Dump what was sent by value of modules that are being imported; return how often."""
        count = 0
        for module in modules:
            parts = {
                name: value
                for name, value in list(vars(module).items())
                if id(value) in self._pickler.seen
                and getattr(value, "__module__", None) == module.__name__
            }
            if parts:
                self._pickler.dump(ModuleParts(module.__name__, parts))
                count += 1
        return count

    def _can_do_without(self, name: str) -> bool:
        value = vars(sys.modules["__main__"]).get(name)
        if name in self._without or isinstance(value, (type, *_NAMED_KINDS, types.ModuleType)):
            return False
        try:
            _Pickler(io.BytesIO(), self._remote, self._is_named, lambda _: False, {}).dump(value)
        except NeedsFork:
            return False
        except Exception:  # noqa: BLE001 - a user's __reduce__ may raise anything
            return True
        return False

    def _is_made_there(self, value: Any) -> bool:
        """Note what goes by name; return whether a global need not be sent."""
        if isinstance(value, types.ModuleType):
            return True
        if getattr(value, "__module__", None) not in MAIN_NAMES:
            # Imported from elsewhere.
            return isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType))
        return self._is_named(value)

    def _is_named(self, value: Any) -> bool:
        """Return whether the trial's main module has the same under the same name."""
        if id(value) in self._named:
            return True
        if getattr(value, "__module__", None) not in MAIN_NAMES:
            return False
        path = getattr(value, "__qualname__", "").split(".")
        found: Any = sys.modules["__main__"]
        for part in path:
            found = getattr(found, part, None)
        if path[0] not in self._main.names:
            if len(path) == 1:
                self._by_value[path[0]] = value
            return False
        if found is not value:
            return False
        self._named[id(value)] = value
        return True

    def _take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Keep a large buffer out of the pickle; return whether to copy it in after all."""
        if buffer.raw().nbytes < _LEAST_BUFFER:
            return True
        self._buffers.append(buffer)
        return False


def _send_by_value(modules: Iterable[types.ModuleType]) -> None:
    """Let cloudpickle send the functions and classes of these modules by value, of no others.

    Any thread's trial finds the same modules, so that what one registers, another needs.
    """
    wanted = {module.__name__: module for module in modules}
    for name in _sent_by_value.keys() - wanted.keys():
        module = _sent_by_value.pop(name, None)
        with contextlib.suppress(ValueError):
            if module is not None:
                cloudpickle.unregister_pickle_by_value(module)
    known = cloudpickle.list_registry_pickle_by_value()
    for name, module in wanted.items():
        if name not in known:
            _sent_by_value[name] = module
            cloudpickle.register_pickle_by_value(module)


_sent_by_value: dict[str, types.ModuleType] = {}


def global_names(value: Any) -> set[str]:
    """Return the names of the globals that a function, class or callable of a script may use."""
    names: set[str] = set()
    seen: set[int] = set()
    todo = [value]
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, types.CodeType):
            names |= {*part.co_names}
            todo += [c for c in part.co_consts if isinstance(c, types.CodeType)]
        else:
            todo += _parts(part)
    return names


def _parts(value: Any) -> Iterator[Any]:
    """Yield the code and the functions that a callable is made of."""
    if isinstance(value, type):
        if value.__module__ in MAIN_NAMES:
            yield from vars(value).values()
            yield from value.__bases__
    elif isinstance(value, types.FunctionType):
        yield value.__code__
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                yield cell.cell_contents
        yield getattr(value, "__wrapped__", None)
        yield from vars(value).values()
    elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
        yield value.__func__
    elif isinstance(value, property):
        yield from (value.fget, value.fset, value.fdel)
    elif isinstance(value, functools.partial):
        yield value.func
    elif hasattr(value, "__wrapped__"):
        yield value.__wrapped__


# The latter is what a cached function is.
_NAMED_KINDS = (types.FunctionType, type(functools.lru_cache(global_names)))


_OF_TORCH = ("torch", "torch.storage")


class _Spawning:
    """Passes for the process that multiprocessing is about to spawn, to which locks may go."""

    method = "forkserver"
    DupFd = InheritedDescriptor

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def duplicate_for_child(self, descriptor: int) -> int:
        self.descriptors.append(descriptor)
        return len(self.descriptors) - 1


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped
    def __init__(
        self,
        file: io.BytesIO,
        remote: RemoteObjects,
        is_named: Callable[[Any], bool],
        take_buffer: Callable[[pickle.PickleBuffer], Any],
        left: Mapping[int, str],
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=take_buffer)
        self._remote = remote
        self._is_named = is_named
        self._left = left
        self._reducers = dict(_multiprocessing_reducers())
        self.seen: set[int] = set()

    def reducer_override(self, value: Any) -> Any:
        if is_remote(value):
            return (proxy_of, (self._remote.handle(value),))
        if id(value) in self._left:
            return (global_of_main, (self._left[id(value)],))
        if getattr(value, "_is_fork_ctx", False) is True and isinstance(value, SemLock):
            raise NeedsFork
        kind = type(value)
        if kind in _NAMED_KINDS or isinstance(value, type):
            self.seen.add(id(value))
            if self._is_named(value):
                return value.__qualname__
        elif kind in self._reducers:
            return self._reducers[kind](value)
        elif kind is contextvars.ContextVar:
            return make_context_variable, (value.name, *_value_of(value))
        elif kind.__module__ in _OF_TORCH and (reduced := reduce_tensor(value)) is not None:
            return reduced
        return super().reducer_override(value)


def _value_of(variable: contextvars.ContextVar[Any]) -> tuple[Any, ...]:
    try:
        return (variable.get(),)
    except LookupError:
        return ()


def _multiprocessing_reducers() -> Iterator[tuple[type, Callable[[Any], Any]]]:
    """Yield what only multiprocessing pickles: connections, sockets, shared memory.

    Not the tensors that torch adds there: one would be moved into shared memory, and the trial
    would write into the study's own.
    """
    for kind, reduce in ForkingPickler._extra_reducers.items():  # type: ignore[attr-defined]
        module = str(getattr(reduce, "__module__", ""))
        if module.startswith("multiprocessing.") and (
            module != "multiprocessing.reduction" or kind is socket.socket
        ):
            yield kind, reduce
