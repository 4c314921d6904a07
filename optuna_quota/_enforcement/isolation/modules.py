"""Which modules a trial needs, so that its template can have them loaded."""

from __future__ import annotations

from collections.abc import Iterable
import functools
import itertools
import pickletools
import site
import sys
import sysconfig


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


# Code comes first in a pickle; the elements of a long list after it are not worth reading.
_MOST_OPCODES = 20_000


def named_modules(pickled: bytes) -> list[str]:
    """Return the modules of this process whose names a pickle mentions: it will import them."""
    names: dict[str, None] = {}
    for _, argument, _ in itertools.islice(pickletools.genops(pickled), _MOST_OPCODES):
        if isinstance(argument, str):
            # The names of globals come as "module" or, in old protocols, as "module name".
            for name in (argument, argument.partition(" ")[0]):
                if name in sys.modules:
                    names[name] = None
    return list(names)


def can_preload(names: Iterable[str]) -> list[str]:
    """Return those modules that a template may import.

    Only installed ones: a user's own may be edited while the study's process runs, and each trial
    is to import what is there then.
    """
    folders = _installed_folders()
    return [
        name
        for name in names
        if name.partition(".")[0] not in _NEVER and _is_installed(name, folders)
    ]


def _is_installed(name: str, folders: tuple[str, ...]) -> bool:
    module = sys.modules.get(name.partition(".")[0])
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    if module is None:
        return False
    return origin in (None, "built-in", "frozen") or str(origin).startswith(folders)


@functools.cache
def _installed_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    if hasattr(site, "getsitepackages"):
        folders += site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return tuple(folders)
