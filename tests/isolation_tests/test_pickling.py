"""Classes, functions, data, queues and locks that scripts send to their trials."""

from __future__ import annotations

import inspect
import linecache
from pathlib import Path
import textwrap
import traceback
from typing import Any

import optuna
import pytest

from optuna_quota import isolated
from tests.isolation_tests.scripts import always, run_script


CLASSES = """
import collections, dataclasses, enum, functools, inspect, multiprocessing as mp, pickle
import threading, traceback, typing
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

class AttributeDict(dict):
    __getattr__ = dict.__getitem__
    def __getstate__(self):  # Python 3.10 can't pickle it without
        return None

class Holder:
    def __init__(self):
        self.lock = threading.Lock()

    @functools.cached_property
    def size(self):
        return 1

HOLDER = Holder()
OPTIONS = AttributeDict(one=1)
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
    with HOLDER.lock:
        assert OPTIONS.one == HOLDER.size
    assert pickle.loads(pickle.dumps(args))[0] == DEFAULT
    with mp.Pool(1) as pool:
        total = sum(pool.map(work, [args]))
    with ProcessPoolExecutor(1) as executor:
        total += sum(executor.map(work, [args]))
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


MAIN = """
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


@pytest.mark.slow
@pytest.mark.parametrize("way", ["unguarded", "guarded", "-m", "-c"])
def test_identity_of_classes_and_functions(tmp_path: Path, way: str) -> None:
    source = CLASSES + MAIN
    if way == "guarded":
        source = f'{CLASSES}if __name__ == "__main__":{textwrap.indent(MAIN, "    ")}'
    if way == "-c":
        # No file, no source; each module is read by the interpreter at once.
        source = source.replace('assert "the guilty line"', 'assert True or "the guilty line"')
        source = source.replace('"the guilty line" in traceback', '"fail" in traceback')
        source = source.replace('assert "pool.map"', 'assert True or "pool.map"')
    command = {"-m": ["-m", "script"], "-c": ["-c", f"from helpers import *\n{source}"]}
    found = run_script(tmp_path, source, *command.get(way, []))
    assert found["found"] == always(100_006, 100_006)
    assert found["lines"] == [True] * 6
    if way != "guarded":
        assert found["loads"] == 1


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


@pytest.mark.slow
def test_queues_and_locks_of_the_fork_context(tmp_path: Path) -> None:
    found = run_script(tmp_path, FORK_CONTEXT)
    assert found["found"] == always(1.0) and found["both"] == always(2.0)
    assert found["got"] == 3_000 and found["count"] == 3
    # A lock is made anew beside it; the queue is the script's own.
    assert found["spawned"] == [0, 0, 0]


CARRIED = """
import contextvars
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
    with open("/proc/self/status") as file:
        peak = [int(x.split()[1]) * 1024 for x in file if x.startswith("VmHWM")][0]
    trial.set_user_attr("peak", peak)
    return float(DATA[-1] + len(DATA) * 0)

nested = values(Outer(plain), n_trials=1)
peaks = {}
for method in ("forkserver", "spawn"):
    study = optuna.create_study()
    study.optimize(isolated(objective, start_method=method), n_trials=2)
    peaks[method] = max(t.user_attrs["peak"] for t in study.trials) / SIZE
    peaks[method + " value"] = study.best_value
say(nested=nested, peaks=peaks)
"""


def test_functions_sent_by_value_keep_their_file_and_source() -> None:
    name, source = "<cell 1>", "def in_a_cell(x):\n    return 1 / x\n"
    # As IPython does.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    cell: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), cell)

    def objective(trial: optuna.Trial) -> float:
        assert "def objective" in inspect.getsource(objective)
        assert inspect.getsource(cell["in_a_cell"]) == source
        return float(cell["in_a_cell"](0))

    try:
        with pytest.raises(ZeroDivisionError) as caught:
            optuna.create_study().optimize(isolated(objective), n_trials=1)
    finally:
        del linecache.cache[name]
    *_, outer, inner = traceback.extract_tb(caught.value.__traceback__)
    assert outer.filename == __file__ and inner.filename == name


LOADER = """
import importlib.util, sys, types

sys.modules["registry"] = types.ModuleType("registry")

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
BY_PATH = """
import types
from loader import load

def fail(objective):
    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=1, catch=hub.Failed)
    return study.trials[0].state.name

# As OptunaHub does, whose packages have no parents; and under another module's name.
hub = load("registry.package.hub", "elsewhere/hub/__init__.py")
plan = load("plan", "elsewhere/plan.py")
plan.SCALE = 3.0
made = types.ModuleType("made")
exec("def objective(trial): return 5.0", vars(made))
sys.modules["made"] = made
say(
    hub=values(hub.Problem(), n_trials=1),
    failed=fail(hub.fail),
    plan=values(plan.objective, n_trials=1),
    module=values(lambda trial: plan.scale(2.0), n_trials=1),
    made=values(made.objective, n_trials=1),
)
"""
HUB = """
import enum

class Kind(enum.Enum):
    SPHERE = 1

class Failed(Exception):
    pass

class Problem:
    def __init__(self):
        self.kind = Kind.SPHERE

    def __call__(self, trial):
        return float(self.kind is Kind.SPHERE)

def fail(trial):
    raise Failed("with a class of its own")
"""
PLAN = """
SCALE = 1.0

def scale(x):
    return SCALE * x

def objective(trial):
    return scale(1.0)
"""


LOADER_IN_USE = """
from torch.utils.data import DataLoader

if __name__ == "__main__":
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True)
    once = sum(int(batch) for batch in loader)
    say(once=once, found=values(lambda trial: float(sum(map(int, loader))), n_trials=1))
"""


@pytest.mark.slow
@pytest.mark.integration
def test_a_loader_whose_workers_the_script_has_started(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert run_script(tmp_path, LOADER_IN_USE) == {"once": 6, "found": always(6.0)}


@pytest.mark.slow
def test_modules_that_no_other_process_can_import(tmp_path: Path) -> None:
    (tmp_path / "loader.py").write_text(LOADER)
    (tmp_path / "elsewhere" / "hub").mkdir(parents=True)
    (tmp_path / "elsewhere" / "hub" / "__init__.py").write_text(
        "from ._problem import Failed, fail, Problem\n"
    )
    (tmp_path / "elsewhere" / "hub" / "_problem.py").write_text(HUB)
    (tmp_path / "elsewhere" / "plan.py").write_text(PLAN)
    (tmp_path / "plan.py").write_text("raise RuntimeError('another one of this name')\n")
    found = run_script(tmp_path, BY_PATH)
    assert found["hub"] == always(1.0) and found["failed"] == "FAIL"
    assert found["plan"] == always(3.0) and found["module"] == always(6.0)
    assert found["made"] == always(5.0)


@pytest.mark.slow
def test_data_is_held_once_and_studies_may_be_nested(tmp_path: Path) -> None:
    found = run_script(tmp_path, CARRIED)
    assert found["nested"] == always(5.0)
    for method in ("forkserver", "spawn"):
        assert found["peaks"][f"{method} value"] == 1.0
        # The interpreter with its modules is half of it at most.
        assert 1.0 <= found["peaks"][method] < 2.0


@pytest.mark.slow
@pytest.mark.integration
def test_torchscript_pydantic_and_shared_tensors(tmp_path: Path) -> None:
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

say(found=values(objective, n_trials=1), shared=float(SHARED[0]))
"""
    found = run_script(tmp_path, source)
    assert found == {"found": always(4.25), "shared": 3.0}


OF_A_CLASS = """
import weakref
CACHE = weakref.WeakValueDictionary()

class Base:
    def run(self):
        return len(CACHE)

class Tuning(Base):
    @classmethod
    def objective(cls, trial):
        return cls().run()

try:
    values(Tuning.objective, n_trials=1, methods=METHODS[:1])
except TypeError as error:
    say(refused=str(error))
"""


def test_what_a_class_of_the_objective_refers_to_is_named(tmp_path: Path) -> None:
    assert "because `CACHE` that it refers to" in run_script(tmp_path, OF_A_CLASS)["refused"]
