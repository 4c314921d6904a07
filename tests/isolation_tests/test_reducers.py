"""Objects of libraries in trials: locks, shared memory, arrays, tensors, modules."""

from __future__ import annotations

from pathlib import Path
import pickle
from typing import Any

import numpy as np
import pytest

from optuna_quota._isolation.payload import MappedFiles
from optuna_quota._isolation.reducers import reduce_array
from tests.isolation_tests.scripts import always, run_script


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


EXECUTORS = """
import concurrent.futures as futures, multiprocessing as mp

def double(number):
    return 2 * number

def prepare(number):
    double.base = number

def based(number):
    return double.base + number

THREADS = futures.ThreadPoolExecutor(2, "mine", prepare, (4,))

def objective(trial):
    names = {THREADS.submit(lambda: __import__("threading").current_thread().name).result()}
    assert names == {"mine_0"} and THREADS.submit(based, 1).result() == 5
    assert POOL._mp_context.get_start_method() == "spawn"
    return float(sum(THREADS.map(double, range(3))) + POOL.submit(double, 4).result())

def ended(trial):
    return CLOSED.submit(double, 1).result()

if __name__ == "__main__":
    assert THREADS.submit(based, 0).result() == 4
    POOL = futures.ProcessPoolExecutor(1, mp.get_context("spawn"))
    CLOSED = futures.ThreadPoolExecutor()
    CLOSED.shutdown()
    try:
        values(ended, n_trials=1, methods=METHODS[:1])
    except TypeError as error:
        refused = str(error)
    say(found=values(objective, methods=METHODS[:1]), refused=refused)
    POOL.shutdown()
"""


def test_executors_are_made_again_in_each_trial(tmp_path: Path) -> None:
    said = run_script(tmp_path, EXECUTORS)
    assert said["found"] == {"forkserver": [14.0, 14.0]}
    assert "`CLOSED` that it refers to can't be pickled" in said["refused"]


def test_arrays_of_ctypes(tmp_path: Path) -> None:
    assert run_script(tmp_path, ARRAYS)["found"] == always(21.0)


MANY = 100_000


class Own(np.ndarray):
    def __reduce__(self) -> Any:
        return Own, (3,)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(MANY)[::2],
        np.arange(MANY).reshape(-1, 10)[:, 3:],
        np.arange(MANY).view("M8[s]")[::-1],
        np.zeros(MANY, [("a", "f8"), ("b", "i4")]).view(np.recarray),
    ],
    ids=["steps", "columns", "backwards", "records"],
)
def test_a_copy_of_an_array_is_the_same(array: Any) -> None:
    make, arguments = reduce_array(array, MappedFiles())
    copy = make(*pickle.loads(pickle.dumps(arguments)))
    assert type(copy) is type(array) and copy.dtype == array.dtype
    assert np.array_equal(copy, array)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(MANY),
        np.arange(MANY).reshape(-1, 10).T,
        np.arange(100)[::2],
        np.array([None, 1] * MANY)[::2],
        np.ma.masked_less(np.arange(MANY), 3),
        np.ones(MANY).view(Own),
        [1, 2],
    ],
    ids=["plain", "turned", "small", "objects", "masked", "own way", "no array"],
)
def test_arrays_that_numpy_pickles_itself(value: Any) -> None:
    assert reduce_array(value, MappedFiles()) is None


LOCALS = """
import threading

class Console(threading.local):
    def __init__(self, theme, *, width):
        self.theme, self.width = theme, width

class Printer:
    def __init__(self):
        self.console, self.state = Console("dark", width=80), threading.local()
        self.state.depth, self.state.file = 3, open(os.devnull, "w")

PRINTER = Printer()
PRINTER.console.width = 60

def objective(trial):
    found = [PRINTER.console.width, PRINTER.state.depth]
    thread = threading.Thread(target=lambda: found.append(PRINTER.console.width))
    thread.start()
    thread.join()
    assert PRINTER.console.theme == "dark" and found == [60, 3, 80]
    return 1.0

say(found=values(objective, n_trials=1))
"""


def test_attributes_of_threads(tmp_path: Path) -> None:
    assert run_script(tmp_path, LOCALS)["found"] == always(1.0)


DELEGATES = """
class Wrapper:
    __slots__ = ("__dict__", "steps")

    def __init__(self, env):
        self.env, self.own, self.steps = env, self, 5

    def __getattr__(self, name):
        return getattr(self.env, name)

class Options(dict):
    __getattr__ = dict.get

    def __init__(self, **options):
        super().__init__(options)
        vars(self)["depth"] = 3

WRAPPED, OPTIONS = Wrapper(Wrapper([1, 2, 2])), Options(lr=0.5)

def objective(trial):
    assert WRAPPED.own is WRAPPED and OPTIONS.unknown is None
    return WRAPPED.count(2) + WRAPPED.steps + OPTIONS.lr + OPTIONS.depth

say(found=values(objective, n_trials=1))
"""


def test_objects_that_answer_for_others(tmp_path: Path) -> None:
    assert run_script(tmp_path, DELEGATES)["found"] == always(10.5)
