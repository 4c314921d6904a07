"""A trial's process is what multiprocessing's own would be: real scripts, each run by itself."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
from typing import Any

import pytest


METHODS = ("forkserver", "fork", "spawn")

# Comes before each script.
START = """\
import json, os, sys, time
import optuna
from optuna_quota import isolated, Limits
optuna.logging.set_verbosity(optuna.logging.ERROR)
METHODS = ("forkserver", "fork", "spawn")

def values(objective, n_trials=2, methods=METHODS, **options):
    found = {}
    for method in methods:
        study = optuna.create_study()
        study.optimize(isolated(objective, start_method=method, **options), n_trials=n_trials)
        found[method] = [t.value for t in study.trials]
    return found

def say(**found):
    with open("found.json", "w") as file:
        json.dump(found, file)
"""


def run_script(
    folder: Path, source: str, *command: str, code: int = 0, timeout: float = 100.0
) -> Any:
    """Run a script and return what it says; a pipe would wait for what it leaves behind."""
    (folder / "helpers.py").write_text(START)
    file = folder / "script.py"
    file.write_text(f"from helpers import *\n{source}")
    root = str(Path(__file__).parents[2])
    output = folder / "output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *(command or [file.name])],
            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{folder}"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            cwd=folder,
            start_new_session=True,
        )
        try:
            assert process.wait(timeout) == code, output.read_text()
        finally:
            # What it leaves behind, such as managers, is in its group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if code:
        return output.read_text()
    return json.loads((folder / "found.json").read_text())


def always(*values: float) -> dict[str, list[float]]:
    return {method: list(values) for method in METHODS}


CLASSES = """
import collections, dataclasses, enum, inspect, multiprocessing as mp, pickle, traceback, typing
from concurrent.futures import ProcessPoolExecutor
open("loads.txt", "a").write("x")

@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 0.1

class Kind(enum.Enum):
    A = 1

Point = collections.namedtuple("Point", "x y")

class Pair(typing.NamedTuple):
    a: int = 3

class MyError(Exception):
    pass

DEFAULT, CHOSEN, POINT = Config(), Kind.A, Point(1, 2)
DATA = [1.0] * 100_000
SCALE = 2

def work(args):
    config, kind, point, pair = args
    assert isinstance(config, Config) and kind is Kind.A
    assert isinstance(point, Point) and isinstance(pair, Pair)
    return SCALE

def put(queue):
    queue.put(work((DEFAULT, CHOSEN, POINT, Pair())))

def fail(x):
    return 1 / x  # the guilty line

def objective(trial):
    args = (Config(), Kind.A, Point(1, 2), Pair())
    assert isinstance(DEFAULT, Config) and CHOSEN is Kind.A and isinstance(POINT, Point)
    assert pickle.loads(pickle.dumps(args))[0] == DEFAULT
    with mp.Pool(2) as pool:
        total = sum(pool.map(work, [args] * 2))
    with ProcessPoolExecutor(2) as executor:
        total += sum(executor.map(work, [args] * 2))
    queue = mp.Queue()
    process = mp.Process(target=put, args=(queue,))
    process.start()
    total += queue.get(timeout=20)
    process.join()
    try:
        fail(0)
    except ZeroDivisionError:
        assert "the guilty line" in traceback.format_exc()
    assert "the guilty line" in inspect.getsource(fail)
    assert "pool.map" in inspect.getsource(objective)
    try:
        raise MyError
    except MyError:
        return total + sum(DATA)

def fails(trial):
    if trial.number:
        raise MyError("mine")
    return fail(0)
"""

UNGUARDED = """
found = values(objective)
lines = []
for method in METHODS:
    study = optuna.create_study()
    for kind in (ZeroDivisionError, MyError):
        try:
            study.optimize(isolated(fails, start_method=method), n_trials=1)
        except kind:
            lines.append("the guilty line" in traceback.format_exc() or kind is MyError)
say(found=found, lines=lines, loads=len(open("loads.txt").read()))
"""


def indented(source: str) -> str:
    return source.replace("\n", "\n    ")


@pytest.mark.parametrize("way", ["unguarded", "guarded", "-m", "-c"])
def test_classes_and_functions_of_a_script_are_themselves(tmp_path: Path, way: str) -> None:
    guard = 'if __name__ == "__main__":'
    source = CLASSES + (f"{guard}{indented(UNGUARDED)}" if way == "guarded" else UNGUARDED)
    if way == "-c":
        # No file, no source; each module is read by the interpreter at once.
        source = source.replace('assert "the guilty line"', 'assert True or "the guilty line"')
        source = source.replace('"the guilty line" in traceback', '"fail" in traceback')
        source = source.replace('assert "pool.map"', 'assert True or "pool.map"')
    command = {"-m": ["-m", "script"], "-c": ["-c", f"from helpers import *\n{source}"]}
    found = run_script(tmp_path, source, *command.get(way, []))
    assert found["found"] == always(100_010, 100_010)
    assert found["lines"] == [True] * 6
    if way != "guarded":
        assert found["loads"] == 1


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


def test_globals_that_are_set_under_a_guard(tmp_path: Path) -> None:
    assert run_script(tmp_path, GLOBALS)["found"] == always(117.0, 117.0)


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


def test_a_study_in_a_worker_of_a_pool(tmp_path: Path) -> None:
    found = run_script(tmp_path, WORKERS)["found"]
    assert set(found) >= {"fork", "spawn", "forkserver"}
    assert all(value == [[1.0, 1.0]] * 3 for value in found.values())


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
    output = run_script(tmp_path, source, code=1)
    assert "RuntimeError" in output and "__main__" in output
    assert (tmp_path / "runs.txt").read_text() == "x"


ACROSS = """
import multiprocessing as mp, pathlib, tempfile, threading
from multiprocessing import shared_memory

def objective(trial):
    item = QUEUE.get(timeout=20)
    with LOCK:
        COUNT.value += 1
    QUEUE.put(item)
    MANAGED.put((trial.number, item))
    SHARED.buf[0] += 1
    again = shared_memory.SharedMemory(SHARED.name)
    again.buf[1] += 1
    again.close()
    if trial.number == 1:
        own = shared_memory.SharedMemory(create=True, size=1000)
        pathlib.Path("own.txt").write_text(own.name)
        os.kill(os.getpid(), 9)
    return float(item)

if __name__ == "__main__":
    import warnings
    warnings.simplefilter("ignore")
    context = mp.get_context("spawn")
    QUEUE, LOCK, COUNT = context.Queue(), context.Lock(), context.Value("i", 0)
    QUEUE.put(3)
    MANAGED = mp.Manager().Queue()
    SHARED = shared_memory.SharedMemory(create=True, size=100)
    removed = []
    found = values(objective, n_trials=1)
    for method in METHODS:
        study = optuna.create_study()
        study.optimize(isolated(objective, start_method=method), n_trials=3)
        found[method] += [t.value for t in study.trials]
        own = "/dev/shm/" + pathlib.Path("own.txt").read_text()
        deadline = time.monotonic() + 10
        while os.path.exists(own) and time.monotonic() < deadline:
            time.sleep(0.05)
        removed.append(not os.path.exists(own))
    managed = [MANAGED.get() for _ in range(12)]
    say(found=found, count=COUNT.value, managed=sorted(managed), shared=list(SHARED.buf[:2]),
        removed=removed)
    SHARED.unlink()
"""


def test_queues_locks_managers_and_shared_memory_of_the_script(tmp_path: Path) -> None:
    found = run_script(tmp_path, ACROSS)
    assert found["found"] == always(3.0, 3.0, None, 3.0)  # type: ignore[arg-type]  # one is killed
    assert found["count"] == 12 and found["shared"] == [12, 12]
    assert len(found["managed"]) == 12
    assert found["removed"] == [True] * 3


FORK_CONTEXT = """
import multiprocessing as mp, threading
LOCK = threading.Lock()
context = mp.get_context("fork")
QUEUE, COUNT = context.Queue(), context.Value("i", 0)
SPAWNED = mp.get_context("spawn").Queue()

def objective(trial):
    with COUNT.get_lock():
        COUNT.value += 1
    QUEUE.put("x" * 1_000)
    return 1.0

def of_both(trial):
    with LOCK:
        SPAWNED.put(trial.number)
    return 2.0

of_both.kind = "by value"

if __name__ == "__main__":
    of_both.again = True
    found = values(objective, n_trials=1)
    got = sum(len(QUEUE.get(timeout=20)) for _ in METHODS)
    both = values(of_both, n_trials=1)
    say(found=found, got=got, count=COUNT.value, both=both,
        spawned=[SPAWNED.get(timeout=20) for _ in METHODS])
"""


def test_queues_and_locks_that_only_a_fork_can_share(tmp_path: Path) -> None:
    found = run_script(tmp_path, FORK_CONTEXT)
    assert found["found"] == always(1.0) and found["both"] == always(2.0)
    assert found["got"] == 3_000 and found["count"] == 3
    # A lock is made anew beside it; the queue is the script's own.
    assert found["spawned"] == [0, 0, 0]


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


@pytest.mark.parametrize("method", METHODS)
def test_what_an_objective_leaves_open_holds_nothing_up(tmp_path: Path, method: str) -> None:
    found = run_script(tmp_path, LEFT_OPEN, "script.py", method)
    assert found["found"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert found["took"] < 30


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


CARRIED = """
import array, contextvars, resource
SIZE = 150_000_000
VARIABLE = contextvars.ContextVar("VARIABLE", default=1.0)
VARIABLE.set(5.0)

class Outer:
    def __init__(self, inner):
        self.inner = inner
    def __call__(self, trial):
        study = optuna.create_study()
        study.optimize(isolated(self.inner), n_trials=1)
        return study.best_value

def plain(trial):
    return VARIABLE.get()

import numpy
DATA = numpy.ones(SIZE // 8)

def objective(trial):
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with open("/proc/self/status") as file:
        peak = [int(x.split()[1]) * 1024 for x in file if x.startswith("VmHWM")][0]
    trial.set_user_attr("peak", peak)
    return float(DATA[-1] + len(DATA) * 0)

nested = values(Outer(plain), n_trials=1)
peaks, times = {}, {}
for method in ("forkserver", "spawn"):
    study = optuna.create_study()
    study.optimize(isolated(objective, start_method=method), n_trials=2)
    peaks[method] = max(t.user_attrs["peak"] for t in study.trials) / SIZE
    peaks[method + " value"] = study.best_value
say(nested=nested, peaks=peaks)
"""


def test_data_is_carried_once_and_isolated_within_isolated(tmp_path: Path) -> None:
    found = run_script(tmp_path, CARRIED)
    assert found["nested"] == always(5.0)
    for method in ("forkserver", "spawn"):
        assert found["peaks"][f"{method} value"] == 1.0
        # The interpreter with its modules is half of it at most.
        assert 1.0 <= found["peaks"][method] < 2.0


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
def test_a_hundred_trials_with_a_pool_in_each(tmp_path: Path) -> None:
    assert run_script(tmp_path, MANY_POOLS, timeout=100)["found"] == [12.0] * 100


@pytest.mark.integration
def test_torchscript_and_pydantic_of_an_unguarded_script(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("pydantic")
    source = """
import pickle
import torch
from pydantic import BaseModel
torch.set_default_dtype(torch.float64)

class Config(BaseModel):
    lr: float = 0.5

DEFAULT = Config(lr=0.25)
SHARED = torch.zeros(2).share_memory_()

def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return double(self.layer(x))
        return x

def objective(trial):
    assert isinstance(DEFAULT, Config) and pickle.loads(pickle.dumps(DEFAULT)) == DEFAULT
    result = torch.jit.script(Net())(torch.ones(1, 2))
    assert result.dtype is torch.float64
    SHARED[0] += 1
    return float(torch.jit.script(double)(torch.ones(1))) + result.numel() + DEFAULT.lr

say(found=values(objective), shared=float(SHARED[0]))
"""
    found = run_script(tmp_path, source)
    assert found == {"found": always(4.25, 4.25), "shared": 6.0}
