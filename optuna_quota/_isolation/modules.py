"""Which modules a trial's process is to have loaded before its objective starts."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
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


# They start threads or touch the GPU when imported, or take badly to a fork afterwards: each trial
# imports them itself.
_NEVER = {
    "cudf",
    "cupy",
    "cuml",
    "grpc",
    "horovod",
    "jax",
    "jaxlib",
    "mpi4py",
    "numba",
    "pycuda",
    "pynvml",
    "pyspark",
    "ray",
    "tensorflow",
    "__main__",
    "__mp_main__",
}
# They belong to whatever runs the user's code, or to this library.
_HOSTS = {
    "IPython",
    "_pytest",
    "debugpy",
    "hypothesis",
    "ipykernel",
    "ipywidgets",
    "optuna_quota",
    "pluggy",
    "pydevd",
    "pytest",
}
# What this library and Optuna import for their models, unless the user's code names it.
_OF_MODELS = {"cmaes", "pandas", "patsy", "scipy", "statsmodels"}


def modules_to_preload(*, everything: bool) -> list[str]:
    """Return the modules of this process that trials are to find loaded, in order.

    Args:
        everything: Whether to take what was imported anywhere, or only the packages that the
            user's own code names.
    """
    packages = packages_in_user_code()
    if everything:
        loaded = {name.partition(".")[0] for name in list(sys.modules)}
        packages |= loaded - _OF_MODELS
    packages -= _HOSTS
    return can_preload(name for name in list(sys.modules) if name.partition(".")[0] in packages)


def packages_in_user_code() -> set[str]:
    """Return the top-level packages that the script and its modules name, and these modules'."""
    own = user_modules()
    main = sys.modules.get("__main__")
    packages = {module.__name__.partition(".")[0] for module in own}
    for module in own if main is None else [*own, main]:
        packages |= packages_named_in(module)
    return packages


def packages_named_in(module: types.ModuleType) -> set[str]:
    """Return the top-level packages that a module's globals come from."""
    found = set()
    for value in list(vars(module).values()):
        name = (
            value.__name__
            if isinstance(value, types.ModuleType)
            else getattr(value, "__module__", None)
            if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType))
            else type(value).__module__
        )
        if isinstance(name, str):
            found.add(name.partition(".")[0])
    return found


def can_preload(names: Iterable[str]) -> list[str]:
    """Return those modules that can be imported before a fork."""
    found = []
    for name in names:
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        if (
            name.partition(".")[0] not in _NEVER
            and spec is not None
            and spec.name == name
            and not getattr(spec, "_initializing", False)
        ):
            found.append(name)
    return found


def user_modules() -> list[types.ModuleType]:
    """Return the user's own modules of this process: those of files that were not installed."""
    return list(_user_modules(loaded_modules()))


def loaded_modules() -> tuple[int, str]:
    """Return what changes when a module is imported: how many there are, and the newest."""
    return len(sys.modules), next(reversed(sys.modules))


@functools.lru_cache(maxsize=1)
def _user_modules(loaded: tuple[int, str]) -> list[types.ModuleType]:
    # There may be thousands, and this is asked for each trial.
    folders = _installed_folders()
    return [
        module
        for name, module in list(sys.modules.items())
        if name not in _NEVER
        and isinstance(module, types.ModuleType)
        and (file := getattr(module, "__file__", None))
        and not file.startswith(folders)
        and name.partition(".")[0] not in _HOSTS
    ]


def is_installed(file: str) -> bool:
    """Return whether a file belongs to an installed package or a program of the environment."""
    return file.startswith(_installed_folders())


def modules_being_imported() -> list[types.ModuleType]:
    """Return the user's own modules, but for the main one, that are still being imported.

    An import of one elsewhere would do again what it does here: run a study, if it does so now.
    """
    found = {}
    for frame in list(sys._current_frames().values()):
        at: types.FrameType | None = frame
        while at is not None:
            name = at.f_globals.get("__name__")
            module = sys.modules.get(name) if isinstance(name, str) else None
            if at.f_code.co_name == "<module>" and at.f_globals is getattr(
                module, "__dict__", None
            ):
                found[name] = module
            at = at.f_back
    return [
        module
        for name, module in found.items()
        if name not in _NEVER
        and module is not None
        and (file := getattr(module, "__file__", None))
        and not is_installed(file)
    ]


def modification_times(names: Iterable[str]) -> dict[str, int]:
    """Return when the files of the user's own among some modules were last changed."""
    own = {module.__name__: module.__file__ for module in user_modules()}
    found = {}
    for name in names:
        file = own.get(name)
        if file is not None:
            found[file] = modified(file)
    return found


def modified(file: str) -> int:
    """Return when a file was last changed in nanoseconds, 0 when it is gone."""
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return 0


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
