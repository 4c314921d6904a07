"""Isolated trials on a real NVIDIA GPU, by the driver's own API; no framework is needed."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
import time

import optuna
import pytest

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler


def find_gpu() -> str | None:
    """Return why there is no GPU to test on, None if there is one."""
    try:
        ctypes.CDLL("libcuda.so.1")
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "no NVIDIA driver was found"
    return None if os.path.exists("/dev/nvidiactl") else "no NVIDIA GPU was found"


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(find_gpu() is not None, reason=find_gpu() or ""),
]

MIB = 2**20
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def path_with_cuda_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def make_study(**limits: str) -> optuna.Study:
    sampler = QuotaSampler(
        optuna.samplers.RandomSampler(), quota=Quota(n_trials=99), gpus_per_trial=1
    )
    return optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=Limits(**limits)))


def hold(trial: optuna.Trial) -> float:
    from cuda_driver import Cuda

    with Cuda() as cuda:
        cuda.allocate((1 + trial.number) * 512 * MIB)
        time.sleep(1.5)
    return 1.0


def grow(trial: optuna.Trial) -> float:
    from cuda_driver import Cuda

    with Cuda() as cuda:
        for _ in range(64):
            cuda.allocate(64 * MIB)
            time.sleep(0.05)
    return 1.0


def spin(trial: optuna.Trial) -> float:
    from cuda_driver import Cuda

    with Cuda() as cuda:
        cuda.spin(4.0)
    return 1.0


def test_each_trial_is_charged_what_it_holds() -> None:
    study = make_study(gpu_memory="6GiB")
    study.optimize(isolated(hold), n_trials=2)
    for trial in study.trials:
        allocated = (1 + trial.number) * 512 * MIB
        # The rest is the driver's context, a few hundred MiB.
        assert allocated <= trial.user_attrs["quota:gpu_memory"] < allocated + 1024 * MIB
        assert trial.user_attrs["quota:gpu_source"] in ("process", "device")


def test_a_trial_over_its_limit_is_terminated() -> None:
    study = make_study(gpu_memory="1GiB")
    study.optimize(isolated(grow), n_trials=1)
    assert study.trials[0].user_attrs["quota:outcome"] == "terminated"
    assert study.trials[0].user_attrs["quota:breach"]["resource"] == "gpu_memory"


def test_time_and_energy_of_a_busy_trial() -> None:
    study = make_study()
    study.optimize(isolated(spin), n_trials=1)
    used = study.trials[0].user_attrs
    assert used["quota:outcome"] == "completed"
    if "quota:gpu_time" in used:  # not on all models
        assert 1.0 < used["quota:gpu_time"] < 10.0
    if "quota:energy" in used:
        assert used["quota:energy"] > 10.0
