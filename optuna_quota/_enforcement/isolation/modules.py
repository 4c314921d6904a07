"""Which modules a trial's process is to have loaded before its objective starts."""

from __future__ import annotations

from collections.abc import Iterable
import functools
import os
import site
import sys
import sysconfig
import types


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
# They belong to whatever runs the user's code.
_HOSTS = {"IPython", "_pytest", "debugpy", "ipykernel", "ipywidgets", "pluggy", "pydevd", "pytest"}


def modules_to_preload() -> list[str]:
    """Return the modules that the user's own code has imported here, in order.

    Those are the packages that the script and its modules name, with all of them that is loaded,
    and these modules themselves. What only the runner of a notebook or of tests needs is left out.
    """
    own = user_modules()
    packages = {m.__name__.partition(".")[0] for m in own}
    for module in (*own, sys.modules.get("__main__")):
        if module is not None:
            packages |= packages_named_in(module)
    packages -= _HOSTS
    return can_preload(name for name in list(sys.modules) if name.partition(".")[0] in packages)


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
        if name.partition(".")[0] not in _NEVER and spec is not None and spec.name == name:
            found.append(name)
    return found


def user_modules() -> list[types.ModuleType]:
    """Return the user's own modules of this process: those of files that were not installed."""
    return list(_user_modules(len(sys.modules)))


@functools.lru_cache(maxsize=1)
def _user_modules(count: int) -> list[types.ModuleType]:
    # There may be thousands of modules; as long as they are as many, they are the same.
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
    folders.append(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    return tuple(os.path.join(folder, "") for folder in folders if folder)
