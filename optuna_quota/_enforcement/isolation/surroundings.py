"""What the objective finds around it: the same in its own process as in the study's."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
from dataclasses import dataclass
import importlib.machinery
import inspect
import multiprocessing
import os
import random
import sys
import types
from typing import Any


@dataclass(frozen=True)
class Surroundings:
    """Environment, working directory, import path, arguments, main module and random seeds.

    Attributes:
        environ: The environment variables.
        added: Those of them that the study's process does not have, or not so.
        folder: The working directory, None where it is gone.
        path: ``sys.path``.
        argv: ``sys.argv``.
        main_file: The script that runs.
        main_name: The module that runs by ``-m``.
        seeds: A seed for each global generator, drawn from the study's process: a script that
            seeds them gets the same trials again, and no two trials the same numbers.
        start_method: That of :mod:`multiprocessing`, None where none was chosen.
    """

    environ: Mapping[str, str]
    added: Mapping[str, str]
    folder: str | None
    path: tuple[str, ...]
    argv: tuple[str, ...]
    main_file: str | None
    main_name: str | None
    seeds: Mapping[str, int]
    start_method: str | None = None


def surroundings(environment: Mapping[str, str] | None = None) -> Surroundings:
    """Return those of this process.

    Args:
        environment: Environment variables to add or to replace.
    """
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    try:
        folder: str | None = os.getcwd()
    except OSError:
        folder = None
    return Surroundings(
        environ={**os.environ, **(environment or {})},
        added=dict(environment or {}),
        folder=folder,
        path=tuple(sys.path),
        argv=tuple(getattr(sys, "argv", ())),
        main_file=getattr(main, "__file__", None),
        main_name=None if spec is None else spec.name,
        seeds=_draw_seeds(),
        start_method=multiprocessing.get_start_method(allow_none=True),
    )


def enter(found: Surroundings) -> None:
    """Make this process's surroundings the same."""
    for name in set(os.environ) - set(found.environ):
        del os.environ[name]
    for name, value in found.environ.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    if found.folder is not None:
        with contextlib.suppress(OSError):
            os.chdir(found.folder)
    sys.path[:] = found.path
    sys.argv[:] = found.argv
    _renew_main(found)
    if found.start_method is not None:
        multiprocessing.set_start_method(found.start_method, force=True)


def seed(found: Surroundings) -> None:
    """Seed the global generators: a forked process would repeat its template's numbers."""
    for name, value in found.seeds.items():
        if name == "random":
            random.seed(value)
        elif name == "numpy" and "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(value)
        elif name == "torch" and "torch" in sys.modules:
            sys.modules["torch"].manual_seed(value)


def _draw_seeds() -> dict[str, int]:
    seeds = {"random": random.getrandbits(32)}
    if "numpy" in sys.modules:
        seeds["numpy"] = int(sys.modules["numpy"].random.randint(0, 2**31 - 1))
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "randint"):
        seeds["torch"] = int(torch.randint(0, 2**31 - 1, ()))
    return seeds


# The template's own main module must live on: clearing it would clear the code that runs.
_former_mains: list[types.ModuleType | None] = []


def _renew_main(found: Surroundings) -> None:
    """Put an empty ``__main__`` in place that tells where the script is.

    The script is never run again, so it needs no guard. Processes that the objective starts by
    multiprocessing's spawn find the script by this, as they would without isolation.
    """
    _former_mains.append(sys.modules.get("__main__"))
    main = types.ModuleType("__main__")
    if found.main_file is not None:
        main.__file__ = found.main_file
    if found.main_name is not None:
        main.__spec__ = importlib.machinery.ModuleSpec(found.main_name, None)
    sys.modules["__main__"] = main


def fill_main(objective: Any) -> None:
    """Let ``__main__`` hold what the objective took along from it.

    Classes and functions of a script travel by value. Picklers inside the objective, such as those
    of multiprocessing, look them up by name.
    """
    names = _globals_of(objective)
    if names.get("__name__") == "__main__":
        main = vars(sys.modules["__main__"])
        main.update({k: v for k, v in names.items() if not k.startswith("__")})


def _globals_of(objective: Any) -> Mapping[str, Any]:
    while True:
        inner = getattr(objective, "func", None) or getattr(objective, "__wrapped__", None)
        if inner is None:
            break
        objective = inner
    function = getattr(objective, "__func__", objective)
    if not inspect.isfunction(function):
        function = vars(type(objective)).get("__call__")
    found: Mapping[str, Any] = getattr(function, "__globals__", {})
    return found
