"""Hydra's Optuna sweeper, as its release asks, launches and tells: in whole batches."""

from __future__ import annotations

import json
from pathlib import Path
import sys
from types import ModuleType
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits, Quota, QuotaExhausted, QuotaSampler, Strategy, Usage
from optuna_quota._sampler import integrations


SPACE = {"x": FloatDistribution(0, 1)}


class OptunaSweeperImpl:
    """The parts of hydra-optuna-sweeper 1.3.0 that take part in a sweep."""

    def __init__(self, sampler: QuotaSampler, n_trials: int, n_jobs: int, folder: Path) -> None:
        self.sampler, self.n_trials, self.n_jobs = sampler, n_trials, n_jobs
        self.study_name: str | None = None
        self.storage: Any = None
        self.job_idx, self.sweep_dir = 0, str(folder / "sweep")
        self.batches: list[int] = []

    def sweep(self, arguments: list[str]) -> None:
        study = optuna.create_study(
            study_name=self.study_name,
            storage=self.storage,
            sampler=self.sampler,
            load_if_exists=True,
        )
        batch_size = self.n_jobs
        n_trials_to_go = self.n_trials
        while n_trials_to_go > 0:
            batch_size = min(n_trials_to_go, batch_size)
            trials = [study.ask() for _ in range(batch_size)]
            for trial in trials:
                trial._suggest("x", SPACE["x"])
            Path(self.sweep_dir).mkdir(exist_ok=True)
            self.batches.append(len(trials))
            self.job_idx += len(trials)
            for trial in trials:
                study.tell(trial, trial.params["x"])
            n_trials_to_go -= batch_size
        results = {"best_value": study.best_value, "n_rows": len(study.trials)}
        Path(self.sweep_dir, "optimization_results.yaml").write_text(json.dumps(results))


@pytest.fixture
def sweeper_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    class OptunaSweeper:
        def __init__(self, *arguments: Any) -> None:
            self.sweeper = OptunaSweeperImpl(*arguments)

        def sweep(self, arguments: list[str]) -> None:
            self.sweeper.sweep(arguments)

    module: Any = ModuleType(integrations._HYDRA)
    module.OptunaSweeper = OptunaSweeper
    monkeypatch.setitem(sys.modules, integrations._HYDRA, module)
    return OptunaSweeper


def results_of(sweeper: OptunaSweeperImpl) -> Any:
    return json.loads(Path(sweeper.sweep_dir, "optimization_results.yaml").read_text())


def study_of(sweeper: OptunaSweeperImpl) -> optuna.Study:
    assert sweeper.study_name is not None
    return optuna.load_study(study_name=sweeper.study_name, storage=sweeper.storage)


def test_a_sweep_ends_with_its_quota_and_writes_its_results(
    sweeper_class: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = QuotaSampler(RandomSampler(seed=0), quota=Quota(n_trials=5))
    sweep = sweeper_class(sampler, 30, 3, tmp_path)
    sweep.sweep([])
    assert sweep.sweeper.batches == [3, 2]
    trials = study_of(sweep.sweeper).trials
    completed = [t.value for t in trials if t.state == TrialState.COMPLETE]
    assert len(completed) == 5
    assert not any(t.state == TrialState.RUNNING for t in trials)
    assert results_of(sweep.sweeper)["best_value"] == min(v for v in completed if v is not None)
    assert "The sweep ends after 2 more" in caplog.text

    # Another sweep of the study, which has nothing left.
    again = sweeper_class(sampler, 30, 3, tmp_path / "again")
    again.sweeper.study_name, again.sweeper.storage = (
        sweep.sweeper.study_name,
        sweep.sweeper.storage,
    )
    again.sweep([])
    assert again.sweeper.batches == []
    assert results_of(again.sweeper)["best_value"] == results_of(sweep.sweeper)["best_value"]


def test_batches_are_as_large_as_fit_at_once(sweeper_class: Any, tmp_path: Path) -> None:
    sampler = QuotaSampler(quota=Quota(trial_time="25s"), footprint=Usage(wall_time=10))
    sweep = sweeper_class(sampler, 5, 4, tmp_path)
    sweep.sweep([])
    assert sweep.sweeper.batches == [2, 2, 1]
    assert results_of(sweep.sweeper)


def test_an_enqueued_point_of_a_batch_that_does_not_fit_runs(
    sweeper_class: Any, tmp_path: Path
) -> None:
    sampler = QuotaSampler(quota=Quota(n_trials=2))
    study = optuna.create_study()
    study.enqueue_trial({"x": 0.25})
    sweep = sweeper_class(sampler, 5, 3, tmp_path)
    sweep.sweeper.study_name, sweep.sweeper.storage = study.study_name, study._storage
    sweep.sweep([])
    completed = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert sorted(t.params["x"] == 0.25 for t in completed) == [False, True]


def test_a_sweep_whose_points_are_all_rejected_ends(sweeper_class: Any, tmp_path: Path) -> None:
    sampler = QuotaSampler(
        quota=Quota(n_trials=99),
        limits=Limits(wall_time=1),
        footprint=lambda params: Usage(wall_time=9),
        strategy=Strategy(9, search_space=SPACE),
        on_veto="skip",
    )
    sweep = sweeper_class(sampler, 50, 2, tmp_path)
    # There is no result to write.
    with pytest.raises(optuna.TrialPruned):
        sweep.sweep([])
    outcomes = [t.user_attrs["quota:outcome"] for t in study_of(sweep.sweeper).trials]
    assert set(outcomes) == {"rejected"} and len(outcomes) == 40


def test_a_quota_that_was_used_up_before_any_result_raises(
    sweeper_class: Any, tmp_path: Path
) -> None:
    study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=1)))
    study.tell(study.ask(), state=TrialState.FAIL)
    sweep = sweeper_class(study.sampler, 5, 1, tmp_path)
    sweep.sweeper.study_name, sweep.sweeper.storage = study.study_name, study._storage
    with pytest.raises(QuotaExhausted):
        sweep.sweep([])
