"""What the objective finds around it: the same in its own process as in the study's."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import contextvars
from dataclasses import dataclass
import functools
import multiprocessing
import os
import random
import sys
import types
from typing import Any

from optuna_quota._isolation.after_import import after_import
from optuna_quota._isolation.main_module import MainModule
from optuna_quota._isolation.main_module import make_main_module
from optuna_quota._isolation.module_state import read_module_state
from optuna_quota._isolation.module_state import restore_module_state
from optuna_quota._isolation.module_state import set_attributes
from optuna_quota._isolation.modules import user_modules
from optuna_quota._isolation.process_settings import apply_settings
from optuna_quota._isolation.process_settings import read_settings


@dataclass(frozen=True)
class ProcessContext:
    """Environment, folder, import path, arguments, main module, settings and random seeds.

    Attributes:
        environ: The environment variables.
        added: Those of them that the study's process does not have, or not so.
        folder: The working directory, None where it is gone.
        path: ``sys.path``.
        argv: ``sys.argv``.
        main: How to make the main module.
        settings: Settings of the interpreter and of libraries.
        module_state: What the script has set in the user's own modules.
        seeds: A seed for each global generator, drawn from the study's process: a script that
            seeds them gets the same trials again, and no two trials the same numbers.
        start_method: That of :mod:`multiprocessing`, None where none was chosen.
        authkey: What processes of :mod:`multiprocessing` prove by that they belong together.
    """

    environ: Mapping[str, str]
    added: Mapping[str, str]
    folder: str | None
    path: tuple[str, ...]
    argv: tuple[str, ...]
    main: MainModule
    settings: Mapping[str, Any]
    module_state: Mapping[str, bytes]
    seeds: Mapping[str, int]
    start_method: str | None = None
    authkey: bytes = b""


def read_context(environment: Mapping[str, str] | None, main: MainModule) -> ProcessContext:
    """Return the context of this process.

    Args:
        environment: Environment variables to add or to replace.
        main: How to make the main module.
    """
    try:
        folder: str | None = os.getcwd()
    except OSError:
        folder = None
    return ProcessContext(
        environ={**os.environ, **(environment or {})},
        added=dict(environment or {}),
        folder=folder,
        path=tuple(sys.path),
        argv=tuple(getattr(sys, "argv", ())),
        main=main,
        settings=read_settings(),
        module_state=read_module_state(user_modules()),
        seeds=_draw_seeds(),
        start_method=multiprocessing.get_start_method(allow_none=True),
        authkey=bytes(multiprocessing.current_process().authkey),
    )


def enter_context(found: ProcessContext, *, has_main: bool) -> None:
    """Make this process's context the same.

    Args:
        found: The context of the study's process.
        has_main: Whether the main module was made already.
    """
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
    if found.start_method is not None:
        multiprocessing.set_start_method(found.start_method, force=True)
    multiprocessing.current_process().authkey = found.authkey
    if not has_main:
        make_main_module(found.main)
    apply_settings(found.settings, after_import)
    restore_module_state(found.module_state, after_import)


def seed(found: ProcessContext) -> None:
    """Seed the global generators: a forked process would repeat its template's numbers.

    Those of a library that only the objective imports begin all alike (torch), or by themselves
    at a point of their own (numpy).
    """
    for name, value in found.seeds.items():
        if name == "random":
            random.seed(value)
        elif name == "numpy":
            after_import("numpy", functools.partial(_seed_numpy, value))
        elif name == "torch":
            after_import("torch", functools.partial(_seed_torch, value))


def _seed_numpy(value: int, numpy: Any) -> None:
    numpy.random.seed(value)


def _seed_torch(value: int, torch: Any) -> None:
    torch.manual_seed(value)


def _draw_seeds() -> dict[str, int]:
    seeds = {"random": random.getrandbits(32)}
    if "numpy" in sys.modules:
        seeds["numpy"] = int(sys.modules["numpy"].random.randint(0, 2**31 - 1))
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "randint"):
        seeds["torch"] = int(torch.randint(0, 2**31 - 1, ()))
    else:
        seeds["torch"] = seeds["random"]
    return seeds


@dataclass(frozen=True)
class MainState:
    """What the main module of a trial's process is to hold beside what it has made itself.

    Attributes:
        values: Its global variables.
        attributes: Those of its classes and functions, by name.
    """

    values: Mapping[str, Any]
    attributes: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ModuleParts:
    """Functions and classes of a module that the trial's process must not import.

    Attributes:
        module: Its name.
        parts: What the objective refers to, by name.
    """

    module: str
    parts: Mapping[str, Any]


def hold_module_parts(found: ModuleParts) -> None:
    """Let a module of that name hold the parts, for pickles that name them."""
    module = sys.modules.setdefault(found.module, types.ModuleType(found.module))
    vars(module).update(found.parts)


def hold_main_state(state: MainState) -> None:
    """Let ``__main__`` hold what it holds in the study's process."""
    main = sys.modules["__main__"]
    vars(main).update(state.values)
    for path, attributes in state.attributes.items():
        owner: Any = main
        for part in path.split("."):
            owner = getattr(owner, part)
        set_attributes(owner, attributes)


def global_of_main(name: str) -> Any:
    """Return a global that the main module of a trial's process has made itself."""
    return vars(sys.modules["__main__"])[name]


def make_context_variable(name: str, *value: Any) -> contextvars.ContextVar[Any]:
    """Return a context variable with the value that it has in the study's process, if any."""
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar(name)
    for found in value:
        variable.set(found)
    return variable
