"""Memory of an isolated trial: what is recorded, what fits and what breaches a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import functools
import mmap
import multiprocessing
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
import psutil
import pytest

from optuna_quota import isolated, Limits, QuotaPruner
from optuna_quota._records import read_record
from tests.isolation_tests.trials import needs_supervisor, run_one


pytestmark = needs_supervisor
MIB = 2**20


class Witness(threading.Thread):
    """Adds up the memory of a trial's tree from outside, by the kernel's own account.

    Args:
        file: Where the trial's process writes its pid. Once it has been looked at twice, a file
            beside it says so.

    Attributes:
        peak: The most that two looks in a row saw, in bytes.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._file = file
        self._watching = file.with_suffix(".watching")
        self._stop_it = threading.Event()

    def run(self) -> None:
        last = 0
        while not self._stop_it.wait(0.01):
            with contextlib.suppress(OSError, ValueError, psutil.Error):
                root = psutil.Process(int(self._file.read_text()))
                now = sum(map(pss, [root.pid, *(p.pid for p in root.children(recursive=True))]))
                self.peak = max(self.peak, min(now, last))
                if last:
                    self._watching.touch()
                last = now

    def __enter__(self) -> Witness:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_it.set()
        self.join()


def pss(pid: int) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:", "SwapPss:")):
                total += int(line.split()[1]) * 1024
    return total


def show() -> float:
    """Let everybody look, also a supervisor that gets little of a busy machine."""
    before = wakeups(os.getppid())
    time.sleep(0.4)
    while wakeups(os.getppid()) < before + 4:
        time.sleep(0.01)
    return 0.0


def wakeups(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("voluntary_ctxt_switches:")[2].split()[0])


def hold_shared_memory(trial: optuna.Trial) -> float:
    from multiprocessing import shared_memory

    block = shared_memory.SharedMemory(create=True, size=250 * MIB)
    array = np.ndarray(250 * MIB // 8, buffer=block.buf)
    array[:] = 1
    with readers(array):
        found = show()
    del array
    block.close()
    block.unlink()
    return found


@contextlib.contextmanager
def readers(array: Any) -> Iterator[None]:
    """Let four forked processes read an array and stay."""
    context = multiprocessing.get_context("fork")
    read, go = context.Barrier(5), context.Event()

    def run() -> None:
        float(array.sum())
        read.wait(60)
        go.wait(60)

    workers = [context.Process(target=run) for _ in range(4)]
    for worker in workers:
        worker.start()
    read.wait(60)
    yield
    go.set()
    for worker in workers:
        worker.join(60)


def hold_a_copied_array(trial: optuna.Trial) -> float:
    array = np.ones(200 * MIB // 8)
    with readers(array):
        return show()


def write_to_an_inherited_array(trial: optuna.Trial) -> float:
    array = np.ones(100 * MIB // 8)
    context = multiprocessing.get_context("fork")
    written, go = context.Event(), context.Event()

    def run() -> None:
        array[:] = 2
        written.set()
        go.wait(60)

    worker = context.Process(target=run)
    worker.start()
    written.wait(60)
    found = show()
    go.set()
    worker.join(60)
    return found


def hold_torch_tensors(trial: optuna.Trial) -> float:
    torch = pytest.importorskip("torch")
    tensor = torch.empty(150 * MIB // 4).share_memory_().fill_(1)
    with readers(tensor.numpy()):
        return show()


def hold_a_file_in_memory(trial: optuna.Trial) -> float:
    # As joblib does for large arrays: the file is memory, whoever maps it.
    path = f"/dev/shm/optuna-quota-test-{os.getpid()}"
    try:
        array = np.memmap(path, dtype=np.uint8, mode="w+", shape=(200 * MIB,))
        array[:] = 1
        with readers(array):
            return show()
    finally:
        os.unlink(path)


def map_a_file(trial: optuna.Trial) -> float:
    data = np.memmap(os.environ["QUOTA_TEST_FILE"], dtype=np.uint8, mode="r")
    assert int(data.max()) == 1
    return show()


def map_a_file_for_a_moment(trial: optuna.Trial) -> float:
    data = np.memmap(os.environ["QUOTA_TEST_FILE"], dtype=np.uint8, mode="r")
    assert int(data.max()) == 1
    del data
    return show()


def map_a_file_to_write(trial: optuna.Trial) -> float:
    # Private: 700 MiB are reserved, and 60 of them become memory.
    data = np.memmap(os.environ["QUOTA_TEST_FILE"], dtype=np.uint8, mode="c")
    data[: 60 * MIB] = 2
    return show()


def hold_threads(trial: optuna.Trial) -> float:
    done = threading.Event()
    threads = [threading.Thread(target=done.wait) for _ in range(64)]
    for thread in threads:
        thread.start()
    block = np.ones(60 * MIB // 8)
    found = show()
    done.set()
    for thread in threads:
        thread.join()
    return found + 0.0 * float(block[0])


def fill_a_buffer_lazily(trial: optuna.Trial) -> float:
    buffer = np.zeros(1300 * MIB, dtype=np.uint8)
    buffer[: 64 * MIB] = 1
    return show()


HOLDERS = [
    hold_shared_memory,
    hold_a_copied_array,
    write_to_an_inherited_array,
    hold_torch_tensors,
    hold_a_file_in_memory,
    map_a_file,
    map_a_file_for_a_moment,
    map_a_file_to_write,
    hold_threads,
    fill_a_buffer_lazily,
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("data") / "big"
    with path.open("wb") as out:
        for _ in range(700):
            out.write(b"\x01" * MIB)
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, "450MiB"], ids=["no limit", "limit"])
@pytest.mark.parametrize("objective", HOLDERS, ids=lambda value: value.__name__)
def test_memory_is_recorded_as_the_kernel_divides_it(
    objective: Callable[..., Any],
    limit: str | None,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if objective is hold_torch_tensors:
        pytest.importorskip("torch")
    monkeypatch.setenv("QUOTA_TEST_FILE", str(file))
    pid = tmp_path / "pid"

    def run(trial: optuna.Trial) -> float:
        pid.write_text(str(os.getpid()))
        while not pid.with_suffix(".watching").exists():
            time.sleep(0.002)
        return float(objective(trial))

    with Witness(pid) as witness:
        trial = run_one(run, None if limit is None else Limits(memory=limit))
    record = read_record(trial)
    assert (trial.state, record.reason) == (TrialState.COMPLETE, None)
    assert witness.peak and record.usage.memory is not None
    # What the fork server of this test run holds, some 150 MiB, has 3 to 7 holders.
    assert abs(record.usage.memory - witness.peak) <= 0.1 * witness.peak + 20 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, "450MiB"], ids=["no limit", "limit"])
def test_memory_freed_between_measurements_is_recorded(limit: str | None) -> None:
    def objective(trial: optuna.Trial) -> float:
        time.sleep(0.7)  # looks are seldom by now
        block = mmap.mmap(-1, 300 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(block, dtype=np.uint8)[:] = 1

        del block
        time.sleep(0.3)
        return 0.0

    record = read_record(run_one(objective, None if limit is None else Limits(memory=limit)))
    assert record.outcome == "completed" and record.usage.memory is not None
    # With what all hold that were forked from the fork server.
    assert 300 * MIB <= record.usage.memory < 400 * MIB


@pytest.mark.slow
def test_a_file_that_is_read_within_a_short_trial_is_no_memory(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUOTA_TEST_FILE", str(file))

    def objective(trial: optuna.Trial) -> float:
        data = np.memmap(os.environ["QUOTA_TEST_FILE"], dtype=np.uint8, mode="r")
        return float(data[: 200 * MIB].max())

    for _ in range(3):
        record = read_record(run_one(objective, Limits(memory="100MiB")))
        assert (record.outcome, record.reason) == ("completed", None)
        assert record.usage.memory is not None and record.usage.memory < 60 * MIB


@pytest.mark.slow
def test_memory_of_the_study_does_not_count_for_a_fork() -> None:
    block = np.ones(300 * MIB // 8)

    def objective(trial: optuna.Trial) -> float:
        own = np.ones(50 * MIB // 8)
        time.sleep(0.3)
        return float(own[0] + block[0])

    trial = run_one(objective, Limits(memory="120MiB"), start_method="fork")
    record = read_record(trial)
    assert (trial.state, record.reason) == (TrialState.COMPLETE, None)
    assert record.usage.memory is not None
    assert 50 * MIB <= record.usage.memory < 80 * MIB


@pytest.mark.slow
def test_pages_that_a_fork_writes_to_count() -> None:
    block = np.ones(300 * MIB // 8)

    def objective(trial: optuna.Trial) -> float:
        for start in range(0, len(block), MIB // 4):  # 2 MiB
            block[start : start + MIB // 4] = 2
            time.sleep(0.01)
        time.sleep(60)
        return 0.0

    record = read_record(run_one(objective, Limits(memory="200MiB"), start_method="fork"))
    assert record.outcome == "terminated"
    assert record.usage.memory is not None and record.usage.memory < 260 * MIB


# What is over.


def grow(kind: str) -> Any:
    """Return an objective that takes more and more memory, and catches what it can."""

    def objective(trial: optuna.Trial) -> float:
        held: list[Any] = []
        for _ in range(400):
            if kind == "shared":
                block = mmap.mmap(-1, 4 * MIB)
                np.frombuffer(block, dtype=np.uint8)[:] = 1
                held.append(block)
            elif kind == "list":
                held.append([float(i) for i in range(100_000)])
            else:
                held.append(np.ones(4 * MIB // 8))
            with contextlib.suppress(Exception):
                time.sleep(0.0005)
        time.sleep(60)
        return 0.0

    return objective


@pytest.mark.parametrize("kind", ["array", "shared", "list"])
def test_growth_is_stopped_soon_after_the_limit(kind: str) -> None:
    record = read_record(run_one(grow(kind), Limits(memory="256MiB"), grace_period=2.0))
    assert record.outcome == "terminated" and record.breach is not None
    assert record.breach.resource == "memory" and not record.breach.refused
    assert 256 * MIB < record.breach.observed < 300 * MIB
    assert record.reason is not None and "used, 256 MiB allowed" in record.reason
    assert record.usage.memory is not None and record.usage.memory < 330 * MIB


# Unlike CDLL, it does not release the interpreter lock.
hold_interpreter = ctypes.PyDLL(None).usleep


class LoadsSlowly:
    """Says that it is being loaded, and takes its time."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return _load_slowly, (self._file,)


def _load_slowly(file: Path) -> LoadsSlowly:
    file.touch()
    time.sleep(0.3)
    return LoadsSlowly(file)


def _fill_600_mib(_: LoadsSlowly, trial: optuna.Trial) -> float:
    held = []
    for _ in range(150):
        held.append(np.ones(4 * MIB // 8))
        time.sleep(0.001)
    return float(held[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_a_limit_is_enforced_while_the_study_is_busy(start_method: Any, tmp_path: Path) -> None:
    file = tmp_path / "loading"

    def hold_once_loading() -> None:
        while not file.exists():
            time.sleep(0.01)
        hold_interpreter(1_500_000)

    if start_method == "fork":
        study, holds = os.getpid(), [1_500_000]

        def hold_once() -> None:
            # The hook stays registered, and is run in the supervisor as well.
            if os.getpid() == study and holds:
                hold_interpreter(holds.pop())

        os.register_at_fork(after_in_parent=hold_once)
    else:
        threading.Thread(target=hold_once_loading).start()
    objective = functools.partial(_fill_600_mib, LoadsSlowly(file))
    trial = run_one(objective, Limits(memory="300MiB"), start_method=start_method)
    record = read_record(trial)
    assert record.outcome == "terminated" and record.breach is not None
    assert record.breach.observed < 330 * MIB
    assert 0 < record.breach.seconds < 60
    assert record.usage.memory is not None and record.usage.memory < 340 * MIB


@pytest.mark.slow
def test_memory_freed_before_the_objective_begins_does_not_count() -> None:
    trial = run_one(functools.partial(_run_loaded, LoadsMuch()), Limits(memory="300MiB"))
    record = read_record(trial)
    assert (trial.state, record.reason) == (TrialState.COMPLETE, None)
    assert record.usage.memory is not None and record.usage.memory < 250 * MIB


class LoadsMuch:
    """Needs 400 MiB for a moment when it is unpickled."""

    def __reduce__(self) -> Any:
        return _load_much, ()


def _load_much() -> LoadsMuch:
    held = np.ones(400 * MIB // 8)
    time.sleep(0.3)
    del held
    return LoadsMuch()


def _run_loaded(loaded: LoadsMuch, trial: optuna.Trial) -> float:
    time.sleep(0.1)
    return 0.0


def fill(size: int) -> float:
    return float(np.ones(size // 8).sum())


def in_a_pool(size: int) -> float:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return sum(pool.map(fill, [size] * 2))


def in_an_executor(size: int) -> float:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        return sum(pool.map(fill, [size] * 2))


def in_joblib(size: int) -> float:
    from joblib import delayed, Parallel

    return float(sum(Parallel(n_jobs=2)(delayed(fill)(size) for _ in range(2))))


def in_a_data_loader(size: int) -> float:
    from torch.utils.data import DataLoader

    class Data:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> float:
            return fill(size)

    loader: Any = DataLoader(Data(), num_workers=2, batch_size=2)  # type: ignore[arg-type]
    return float(sum(batch.sum() for batch in loader))


FILL = "import sys, numpy as np; print(float(np.ones(int(sys.argv[1]) // 8).sum()))"


def in_a_checked_script(size: int) -> float:
    command = [sys.executable, "-c", FILL, str(size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def in_a_script(size: int) -> float:
    command = [sys.executable, "-c", FILL, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"training failed ({done.returncode}): {done.stderr[-4000:]}")
    return float(done.stdout)


class Hungry:
    """An estimator that needs memory, as scikit-learn sees one."""

    def __init__(self, size: int = 0) -> None:
        self.size = size

    def get_params(self, deep: bool = True) -> dict[str, int]:
        return {"size": self.size}

    def set_params(self, **params: int) -> Hungry:
        return self

    def fit(self, x: Any, y: Any) -> Hungry:
        # The last two of five fits are larger.
        self.data = np.ones(self.size // 8 if x[0, 0] == 0 else 8)
        return self

    def score(self, x: Any, y: Any) -> float:
        return 1.0

    def __sklearn_tags__(self) -> Any:
        from sklearn.base import BaseEstimator

        return BaseEstimator().__sklearn_tags__()


def in_some_fits(size: int) -> float:
    from sklearn.model_selection import cross_val_score

    x = np.arange(50.0)[:, None]
    scores = cross_val_score(Hungry(size), x, np.arange(50) % 2, cv=5)  # type: ignore[arg-type]
    return float(scores.mean())


WORKERS = [
    fill,
    in_a_pool,
    pytest.param(in_an_executor, marks=pytest.mark.slow),
    pytest.param(in_joblib, marks=pytest.mark.slow),
    pytest.param(in_a_data_loader, marks=pytest.mark.slow),
    pytest.param(in_a_checked_script, marks=pytest.mark.slow),
    pytest.param(in_a_script, marks=pytest.mark.slow),
    pytest.param(in_some_fits, marks=pytest.mark.slow),
]


def needs(act: Any) -> None:
    for name, of in (
        ("joblib", in_joblib),
        ("torch", in_a_data_loader),
        ("sklearn", in_some_fits),
    ):
        if act is of:
            pytest.importorskip(name)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("strict", [False, True], ids=["measured", "strict"])
@pytest.mark.parametrize("act", WORKERS, ids=lambda value: value.__name__)
def test_too_much_memory_is_a_breach_in_any_process(act: Any, strict: bool) -> None:
    needs(act)
    trial = run_one(
        lambda trial: act(900 * MIB),
        Limits(memory="400MiB"),
        grace_period=1.0,
        strict_memory=strict,
    )
    record = read_record(trial)
    assert (trial.state, record.outcome) == (TrialState.PRUNED, "terminated"), record.reason
    assert record.breach is not None and record.breach.resource == "memory"
    verb = "asked for" if record.breach.refused else "used"
    assert record.breach.refused is strict
    assert record.reason is not None and f"{verb}, 400 MiB allowed" in record.reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("act", WORKERS, ids=lambda value: value.__name__)
def test_memory_within_the_limit_completes(act: Any) -> None:
    needs(act)
    trial = run_one(lambda trial: act(80 * MIB), Limits(memory="400MiB"))
    assert (trial.state, read_record(trial).reason) == (TrialState.COMPLETE, None)


def raise_in_a_pool() -> float:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return float(pool.apply(raise_memory_error))


def raise_memory_error() -> float:
    raise MemoryError("the table of this simulator is full")


def fail_in_a_script() -> float:
    command = [sys.executable, "-c", "raise SystemExit('no such dataset')"]
    subprocess.run(command, check=True, capture_output=True)
    return 0.0


def die_in_a_worker() -> float:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return float(pool.submit(os._exit, 3).result() or 0.0)


@pytest.mark.parametrize("strict", [False, True], ids=["measured", "strict"])
@pytest.mark.parametrize(
    "act",
    [raise_memory_error, raise_in_a_pool, fail_in_a_script, die_in_a_worker],
    ids=lambda value: value.__name__,
)
def test_an_unrelated_failure_is_no_breach(act: Any, strict: bool) -> None:
    trial = run_one(lambda trial: act(), Limits(memory="400MiB"), strict_memory=strict)
    record = read_record(trial)
    assert (trial.state, record.outcome) == (TrialState.FAIL, "failed"), record.reason
    assert record.breach is None


def test_strict_memory_refuses_what_is_reserved_too() -> None:
    def objective(trial: optuna.Trial) -> float:
        return float(np.zeros(900 * MIB, dtype=np.uint8)[0])

    measured = run_one(objective, Limits(memory="400MiB"))
    assert measured.state == TrialState.COMPLETE
    strict = read_record(run_one(objective, Limits(memory="400MiB"), strict_memory=True))
    assert strict.outcome == "terminated" and strict.breach is not None
    assert strict.breach.refused and "asked for" in (strict.reason or "")


@pytest.mark.slow
def test_a_crash_near_the_limit_is_a_crash() -> None:
    def objective(trial: optuna.Trial) -> float:
        held = np.ones(400 * MIB // 8)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGSEGV)
        return float(held[0])

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(memory="540MiB")))
    study.optimize(isolated(objective), n_trials=1)
    record = read_record(study.trials[0])
    assert (record.outcome, record.breach) == ("failed", None)
