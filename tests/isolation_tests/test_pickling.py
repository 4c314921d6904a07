"""Classes, functions, data, queues and locks that scripts send to their trials."""

from __future__ import annotations

from pathlib import Path
import textwrap

import pytest

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
        # A thread sends the item.
        QUEUE.close()
        QUEUE.join_thread()
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
    found = {}
    for method in METHODS:
        study = optuna.create_study()
        study.optimize(isolated(objective, start_method=method), n_trials=3)
        found[method] = [t.value for t in study.trials]
        own = "/dev/shm/" + pathlib.Path("own.txt").read_text()
        deadline = time.monotonic() + 10
        while os.path.exists(own) and time.monotonic() < deadline:
            time.sleep(0.05)
        removed.append(not os.path.exists(own))
    managed = [MANAGED.get() for _ in range(9)]
    say(found=found, count=COUNT.value, managed=sorted(managed), shared=list(SHARED.buf[:2]),
        removed=removed)
    SHARED.unlink()
"""


@pytest.mark.slow
def test_queues_locks_managers_and_shared_memory(tmp_path: Path) -> None:
    found = run_script(tmp_path, ACROSS)
    assert found["found"] == always(3.0, None, 3.0)  # one is killed
    assert found["count"] == 9 and found["shared"] == [9, 9]
    assert len(found["managed"]) == 9
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


OPS = """
import sys, types

class Ops(types.ModuleType):
    def __reduce__(self):
        raise TypeError("cannot pickle 'Ops' object")

ops = Ops("lazy.ops")
sys.modules["lazy.ops"] = ops
"""
NAMED_OPS = """
import lazy
ops = [1.0, 2.0]

def objective(trial):
    return len(ops) + float(type(lazy.ops).__name__ == "Ops")

say(found=values(objective, n_trials=1))
"""


def test_a_name_that_is_also_that_of_a_module_of_a_class_of_its_own(tmp_path: Path) -> None:
    """As `torch.ops`, where a notebook has `ops`."""
    (tmp_path / "lazy").mkdir()
    (tmp_path / "lazy" / "__init__.py").write_text(OPS)
    source = f"from helpers import *\n{NAMED_OPS}"
    assert run_script(tmp_path, "", "-c", source)["found"] == always(3.0)


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


@pytest.mark.slow
@pytest.mark.integration
def test_tensors_that_torch_pickles_itself_give_no_warning(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = """
import warnings
import torch
warnings.simplefilter("error")
WEIGHTS, SHARED = torch.ones(3, requires_grad=True), torch.zeros(2).share_memory_()

def objective(trial):
    SHARED[0] += 1
    return float(WEIGHTS.detach().sum())

say(found=values(objective, n_trials=1), shared=float(SHARED[0]))
"""
    found = run_script(tmp_path, source)
    assert found == {"found": always(3.0), "shared": 3.0}


ARRAYS = """
import ctypes

class Point(ctypes.Structure):
    _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_double * 2)]

class Pair(ctypes.Array):
    _type_, _length_ = ctypes.c_int, 2

numbers, points, text = (ctypes.c_int * 3)(1, 2, 3), (Point * 2)(), ctypes.create_string_buffer(9)
array = ctypes.Array
points[1].y[0] = 4.0

def objective(trial):
    return sum(numbers) + points[1].y[0] + len(text) + len(Pair(1, 2))

say(found=values(objective, n_trials=1))
"""


def test_arrays_of_ctypes(tmp_path: Path) -> None:
    assert run_script(tmp_path, ARRAYS)["found"] == always(21.0)
