"""Memory over a limit is a breach in whichever process of the trial it is asked for."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
import resource
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import isolated, Limits, QuotaPruner
from optuna_quota._records import read_record
from tests.isolation_tests.trials import needs_supervisor, run_one


pytestmark = needs_supervisor
MIB = 2**20


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


KEPT: list[bytearray] = []


def test_an_objective_that_has_left_no_room_keeps_its_result() -> None:
    def objective(trial: optuna.Trial) -> float:
        # As under `strict_memory=True`, but far from the limit that the supervisor enforces.
        data = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (data + 60 * MIB, hard))
        for size in (2**20, 2**12, 2**9, 64):
            try:
                while True:
                    KEPT.append(bytearray(size))
            except MemoryError:
                continue
        return 1.0

    trial = run_one(objective, Limits(memory="900MiB"))
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 1.0)


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
