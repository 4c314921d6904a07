"""Torch's cached GPU memory between trials of one process."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler


GIB = 2**30


class FakeCuda:
    def __init__(self, held: int = 0) -> None:
        self.held, self.cached = held, 0
        self.n_emptied = 0

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def memory_allocated(self, device: int) -> int:
        return self.held

    def empty_cache(self) -> None:
        self.cached = 0
        self.n_emptied += 1


@pytest.mark.parametrize("has_sampler", [True, False])
def test_a_trial_does_not_inherit_its_predecessors_cache(
    monkeypatch: pytest.MonkeyPatch, has_sampler: bool
) -> None:
    cuda = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    seen = []

    def objective(trial: optuna.Trial) -> float:
        trial.should_prune()
        seen.append(cuda.cached)
        cuda.cached += 4 * GIB
        return 1.0

    options: dict[str, Any] = {}
    if has_sampler:
        options["sampler"] = QuotaSampler(optuna.samplers.RandomSampler(), quota=Quota(n_trials=9))
    pruner = QuotaPruner(limits=Limits(gpu_memory="8GiB"))
    optuna.create_study(pruner=pruner, **options).optimize(objective, n_trials=3)
    assert seen == [0, 0, 0]


def test_without_a_limit_torch_keeps_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time=60)))
    study.optimize(lambda trial: float(trial.should_prune()), n_trials=2)
    assert cuda.n_emptied == 0


def test_memory_that_tensors_still_hold_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=FakeCuda(held=3 * GIB)))
    monkeypatch.setattr("optuna_quota._enforcement.study_warnings._logger.propagate", True)
    monkeypatch.setattr(sys.modules["logging"].getLogger("optuna"), "propagate", True)
    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(gpu_memory="8GiB")))
    # The one of them that counts what this process holds.
    study.optimize(isolated(lambda trial: 1.0), n_trials=1)
    assert "tensors" not in caplog.text
    study.optimize(lambda trial: float(trial.should_prune()), n_trials=2)
    (found,) = {each.getMessage() for each in caplog.records if "tensors" in each.getMessage()}
    assert found.startswith("Before trial 1 began tensors of this process held 3 GiB")
