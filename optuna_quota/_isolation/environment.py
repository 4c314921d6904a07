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

from optuna_quota._isolation.cores import threads_by_variables
from optuna_quota._isolation.log_libraries import read_structlog, set_structlog
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


def _traced_frames(tracemalloc: Any) -> int:
    return int(tracemalloc.is_tracing() and tracemalloc.get_traceback_limit())


def _trace_memory(tracemalloc: Any, frames: int) -> None:
    tracemalloc.stop()
    if frames:
        tracemalloc.start(frames)


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
    "mkldnn.enabled",
)


def _torch_flags(torch: Any) -> dict[str, Any]:
    return {path: operator.attrgetter(path)(torch.backends) for path in _TORCH_FLAGS}


def _set_torch_flags(torch: Any, values: dict[str, Any]) -> None:
    for path, value in values.items():
        parent, _, name = path.rpartition(".")
        owner = operator.attrgetter(parent)(torch.backends)
        if getattr(owner, name) != value:
            setattr(owner, name, value)


_ATTENTION = ("cudnn", "flash", "math", "mem_efficient")


def _attention(backend: Any) -> dict[str, bool]:
    return {name: getattr(backend, f"{name}_sdp_enabled")() for name in _ATTENTION}


def _set_attention(backend: Any, values: dict[str, bool]) -> None:
    for name, value in values.items():
        getattr(backend, f"enable_{name}_sdp")(value)


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


def _set_autocast(torch: Any, values: dict[str, tuple[bool, str]]) -> None:
    for kind, (enabled, dtype) in values.items():
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, getattr(torch, dtype.removeprefix("torch.")))


def _joblib_config(parallel: Any) -> dict[str, Any]:
    # What is left at its default has no plain value.
    config = getattr(parallel._backend, "config", {})
    found = {name: value for name, value in config.items() if isinstance(value, _PLAIN)}
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


def _jax_options(jax: Any) -> dict[str, Any]:
    return {k: v for k, v in jax.config.values.items() if isinstance(v, _PLAIN)}


def _set_jax_options(jax: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if jax.config.values.get(name) != value:
            jax.config.update(name, value)


def _keras_policy(keras: Any) -> str | None:
    # Reading it would fix it at the present type.
    policy = keras.src.backend.common.global_state.get_global_attribute("dtype_policy")
    return None if policy is None else str(policy.name)


def _set_keras_numbers(config: Any, values: tuple[str, float, str]) -> None:
    floats, epsilon, images = values
    config.set_floatx(floats)
    config.set_epsilon(epsilon)
    config.set_image_data_format(images)


def _mlflow_runs(fluent: Any) -> bytes:
    runs = list(fluent._active_run_stack.get())
    return pickle.dumps(runs) if runs else b""


def _set_mlflow_runs(fluent: Any, runs: bytes) -> None:
    # A run that a trial starts is nested in the study's, which the trial must not end.
    fluent._active_run_stack.set(pickle.loads(runs))
    atexit.unregister(fluent._safe_end_run)


def _read_decimal(decimal: Any) -> tuple[Any, ...]:
    *values, _flags, traps = decimal.getcontext().__reduce__()[1]
    return (*values, [], traps)


_SETTINGS: Mapping[str, Setting] = {
    "recursion limit": _by_functions("sys", "getrecursionlimit", "setrecursionlimit"),
    "switch interval": _by_functions("sys", "getswitchinterval", "setswitchinterval"),
    "integer digits": _by_functions("sys", "get_int_max_str_digits", "set_int_max_str_digits"),
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
    "resource limits": Setting("resource", _read_resource_limits, _set_resource_limits),
    "fields of CSV": Setting(
        "csv", lambda m: m.field_size_limit(), lambda m, v: m.field_size_limit(v)
    ),
    "temporary folder": Setting(
        "tempfile", lambda m: m.tempdir, lambda m, v: setattr(m, "tempdir", v)
    ),
    "stacks of threads": Setting(
        "threading",
        lambda m: (size := m.stack_size(), m.stack_size(size))[0],  # to read it sets it to 0
        lambda m, v: m.stack_size(v),
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
    "thread pools": Setting("threadpoolctl", _thread_pools, _set_thread_pools),
    "numba threads": Setting(
        "numba.np.ufunc.parallel",
        _numba_threads,
        lambda m, v: m.set_num_threads(v or m.NUM_THREADS),
    ),
    "pyarrow threads": _by_functions("pyarrow", "cpu_count", "set_cpu_count"),
    "opencv threads": _by_functions("cv2", "getNumThreads", "setNumThreads"),
    "xgboost": Setting("xgboost", lambda m: m.get_config(), lambda m, v: m.set_config(**v)),
    "scikit-learn": Setting("sklearn", lambda m: m.get_config(), lambda m, v: m.set_config(**v)),
    "joblib": Setting("joblib.parallel", _joblib_config, _set_joblib_config),
    "dask": Setting(
        "dask.config",
        lambda m: {k: v for k, v in m.config.items() if is_plain(v)},
        lambda m, v: m.config.update(v),
    ),
    "jax": Setting("jax", _jax_options, _set_jax_options),
    "keras": Setting(
        "keras",
        lambda m: (m.config.floatx(), m.config.epsilon(), m.config.image_data_format()),
        lambda m, v: _set_keras_numbers(m.config, v),
    ),
    "keras policy": Setting(
        "keras", _keras_policy, lambda m, v: m.config.set_dtype_policy(v or m.config.floatx())
    ),
    "torch threads": _by_functions("torch", "get_num_threads", "set_num_threads"),
    "torch interop threads": _by_functions(
        "torch", "get_num_interop_threads", "set_num_interop_threads"
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
    "torch precision": _by_functions(
        "torch", "get_float32_matmul_precision", "set_float32_matmul_precision"
    ),
    "torch flags": Setting("torch", _torch_flags, _set_torch_flags),
    "torch attention": Setting("torch.backends.cuda", _attention, _set_attention),
    "torch anomalies": Setting(
        "torch",
        lambda m: (m.is_anomaly_enabled(), m.is_anomaly_check_nan_enabled()),
        lambda m, v: m.autograd.set_detect_anomaly(*v),
    ),
    "torch autocast": Setting("torch", _autocast, _set_autocast),
    "torch safe globals": Setting("torch", read_safe_globals, set_safe_globals),
    "torch gradients": _by_functions("torch", "is_grad_enabled", "set_grad_enabled"),
    "torch sharing": _by_functions(
        "torch.multiprocessing", "get_sharing_strategy", "set_sharing_strategy"
    ),
    "structlog": Setting("structlog", read_structlog, set_structlog),
    "mlflow runs": Setting("mlflow.tracking.fluent", _mlflow_runs, _set_mlflow_runs),
}
