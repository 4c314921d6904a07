"""Give a trial's process the environment and settings of the study's process.

Each setting of the interpreter or of a library is read in the study's process and applied in the
trial's where it differs, or as soon as the library is imported there. Settings of libraries that
the study's process has not imported are left alone. Random generators are no settings: copies
would repeat each other's numbers, so each trial seeds its own.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
import contextlib
from dataclasses import dataclass
import functools
import gc
import multiprocessing
import operator
import os
import pickle
import random
import sys
from typing import Any, NamedTuple

from optuna_quota._isolation.main_module import MainModule, make_main_module
from optuna_quota._isolation.modules import (
    after_import,
    read_module_state,
    restore_module_state,
    user_modules,
)


@dataclass(frozen=True)
class ProcessContext:
    """The context of the study's process that a trial's process takes over."""

    environ: Mapping[str, str]
    folder: str | None  # The working directory, None where it was removed
    path: tuple[str, ...]
    argv: tuple[str, ...]
    main: MainModule
    settings: Mapping[str, Any]
    module_state: Mapping[str, bytes]  # Changes that the script has made to the user's own modules
    # A seed for each global generator, drawn from the study's generators: a script that seeds them
    # gets the same trials again, and each trial other numbers
    seeds: Mapping[str, int]
    start_method: str | None  # That of :mod:`multiprocessing`, None where none was chosen
    authkey: bytes


def read_context(added: Mapping[str, str], main: MainModule) -> ProcessContext:
    folder = None
    with contextlib.suppress(OSError):
        folder = os.getcwd()
    return ProcessContext(
        environ={**os.environ, **added},
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


def enter_context(context: ProcessContext) -> None:
    for name in set(os.environ) - set(context.environ):
        del os.environ[name]
    for name, value in context.environ.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    if context.folder is not None:
        with contextlib.suppress(OSError):
            os.chdir(context.folder)
    sys.path[:] = context.path
    sys.argv[:] = context.argv
    if context.start_method is not None:
        multiprocessing.set_start_method(context.start_method, force=True)
    multiprocessing.current_process().authkey = context.authkey
    if not context.main.is_made:
        make_main_module(context.main)
    apply_settings(context.settings)
    restore_module_state(context.module_state)


# Settings.


class Setting(NamedTuple):
    """How to read a setting of a module, as a value that can be pickled, and how to apply it."""

    module: str
    read: Callable[[Any], Any]
    apply: Callable[[Any, Any], Any]


_UNAVAILABLE = (AttributeError, ImportError, RuntimeError, ValueError, OSError)


def read_settings() -> dict[str, Any]:
    found = {}
    for name, setting in _SETTINGS.items():
        module = sys.modules.get(setting.module)
        if module is not None:
            # A module that is half imported, or of a version without this setting.
            with contextlib.suppress(*_UNAVAILABLE):
                found[name] = setting.read(module)
    return found


def apply_settings(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        setting = _SETTINGS[name]
        after_import(setting.module, functools.partial(_apply, setting, value))


def _apply(setting: Setting, value: Any, module: Any) -> None:
    with contextlib.suppress(*_UNAVAILABLE):
        if setting.read(module) != value:
            setting.apply(module, value)


def _by_functions(module: str, getter: str, setter: str) -> Setting:
    return Setting(
        module, operator.methodcaller(getter), lambda found, value: getattr(found, setter)(value)
    )


def _set_garbage_collection(module: Any, values: tuple[bool, tuple[int, int, int]]) -> None:
    enabled, thresholds = values
    gc.set_threshold(*thresholds)
    (gc.enable if enabled else gc.disable)()


def _read_umask(module: Any) -> int:
    # The kernel shows it here; by the system call it can only be read by changing it.
    with open("/proc/self/status", "rb") as file:
        text = file.read()
    return int(text.partition(b"\nUmask:")[2].split(None, 1)[0], 8)


def _read_resource_limits(module: Any) -> dict[int, tuple[int, int]]:
    kinds = {getattr(module, name) for name in dir(module) if name.startswith("RLIMIT_")}
    return {kind: module.getrlimit(kind) for kind in kinds}


def _set_resource_limits(module: Any, values: dict[int, tuple[int, int]]) -> None:
    for kind, limits in values.items():
        if module.getrlimit(kind) != limits:
            # Only root may raise a hard limit again.
            with contextlib.suppress(ValueError, OSError):
                module.setrlimit(kind, limits)


_PLAIN = (bool, int, float, str, list, tuple, type(None))


def _numpy_printing(numpy: Any) -> dict[str, Any]:
    # Not a formatter: it may be the script's own, which a trial has only later.
    return {k: v for k, v in numpy.get_printoptions().items() if isinstance(v, _PLAIN)}


def _rc_params(matplotlib: Any) -> dict[str, Any]:
    # Not by item: reading the backend selects one.
    return {k: v for k, v in dict.items(matplotlib.rcParams) if isinstance(v, _PLAIN)}


def _pandas_options(config: Any) -> dict[str, Any]:
    return {
        key: value
        for key, option in config._registered_options.items()
        if isinstance(value := _pandas_option(config, key), _PLAIN) and value != option.defval
    }


def _pandas_option(config: Any, key: str) -> Any:
    # `get_option` looks each key up by a regular expression, which takes a thousand times longer.
    found = config._global_config
    for part in key.split("."):
        found = found[part]
    return found


def _set_pandas_options(config: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        config.set_option(key, value)


_TORCH_FLAGS = (
    "cudnn.benchmark",
    "cudnn.deterministic",
    "cudnn.enabled",
    "cuda.matmul.allow_tf32",
    "cudnn.allow_tf32",
)


def _torch_flags(torch: Any) -> dict[str, Any]:
    return {path: operator.attrgetter(path)(torch.backends) for path in _TORCH_FLAGS}


def _set_torch_flags(torch: Any, values: dict[str, Any]) -> None:
    for path, value in values.items():
        parent, _, name = path.rpartition(".")
        owner = operator.attrgetter(parent)(torch.backends)
        if getattr(owner, name) != value:
            setattr(owner, name, value)


def _mlflow_runs(fluent: Any) -> bytes:
    runs = list(fluent._active_run_stack.get())
    return pickle.dumps(runs) if runs else b""


def _set_mlflow_runs(fluent: Any, runs: bytes) -> None:
    # A run that a trial starts is nested in the study's, which is not the trial's to end.
    fluent._active_run_stack.set(pickle.loads(runs))
    atexit.unregister(fluent._safe_end_run)


def _read_decimal(decimal: Any) -> tuple[Any, ...]:
    found = decimal.getcontext()
    return found.prec, found.rounding, found.Emin, found.Emax, found.capitals, found.clamp


_SETTINGS: Mapping[str, Setting] = {
    "recursion limit": _by_functions("sys", "getrecursionlimit", "setrecursionlimit"),
    "switch interval": _by_functions("sys", "getswitchinterval", "setswitchinterval"),
    "integer digits": _by_functions("sys", "get_int_max_str_digits", "set_int_max_str_digits"),
    "garbage collection": Setting(
        "gc", lambda m: (m.isenabled(), m.get_threshold()), _set_garbage_collection
    ),
    "umask": Setting("os", _read_umask, lambda m, v: m.umask(v)),
    "priority": Setting(
        "os", lambda m: m.getpriority(m.PRIO_PROCESS, 0), lambda m, v: m.nice(v - m.nice(0))
    ),
    "processors": Setting(
        "os", lambda m: m.sched_getaffinity(0), lambda m, v: m.sched_setaffinity(0, v)
    ),
    "resource limits": Setting("resource", _read_resource_limits, _set_resource_limits),
    "temporary folder": Setting(
        "tempfile", lambda m: m.tempdir, lambda m, v: setattr(m, "tempdir", v)
    ),
    "socket timeout": _by_functions("socket", "getdefaulttimeout", "setdefaulttimeout"),
    "locale": Setting(
        "locale", lambda m: m.setlocale(m.LC_ALL), lambda m, v: m.setlocale(m.LC_ALL, v)
    ),
    "decimal": Setting("decimal", _read_decimal, lambda m, v: m.setcontext(m.Context(*v))),
    "numpy errors": Setting("numpy", lambda m: dict(m.geterr()), lambda m, v: m.seterr(**v)),
    "numpy printing": Setting("numpy", _numpy_printing, lambda m, v: m.set_printoptions(**v)),
    "pandas options": Setting("pandas._config.config", _pandas_options, _set_pandas_options),
    "matplotlib": Setting("matplotlib", _rc_params, lambda m, v: dict.update(m.rcParams, v)),
    "scikit-learn": Setting("sklearn", lambda m: m.get_config(), lambda m, v: m.set_config(**v)),
    "torch threads": _by_functions("torch", "get_num_threads", "set_num_threads"),
    "torch interop threads": _by_functions(
        "torch", "get_num_interop_threads", "set_num_interop_threads"
    ),
    "torch dtype": Setting(
        "torch",
        lambda m: str(m.get_default_dtype()).removeprefix("torch."),
        lambda m, v: m.set_default_dtype(getattr(m, v)),
    ),
    "torch determinism": Setting(
        "torch",
        lambda m: (
            m.are_deterministic_algorithms_enabled(),
            m.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda m, v: m.use_deterministic_algorithms(v[0], warn_only=v[1]),
    ),
    "torch precision": _by_functions(
        "torch", "get_float32_matmul_precision", "set_float32_matmul_precision"
    ),
    "torch flags": Setting("torch", _torch_flags, _set_torch_flags),
    "torch gradients": _by_functions("torch", "is_grad_enabled", "set_grad_enabled"),
    "torch sharing": _by_functions(
        "torch.multiprocessing", "get_sharing_strategy", "set_sharing_strategy"
    ),
    "mlflow runs": Setting("mlflow.tracking.fluent", _mlflow_runs, _set_mlflow_runs),
}


# The global random generators of libraries.


def _draw_seeds() -> dict[str, int]:
    seeds = {"random": random.getrandbits(32)}
    # Where only the objective imports numpy, that seeds itself.
    if "numpy" in sys.modules:
        seeds["numpy"] = int(sys.modules["numpy"].random.randint(0, 2**31 - 1))
    # torch starts with the same seed in each process.
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "randint"):
        seeds["torch"] = int(torch.randint(0, 2**31 - 1, ()))
    else:
        seeds["torch"] = seeds["random"]
    return seeds


def seed(seeds: Mapping[str, int]) -> None:
    """Seed the global generators, now or once their library is imported."""
    functions = {"random": "seed", "numpy": "random.seed", "torch": "manual_seed"}
    for name, value in seeds.items():
        after_import(name, functools.partial(_seed, functions[name], value))


def _seed(function: str, value: int, module: Any) -> None:
    operator.attrgetter(function)(module)(value)
