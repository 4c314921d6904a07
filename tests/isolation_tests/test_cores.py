"""A limit on cores confines an isolated trial."""

from __future__ import annotations

from collections.abc import Collection, Mapping
import os
import pickle
import secrets
import sys
import threading
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, Strategy
from optuna_quota._isolation import cores
from optuna_quota._isolation.cores import choose_cores, CorePool, Cores
from optuna_quota._limits import with_cores
from optuna_quota._metering.host import cpu_count


on_linux = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or cpu_count() < 2, reason="needs affinity, two cores"
)


@pytest.fixture(autouse=True)
def names_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other programs on the machine use processors too.
    monkeypatch.setattr(cores, "_PREFIX", f"\0optuna-quota/test/{secrets.token_hex(8)}/")


@pytest.mark.parametrize(
    ("limit", "allowed", "trials", "taken", "expected"),
    [
        (2, [0, 1, 2, 3], {}, (), Cores((0, 1), 2)),
        (2, [0, 1, 2, 3], {0: 1, 1: 1}, (), Cores((2, 3), 2)),
        (2, [0, 1, 2, 3], {0: 1}, (1,), Cores((2, 3), 2)),
        (1, [4, 6], {4: 2, 6: 1}, (), Cores((6,), 1)),
        (1.5, [0, 1, 2], {}, (), Cores((0, 1), 1)),
        (0.25, [3], {3: 5}, (), Cores((3,), 1)),
        (8, [0, 1], {}, (), Cores((0, 1), 2)),
        (3, (), {}, (), Cores((), 3)),
    ],
)
def test_a_trial_gets_the_processors_that_the_fewest_have(
    limit: float,
    allowed: Collection[int],
    trials: Mapping[int, int],
    taken: Collection[int],
    expected: Cores,
) -> None:
    assert choose_cores(limit, allowed, trials, taken) == expected


@on_linux
def test_two_workers_choose_different_processors() -> None:
    one, other = CorePool(), CorePool()
    with one.claim(1) as first, other.claim(1) as second:
        assert first is not None and second is not None
        assert first.cpus != second.cpus
    with one.claim(None) as nothing:
        assert nothing is None


def test_smaller_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cores._THREAD_VARIABLES:
        monkeypatch.setenv(name, "64")
    monkeypatch.setenv("OMP_NUM_THREADS", "2,4")
    monkeypatch.setenv("MKL_NUM_THREADS", "many")
    monkeypatch.setattr(cores, "_limit_loaded_pools", lambda threads: None)
    monkeypatch.setattr(cores, "after_import", lambda name, act: None)
    cores.confine(Cores((), 3))
    assert os.environ["OMP_NUM_THREADS"] == "2,4"
    assert {os.environ[name] for name in cores._THREAD_VARIABLES[1:]} == {"3"}


def test_pools_of_libraries_are_lowered_and_not_raised() -> None:
    calls = []
    torch = SimpleNamespace(
        get_num_threads=lambda: 8,
        get_num_interop_threads=lambda: 2,
        set_num_threads=lambda n: calls.append(n),
        set_num_interop_threads=lambda n: calls.append(-n),
    )
    cores._limit_torch(torch, 4)
    assert calls == [4]


def seen_by(trial: optuna.Trial) -> float:
    import subprocess

    import numpy as np
    import threadpoolctl

    np.dot(np.ones((64, 64)), np.ones((64, 64)))
    script = "import os; print(len(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    trial.set_user_attr("child", child.stdout.split())
    trial.set_user_attr("cpus", sorted(os.sched_getaffinity(0)))
    trial.set_user_attr("threads", [i["num_threads"] for i in threadpoolctl.threadpool_info()])
    return 1.0


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_processors_threads_and_children_of_a_trial(start_method: Any) -> None:
    pytest.importorskip("threadpoolctl")
    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(cpu_cores=1)))
    objective = isolated(seen_by, start_method=start_method, preload=["numpy"])
    study.optimize(objective, n_trials=1)
    seen = study.trials[0].user_attrs
    assert len(seen["cpus"]) == 1
    assert seen["child"] == ["1", "1"]
    # BLAS of numpy, loaded before the trial and set to all cores then.
    assert set(seen["threads"]) == {1}


def busy(trial: optuna.Trial) -> float:
    """Keep two processes busy until they have used 0.8 CPU-seconds together."""
    import multiprocessing
    import time

    def work() -> None:
        while time.process_time() < 0.4:
            pass

    context = multiprocessing.get_context("fork")
    begun = time.monotonic()
    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    trial.set_user_attr("seconds", time.monotonic() - begun)
    return 1.0


@on_linux
@pytest.mark.slow
def test_an_isolated_trial_is_confined_and_breaches_nothing() -> None:
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(cpu_cores=2))
    pruner = QuotaPruner(limits=Limits(cpu_cores=1))
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.optimize(isolated(busy), n_trials=1)
    (trial,) = study.trials
    assert trial.user_attrs["quota:outcome"] == "completed"
    # Two processes that had a core each would have been done after half of that.
    assert trial.user_attrs["seconds"] > 0.75


@on_linux
@pytest.mark.parametrize("has_strategy", [True, False])
def test_auto_is_the_workers_cores_divided_by_the_jobs(has_strategy: bool) -> None:
    pytest.importorskip("threadpoolctl")
    together = threading.Barrier(2)

    def objective(trial: optuna.Trial) -> float:
        together.wait(timeout=60)
        value = isolated(seen_by)(trial)
        together.wait(timeout=60)
        return float(value)

    options: dict[str, Any] = {}
    if has_strategy:
        options["sampler"] = QuotaSampler(
            optuna.samplers.RandomSampler(),
            quota=Quota(n_trials=9),
            strategy=Strategy(n_trials=2, n_jobs=2),
        )
    pruner = QuotaPruner(limits=Limits(cpu_cores="auto"))
    study = optuna.create_study(pruner=pruner, **options)
    study.optimize(objective, n_trials=2, n_jobs=2)
    one, other = (trial.user_attrs["cpus"] for trial in study.trials)
    assert len(one) == len(other) == -(-cpu_count() // 2)
    assert len({*one, *other}) == min(len(one) * 2, len(os.sched_getaffinity(0)))


@on_linux
def test_auto_in_the_limits_of_isolated_under_a_sampler() -> None:
    def objective(trial: optuna.Trial) -> float:
        return float(len(os.sched_getaffinity(0)))

    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=9))
    study = optuna.create_study(sampler=sampler)
    study.optimize(isolated(objective, limits=Limits(cpu_cores="auto")), n_trials=2, n_jobs=2)
    assert [t.value for t in study.trials] == 2 * [-(-cpu_count() // 2)]


def test_limits_with_auto_can_be_copied_compared_and_shown() -> None:
    limits = Limits(memory="1GiB", cpu_cores="auto")
    assert pickle.loads(pickle.dumps(limits)) == limits != Limits(memory="1GiB")
    assert repr(limits) == "Limits(memory='1GiB', cpu_cores='auto')"
    assert Limits(cpu_cores="auto") and not Limits()
    assert limits.amounts() == {"memory": 2.0**30}
    assert limits.tightened({"memory": 1.0}).cpu_cores == "auto"
    assert with_cores(limits, 2.0) == Limits(memory="1GiB", cpu_cores=2)
    with pytest.raises(ValueError, match="cpu_cores"):
        Limits(cpu_cores="all")  # type: ignore[arg-type]
