"""What the objective finds around it: the same in its own process as in the study's."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from collections.abc import Mapping
import contextlib
from dataclasses import dataclass
import decimal
import functools
import gc
import locale
import multiprocessing
import os
import pickle
import random
import socket
import sys
import tempfile
from typing import Any

from optuna_quota._isolation.main_module import MainModule
from optuna_quota._isolation.main_module import make_main_module
from optuna_quota._isolation.module_state import read_module_state
from optuna_quota._isolation.module_state import restore_module_state
from optuna_quota._isolation.modules import after_import
from optuna_quota._isolation.modules import user_modules


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
class Setting:
    """One setting of a module.

    Attributes:
        module: The module that must be imported for it.
        read: Returns its value as what can be pickled.
        apply: Sets it.
    """

    module: str
    read: Callable[[Any], Any]
    apply: Callable[[Any, Any], Any]


def read_settings() -> dict[str, Any]:
    """Return the settings of this process by name; those of modules not imported are left out."""
    found = {}
    for name, setting in _SETTINGS.items():
        module = sys.modules.get(setting.module)
        if module is not None:
            # A module that is half imported, or of a version that has no such setting.
            with contextlib.suppress(AttributeError, ImportError, RuntimeError, ValueError):
                found[name] = setting.read(module)
    return found


def apply_settings(
    found: Mapping[str, Any], after_import: Callable[[str, Callable[[Any], None]], None]
) -> None:
    """Apply settings, those of modules that are not imported yet once they are.

    Args:
        found: What :func:`read_settings` returned in the study's process.
        after_import: Calls back with a module once it is imported.
    """
    for name, value in found.items():
        setting = _SETTINGS[name]
        after_import(setting.module, functools.partial(_apply, setting, value))


def _apply(setting: Setting, value: Any, module: Any) -> None:
    with contextlib.suppress(AttributeError, ImportError, RuntimeError, ValueError, OSError):
        if setting.read(module) != value:
            setting.apply(module, value)


def _set_garbage_collection(module: Any, values: tuple[bool, tuple[int, int, int]]) -> None:
    enabled, thresholds = values
    gc.set_threshold(*thresholds)
    (gc.enable if enabled else gc.disable)()


def _read_umask(module: Any) -> int:
    # The kernel shows it here; by the system call it can only be read by changing it.
    with open("/proc/self/status", "rb") as file:
        text = file.read()
    return int(text.partition(b"\nUmask:")[2].split(None, 1)[0], 8)


def _numpy_errors(numpy: Any) -> dict[str, str]:
    return dict(numpy.geterr())


def _numpy_printing(numpy: Any) -> dict[str, Any]:
    # Not a formatter: it may be the script's own, which a trial has only later.
    return {k: v for k, v in numpy.get_printoptions().items() if isinstance(v, _PLAIN)}


def _rc_params(matplotlib: Any) -> dict[str, Any]:
    # Not by item: to look at the backend would choose one.
    return {k: v for k, v in dict.items(matplotlib.rcParams) if isinstance(v, _PLAIN)}


def _set_rc_params(matplotlib: Any, values: dict[str, Any]) -> None:
    dict.update(matplotlib.rcParams, values)


_PLAIN = (bool, int, float, str, list, tuple, type(None))


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


def _torch_flags(torch: Any) -> dict[str, Any]:
    backends = torch.backends
    return {
        "cudnn.benchmark": backends.cudnn.benchmark,
        "cudnn.deterministic": backends.cudnn.deterministic,
        "cudnn.enabled": backends.cudnn.enabled,
        "cuda.matmul.allow_tf32": backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": backends.cudnn.allow_tf32,
    }


def _set_torch_flags(torch: Any, values: dict[str, Any]) -> None:
    for path, value in values.items():
        *owners, name = path.split(".")
        owner = torch.backends
        for part in owners:
            owner = getattr(owner, part)
        if getattr(owner, name) != value:
            setattr(owner, name, value)


def _mlflow_runs(fluent: Any) -> bytes:
    runs = list(fluent._active_run_stack.get())
    return pickle.dumps(runs) if runs else b""


def _set_mlflow_runs(fluent: Any, runs: bytes) -> None:
    # A run that a trial starts is nested in the study's, which is not the trial's to end.
    fluent._active_run_stack.set(pickle.loads(runs))
    atexit.unregister(fluent._safe_end_run)


def _set_locale(module: Any, value: str) -> None:
    locale.setlocale(locale.LC_ALL, value)


def _set_decimal(module: Any, context: tuple[Any, ...]) -> None:
    decimal.setcontext(decimal.Context(*context))


def _read_decimal(module: Any) -> tuple[Any, ...]:
    found = decimal.getcontext()
    return found.prec, found.rounding, found.Emin, found.Emax, found.capitals, found.clamp


_SETTINGS: Mapping[str, Setting] = {
    "recursion limit": Setting(
        "sys", lambda m: sys.getrecursionlimit(), lambda m, v: sys.setrecursionlimit(v)
    ),
    "switch interval": Setting(
        "sys", lambda m: sys.getswitchinterval(), lambda m, v: sys.setswitchinterval(v)
    ),
    "garbage collection": Setting(
        "gc",
        lambda m: (gc.isenabled(), gc.get_threshold()),
        _set_garbage_collection,
    ),
    "umask": Setting("os", _read_umask, lambda m, v: os.umask(v)),
    "temporary folder": Setting(
        "tempfile", lambda m: tempfile.tempdir, lambda m, v: setattr(tempfile, "tempdir", v)
    ),
    "socket timeout": Setting(
        "socket", lambda m: socket.getdefaulttimeout(), lambda m, v: socket.setdefaulttimeout(v)
    ),
    "locale": Setting("locale", lambda m: locale.setlocale(locale.LC_ALL), _set_locale),
    "decimal": Setting("decimal", _read_decimal, _set_decimal),
    "numpy errors": Setting("numpy", _numpy_errors, lambda m, v: m.seterr(**v)),
    "numpy printing": Setting("numpy", _numpy_printing, lambda m, v: m.set_printoptions(**v)),
    "pandas options": Setting("pandas._config.config", _pandas_options, _set_pandas_options),
    "matplotlib": Setting("matplotlib", _rc_params, _set_rc_params),
    "scikit-learn": Setting("sklearn", lambda m: m.get_config(), lambda m, v: m.set_config(**v)),
    "torch threads": Setting(
        "torch", lambda m: m.get_num_threads(), lambda m, v: m.set_num_threads(v)
    ),
    "torch interop threads": Setting(
        "torch", lambda m: m.get_num_interop_threads(), lambda m, v: m.set_num_interop_threads(v)
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
    "torch precision": Setting(
        "torch",
        lambda m: m.get_float32_matmul_precision(),
        lambda m, v: m.set_float32_matmul_precision(v),
    ),
    "torch flags": Setting("torch", _torch_flags, _set_torch_flags),
    "torch gradients": Setting(
        "torch", lambda m: m.is_grad_enabled(), lambda m, v: m.set_grad_enabled(v)
    ),
    "torch sharing": Setting(
        "torch.multiprocessing",
        lambda m: m.get_sharing_strategy(),
        lambda m, v: m.set_sharing_strategy(v),
    ),
    "mlflow runs": Setting("mlflow.tracking.fluent", _mlflow_runs, _set_mlflow_runs),
}
