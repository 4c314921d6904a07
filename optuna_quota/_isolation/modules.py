"""Finds the user's own modules, and the modules to load before trials are forked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import functools
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import os
from pathlib import Path
import re
import site
import sys
import sysconfig
import threading
import types
from typing import Any


# Each trial imports these itself: they start threads on import, can't be used after a fork, or use
# the GPU.
_THREADED = {
    *("eventlet", "gevent", "grpc", "horovod", "jax", "jaxlib", "mpi4py", "numba", "pyspark"),
    *("ray", "tensorflow"),
}
_ON_GPU = {"cudf", "cuml", "cupy", "pycuda", "pynvml"}
LEFT_TO_TRIALS = {*_THREADED, *_ON_GPU, "__main__", "__mp_main__"}
# They run the user's code, or belong to this library.
_NOTEBOOKS = {"IPython", "ipykernel", "ipywidgets"}
_TEST_TOOLS = {"_pytest", "debugpy", "hypothesis", "pluggy", "pydevd", "pytest"}
_HOSTS = {*_NOTEBOOKS, *_TEST_TOOLS, "optuna_quota"}
# Imported by this library and Optuna for their own models: loaded only if the user's code names
# them.
_OF_MODELS = {"cmaes", "pandas", "patsy", "scipy", "statsmodels"}


# What to load before trials are forked.

# The code behind `os.environ.update` and the like.
_OF_ENVIRON = {os.environ.copy.__code__.co_filename, os.environ.update.__code__.co_filename}


def modules_to_preload(*, everything: bool) -> list[str]:
    """Return the modules of this process to load for trials, in order.

    Either all imported modules, or only those of packages that the user's own code names.
    """
    own = user_modules()
    packages = {_package(module.__name__) for module in own}
    for module in [*own, sys.modules.get("__main__")]:
        packages |= _packages_of_globals(module)
    if everything:
        packages |= {_package(name) for name in list(sys.modules)} - _OF_MODELS
    packages -= _HOSTS
    return can_preload(name for name in list(sys.modules) if _package(name) in packages)


class LateImports:
    """Records which modules of loaded packages a trial imports, to load them for later trials.

    Many packages import parts of themselves on first use, torch 800 modules with its first
    optimizer: over a second of each trial. If the user's code sets environment variables in a
    trial, which these modules may read on import, each trial continues to import them itself.
    """

    def __init__(self) -> None:
        self._loaded = set(sys.modules)
        self._sets_variables = False
        for name in ("__setitem__", "__delitem__"):
            self._watch(type(os.environ), name)

    def _watch(self, cls: Any, name: str) -> None:
        method = getattr(cls, name)

        def watched(environ: Any, *args: str) -> None:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename in _OF_ENVIRON:
                frame = frame.f_back
            if environ is os.environ and not is_installed(frame.f_code.co_filename):
                self._sets_variables = True
            method(environ, *args)

        setattr(cls, name, watched)

    def found(self) -> tuple[str, ...]:
        if len(sys.modules) == len(self._loaded) or self._sets_variables:
            return ()
        packages = {_package(name) for name in self._loaded} - _HOSTS
        late = [name for name in list(sys.modules) if name not in self._loaded]
        return tuple(
            name
            for name in can_preload(name for name in late if _package(name) in packages)
            if is_installed(getattr(sys.modules[name], "__file__", None) or "")
        )


def can_preload(names: Iterable[str]) -> list[str]:
    return [name for name in names if _package(name) not in LEFT_TO_TRIALS and _is_loaded(name)]


def _is_loaded(name: str) -> bool:
    """Return whether a module is completely imported, under its own name."""
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
    """Return the user's own modules, whose files were not installed, without ``__main__``."""
    return list(_user_modules(loaded_modules()))


def loaded_modules() -> tuple[int, str]:
    """Return a key that changes with each import: the number of modules, and the newest."""
    return len(sys.modules), next(reversed(sys.modules))


@functools.lru_cache(maxsize=1)
def _user_modules(loaded: tuple[int, str]) -> list[types.ModuleType]:
    # There may be thousands of modules, and this is called for each trial.
    return [module for name, module in sys.modules.copy().items() if _is_users(name, module)]


def _is_users(name: str, module: types.ModuleType | None) -> bool:
    if (
        name in LEFT_TO_TRIALS
        or _package(name) in _HOSTS
        or not isinstance(module, types.ModuleType)
    ):
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
    """Return the paths of what ``pip install --target`` has installed in a folder.

    By name, as an application may be in the same folder as its libraries.
    """
    found = set()
    with contextlib.suppress(OSError):
        for record in Path(folder).glob("*.dist-info/RECORD"):
            text = record.read_text(encoding="utf-8", errors="replace")
            found.update(re.findall(r"^[^/,\n]+/?", text, re.MULTILINE))
    return [os.path.join(folder, name) for name in found]


def closure_variables(function: types.FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not filled yet
            found[name] = cell.cell_contents
    return found


def module_frames() -> Iterator[types.FrameType]:
    """Yield the frames of all threads that execute the body of a module, innermost first."""
    for frame in _current_frames():
        at: types.FrameType | None = frame
        while at is not None:
            if at.f_code.co_name == "<module>":
                yield at
            at = at.f_back


# Held while garbage collection is off: two threads at once could leave it off permanently.
_no_collection = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_no_collection.acquire,
        after_in_parent=_no_collection.release,
        after_in_child=_no_collection.release,
    )


def _current_frames() -> list[types.FrameType]:
    """Return the innermost frame of each thread.

    Python 3.11 before 3.11.9 holds its lock on the list of threads meanwhile. A garbage collection
    at that moment is a deadlock if it frees a ``threading.local``, which each study has:
    https://github.com/python/cpython/issues/106883.
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
    """Return the user's own modules that are still being imported, except ``__main__``.

    Importing them in another process would repeat what they do here, such as running a study.
    """
    found: dict[str, types.ModuleType] = {}
    for frame in module_frames():
        name = str(frame.f_globals.get("__name__"))
        module = sys.modules.get(name)
        if getattr(module, "__dict__", None) is frame.f_globals and _is_users(name, module):
            found[name] = sys.modules[name]
    return list(found.values())


def modules_without_import() -> list[types.ModuleType]:
    """Return the modules that no other process can import by their name.

    They were created by code, or loaded from a path, as OptunaHub loads its packages.
    """
    return list(_modules_without_import(loaded_modules(), tuple(sys.path)))


@functools.lru_cache(maxsize=1)
def _modules_without_import(
    loaded: tuple[int, str], path: tuple[Any, ...]
) -> list[types.ModuleType]:
    of_files = [module for module in user_modules() if not _is_found(module.__name__)]
    made = [m for name, m in sys.modules.copy().items() if _is_made_by_code(name, m)]
    return [m for m in (*of_files, *made) if sys.modules.get(m.__name__) is m]


def _is_found(name: str) -> bool:
    """Return whether an import by this name finds the file that is loaded under it."""
    parent, module = name.rpartition(".")[0], sys.modules.get(name)
    path = getattr(sys.modules.get(parent), "__path__", None)
    if parent and (path is None or not _is_found(parent)):
        return False
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path)
        if spec is not None:
            file = getattr(module, "__file__", None)
            return file is None or not spec.has_location or _is_same_file(file, str(spec.origin))
    return False


def _is_same_file(path: str, other: str) -> bool:
    with contextlib.suppress(OSError):
        return path == other or os.path.samefile(path, other)
    return False


def _is_made_by_code(name: str, module: types.ModuleType | None) -> bool:
    # Libraries create some of their submodules, and do so in the trial as well.
    owners = (module, sys.modules.get(_package(name)))
    return (
        type(module) is types.ModuleType
        and name not in LEFT_TO_TRIALS
        and all(getattr(owner, "__spec__", None) is None for owner in owners)
        and not hasattr(module, "__file__")
        and any(
            getattr(v, "__globals__", None) is vars(module) for v in list(vars(module).values())
        )
    )


def modification_times(names: Iterable[str]) -> dict[str, int]:
    own = {module.__name__: module.__file__ for module in user_modules()}
    files = [file for name in names if (file := own.get(name)) is not None]
    return {file: modified(file) for file in files}


def modified(file: str) -> int:
    """Return when a file was last changed, in nanoseconds; 0 if it was removed."""
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
