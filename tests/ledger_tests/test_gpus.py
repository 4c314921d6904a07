"""Each trial gets the GPU with the most room."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
import threading
from typing import Any

import optuna
import pytest

from optuna_quota import isolated, Limits, Quota, QuotaSampler, Usage
from optuna_quota._ledger.grant import Refusal
from optuna_quota._ledger.heartbeat import RunningTrial
from optuna_quota._ledger.ledger import Ledger
from optuna_quota._metering.host import Gpu
from tests.ledger_tests.test_ledger import begin, finish, reserve


GPUS = (Gpu("GPU-a", 24.0), Gpu("GPU-b", 16.0))


FOUR = tuple(Gpu(f"GPU-{name}", 24.0) for name in "abcd")


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "all"])
def test_gpus_per_trial_is_a_positive_whole_number(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="`gpus_per_trial` must be"):
        QuotaSampler(quota=Quota(n_trials=5), gpus_per_trial=value)


def test_one_gpu_is_one_gpu_per_trial() -> None:
    assert QuotaSampler(quota=Quota(n_trials=5), one_gpu=True).gpus_per_trial == 1
    assert QuotaSampler(quota=Quota(n_trials=5)).gpus_per_trial is None
    with pytest.raises(ValueError, match="means `gpus_per_trial=1`"):
        QuotaSampler(quota=Quota(n_trials=5), one_gpu=True, gpus_per_trial=2)


def test_trials_wait_until_all_of_their_gpus_have_room() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(n_trials=100), gpus=FOUR, gpus_per_trial=2)
    answers = [reserve(ledger, begin(study), {"gpu_memory": 48.0}) for _ in range(2)]
    assert [a.reservation.gpu for a in answers if isinstance(a, RunningTrial)] == [
        "GPU-a,GPU-b",
        "GPU-c,GPU-d",
    ]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("attempt", range(5))
def test_trials_that_start_at_once_spread_over_the_gpus(workers: int, attempt: int) -> None:
    study = optuna.create_study()
    # Each knows only what it has read itself, as in processes of their own.
    quota = Quota(n_trials=100)
    ledgers = [Ledger(study, quota, gpus=FOUR, gpus_per_trial=1) for _ in range(workers)]
    trials = [begin(study) for _ in range(4)]
    together = threading.Barrier(4)

    def start(i: int) -> RunningTrial | Refusal:
        together.wait(30)
        return reserve(ledgers[i % workers], trials[i], {"gpu_memory": 6.0})

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(start, range(4)))
    given = [str(a.reservation.gpu) for a in answers if isinstance(a, RunningTrial)]
    assert sorted(given) == [gpu.uuid for gpu in FOUR]


def test_trials_spread_over_the_gpus_and_wait_for_none() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(n_trials=100), gpus=GPUS)
    answers = [reserve(ledger, begin(study), {"gpu_memory": 8.0}) for _ in range(5)]
    assert all(isinstance(answer, RunningTrial) for answer in answers)
    given = Counter(
        answer.reservation.gpu for answer in answers if isinstance(answer, RunningTrial)
    )
    assert given == {"GPU-a": 3, "GPU-b": 2}
    assert all(
        "gpu:" not in str(answer.left) for answer in answers if isinstance(answer, RunningTrial)
    )


def test_a_released_gpu_is_assigned_again() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(n_trials=100), gpus=GPUS[1:])
    for _ in range(3):
        trial = begin(study)
        answer = reserve(ledger, trial, {"gpu_memory": 16.0})
        assert isinstance(answer, RunningTrial) and answer.reservation.gpu == "GPU-b"
        finish(study, ledger, trial, Usage(gpu_memory=10.0))


def test_a_trial_that_fits_no_gpu_is_refused() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(n_trials=100), gpus=GPUS)
    answer = reserve(ledger, begin(study), limits=Limits(gpu_memory="25B"))
    assert isinstance(answer, Refusal) and not answer.final
    assert "GPU-a" in answer.reason


def test_an_isolated_trial_sees_the_gpu_that_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def objective(trial: optuna.Trial) -> float:
        import os

        trial.set_user_attr("seen", os.environ.get("CUDA_VISIBLE_DEVICES"))
        return 0.0

    monkeypatch.setattr("optuna_quota._sampler.study_session.gpus_here", lambda: GPUS)
    for options, seen in [({"one_gpu": True}, "GPU-a"), ({"gpus_per_trial": 2}, "GPU-a,GPU-b")]:
        sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=5), **options)
        study = optuna.create_study(sampler=sampler)
        study.optimize(isolated(objective), n_trials=1)
        assert study.trials[0].user_attrs["seen"] == seen
