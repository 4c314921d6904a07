"""Isolated trials among scripts, notebooks, pruning callbacks and other systems."""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys

import numpy as np
import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import isolated
from optuna_quota import Limits
from optuna_quota import QuotaPruner
from optuna_quota import TrialCrashed
from optuna_quota._isolation import run
from optuna_quota._records import read_record


def run_python(tmp_path: Path, *arguments: str) -> str:
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


@pytest.mark.parametrize("as_module", [False, True])
def test_a_script_needs_no_guard_and_runs_once(tmp_path: Path, as_module: bool) -> None:
    (tmp_path / "tuning.py").write_text(SCRIPT)
    arguments = ["-m", "tuning"] if as_module else ["tuning.py"]
    assert run_python(tmp_path, *arguments) == "the script runs\n[6.0, 6.0]\n"


def test_a_main_without_a_file_as_in_a_notebook(tmp_path: Path) -> None:
    assert run_python(tmp_path, "-c", SCRIPT) == "the script runs\n[6.0, 6.0]\n"


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


def test_the_plain_start_of_other_systems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "can_supervise", lambda: False)

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        trial.report(x, 0)
        print("here")  # noqa: T201
        if trial.number == 1:
            os._exit(3)
        if trial.number == 2:
            import time

            time.sleep(60)
        return x

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time="15s")))
    study.optimize(isolated(objective), n_trials=2, catch=(TrialCrashed,))
    study.pruner = QuotaPruner(limits=Limits(wall_time="3s"))
    study.optimize(isolated(objective, grace_period=1.0), n_trials=1)
    states = [t.state for t in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED]
    assert "exit code 3" in (read_record(study.trials[1]).reason or "")
    assert read_record(study.trials[2]).outcome == "terminated"
    assert capsys.readouterr().out.startswith("here\nhere\n")


def test_a_predictive_stop_comes_before_the_limit() -> None:
    def objective(trial: optuna.Trial) -> float:
        import time

        pace = trial.suggest_categorical("pace", [0.001, 0.5])
        for step in range(100):
            time.sleep(pace)
            trial.report(0.0, step)
        return 0.0

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time="30s")))
    for pace in (0.001, 0.001, 0.001, 0.5):
        study.enqueue_trial({"pace": pace})
    study.optimize(isolated(objective, predictive_stop=True), n_trials=4)
    slow = study.trials[-1]
    record = read_record(slow)
    assert [t.state for t in study.trials[:3]] == [TrialState.COMPLETE] * 3
    assert slow.state == TrialState.PRUNED
    assert record.breach is not None and record.breach.forecast
    assert record.breach.observed > 30 > (record.usage.wall_time or 0)


def test_the_sampler_settles_what_isolated_stopped() -> None:
    from optuna_quota import Quota
    from optuna_quota import QuotaSampler

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        if trial.number == 1:
            os._exit(9)
        if trial.number == 2:
            held = []
            while True:
                held.append(np.ones(2**22))
        return 0.0

    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=20)),
        pruner=QuotaPruner(limits=Limits(memory="300MiB")),
    )
    study.optimize(isolated(objective), n_trials=3, catch=(TrialCrashed,))
    records = [read_record(t) for t in study.trials]
    assert [r.outcome for r in records] == ["completed", "failed", "terminated"]
    assert {r.isolation for r in records} == {"process"}
    assert "exit code 9" in (records[1].reason or "")
    assert max(study.trials[2].constraints.values()) > 0


@pytest.mark.integration
@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
def test_pruning_callbacks(library: str) -> None:
    pytest.importorskip(library)
    pytest.importorskip("optuna_integration")
    rng = np.random.default_rng(0)
    x, y = rng.random((200, 4)), rng.random(200)

    def by_lightgbm(trial: optuna.Trial) -> float:
        import lightgbm
        from optuna_integration import LightGBMPruningCallback

        data = lightgbm.Dataset(x, y)
        lightgbm.train(
            {"objective": "l2", "metric": "l2", "verbosity": -1, "num_threads": 1},
            data,
            num_boost_round=5,
            valid_sets=[data],
            callbacks=[LightGBMPruningCallback(trial, "l2", valid_name="training")],
        )
        return 0.0

    def by_xgboost(trial: optuna.Trial) -> float:
        from optuna_integration import XGBoostPruningCallback
        import xgboost

        data = xgboost.DMatrix(x, y)
        xgboost.train(
            {"nthread": 1},
            data,
            num_boost_round=5,
            evals=[(data, "train")],
            verbose_eval=False,
            callbacks=[XGBoostPruningCallback(trial, "train-rmse")],
        )
        return 0.0

    pruner = optuna.pruners.ThresholdPruner(upper=1e-9, n_warmup_steps=2)
    study = optuna.create_study(pruner=pruner)
    study.optimize(isolated({"lightgbm": by_lightgbm, "xgboost": by_xgboost}[library]), n_trials=1)
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert len(trial.intermediate_values) == 3


@pytest.mark.integration
def test_torch_runs_out_of_memory_at_the_limit() -> None:
    torch = pytest.importorskip("torch")

    def objective(trial: optuna.Trial) -> float:
        return float(torch.ones(2**31, dtype=torch.float32).sum())

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(memory="2GiB")))
    study.optimize(isolated(objective), n_trials=1)
    record = read_record(study.trials[0])
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "memory"


FORKING = """
import atexit
import multiprocessing
import os
import tempfile
import time
import optuna
from optuna_quota import isolated

optuna.logging.set_verbosity(optuna.logging.WARNING)
pid = os.getpid()
folder = tempfile.TemporaryDirectory()
helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
helper.start()
atexit.register(lambda: print("ends in the study's process:", os.getpid() == pid))

def objective(trial):
    own = tempfile.TemporaryDirectory()
    trial.set_user_attr("own", own.name)
    globals()["kept"] = own
    return float(os.path.exists(folder.name))

study = optuna.create_study()
study.optimize(isolated(objective, start_method="fork"), n_trials=2)
print([t.value for t in study.trials], helper.is_alive())
print([os.path.exists(t.user_attrs["own"]) for t in study.trials])
"""


def test_a_forked_trial_leaves_the_studys_exit_to_the_study(tmp_path: Path) -> None:
    assert run_python(tmp_path, "-c", FORKING).splitlines() == [
        "[1.0, 1.0] True",
        "[False, False]",
        "ends in the study's process: True",
    ]


LOGGING = """
import logging
import sys
import optuna
from optuna_quota import isolated
import own_module

optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.lastResort = logging.StreamHandler(sys.stdout)

def find_logger(name):
    logger = logging.getLogger(name)
    if not logger.handlers:
        logger.addHandler(own_module.handler("function"))
    return logger

find_logger("known")

def objective(trial):
    own_module.logger.warning("one")
    find_logger("known").warning("two")
    find_logger("unknown").warning("three")
    logging.getLogger("unheard").warning("four")
    return 0.0

optuna.create_study().optimize(isolated(objective), n_trials=1)
"""

LOGGING_MODULE = """
import logging
import sys

def handler(name):
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"{name}: %(message)s"))
    return handler

logger = logging.getLogger("own")
logger.addHandler(handler("module"))
"""


def test_handlers_that_trials_set_up_again_do_not_log_twice(tmp_path: Path) -> None:
    (tmp_path / "own_module.py").write_text(LOGGING_MODULE)
    lines = run_python(tmp_path, "-c", LOGGING).splitlines()
    assert sorted(lines) == ["four", "function: three", "function: two", "module: one"]


FILTERING = """
import warnings
import optuna
from optuna_quota import isolated

optuna.logging.set_verbosity(optuna.logging.WARNING)

class Mine(UserWarning):
    pass

def objective(trial):
    warnings.warn("take care", Mine)
    return 1.0

study = optuna.create_study()
warnings.simplefilter("ignore", Mine)
study.optimize(isolated(objective), n_trials=1)
warnings.simplefilter("error", Mine)
study.optimize(isolated(objective), n_trials=1, catch=Mine)
print([t.state.name for t in study.trials])
"""


def test_filters_for_warnings_of_the_script(tmp_path: Path) -> None:
    assert run_python(tmp_path, "-c", FILTERING) == "['COMPLETE', 'FAIL']\n"


MADE_ELSEWHERE = """
def make():
    class Local(UserWarning):
        pass
    return Local
"""

FILTERING_ODD = """
import sys
import types
import warnings
import optuna
from optuna_quota import isolated
import elsewhere

optuna.logging.set_verbosity(optuna.logging.WARNING)
made = types.ModuleType("made")
made.Gone = type("Gone", (UserWarning,), {"__module__": "made"})
sys.modules["made"] = made

def objective(trial):
    return 1.0

study = optuna.create_study()
warnings.simplefilter("ignore", elsewhere.make())
warnings.simplefilter("ignore", made.Gone)
study.optimize(isolated(objective), n_trials=1)
print([t.state.name for t in study.trials])
"""


def test_filters_for_warnings_that_can_not_be_imported(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(MADE_ELSEWHERE)
    assert run_python(tmp_path, "-c", FILTERING_ODD) == "['COMPLETE']\n"


def test_a_module_that_runs_a_study_when_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "tuning.py").write_text(SCRIPT)
    printed = run_python(tmp_path, "-c", "import tuning")
    assert printed == "the script runs\n[6.0, 6.0]\n"


def test_a_study_that_an_imported_module_runs_again_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tuning.py").write_text(SCRIPT)
    again = "from tuning import isolated, objective, optuna; study = optuna.create_study(); "
    again += "study.optimize(isolated(objective), n_trials=1, catch=(RuntimeError,)); "
    again += "print(study.trials[0].state.name)"
    assert run_python(tmp_path, "-c", again).splitlines()[-1] == "FAIL"


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


def test_files_that_a_script_opens_are_open_in_its_trials(tmp_path: Path) -> None:
    (tmp_path / "tuning.py").write_text(
        OPENS_FILES.format(imports="", shared="", count="", result="")
    )
    printed = run_python(tmp_path, "tuning.py")
    assert printed == "['COMPLETE', 'COMPLETE'] ['trial 0', 'trial 1', '']\n"


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
