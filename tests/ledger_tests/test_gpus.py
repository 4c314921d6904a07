"""Each trial gets the GPU with the most room."""

from __future__ import annotations

from collections import Counter

import optuna
import pytest

from optuna_quota import isolated, Limits, Quota, QuotaSampler, Usage
from optuna_quota._ledger import Gpu, Grant, Ledger, Refusal
from optuna_quota._ledger.gpus import request_gpu
from optuna_quota._ledger.protocol import Claim, ResourceRequest
from tests.ledger_tests.test_ledger import begin, finish, reserve


GPUS = (Gpu("GPU-a", 24.0), Gpu("GPU-b", 16.0))


@pytest.mark.parametrize(
    ("claims", "need", "expected"),
    [
        ([], 8.0, {"gpu:GPU-a": ResourceRequest(8, 8)}),
        ([Claim(0, "here", {"gpu:GPU-a": 12})], 8.0, {"gpu:GPU-b": ResourceRequest(8, 8)}),
        ([Claim(0, "here", asked={"gpu:GPU-a": 12})], 8.0, {"gpu:GPU-b": ResourceRequest(8, 8)}),
        ([Claim(0, "there", {"gpu:GPU-a": 12})], 8.0, {"gpu:GPU-a": ResourceRequest(8, 8)}),
        ([], None, {"gpu:GPU-a": ResourceRequest(3, 12)}),
    ],
)
def test_the_gpu_with_the_most_room(
    claims: list[Claim], need: float | None, expected: dict[str, ResourceRequest]
) -> None:
    assert request_gpu(GPUS, claims, "here", need) == expected
    assert request_gpu((), claims, "here", need) == {}


def test_trials_spread_over_the_gpus_and_wait_for_none() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(n_trials=100), gpus=GPUS)
    answers = [reserve(ledger, begin(study), {"gpu_memory": 8.0}) for _ in range(5)]
    assert all(isinstance(answer, Grant) for answer in answers)
    given = Counter(answer.gpu for answer in answers if isinstance(answer, Grant))
    assert given == {"GPU-a": 3, "GPU-b": 2}
    assert all("gpu:" not in str(answer.left) for answer in answers if isinstance(answer, Grant))


def test_a_gpu_given_back_is_given_again() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(n_trials=100), gpus=GPUS[1:])
    for _ in range(3):
        trial = begin(study)
        answer = reserve(ledger, trial, {"gpu_memory": 16.0})
        assert isinstance(answer, Grant) and answer.gpu == "GPU-b"
        finish(study, ledger, trial, Usage(gpu_memory=10.0))


def test_what_fits_no_gpu_is_refused() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(n_trials=100), gpus=GPUS)
    answer = reserve(ledger, begin(study), limits=Limits(gpu_memory=25))
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
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=5), one_gpu=True)
    study = optuna.create_study(sampler=sampler)
    study.optimize(isolated(objective), n_trials=1)
    assert study.trials[0].user_attrs["seen"] == "GPU-a"
