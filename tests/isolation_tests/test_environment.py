"""Environment and settings of the study's process are those of its trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import csv
import decimal
import fractions
import gc
import locale
import multiprocessing
import os
from pathlib import Path
import pickle
import random
import socket
import sys
import tempfile
import threading
import tracemalloc
import types
from typing import Any

import numpy as np
import optuna
import pytest

from optuna_quota import isolated
from optuna_quota._isolation.environment import apply_settings, read_settings
from tests.isolation_tests.scripts import always, run_python, run_script


def test_variables_folder_and_import_path_are_the_same(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_module.py").write_text("VALUE = 4.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OWN_VARIABLE", "here")

    def objective(trial: optuna.Trial) -> float:
        import own_module  # type: ignore[import-not-found]  # written above

        assert os.environ["OWN_VARIABLE"] == "here"
        assert os.path.samefile(os.getcwd(), str(tmp_path))
        return float(own_module.VALUE)

    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=1)
    assert study.best_value == 4.0


@pytest.mark.slow
def test_constants_of_libraries_that_a_script_sets_hold_in_its_trials(tmp_path: Path) -> None:
    source = """
import images
from images import files
images.MAX_PIXELS = None

def main():
    files.LOAD_TRUNCATED = True
    say(found=values(objective, n_trials=1))

def objective(trial):
    return float(images.MAX_PIXELS is None) + 2 * files.LOAD_TRUNCATED + files.opened

main()
"""
    (tmp_path / "images-1.0.dist-info").mkdir()
    (tmp_path / "images-1.0.dist-info" / "RECORD").write_text("images/__init__.py,,\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "__init__.py").write_text("MAX_PIXELS = 100\n")
    (tmp_path / "images" / "files.py").write_text("LOAD_TRUNCATED = False\nopened = 0\n")
    assert run_script(tmp_path, source)["found"] == always(3.0)


def test_the_start_method_of_multiprocessing_is_the_same() -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        study = optuna.create_study()
        study.optimize(
            isolated(lambda trial: float(multiprocessing.get_start_method() == "spawn")),
            n_trials=1,
        )
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert study.best_value == 1.0


def test_random_numbers_differ_by_trial_and_follow_the_seed() -> None:
    def objective(trial: optuna.Trial) -> float:
        return float(np.random.random() + random.random())

    def values() -> list[float | None]:
        random.seed(3)
        np.random.seed(3)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        study.optimize(isolated(objective), n_trials=3)
        return [t.value for t in study.trials]

    first = values()
    assert len(set(first)) == 3
    assert values() == first


@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_a_file_that_a_trial_leaves_open_is_written(tmp_path: Path, method: Any) -> None:
    def objective(trial: optuna.Trial) -> float:
        file = (tmp_path / "left.txt").open("w")
        file.write("all")
        setattr(sys, "left_open", file)  # noqa: B010 - as a variable of a module would
        return 0.0

    optuna.create_study().optimize(isolated(objective, start_method=method), n_trials=1)
    assert (tmp_path / "left.txt").read_text() == "all"


def test_a_trial_does_not_write_what_the_study_has_in_a_buffer(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    with path.open("w") as log:
        log.write("once")
        study = optuna.create_study()
        study.optimize(isolated(lambda trial: 0.0, start_method="fork"), n_trials=2)
    assert path.read_text() == "once"


OPENS_FILES = """
import os
import optuna
from optuna_quota import isolated
{imports}
log = open("log.txt", "a", buffering=1)
{shared}

def objective(trial):
    other = open("other.txt", "w")
    log.write(f"trial {{trial.number}}\\n")
    {count}
    other.close()
    return 1.0

if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=2)
    print([t.state.name for t in study.trials], open("log.txt").read().split("\\n"){result})
"""


@pytest.mark.slow
def test_files_that_a_script_opens_are_open_in_its_trials(tmp_path: Path) -> None:
    script = OPENS_FILES.format(imports="", shared="", count="", result="")
    (tmp_path / "tuning.py").write_text(script)
    printed = run_python(tmp_path, "tuning.py")
    assert printed == "['COMPLETE', 'COMPLETE'] ['trial 0', 'trial 1', '']\n"


@pytest.mark.slow
@pytest.mark.integration
def test_tensors_that_a_script_shares_are_shared_with_its_trials(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    script = OPENS_FILES.format(
        imports="import torch",
        shared="tensor = torch.zeros(1).share_memory_()",
        count="tensor[0] += 1",
        result=", float(tensor[0])",
    )
    (tmp_path / "tuning.py").write_text(script)
    printed = run_python(tmp_path, "tuning.py")
    assert printed == "['COMPLETE', 'COMPLETE'] ['trial 0', 'trial 1', ''] 2.0\n"


@pytest.fixture
def restored() -> Iterator[None]:
    before = read_settings()
    yield
    apply_settings(before)
    assert read_settings() == before


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


# How a script makes each setting, and how its trial would see it.
OWN: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "recursion limit": (lambda: sys.setrecursionlimit(3210), sys.getrecursionlimit),
    "switch interval": (lambda: sys.setswitchinterval(0.25), sys.getswitchinterval),
    "integer digits": (lambda: sys.set_int_max_str_digits(9999), sys.get_int_max_str_digits),
    "garbage collection": (gc.disable, gc.isenabled),
    "garbage collection's pace": (lambda: gc.set_threshold(123, 4, 5), gc.get_threshold),
    "memory tracing": (
        lambda: tracemalloc.start(3),
        lambda: tracemalloc.is_tracing() and tracemalloc.get_traceback_limit(),
    ),
    "umask": (lambda: os.umask(0o077), _umask),
    "fields of CSV": (lambda: csv.field_size_limit(1 << 30), csv.field_size_limit),
    "temporary folder": (lambda: setattr(tempfile, "tempdir", "/nowhere"), tempfile.gettempdir),
    "socket timeout": (lambda: socket.setdefaulttimeout(12.5), socket.getdefaulttimeout),
    "locale": (
        lambda: locale.setlocale(locale.LC_NUMERIC, "C.UTF-8"),
        lambda: locale.setlocale(locale.LC_NUMERIC),
    ),
    "stacks of threads": (
        lambda: threading.stack_size(1 << 20),
        lambda: (size := threading.stack_size(), threading.stack_size(size))[0],
    ),
    "decimal": (
        lambda: decimal.setcontext(decimal.Context(7, decimal.ROUND_UP, traps=[])),
        lambda: (
            decimal.Decimal(2) / 3,
            decimal.getcontext().rounding,
            decimal.getcontext().traps[decimal.DivisionByZero],
        ),
    ),
}

if sys.platform == "linux":
    import resource

    n_files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    OWN["resource limits"] = (
        lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (n_files - 1, most_files)),
        lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) > 1:
        OWN["processors"] = (
            lambda: os.sched_setaffinity(0, processors[1:]),
            lambda: os.sched_getaffinity(0),
        )
    if os.geteuid() == 0:  # else it can't be undone
        OWN["priority"] = (lambda: os.nice(1), lambda: os.nice(0))


OF_LIBRARIES: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "numpy errors": ("numpy", lambda m: m.seterr(divide="raise"), lambda m: m.geterr()),
    "numpy printing": (
        "numpy",
        lambda m: m.set_printoptions(precision=3, suppress=True),
        lambda m: (m.get_printoptions()["precision"], str(m.array([1 / 3, 1e-9]))),
    ),
    "matplotlib": (
        "matplotlib",
        lambda m: m.rcParams.update({"figure.dpi": 33.0}),
        lambda m: m.rcParams["figure.dpi"],
    ),
    "matplotlib's backend": (
        "matplotlib",
        lambda m: m.use("svg" if m.get_backend() != "svg" else "pdf"),
        lambda m: m.get_backend(),
    ),
    "scikit-learn": (
        "sklearn",
        lambda m: m.set_config(assume_finite=True),
        lambda m: m.get_config(),
    ),
    "torch threads": ("torch", lambda m: m.set_num_threads(3), lambda m: m.get_num_threads()),
    "torch dtype": (
        "torch",
        lambda m: m.set_default_dtype(m.float64),
        lambda m: m.get_default_dtype(),
    ),
    "torch determinism": (
        "torch",
        lambda m: m.use_deterministic_algorithms(True, warn_only=True),
        lambda m: (
            m.are_deterministic_algorithms_enabled(),
            m.is_deterministic_algorithms_warn_only_enabled(),
        ),
    ),
    "torch precision": (
        "torch",
        lambda m: m.set_float32_matmul_precision("medium"),
        lambda m: m.get_float32_matmul_precision(),
    ),
    "torch flags": (
        "torch",
        lambda m: setattr(m.backends.cudnn, "benchmark", True),
        lambda m: m.backends.cudnn.benchmark,
    ),
    "torch device": (
        "torch",
        lambda m: m.set_default_device("meta"),
        lambda m: m.empty(0).device.type,
    ),
    "torch attention": (
        "torch.backends.cuda",
        lambda m: m.enable_flash_sdp(False),
        lambda m: m.flash_sdp_enabled(),
    ),
    "torch anomalies": (
        "torch",
        lambda m: m.autograd.set_detect_anomaly(True, check_nan=False),
        lambda m: (m.is_anomaly_enabled(), m.is_anomaly_check_nan_enabled()),
    ),
    "numba threads": (
        "numba.np.ufunc.parallel",
        lambda m: m.set_num_threads(1),
        lambda m: m.get_num_threads(),
    ),
    "opencv threads": ("cv2", lambda m: m.setNumThreads(1), lambda m: m.getNumThreads()),
    "pyarrow threads": ("pyarrow", lambda m: m.set_cpu_count(3), lambda m: m.cpu_count()),
    "dask": (
        "dask.config",
        lambda m: m.set({"temporary-directory": "/nowhere"}),
        lambda m: m.get("temporary-directory"),
    ),
    "jax": (
        "jax",
        lambda m: m.config.update("jax_enable_x64", True),
        lambda m: str(m.numpy.ones(1).dtype),
    ),
    "keras": (
        "keras",
        lambda m: m.config.set_image_data_format("channels_first"),
        lambda m: m.config.image_data_format(),
    ),
    "keras policy": (
        "keras",
        lambda m: m.config.set_dtype_policy("mixed_bfloat16"),
        lambda m: m.layers.Dense(1).compute_dtype,
    ),
    "structlog": (
        "structlog",
        lambda m: m.configure(processors=[m.processors.JSONRenderer()]),
        lambda m: [type(p).__name__ for p in m.get_config()["processors"]],
    ),
    "xgboost": ("xgboost", lambda m: m.set_config(verbosity=0), lambda m: m.get_config()),
    "torch autocast": (
        "torch",
        lambda m: m.autocast("cpu", dtype=m.float16).__enter__(),
        lambda m: str((m.ones(1, 1) @ m.ones(1, 1)).dtype),
    ),
    "torch gradients": (
        "torch",
        lambda m: m.set_grad_enabled(False),
        lambda m: m.is_grad_enabled(),
    ),
    "torch safe globals": (
        "torch",
        lambda m: m.serialization.add_safe_globals([fractions.Fraction, m.nn.Linear]),
        lambda m: set(m.serialization.get_safe_globals()),
    ),
    "torch sharing": (
        "torch.multiprocessing",
        lambda m: m.set_sharing_strategy("file_system"),
        lambda m: m.get_sharing_strategy(),
    ),
}


def check(make: Callable[[], Any], see: Callable[[], Any]) -> None:
    before, settings = see(), read_settings()
    make()
    made, changed = see(), pickle.loads(pickle.dumps(read_settings()))
    assert made != before
    apply_settings(settings)
    assert see() == before
    apply_settings(changed)
    assert see() == made


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", OWN)
def test_a_setting_of_the_interpreter(name: str) -> None:
    check(*OWN[name])


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("name", OF_LIBRARIES)
def test_a_setting_of_a_library(name: str) -> None:
    module, make, see = OF_LIBRARIES[name]
    library = pytest.importorskip(module)
    before = read_settings()
    try:
        check(lambda: make(library), lambda: see(library))
    finally:
        apply_settings(before)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="it has one thread")
def test_threads_of_blas_that_a_script_has_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = pytest.importorskip("threadpoolctl")

    def threads() -> list[int]:
        return [p["num_threads"] for p in pools.threadpool_info() if p["user_api"] == "blas"]

    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    with pools.threadpool_limits(len(os.sched_getaffinity(0))):
        assert "thread pools" not in read_settings()
    with pools.threadpool_limits(1):
        limited = pickle.loads(pickle.dumps(read_settings()))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert "thread pools" not in read_settings()  # trials have the variable
    with pools.threadpool_limits(2, user_api="blas"):
        apply_settings(limited)
        assert set(threads()) == {1}


def test_how_joblib_runs_what_is_parallel() -> None:
    joblib = pytest.importorskip("joblib")

    def backend() -> str:
        found, n_jobs = joblib.parallel.get_active_backend()
        return f"{type(found).__name__} {n_jobs} {found.inner_max_num_threads}"

    default, before = backend(), read_settings()
    with joblib.parallel_config("loky", n_jobs=3, inner_max_num_threads=2):
        configured = pickle.loads(pickle.dumps(read_settings()))
    with joblib.parallel_config("threading", n_jobs=2):
        apply_settings(configured)
        assert backend() == "LokyBackend 3 2"
        joblib.parallel_config("threading")
        threads = read_settings()
    apply_settings(threads)
    assert backend() == "ThreadingBackend 3 None"
    vars(joblib.parallel._backend).clear()
    assert backend() == default and read_settings() == before


def test_a_default_device_of_torch_takes_part_in_no_seed() -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)

    def objective(trial: optuna.Trial) -> float:
        assert torch.empty(0).device.type == "meta"
        return float(torch.rand((), generator=generator, device="cpu"))

    study = optuna.create_study()
    with torch.device("meta"):
        study.optimize(isolated(objective), n_trials=2)
    values = {trial.value for trial in study.trials}
    assert len(values) == 2


def test_options_of_pandas_that_are_not_the_default() -> None:
    pandas = pytest.importorskip("pandas")
    with pandas.option_context("display.max_rows", 77, "display.width", 99):
        found = pickle.loads(pickle.dumps(read_settings()))
    assert found["pandas options"].items() >= {("display.max_rows", 77), ("display.width", 99)}
    with pandas.option_context("display.max_rows", 60, "display.width", 80):
        apply_settings(found)
        assert pandas.get_option("display.max_rows") == 77


def test_functions_among_settings_are_left_out() -> None:
    # They may be the script's, which is made in a trial after these are read there.
    numpy = pytest.importorskip("numpy")
    with numpy.printoptions(formatter={"bool": _umask}):
        assert _umask.__name__.encode() not in pickle.dumps(read_settings())


def test_a_setting_of_a_library_that_is_imported_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sklearn.py").write_text(
        "found = {}\ndef get_config(): return found\ndef set_config(**v): found.update(v)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    assert "scikit-learn" not in read_settings()
    apply_settings({"scikit-learn": {"a": 1}})
    import sklearn

    assert sklearn.found == {"a": 1}
    monkeypatch.delitem(sys.modules, "sklearn")


def test_a_library_without_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sklearn", "pandas._config.config", "numpy", "torch"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    found = read_settings()
    assert "scikit-learn" not in found and "umask" in found
    names = ("scikit-learn", "pandas options", "numpy errors", "torch dtype", "torch flags")
    apply_settings(dict.fromkeys(names, 3))


STRUCTLOG = """
import logging
import structlog

def add_run(logger, name, event):
    return {**event, "run": "r1"}

handler = logging.FileHandler("study.log")
handler.setFormatter(
    structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(sort_keys=True),
        ]
    )
)
logging.getLogger().addHandler(handler)
logging.getLogger().setLevel(logging.INFO)
structlog.configure(
    processors=[add_run, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
)

def objective(trial):
    structlog.get_logger("train").info("epoch", loss=0.5, seen=[1, {"a": None}])
    return 1.0

say(found=values(objective, n_trials=1, methods=["forkserver"]))
"""


@pytest.mark.integration
def test_events_of_structlog_are_processed_as_in_the_study(tmp_path: Path) -> None:
    pytest.importorskip("structlog")
    assert run_script(tmp_path, STRUCTLOG)["found"] == {"forkserver": [1.0]}
    assert (tmp_path / "study.log").read_text().splitlines() == [
        '{"event": "epoch", "loss": 0.5, "run": "r1", "seen": [1, {"a": null}]}'
    ]
