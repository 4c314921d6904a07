"""Finds the user's own modules, and those to load before trials are forked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import site
import sys
import sysconfig
import types
from typing import Any


# Each trial imports these itself: they start threads when imported or can't be used after a fork,
# or use the GPU.
_THREADED = {"grpc", "horovod", "jax", "jaxlib", "mpi4py", "numba", "pyspark", "ray", "tensorflow"}
_ON_GPU = {"cudf", "cuml", "cupy", "pycuda", "pynvml"}
_NEVER = {*_THREADED, *_ON_GPU, "__main__", "__mp_main__"}
# They run the user's code, or belong to this library.
_NOTEBOOKS = {"IPython", "ipykernel", "ipywidgets"}
_TEST_TOOLS = {"_pytest", "debugpy", "hypothesis", "pluggy", "pydevd", "pytest"}
_HOSTS = {*_NOTEBOOKS, *_TEST_TOOLS, "optuna_quota"}
# Imported by this library and Optuna for their models; left out unless the user's code names them.
_OF_MODELS = {"cmaes", "pandas", "patsy", "scipy", "statsmodels"}


def modules_to_preload(*, everything: bool) -> list[str]:
    """Return the modules of this process that trials are to find loaded, in order.

    Args:
        everything: Whether to take all imported modules, or only those of packages that the
            user's own code names.
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
    """Return those modules that can be imported before a fork."""
    found = []
    for name in names:
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if (
            _package(name) not in _NEVER
            and spec is not None
            and spec.name == name
            and not getattr(spec, "_initializing", False)
        ):
            found.append(name)
    return found


def _package(module: str) -> str:
    return module.partition(".")[0]


def _packages_of_globals(module: types.ModuleType | None) -> set[str]:
    found, name = set(), None
    for value in list(getattr(module, "__dict__", {}).values()):
        if isinstance(value, types.ModuleType):
            name = value.__name__
        elif isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            name = getattr(value, "__module__", None)
        else:
            name = type(value).__module__
        if isinstance(name, str):
            found.add(_package(name))
    return found


def user_modules() -> list[types.ModuleType]:
    """Return the user's own modules: those of files that were not installed, but ``__main__``."""
    return list(_user_modules(loaded_modules()))


def loaded_modules() -> tuple[int, str]:
    """Return a key that changes with each import: the number of modules, and the newest."""
    return len(sys.modules), next(reversed(sys.modules))


@functools.lru_cache(maxsize=1)
def _user_modules(loaded: tuple[int, str]) -> list[types.ModuleType]:
    # There may be thousands of modules, and this is called for each trial.
    return [module for name, module in list(sys.modules.items()) if _is_users(name, module)]


def _is_users(name: str, module: types.ModuleType | None) -> bool:
    if name in _NEVER or _package(name) in _HOSTS or not isinstance(module, types.ModuleType):
        return False
    file = getattr(module, "__file__", None)
    return file is not None and not is_installed(file)


def is_installed(file: str) -> bool:
    """Return whether a file belongs to an installed package or a program of the environment."""
    return file.startswith(_installed_folders())


@functools.cache
def _installed_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")]
    if hasattr(site, "getsitepackages"):
        folders += site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    # This library itself, wherever it is installed from.
    folders.append(os.path.dirname(os.path.dirname(__file__)))
    return tuple(os.path.join(folder, "") for folder in folders if folder)


def module_frames() -> Iterator[types.FrameType]:
    """Yield the frames of all threads that execute the body of a module, innermost first."""
    for frame in list(sys._current_frames().values()):
        at: types.FrameType | None = frame
        while at is not None:
            if at.f_code.co_name == "<module>":
                yield at
            at = at.f_back


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
    """Return when the files of those modules that are the user's own were last changed."""
    own = {module.__name__: module.__file__ for module in user_modules()}
    files = [file for name in names if (file := own.get(name)) is not None]
    return {file: modified(file) for file in files}


def modified(file: str) -> int:
    """Return when a file was last changed in nanoseconds, 0 for a removed one."""
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return 0


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
