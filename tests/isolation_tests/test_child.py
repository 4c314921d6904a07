"""A trial's process is like one that multiprocessing itself has started."""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys
import time

import pytest

from tests.isolation_tests.scripts import METHODS, run_python, run_script


CHILD = """
import importlib.util, multiprocessing as mp, random, signal, uuid
import own_config, own_tool
own_config.SCALE = 10
own_config.TABLE["a"] = 2
own_config.Settings.depth = 4

def objective(trial):
    assert os.path.isdir(own_tool.FOLDER.name), "removed by an earlier trial"
    assert own_config.seen() == (10, 2, 4)
    import numpy, tempfile
    for name, value in {
        "random": random.random(),
        "numpy": float(numpy.random.rand()),
        "generator": float(numpy.random.default_rng().random()),
        "uuid": str(uuid.uuid4()),
        "file": os.path.basename(tempfile.mktemp()),
        "process": mp.current_process().name,
    }.items():
        trial.set_user_attr(name, value)
    if TORCH:
        import torch
        trial.set_user_attr("torch", float(torch.nn.Linear(1, 1).weight))
    parent = mp.parent_process()
    assert parent is not None and parent.is_alive() and not mp.current_process().daemon
    assert mp.current_process().name != "MainProcess"
    assert bytes(mp.current_process().authkey) == KEY
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return 1.0

if __name__ == "__main__":
    KEY = bytes(mp.current_process().authkey)
    same = []
    for method in METHODS:
        # To import it takes seconds.
        TORCH = method == "forkserver" and importlib.util.find_spec("torch") is not None
        study = optuna.create_study()
        study.optimize(isolated(objective, start_method=method), n_trials=2)
        for name in study.trials[0].user_attrs:
            if not name.startswith("quota:"):
                if len({t.user_attrs.get(name) for t in study.trials}) != 2:
                    same.append((method, name))
    say(same=same, exits=open("exits.txt").read() if os.path.exists("exits.txt") else "")
"""


@pytest.mark.slow
def test_a_trial_is_an_ordinary_child(tmp_path: Path) -> None:
    (tmp_path / "own_config.py").write_text(
        "SCALE = 1\nTABLE = {'a': 1}\nclass Settings:\n    depth = 1\n"
        "def seen(): return SCALE, TABLE['a'], Settings.depth\n"
    )
    (tmp_path / "own_tool.py").write_text(
        "import atexit, os, tempfile\nFOLDER = tempfile.TemporaryDirectory()\n"
        "atexit.register(lambda: open('exits.txt', 'a').write('x'))\n"
    )
    found = run_script(tmp_path, CHILD)
    assert found["same"] == []
    # Handlers that a module registers are run by the study's process alone, at its own end.
    assert found["exits"] == "" and (tmp_path / "exits.txt").read_text() == "x"


LEFT_OPEN = """
import multiprocessing as mp, subprocess, threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
KEPT = []

def objective(trial):
    kind = trial.number
    if kind == 0:
        KEPT.append(ProcessPoolExecutor(1))
        KEPT[-1].submit(time.sleep, 600)
    elif kind == 1:
        KEPT.append(ThreadPoolExecutor(1))
        KEPT[-1].submit(time.sleep, 600)
    elif kind == 2:
        KEPT.append(mp.Pool(1))
        KEPT[-1].apply_async(time.sleep, (600,))
    elif kind == 3:
        threading.Thread(target=time.sleep, args=(600,)).start()
    elif kind == 4:
        mp.Process(target=time.sleep, args=(600,)).start()
    else:
        subprocess.Popen(["sleep", "600"])
    return float(kind)

if __name__ == "__main__":
    start = time.monotonic()
    found = values(objective, n_trials=6, methods=[sys.argv[1]], grace_period=1.0,
                   limits=Limits(wall_time=5))
    say(found=found[sys.argv[1]], took=time.monotonic() - start)
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_pools_threads_and_processes_that_are_left_open(tmp_path: Path, method: str) -> None:
    found = run_script(tmp_path, LEFT_OPEN, "script.py", method)
    assert found["found"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert found["took"] < 30


SAVES_LATE = """
import pathlib, threading
from concurrent.futures import ThreadPoolExecutor

def save(name):
    time.sleep(0.8)
    pathlib.Path(name).touch()

def objective(trial):
    threading.Thread(target=save, args=(f"thread {trial.number}",)).start()
    ThreadPoolExecutor(1).submit(save, f"executor {trial.number}")
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    threading.Timer(3.0, save, ("timer late",)).start()
    return 1.0

start = time.monotonic()
values(objective, n_trials=2, methods=[sys.argv[1]])
say(saved=sorted(p.name for p in pathlib.Path().glob("* *")), took=time.monotonic() - start)
"""


@pytest.mark.parametrize("method", METHODS)
def test_threads_that_are_left_running_complete_their_work(tmp_path: Path, method: str) -> None:
    found = run_script(tmp_path, SAVES_LATE, "script.py", method)
    assert found["saved"] == ["executor 0", "executor 1", "thread 0", "thread 1"]
    assert found["took"] < 20


WORKERS = """
import multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor

SHIFT = 1.0

class Result:
    def __init__(self, value):
        self.value = value

def objective(trial):
    return Result(SHIFT).value

def work(method):
    return values(objective, methods=[method])[method]

if __name__ == "__main__":
    found = {}
    for context in METHODS:
        with ProcessPoolExecutor(1, mp_context=mp.get_context(context)) as executor:
            found[context] = list(executor.map(work, METHODS))
    try:
        import joblib
    except ImportError:
        pass
    else:
        found["loky"] = joblib.Parallel(n_jobs=2)(joblib.delayed(work)(m) for m in METHODS)
    say(found=found)
"""


@pytest.mark.slow
def test_a_study_in_a_worker_of_a_pool(tmp_path: Path) -> None:
    found = run_script(tmp_path, WORKERS)["found"]
    assert set(found) >= {"fork", "spawn", "forkserver"}
    assert all(value == [[1.0, 1.0]] * 3 for value in found.values())


MANY_POOLS = """
import multiprocessing as mp

def work(x):
    return 2 * x

def objective(trial):
    with mp.Pool(2) as pool:
        return float(sum(pool.map(work, range(4))))

found = values(objective, n_trials=100, methods=["forkserver"])
say(found=found["forkserver"])
"""


@pytest.mark.slow
def test_many_trials_with_a_pool_in_each(tmp_path: Path) -> None:
    assert run_script(tmp_path, MANY_POOLS)["found"] == [12.0] * 100


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


@pytest.mark.slow
def test_exit_handlers_of_the_study_do_not_run_in_its_forks(tmp_path: Path) -> None:
    assert run_python(tmp_path, "-c", FORKING).splitlines() == [
        "[1.0, 1.0] True",
        "[False, False]",
        "ends in the study's process: True",
    ]


MAKES_A_LOCK = """
import multiprocessing, optuna
from optuna_quota import isolated
LOCK = multiprocessing.get_context("spawn").Lock()
open("names.txt", "a").write(LOCK._semlock.name + "\\n")
if __name__ == "__main__":
    optuna.create_study().optimize(isolated(lambda trial: 1.0), n_trials=1)
"""


def test_semaphores_that_the_fork_servers_main_module_makes_are_removed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(MAKES_A_LOCK)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "script.py"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=100)
    names = (tmp_path / "names.txt").read_text().split()
    assert len(names) == 2
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/dev/shm/sem.{name[1:]}") for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.02)
