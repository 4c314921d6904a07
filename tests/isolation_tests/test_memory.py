"""Memory of an isolated trial as it is recorded: held, shared, mapped and freed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
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
import weakref

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
    """Measures the memory of a trial's tree from outside, by the kernel's figures.

    Args:
        file: Where the trial's process writes its pid. After two measurements, another file is
            created beside it.

    Attributes:
        peak: The highest memory of two consecutive measurements, in bytes.
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
    """Wait until all have measured, also a supervisor on a busy or slow machine.

    Far from a limit it measures shared memory in a fiftieth of the time, on a slow machine seldom.
    """
    before = wakeups(os.getppid())
    began = time.monotonic()
    longest = 0.0
    while time.monotonic() < began + max(0.4, 75 * longest) or wakeups(os.getppid()) < before + 4:
        longest = max(longest, time_to_measure())
        time.sleep(0.02)
    return 0.0


def time_to_measure() -> float:
    """Return the CPU-seconds that measuring this trial takes, as its supervisor does it."""
    begun = time.thread_time()
    for process in (
        os.getpid(),
        *(p.pid for p in multiprocessing.active_children()),
        os.getppid(),
    ):
        pss(process)
    return time.thread_time() - begun


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
    # As joblib does for large arrays: a file in tmpfs is memory of each process that maps it.
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


def allocate_and_return(trial: optuna.Trial) -> float:
    return float(np.ones(150 * MIB // 8)[0])


@pytest.mark.slow
def test_the_peak_of_a_trial_that_ends_at_once_is_recorded() -> None:
    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(memory="400MiB")))
    study.optimize(isolated(allocate_and_return), n_trials=40, n_jobs=4)

    peaks = [read_record(trial).usage.memory or 0.0 for trial in study.trials]
    assert [round(peak / MIB) for peak in peaks if not 150 * MIB <= peak < 190 * MIB] == []


def test_a_trial_whose_supervisor_gets_no_core_is_measured() -> None:
    def objective(trial: optuna.Trial) -> float:
        supervisor = os.getppid()
        if trial.number:
            os.kill(supervisor, signal.SIGSTOP)
            subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -CONT {supervisor}"])
        else:
            time.sleep(0.1)
        block = np.ones(50 * MIB // 8)
        if not trial.number:
            time.sleep(0.1)
        return float(block[0])

    study = optuna.create_study(pruner=QuotaPruner())
    study.optimize(isolated(objective), n_trials=5)
    usual, *others = [read_record(trial).usage.memory or 0.0 for trial in study.trials]
    assert [round(each / MIB) for each in others if abs(each - usual) > 8 * MIB] == []


BUSY = "import numpy as np\nwhile True: np.ones(25 * 2**20)"


@pytest.mark.slow
@pytest.mark.parametrize("host", ["quiet", "others allocate huge pages"])
def test_a_file_that_is_read_within_a_short_trial_is_no_memory(
    host: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUOTA_TEST_FILE", str(file))

    def objective(trial: optuna.Trial) -> float:
        data = np.memmap(os.environ["QUOTA_TEST_FILE"], dtype=np.uint8, mode="r")
        return float(data[: 200 * MIB].max())

    with contextlib.ExitStack() as stack:
        if host != "quiet":
            other = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(other.kill)
        for _ in range(3 if host == "quiet" else 10):
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
def test_data_of_a_script_is_not_copied_by_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    module, owner = sys.modules[__name__], threading.Event()
    for number in range(8_000):  # each on pages of its own, some 2 times 36 MiB
        monkeypatch.setattr(module, f"value_{number}", (None,) * 600, raising=False)
        weakref.finalize(owner, list, (None,) * 600)

    trial = run_one(lambda trial: 0.0, Limits(memory="100MiB"), start_method="fork")
    record = read_record(trial)
    assert (trial.state, record.reason) == (TrialState.COMPLETE, None)
    assert record.usage.memory is not None and record.usage.memory < 25 * MIB


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
