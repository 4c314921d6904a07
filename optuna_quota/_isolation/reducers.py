"""How objects of libraries are pickled for a trial's process, where cloudpickle is not enough.

Arrays and tensors go without the copies that numpy and torch make, or by the file that is mapped
to their memory. Locks, connections and shared memory go as multiprocessing sends them. In files
that a script has opened, such as its log, a trial goes on.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import contextvars
import copyreg
import ctypes
import gc
import importlib
import io
import multiprocessing
from multiprocessing.reduction import ForkingPickler
import operator
import os
import pickle
import queue
import socket
import stat
import sys
import threading
import types
from typing import Any

from optuna_quota._isolation import linux
from optuna_quota._isolation.payload import FileRegion, MappedFiles
from optuna_quota._isolation.random_generators import (
    is_generator,
    reduce_generator,
    values_within_reach,
)


# The class of ctypes' array types, which can't be looked up by name.
_ARRAY_TYPE = type(ctypes.c_char * 1)
_LIBRARIES = (ctypes.CDLL, ctypes.PyDLL)
# A copy of these in another process would not connect the two.
_BETWEEN_THREADS = (
    queue.Queue,
    threading.Barrier,
    threading.Condition,
    threading.Event,
    threading.Semaphore,
)


def reduce_library_object(value: Any, files: MappedFiles) -> Any:
    """Return the reduced value of an object, None if it is to be pickled as any other.

    Raises:
        TypeError: If it can't be pickled.
    """
    kind = type(value)
    if kind in _LIBRARIES or isinstance(value, _BETWEEN_THREADS):
        raise TypeError(f"cannot pickle '{kind.__module__}.{kind.__name__}' object")
    if kind.__name__ in _EXECUTORS and kind.__module__.startswith("concurrent.futures."):
        return _reduce_executor(value)
    if kind is contextvars.ContextVar:
        with contextlib.suppress(LookupError):
            return _make_context_variable, (value.name, value.get())
        return contextvars.ContextVar, (value.name,)
    if is_generator(value):
        return reduce_generator(value)
    # Cloudpickle knows plain modules alone. It takes `classes` in a function's code for
    # `torch.classes` where torch is loaded.
    if isinstance(value, types.ModuleType) and kind is not types.ModuleType:
        is_imported = sys.modules.get(value.__name__) is value
        return (importlib.import_module, (value.__name__,)) if is_imported else None
    if kind.__module__ in ("torch", "torch.storage"):
        return _reduce_tensor(value, files)
    if kind.__module__.partition(".")[0] == "loguru":
        return _reduce_logger(value)
    if hasattr(kind, "__getattr__"):
        return _reduce_delegate(value)
    return reduce_array(value, files)


def _reduce_delegate(value: Any) -> Any:
    """Reduce an object whose class has ``__getattr__``, such as a wrapper.

    Pickle looks up ``__setstate__`` on the new object while it is empty: a wrapper that delegates
    to one of its attributes recurses endlessly, and one that has any attribute returns nonsense.
    """
    kind = type(value)
    has_own_way = any(
        getattr(kind, name) is not getattr(object, name)
        for name in ("__reduce__", "__reduce_ex__")
    )
    if has_own_way or hasattr(kind, "__setstate__") or kind in copyreg.dispatch_table:
        return None
    make, arguments, state, *items = value.__reduce_ex__(4)
    return make, arguments, state, *items, _set_state


def _set_state(made: Any, state: Any) -> None:
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        object.__getattribute__(made, "__dict__").update(attributes)
    for name, held in (slots or {}).items():
        object.__setattr__(made, name, held)


def reduce_array_type(value: Any) -> Any:
    """Return the reduced value of a ctypes array type, None for any other class."""
    # ctypes.Array itself has no length.
    is_array = type(value) is _ARRAY_TYPE and hasattr(value, "_length_")
    if is_array and value is value._type_ * value._length_:
        return operator.mul, (value._type_, value._length_)
    return None


def _make_context_variable(name: str, value: Any) -> contextvars.ContextVar[Any]:
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar(name)
    variable.set(value)
    return variable


# Their attributes that say whether they were shut down.
_EXECUTORS = {"ThreadPoolExecutor": "_shutdown", "ProcessPoolExecutor": "_shutdown_thread"}
# Those of them that their constructors take, but for the context.
_EXECUTOR_ARGUMENTS = (
    "max_workers",
    "thread_name_prefix",
    "initializer",
    "initargs",
    "max_tasks_per_child",
)


def _reduce_executor(value: Any) -> Any:
    """Reduce an executor of threads or processes: a trial starts its own."""
    kind, held = type(value), vars(value)
    if held[_EXECUTORS[kind.__name__]]:
        raise TypeError(f"cannot pickle '{kind.__name__}' object after its shutdown")
    given = {name: held[f"_{name}"] for name in _EXECUTOR_ARGUMENTS if f"_{name}" in held}
    context = held.get("_mp_context")
    return _make_executor, (kind, given, None if context is None else context.get_start_method())


def _make_executor(kind: Any, given: dict[str, Any], method: str | None) -> Any:
    context = {} if method is None else {"mp_context": multiprocessing.get_context(method)}
    return kind(**given, **context)


def _reduce_logger(value: Any) -> Any:
    """Reduce a logger of loguru without its handlers; None for anything else."""
    module: Any = sys.modules.get("loguru")
    if module is None or type(value) is not type(module.logger):
        return None
    return _make_logger, tuple(value._options)


def _make_logger(*options: Any) -> Any:
    logger: Any = importlib.import_module("loguru").logger
    return logger if not any(options) else type(logger)(logger._core, *options)


# Arrays, tensors and thread-local objects.


# Copying less takes no time.
_MIN_BYTES = 1 << 16


def reduce_array(value: Any, files: MappedFiles) -> Any:
    """Reduce an array without a copy; None if numpy itself makes none.

    An array that is mapped from a file goes by the file's path. Others that numpy would copy into
    the pickle, of subclasses or with gaps, go as plain arrays without gaps.
    """
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray) or value.dtype.hasobject:
        return None
    kind, plain = type(value), numpy.ndarray
    if any(getattr(kind, name) is not getattr(plain, name) for name in _PICKLING):
        return None
    base = value
    while isinstance(base, plain) and base.base is not None:
        base = base.base
    if not isinstance(base, plain):
        first, low, high = _bounds(value)
        region = files.find(low, high - low, readonly=not value.flags.writeable)
        if region is not None:
            shown = {n: getattr(value, n) for n in _SHOWN} if kind is numpy.memmap else {}
            place = first - low
            return _map_array, (
                (kind, region, value.dtype, value.shape, place, value.strides),
                shown,
            )
    has_gaps = not (value.flags.c_contiguous or value.flags.f_contiguous)
    if value.nbytes < _MIN_BYTES or (kind is plain and not has_gaps):
        return None
    whole = value.view(plain)
    return _view_array, (kind, numpy.ascontiguousarray(whole) if has_gaps else whole)


_PICKLING = ("__reduce__", "__reduce_ex__", "__setstate__")
_SHOWN = ("filename", "offset", "mode")


def memory_address(memory: Any) -> int:
    numpy: Any = sys.modules["numpy"]  # which Optuna has imported
    return int(numpy.asarray(memory).__array_interface__["data"][0])


def _bounds(array: Any) -> tuple[int, int, int]:
    """Return the addresses of the first element, of the lowest byte and after the highest."""
    first = memory_address(array)
    if not array.size:
        return first, first, first
    spans = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    low = first + sum(span for span in spans if span < 0)
    return first, low, first + sum(span for span in spans if span > 0) + int(array.itemsize)


def _map_array(layout: tuple[Any, FileRegion, Any, Any, int, Any], shown: dict[str, Any]) -> Any:
    kind, region, dtype, shape, place, strides = layout
    numpy = sys.modules["numpy"]
    array = numpy.ndarray(shape, dtype, region.open(), place, strides).view(kind)
    for name, value in shown.items():
        setattr(array, name, value)
    return array


def _view_array(kind: Any, array: Any) -> Any:
    return array.view(kind)


def _reduce_tensor(value: Any, files: MappedFiles) -> Any:
    """Reduce a tensor or its storage without the copies of torch's own pickling.

    A tensor in shared memory stays shared, and one that is mapped from a file goes by its path. Of
    any other dense tensor on the CPU, the memory becomes a buffer. None for the rest, which torch
    pickles.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    reducers = {
        torch.Tensor: "reduce_tensor",
        torch.TypedStorage: "reduce_typed_storage",
        torch.UntypedStorage: "reduce_storage",
    }
    kind = type(value)
    if kind not in reducers:
        return None
    # A typed storage's own attributes are deprecated, each with a warning.
    memory = value._untyped_storage if kind is torch.TypedStorage else value
    if memory.device.type != "cpu":
        return None
    is_tensor = kind is torch.Tensor
    if is_tensor and (value.layout is not torch.strided or value.requires_grad or vars(value)):
        return None
    if is_tensor:
        storage = value.untyped_storage()
        region = files.find(storage.data_ptr(), storage.nbytes(), readonly=False)
        if region is not None:
            place = value.storage_offset()
            return _map_tensor, (region, value.dtype, tuple(value.shape), value.stride(), place)
    if memory.is_shared():
        reductions: Any = importlib.import_module("torch.multiprocessing.reductions")
        return getattr(reductions, reducers[kind])(value)
    if not is_tensor or not value.numel() or value.is_quantized:
        return None
    if value.is_conj() or value.is_neg():
        return None
    flat = value.contiguous().reshape(-1).view(torch.uint8)
    return _make_tensor, (pickle.PickleBuffer(flat.numpy()), value.dtype, tuple(value.shape))


def _map_tensor(
    region: FileRegion, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...], place: int
) -> Any:
    torch: Any = importlib.import_module("torch")
    # The rest is smaller than an element.
    count = region.size // dtype.itemsize
    return torch.frombuffer(region.open(), dtype=dtype, count=count).as_strided(
        shape, strides, place
    )


def _make_tensor(buffer: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    torch: Any = importlib.import_module("torch")
    writable = bytearray(buffer) if memoryview(buffer).readonly else buffer
    return torch.frombuffer(writable, dtype=torch.uint8).view(dtype).reshape(shape)


def reduce_local(value: threading.local, is_refused: Callable[[Any], bool]) -> Any:
    """Reduce an object with other attributes in each thread, such as a console of rich.

    Attributes that can't be pickled are left out, such as a connection of this thread: Python
    calls the constructor in each new thread, which creates them there.
    """
    # The constructor's arguments are in no attribute.
    parts = gc.get_referents(value)
    arguments = next((part for part in parts if type(part) is tuple), ())
    named = next((p for p in parts if type(p) is dict and all(type(k) is str for k in p)), {})
    attributes = {name: held for name, held in vars(value).items() if not is_refused(held)}
    return _make_local, (type(value), arguments, named, attributes)


def _make_local(
    kind: Any, arguments: tuple[Any, ...], named: dict[str, Any], attributes: dict[str, Any]
) -> Any:
    made = kind(*arguments, **named)
    vars(made).update(attributes)
    return made


# Multiprocessing.


class InheritedDescriptor:
    """An open file on its way to a trial's process, by its index in the payload."""

    def __init__(self, index: int) -> None:
        self._index = index

    def detach(self) -> int:
        return inherited_descriptors[self._index]


# Filled in a trial's process.
inherited_descriptors: list[int] = []


class SpawningProcess:
    """Stands in for the process that multiprocessing is about to spawn, which may get locks."""

    method = "forkserver"
    DupFd = InheritedDescriptor

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def duplicate_for_child(self, descriptor: int) -> int:
        self.descriptors.append(descriptor)
        return len(self.descriptors) - 1


def multiprocessing_reducers() -> dict[type, Callable[[Any], Any]]:
    """Return multiprocessing's own reducers: of connections, sockets, shared memory.

    Those that torch adds are left out: they move a tensor into shared memory, so that the trial
    would write into the study's.
    """
    found = {}
    for kind, reduce in ForkingPickler._extra_reducers.items():  # type: ignore[attr-defined]
        package, _, module = str(getattr(reduce, "__module__", "")).partition(".")
        if kind is socket.socket or (package == "multiprocessing" and module != "reduction"):
            found[kind] = reduce
    return found


_WRITERS = (io.BufferedWriter, io.BufferedRandom)


def reduce_open_file(value: Any, spawning: SpawningProcess) -> Any:
    """Return the reduced value of an open file on a disk, None for anything else.

    One that is written to is sent open, with its place, as to a fork: no line is written over
    another. One that is read is opened anew, at the same place. Text that is read is left to
    cloudpickle, which copies it. Without a supervisor, no file can be sent.
    """
    kind = type(value)
    if not linux.can_supervise():
        return None
    if kind is io.TextIOWrapper:
        if not (_is_on_disk(value) and type(value.buffer) in _WRITERS):
            return None
        value.flush()
        text = value.encoding, value.errors, value.line_buffering, value.mode
        return _make_text, (value.buffer, *text)
    if kind in _WRITERS and _is_on_disk(value):
        value.flush()
        opened = spawning.DupFd(spawning.duplicate_for_child(value.fileno()))
        return _make_binary, (kind, opened, value.raw.mode, value.name)
    if kind is io.BufferedReader and _is_on_disk(value):
        return _open_binary, (os.path.abspath(value.name), value.tell())
    return None


def flush_files_within_reach(objective: Any) -> list[Any]:
    """Write out the files that an objective may write to, and return them.

    A fork of this process then writes what it adds alone.
    """
    kinds = (io.TextIOWrapper, *_WRITERS)
    found = [v for v in values_within_reach(objective) if type(v) in kinds and _is_on_disk(v)]
    for file in found:
        file.flush()
    return found


def _is_on_disk(file: Any) -> bool:
    """Return whether a file is open, and still the one that has its name."""
    if file.closed or not isinstance(file.name, str):
        return False
    try:
        status = os.fstat(file.fileno())
        named = os.stat(file.name)
    except (OSError, ValueError):
        return False
    # /dev/null is written to as well.
    is_kept = stat.S_ISREG(status.st_mode) or (stat.S_ISCHR(status.st_mode) and file.writable())
    return is_kept and os.path.samestat(status, named)


def _make_text(binary: Any, encoding: str, errors: str, line_buffering: bool, mode: str) -> Any:
    # What ends a line was translated to is shown by no attribute.
    text: Any = io.TextIOWrapper(
        binary, encoding=encoding, errors=errors, newline="", line_buffering=line_buffering
    )
    text.mode = mode
    return text


def _make_binary(kind: Any, opened: InheritedDescriptor, mode: str, name: str) -> Any:
    raw: Any = io.FileIO(opened.detach(), mode)
    raw.name = name
    return kind(raw)


def _open_binary(path: str, place: int) -> Any:
    file = open(path, "rb")  # noqa: SIM115 - the objective's to close
    file.seek(place)
    return file
