"""Modules: which are the user's own, what to load before trials are forked, what to carry over.

A script that sets ``config.SCALE = 10`` or ``Config.epochs = 3`` in a module of the user's means
its trials as well, which import that module again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import functools
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import operator
import os
from pathlib import Path
import pickle
import re
import site
import sys
import sysconfig
import threading
import types
from typing import Any


# Each trial imports these itself: they start threads when imported or can't be used after a fork,
# or use the GPU.
_THREADED = {
    *("eventlet", "gevent", "grpc", "horovod", "jax", "jaxlib", "mpi4py", "numba", "pyspark"),
    *("ray", "tensorflow"),
}
_ON_GPU = {"cudf", "cuml", "cupy", "pycuda", "pynvml"}
_NEVER = {*_THREADED, *_ON_GPU, "__main__", "__mp_main__"}
# They run the user's code, or belong to this library.
_NOTEBOOKS = {"IPython", "ipykernel", "ipywidgets"}
_TEST_TOOLS = {"_pytest", "debugpy", "hypothesis", "pluggy", "pydevd", "pytest"}
_HOSTS = {*_NOTEBOOKS, *_TEST_TOOLS, "optuna_quota"}
# Imported by this library and Optuna for their models; left out unless the user's code names them.
_OF_MODELS = {"cmaes", "pandas", "patsy", "scipy", "statsmodels"}


# What to load before trials are forked.


def modules_to_preload(*, everything: bool) -> list[str]:
    """Return the modules of this process that trials are to find loaded, in order.

    Of all that are imported, or of the packages alone that the user's own code names.
    """
    own = user_modules()
    packages = {_package(module.__name__) for module in own}
    for module in [*own, sys.modules.get("__main__")]:
        packages |= _packages_of_globals(module)
    if everything:
        packages |= {_package(name) for name in list(sys.modules)} - _OF_MODELS
    packages -= _HOSTS
    return can_preload(name for name in list(sys.modules) if _package(name) in packages)


def can_preload(names: Iterable[str]) -> list[str]:
    return [name for name in names if _package(name) not in _NEVER and _is_loaded(name)]


def _is_loaded(name: str) -> bool:
    """Return whether a module is loaded under its own name, and not half imported."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and spec.name == name and not getattr(spec, "_initializing", False)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _packages_of_globals(module: types.ModuleType | None) -> set[str]:
    found = set()
    for value in list(getattr(module, "__dict__", {}).values()):
        if isinstance(value, types.ModuleType):
            name: Any = value.__name__
        else:
            is_named = isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType))
            # A class that was made in a namespace without a name has none.
            name = getattr(value if is_named else type(value), "__module__", None)
        if isinstance(name, str):
            found.add(_package(name))
    return found


# The user's own modules.


def user_modules() -> list[types.ModuleType]:
    """Return the user's own modules: those of files that were not installed, but ``__main__``."""
    return list(_user_modules(loaded_modules()))


def loaded_modules() -> tuple[int, str]:
    """Return a key that changes with each import: the number of modules, and the newest."""
    return len(sys.modules), next(reversed(sys.modules))


@functools.lru_cache(maxsize=1)
def _user_modules(loaded: tuple[int, str]) -> list[types.ModuleType]:
    # There may be thousands of modules, and this is called for each trial.
    return [module for name, module in sys.modules.copy().items() if _is_users(name, module)]


def _is_users(name: str, module: types.ModuleType | None) -> bool:
    if name in _NEVER or _package(name) in _HOSTS or not isinstance(module, types.ModuleType):
        return False
    file = getattr(module, "__file__", None)
    return file is not None and not is_installed(file)


def is_installed(file: str) -> bool:
    return file.startswith(_installed_prefixes(tuple(sys.path)))


@functools.lru_cache(maxsize=4)
def _installed_prefixes(searched: Sequence[Any]) -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")]
    if hasattr(site, "getsitepackages"):
        folders += site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    # This library itself, wherever it is installed from.
    folders.append(os.path.dirname(os.path.dirname(__file__)))
    prefixes = [os.path.join(folder, "") for folder in folders if folder]
    for folder in filter(None, searched):
        if isinstance(folder, str) and not os.path.join(folder, "").startswith(tuple(prefixes)):
            prefixes += _packages_in(folder)
    return tuple(prefixes)


@functools.lru_cache(maxsize=256)
def _packages_in(folder: str) -> list[str]:
    """Return the paths of what ``pip install --target`` has put there, as on a shared disk.

    By name, as an application and its libraries may stand in one folder.
    """
    found = set()
    with contextlib.suppress(OSError):
        for record in Path(folder).glob("*.dist-info/RECORD"):
            text = record.read_text(encoding="utf-8", errors="replace")
            found.update(re.findall(r"^[^/,\n]+/?", text, re.MULTILINE))
    return [os.path.join(folder, name) for name in found]


def module_frames() -> Iterator[types.FrameType]:
    """Yield the frames of all threads that execute the body of a module, innermost first."""
    for frame in _current_frames():
        at: types.FrameType | None = frame
        while at is not None:
            if at.f_code.co_name == "<module>":
                yield at
            at = at.f_back


# Held while garbage collection is off: of two threads, one would leave it off for good.
_no_collection = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_no_collection.acquire,
        after_in_parent=_no_collection.release,
        after_in_child=_no_collection.release,
    )


def _current_frames() -> list[types.FrameType]:
    """Return the innermost frame of each thread.

    Python 3.11 before 3.11.9 holds its lock on the list of threads meanwhile. A collection within
    waits for it without end, with the interpreter lock held, if it frees a ``threading.local``,
    which each study has: https://github.com/python/cpython/issues/106883.
    """
    with _no_collection:
        is_on = gc.isenabled()
        gc.disable()
        try:
            return list(sys._current_frames().values())
        finally:
            if is_on:
                gc.enable()


def modules_being_imported() -> list[types.ModuleType]:
    """Return the user's own modules that are still being imported, but ``__main__``.

    Their import in another process would do again what it does here, such as running a study.
    """
    found: dict[str, types.ModuleType] = {}
    for frame in module_frames():
        name = str(frame.f_globals.get("__name__"))
        module = sys.modules.get(name)
        if getattr(module, "__dict__", None) is frame.f_globals and _is_users(name, module):
            found[name] = sys.modules[name]
    return list(found.values())


def modification_times(names: Iterable[str]) -> dict[str, int]:
    own = {module.__name__: module.__file__ for module in user_modules()}
    files = [file for name in names if (file := own.get(name)) is not None]
    return {file: modified(file) for file in files}


def modified(file: str) -> int:
    """Return when a file was last changed in nanoseconds, 0 for a removed one."""
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return 0


# Modules that are imported later.


def after_import(name: str, act: Callable[[types.ModuleType], None]) -> None:
    """Call back with a module once it is imported; at once if it is already."""
    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, act))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module as other finders do, and acts after it was executed."""

    def __init__(self, name: str, act: Callable[[types.ModuleType], None]) -> None:
        self._name = name
        self._act = act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                self._act(module)

            loader.exec_module = exec_module
        return spec


# State that a script has changed.

# Objects with a larger pickle are data, which the module loads itself.
_MAX_PICKLE = 1 << 14
_MAX_ITEMS = 200
_CONTAINERS = (list, tuple, set, frozenset, dict)


class _Attributes(dict[str, Any]):
    """Attributes of a class."""


class _Pickled(bytes):
    """The pickle of an object, to be loaded when its module is there."""


def is_plain(value: Any, depth: int = 4, *, subclasses: bool = False) -> bool:
    """Return whether a value is made of numbers, texts and small containers of them.

    Containers may be nested so deep, and be of subclasses, such as dictionaries with attributes.
    """
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return True
    is_container = isinstance(value, _CONTAINERS) if subclasses else type(value) in _CONTAINERS
    if depth == 0 or not is_container or len(value) > _MAX_ITEMS:
        return False
    parts = [*value, *(value.values() if isinstance(value, dict) else ())]
    if subclasses:
        parts += getattr(value, "__dict__", {}).values()
    return all(is_plain(part, depth - 1, subclasses=subclasses) for part in parts)


def plain_attributes(value: Any) -> dict[str, Any]:
    return {
        name: found
        for name, found in dict(getattr(value, "__dict__", {})).items()
        if not name.startswith("_") and is_plain(found)
    }


def read_module_state(modules: Iterable[types.ModuleType]) -> dict[str, bytes]:
    """Return the pickled state of a user's modules: plain globals, class attributes, objects."""
    found = {module.__name__: _read(module) for module in modules}
    return {name: pickle.dumps(state) for name, state in found.items() if state}


def _read(module: types.ModuleType) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in vars(module).copy().items():
        if name.startswith("__") or isinstance(value, (types.ModuleType, types.FunctionType)):
            continue
        if isinstance(value, type):
            if value.__module__ == module.__name__:
                state[name] = _Attributes(plain_attributes(value))
        elif is_plain(value):
            state[name] = value
        elif (data := _dump_small(value)) is not None:
            state[name] = _Pickled(data)
    return state


def _dump_small(value: Any) -> bytes | None:
    # Finding out the size of models and arrays would take too long.
    if hasattr(type(value), "__array__"):
        return None
    try:
        held = value if isinstance(value, _CONTAINERS) else vars(value)
        if not is_plain(held, depth=5, subclasses=True):
            return None
        data = pickle.dumps(value)
    except Exception:  # noqa: BLE001 - a user's __getattr__ or __reduce__ may raise anything
        return None
    return data if len(data) <= _MAX_PICKLE else None


def restore_module_state(states: Mapping[str, bytes]) -> None:
    """Set what differs, in imported modules now and in others once they are imported."""
    for name, data in states.items():
        after_import(name, functools.partial(_restore, data))


def _restore(data: bytes, module: types.ModuleType) -> None:
    for name, state in pickle.loads(data).items():
        value = vars(module).get(name)
        if isinstance(state, _Attributes):
            set_attributes(value, state)
        elif isinstance(state, _Pickled):
            with contextlib.suppress(Exception):  # its class may be gone from an edited module
                _assign(module, name, pickle.loads(state))
        elif not _is_same(value, state):
            _assign(module, name, state)


def _assign(module: types.ModuleType, name: str, state: Any) -> None:
    """Let a global have a value, in place where other names may refer to the same object."""
    value: Any = vars(module).get(name)
    if type(value) is type(state) and not hasattr(type(value), "__slots__"):
        if isinstance(value, (dict, set)):
            value.clear()
            value.update(state)
        elif isinstance(value, list):
            value[:] = state
        if hasattr(value, "__dict__"):
            vars(value).clear()
            vars(value).update(vars(state))
        if hasattr(value, "__dict__") or isinstance(value, (dict, set, list)):
            return
    setattr(module, name, state)


def set_attributes(owner: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if not _is_same(getattr(owner, name, None), value):
            with contextlib.suppress(AttributeError, TypeError):  # read-only by now
                setattr(owner, name, value)


def _is_same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


def set_main_state(values: Mapping[str, Any], attributes: Mapping[str, Mapping[str, Any]]) -> None:
    main = sys.modules["__main__"]
    vars(main).update(values)
    for path, found in attributes.items():
        set_attributes(operator.attrgetter(path)(main), found)


def set_module_parts(name: str, parts: Mapping[str, Any]) -> None:
    """Set functions and classes of a module that the trial's process must not import."""
    module = sys.modules.setdefault(name, types.ModuleType(name))
    vars(module).update(parts)
