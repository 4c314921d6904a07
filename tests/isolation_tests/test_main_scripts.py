"""Scripts, notebooks and modules whose main module trials have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.isolation_tests.scripts import always, HELPERS, run_python, run_script


SCRIPT = """
import dataclasses
import multiprocessing
import pickle
import optuna
from optuna_quota import isolated

print("the script runs")
optuna.logging.set_verbosity(optuna.logging.WARNING)

@dataclasses.dataclass
class Config:
    width: int

def double(x):
    return 2 * x

def objective(trial):
    config = Config(trial.suggest_int("width", 3, 3))
    again = pickle.loads(pickle.dumps(config))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return float(pool.map(double, [again.width])[0])

study = optuna.create_study()
study.optimize(isolated(objective), n_trials=2)
print([t.value for t in study.trials])
"""


@pytest.mark.slow
@pytest.mark.integration
def test_a_notebook(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    root = str(Path(__file__).parents[2])
    cells = [
        f"import sys; sys.path.insert(0, {root!r})",
        "import optuna\nfrom optuna_quota import isolated\n"
        "optuna.logging.set_verbosity(optuna.logging.WARNING)\nfactor = 2",
        "def objective(trial):\n    print('in a cell', flush=True)\n    return factor * 2.0",
        "study = optuna.create_study()\nstudy.optimize(isolated(objective), n_trials=1)",
        "print(study.best_value)",
        "def fails(trial):\n    return 1 / 0\n\nstudy.optimize(isolated(fails), n_trials=1)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    client = nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3")
    with pytest.raises(nbclient.exceptions.CellExecutionError) as caught:
        client.execute()
    outputs = [o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", [])]
    assert "in a cell\n" in outputs and "4.0\n" in outputs
    # The line of the cell, which only the kernel knows.
    assert "return 1 / 0" in str(caught.value)


@pytest.mark.slow
def test_a_module_that_runs_a_study_when_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "tuning.py").write_text(SCRIPT)
    printed = run_python(tmp_path, "-c", "import tuning")
    assert printed == "the script runs\n[6.0, 6.0]\n"


@pytest.mark.slow
def test_a_study_that_an_imported_module_runs_again_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tuning.py").write_text(SCRIPT)
    again = "from tuning import isolated, objective, optuna; study = optuna.create_study(); "
    again += "study.optimize(isolated(objective), n_trials=1, catch=(RuntimeError,)); "
    again += "print(study.trials[0].state.name)"
    assert run_python(tmp_path, "-c", again).splitlines()[-1] == "FAIL"


GLOBALS = """
import threading
LOCK = threading.Lock()
SCALE = 1.0

def helper():
    return SCALE * ARGS["scale"] + len(DATA) + objective.offset

def objective(trial):
    with LOCK:
        return helper()

if __name__ == "__main__":
    ARGS, SCALE, DATA = {"scale": 7.0}, 2.0, [1, 2, 3]
    objective.offset = 100
    say(found=values(objective))
"""


@pytest.mark.slow
def test_globals_that_are_set_under_a_guard(tmp_path: Path) -> None:
    assert run_script(tmp_path, GLOBALS)["found"] == always(117.0, 117.0)


INDIRECT = """
import dataclasses
import optuna
from optuna_quota import isolated
optuna.logging.set_verbosity(optuna.logging.ERROR)
width, depth = int("3"), int("4")

def by_class(trial):
    @dataclasses.dataclass
    class Config:
        width: int = width
        @staticmethod
        def deeper(by=depth):
            return by + depth
    return float(Config().width + Config.deeper())

def by_text(trial):
    return float(eval("width + 1") + globals()["depth"])

found = []
for objective in (by_class, by_text):
    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=1)
    found.append(study.best_value)
print(found)
"""


@pytest.mark.parametrize("way", ["file", "text"])
def test_globals_that_are_used_by_a_class_or_by_text(tmp_path: Path, way: str) -> None:
    (tmp_path / "script.py").write_text(INDIRECT)
    arguments = ["script.py"] if way == "file" else ["-c", INDIRECT]
    assert run_python(tmp_path, *arguments) == "[11.0, 8.0]\n"


OF_MODULE = """
import sys
import __main__ as imported

this = sys.modules[__name__]

def objective(trial):
    return sys.modules[__name__].by_name + this.by_alias + imported.by_import

class Namesake:
    def __call__(self, trial):
        class Config:
            lock = 1.0
        return Config.lock

if __name__ == "__main__":
    by_name, by_alias, by_import = 1.0, 10.0, 100.0
    lock = open(__file__)
    say(found=values(objective), others=values(Namesake()))
"""


def test_globals_that_are_read_as_attributes_of_the_script(tmp_path: Path) -> None:
    said = run_script(tmp_path, OF_MODULE)
    assert said == {"found": always(111.0, 111.0), "others": always(1.0, 1.0)}


NAMESAKES = """
import threading

class Trainer:
    def __init__(self):
        self.data, self.lock = 2.0, None

    def __call__(self, trial):
        return self.data if self.lock is None else 0.0

if __name__ == "__main__":
    lock, data = threading.Lock(), bytearray(100)
    say(found=values(Trainer()))
"""


def test_globals_that_only_share_the_name_of_an_attribute_are_not_sent(tmp_path: Path) -> None:
    assert run_script(tmp_path, NAMESAKES)["found"] == always(2.0, 2.0)


@pytest.mark.slow
def test_a_spawned_worker_that_imports_the_study_again_says_so(tmp_path: Path) -> None:
    source = """
import multiprocessing as mp

def objective(trial):
    return 1.0

optuna.create_study().optimize(isolated(objective), n_trials=1)
open("runs.txt", "a").write("x")
process = mp.get_context("spawn").Process(target=print)
process.start()
process.join()
sys.exit(process.exitcode)
"""
    (tmp_path / "script.py").write_text(f"{HELPERS}{source}")
    run_python(tmp_path, "script.py", code=1)
    errors = (tmp_path / "errors.txt").read_text()
    assert "RuntimeError" in errors and "__main__" in errors
    assert (tmp_path / "runs.txt").read_text() == "x"


PATCHED = """
import functools, json, ssl
import numpy as np

original = json.dumps

def dumps(value, **options):
    return "own " + original(value, **options)

json.dumps = dumps
json.loads = functools.partial(json.loads, parse_int=float)
ssl._create_default_https_context = ssl._create_unverified_context
if not hasattr(np, "float"):
    np.float = float

def objective(trial):
    assert json.dumps([1]) == "own [1]" and type(json.loads("1")) is float
    assert ssl._create_default_https_context is ssl._create_unverified_context
    return np.float(1)

found = values(objective)
json.dumps = original
say(found=found)
"""


def test_what_a_script_replaces_in_libraries_holds_in_trials(tmp_path: Path) -> None:
    assert run_script(tmp_path, PATCHED)["found"] == always(1.0, 1.0)
