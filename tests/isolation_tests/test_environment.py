"""Environment and settings of the study's process are those of its trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import decimal
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
import types
from typing import Any

import numpy as np
import optuna
import pytest

from optuna_quota import isolated
from optuna_quota._isolation.environment import apply_settings, read_settings
from tests.isolation_tests.scripts import run_python


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
    "umask": (lambda: os.umask(0o077), _umask),
    "temporary folder": (lambda: setattr(tempfile, "tempdir", "/nowhere"), tempfile.gettempdir),
    "socket timeout": (lambda: socket.setdefaulttimeout(12.5), socket.getdefaulttimeout),
    "locale": (
        lambda: locale.setlocale(locale.LC_NUMERIC, "C.UTF-8"),
        lambda: locale.setlocale(locale.LC_NUMERIC),
    ),
    "decimal": (
        lambda: decimal.setcontext(decimal.Context(prec=7, rounding=decimal.ROUND_UP)),
        lambda: (decimal.Decimal(2) / 3, decimal.getcontext().rounding),
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
    "torch gradients": (
        "torch",
        lambda m: m.set_grad_enabled(False),
        lambda m: m.is_grad_enabled(),
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
