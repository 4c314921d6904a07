"""Give a trial's process the environment and settings of the study's process.

Each setting of the interpreter or of a library is read in the study's process and applied in the
trial's if it differs, or as soon as the library is imported there. Settings of libraries that the
study's process has not imported stay unchanged. Random generators are seeded differently for each
trial, as copies would repeat each other's numbers.
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
import sys
from typing import Any, NamedTuple

import cloudpickle

from optuna_quota._isolation.cores import threads_by_variables
from optuna_quota._isolation.main_module import MainModule, make_main_module
from optuna_quota._isolation.module_state import (
    is_plain,
    read_library_constants,
    read_module_state,
    read_safe_globals,
    restore_module_state,
    set_safe_globals,
)
from optuna_quota._isolation.modules import after_import, loaded_modules, user_modules
from optuna_quota._isolation.random_generators import draw_seeds


@dataclass(frozen=True)
class ProcessContext:
    """The settings of the study's process that a trial's process adopts."""

    environ: Mapping[str, str]
    folder: str | None  # The working directory, None if it was removed
    path: tuple[str, ...]
    argv: tuple[str, ...]
    main: MainModule
    settings: Mapping[str, Any]
    # Changes that the script has made to the user's own modules, and to constants of others
    module_state: Mapping[str, bytes]
    # A seed for each global generator, drawn from the study's generators: trials differ, and are
    # the same in each run of a script that seeds them
    seeds: Mapping[str, int]
    start_method: str | None  # That of :mod:`multiprocessing`, None if none was chosen
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
        module_state=read_library_constants() | read_module_state(user_modules()),
        seeds=draw_seeds(),
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
    # Empty settings are left out: comparing them in a trial may take milliseconds.
    return {name: value for name, value in found.items() if value != {}}


def apply_settings(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        setting = _SETTINGS[name]
        after_import(setting.module, functools.partial(_apply, setting, value))


def _apply(setting: Setting, value: Any, module: Any) -> None:
    with contextlib.suppress(*_UNAVAILABLE):
        if setting.read(module) != value:
            setting.apply(module, value)


def _by_item(
    module: str, read: Callable[[Any], dict[Any, Any]], assign: Callable[[Any, Any, Any], Any]
) -> Setting:
    """Return a setting of several items, of which those that differ are set one by one."""

    def apply(found: Any, values: dict[Any, Any]) -> None:
        present = read(found)
        for name, value in values.items():
            if present.get(name) != value:
                with contextlib.suppress(*_UNAVAILABLE):
                    assign(found, name, value)

    return Setting(module, read, apply)


def _by_functions(module: str, getters: Mapping[str, str]) -> Setting:
    """Return what functions of a module set, by these, and read."""

    def read(found: Any) -> dict[str, Any]:
        values = {}
        for name, getter in getters.items():
            with contextlib.suppress(*_UNAVAILABLE):
                values[name] = operator.attrgetter(getter)(found)()
        return values

    return _by_item(module, read, lambda m, name, v: operator.attrgetter(name)(m)(v))


def _by_attributes(module: str, *paths: str) -> Setting:
    def assign(found: Any, path: str, value: Any) -> None:
        *parent, name = path.rsplit(".", 1)
        setattr(operator.attrgetter(*parent)(found) if parent else found, name, value)

    return _by_item(module, lambda m: {p: operator.attrgetter(p)(m) for p in paths}, assign)


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


def _traced_frames(tracemalloc: Any) -> int:
    return int(tracemalloc.is_tracing() and tracemalloc.get_traceback_limit())


def _trace_memory(tracemalloc: Any, frames: int) -> None:
    tracemalloc.stop()
    if frames:
        tracemalloc.start(frames)


_PLAIN = (bool, int, float, str, list, tuple, type(None))


def _plain_items(values: Mapping[str, Any]) -> dict[str, Any]:
    # Not a function: it may be the script's own, which a trial has only later.
    return {name: value for name, value in values.items() if isinstance(value, _PLAIN)}


def _rc_params(matplotlib: Any) -> dict[str, Any]:
    # Not by item: reading the backend selects one.
    return _plain_items(dict(dict.items(matplotlib.rcParams)))


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


def _default_device(torch: Any) -> str | None:
    # Not by `get_default_device`, which makes a tensor there: this process would take GPU memory.
    modes = reversed(torch.overrides._get_current_function_mode_stack())
    # Its module is imported by the first use.
    kind = getattr(getattr(torch.utils, "_device", None), "DeviceContext", ())
    return next((str(mode.device) for mode in modes if isinstance(mode, kind)), None)


def _autocast(torch: Any) -> dict[str, tuple[bool, str]]:
    return {
        kind: (torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind)))
        for kind in ("cpu", "cuda")
    }


def _set_autocast(torch: Any, kind: str, value: tuple[bool, str]) -> None:
    enabled, dtype = value
    torch.set_autocast_enabled(kind, enabled)
    torch.set_autocast_dtype(kind, getattr(torch, dtype.removeprefix("torch.")))


def _joblib_config(parallel: Any) -> dict[str, Any]:
    # What is left at its default has no plain value.
    config = getattr(parallel._backend, "config", {})
    found = _plain_items(config)
    backend: Any = config.get("backend")
    for name, kind in parallel.BACKENDS.items():
        if type(backend) is kind:
            found["backend"] = name
            if backend.inner_max_num_threads is not None:
                found["inner_max_num_threads"] = backend.inner_max_num_threads
    return found


def _set_joblib_config(parallel: Any, values: dict[str, Any]) -> None:
    vars(parallel._backend).clear()
    parallel.parallel_config(**values)


def _numba_threads(parallel: Any) -> int | None:
    # Reading the number starts the threads, so only if they have started already.
    if not parallel._is_initialized or parallel.get_num_threads() == parallel.NUM_THREADS:
        return None
    return int(parallel.get_num_threads())


def _thread_pools(threadpoolctl: Any) -> dict[str, int]:
    """Return the threads of libraries that the script has limited (BLAS, OpenMP), by file."""
    most = min(len(os.sched_getaffinity(0)), threads_by_variables(os.environ))
    return {
        library.filepath: library.num_threads
        for library in _pool_libraries(threadpoolctl, loaded_modules())
        if library.num_threads and library.num_threads < most
    }


@functools.lru_cache(maxsize=1)
def _pool_libraries(threadpoolctl: Any, loaded: tuple[int, str]) -> list[Any]:
    # Finding them takes 5 ms, which only an import can change.
    return list(threadpoolctl.ThreadpoolController().lib_controllers)


def _set_thread_pools(threadpoolctl: Any, numbers: dict[str, int]) -> None:
    for library in _pool_libraries(threadpoolctl, loaded_modules()):
        if library.filepath in numbers:
            library.set_num_threads(numbers[library.filepath])


def _keras_policy(keras: Any) -> str | None:
    # Reading it would fix it at the present type.
    policy = keras.src.backend.common.global_state.get_global_attribute("dtype_policy")
    return None if policy is None else str(policy.name)


def _mlflow_runs(fluent: Any) -> bytes:
    runs = list(fluent._active_run_stack.get())
    return pickle.dumps(runs) if runs else b""


def _set_mlflow_runs(fluent: Any, runs: bytes) -> None:
    # A run that a trial starts is nested in the study's, which the trial must not end.
    fluent._active_run_stack.set(pickle.loads(runs))
    atexit.unregister(fluent._safe_end_run)


def _read_structlog(structlog: Any) -> bytes:
    # By value: processors may be functions of the script's, which trials have only later.
    try:
        return cloudpickle.dumps(structlog.get_config()) if structlog.is_configured() else b""
    except Exception as error:  # such as an open file's; a user's __reduce__ may raise anything
        raise ValueError("It can't be pickled.") from error


def _set_structlog(structlog: Any, config: bytes) -> None:
    structlog.reset_defaults()
    if config:
        structlog.configure(**pickle.loads(config))


def _read_decimal(decimal: Any) -> tuple[Any, ...]:
    *values, _flags, traps = decimal.getcontext().__reduce__()[1]
    return (*values, [], traps)


# By module, the functions that set something, and those that read it.
_FUNCTIONS: Mapping[str, Mapping[str, str]] = {
    "sys": {
        "setrecursionlimit": "getrecursionlimit",
        "setswitchinterval": "getswitchinterval",
        "set_int_max_str_digits": "get_int_max_str_digits",
    },
    "csv": {"field_size_limit": "field_size_limit"},
    "socket": {"setdefaulttimeout": "getdefaulttimeout"},
    "pyarrow": {"set_cpu_count": "cpu_count"},
    "cv2": {"setNumThreads": "getNumThreads"},
    "keras": {
        f"config.set_{name}": f"config.{name}"
        for name in ("floatx", "epsilon", "image_data_format")
    },
    "torch": {
        "set_num_threads": "get_num_threads",
        "set_num_interop_threads": "get_num_interop_threads",
        "set_float32_matmul_precision": "get_float32_matmul_precision",
        "set_grad_enabled": "is_grad_enabled",
    },
    "torch.backends.cuda": {
        f"enable_{name}_sdp": f"{name}_sdp_enabled"
        for name in ("cudnn", "flash", "math", "mem_efficient")
    },
    "torch.multiprocessing": {"set_sharing_strategy": "get_sharing_strategy"},
}

_SETTINGS: Mapping[str, Setting] = {
    **{f"functions of {m}": _by_functions(m, getters) for m, getters in _FUNCTIONS.items()},
    "garbage collection": Setting(
        "gc", lambda m: (m.isenabled(), m.get_threshold()), _set_garbage_collection
    ),
    "memory tracing": Setting("tracemalloc", _traced_frames, _trace_memory),
    "umask": Setting("os", _read_umask, lambda m, v: m.umask(v)),
    "priority": Setting(
        "os", lambda m: m.getpriority(m.PRIO_PROCESS, 0), lambda m, v: m.nice(v - m.nice(0))
    ),
    "processors": Setting(
        "os", lambda m: m.sched_getaffinity(0), lambda m, v: m.sched_setaffinity(0, v)
    ),
    # Only root may raise a hard limit again.
    "resource limits": _by_item(
        "resource", _read_resource_limits, lambda m, kind, limits: m.setrlimit(kind, limits)
    ),
    "temporary folder": _by_attributes("tempfile", "tempdir"),
    "stacks of threads": Setting(
        "threading",
        lambda m: (size := m.stack_size(), m.stack_size(size))[0],  # to read it sets it to 0
        lambda m, v: m.stack_size(v),
    ),
    "locale": Setting(
        "locale", lambda m: m.setlocale(m.LC_ALL), lambda m, v: m.setlocale(m.LC_ALL, v)
    ),
    "decimal": Setting("decimal", _read_decimal, lambda m, v: m.setcontext(m.Context(*v))),
    "numpy errors": Setting("numpy", lambda m: dict(m.geterr()), lambda m, v: m.seterr(**v)),
    "numpy printing": Setting(
        "numpy",
        lambda m: _plain_items(m.get_printoptions()),
        lambda m, v: m.set_printoptions(**v),
    ),
    "pandas options": _by_item(
        "pandas._config.config", _pandas_options, lambda m, key, v: m.set_option(key, v)
    ),
    "matplotlib": Setting("matplotlib", _rc_params, lambda m, v: dict.update(m.rcParams, v)),
    "thread pools": Setting("threadpoolctl", _thread_pools, _set_thread_pools),
    "numba threads": Setting(
        "numba.np.ufunc.parallel",
        _numba_threads,
        lambda m, v: m.set_num_threads(v or m.NUM_THREADS),
    ),
    "xgboost": Setting("xgboost", lambda m: m.get_config(), lambda m, v: m.set_config(**v)),
    "scikit-learn": Setting("sklearn", lambda m: m.get_config(), lambda m, v: m.set_config(**v)),
    "joblib": Setting("joblib.parallel", _joblib_config, _set_joblib_config),
    "dask": Setting(
        "dask.config",
        lambda m: {k: v for k, v in m.config.items() if is_plain(v)},
        lambda m, v: m.config.update(v),
    ),
    "jax": _by_item(
        "jax", lambda m: _plain_items(m.config.values), lambda m, name, v: m.config.update(name, v)
    ),
    "keras policy": Setting(
        "keras", _keras_policy, lambda m, v: m.config.set_dtype_policy(v or m.config.floatx())
    ),
    "torch dtype": Setting(
        "torch",
        lambda m: str(m.get_default_dtype()).removeprefix("torch."),
        lambda m, v: m.set_default_dtype(getattr(m, v)),
    ),
    "torch device": Setting("torch", _default_device, lambda m, v: m.set_default_device(v)),
    "torch determinism": Setting(
        "torch",
        lambda m: (
            m.are_deterministic_algorithms_enabled(),
            m.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda m, v: m.use_deterministic_algorithms(v[0], warn_only=v[1]),
    ),
    "torch flags": _by_attributes(
        "torch",
        "backends.cudnn.benchmark",
        "backends.cudnn.deterministic",
        "backends.cudnn.enabled",
        "backends.cuda.matmul.allow_tf32",
        "backends.cudnn.allow_tf32",
        "backends.mkldnn.enabled",
    ),
    "torch anomalies": Setting(
        "torch",
        lambda m: (m.is_anomaly_enabled(), m.is_anomaly_check_nan_enabled()),
        lambda m, v: m.autograd.set_detect_anomaly(*v),
    ),
    "torch autocast": _by_item("torch", _autocast, _set_autocast),
    "torch safe globals": Setting("torch", read_safe_globals, set_safe_globals),
    "structlog": Setting("structlog", _read_structlog, _set_structlog),
    "mlflow runs": Setting("mlflow.tracking.fluent", _mlflow_runs, _set_mlflow_runs),
}
