"""QuotaSampler around a study: admits, meters, records, ends."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import optuna
from optuna.pruners import NopPruner
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler
from optuna.trial import TrialState
import pytest

from optuna_quota import _optuna, Limits, Quota, QuotaExhausted, QuotaPruner, QuotaSampler
from optuna_quota._metering import key_of, metering_loop
from optuna_quota._records import read_record
from optuna_quota._sampler.candidates import CandidateFilter


def objective(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1)


def study_of(quota: Quota, pruner: optuna.pruners.BasePruner | None = None) -> optuna.Study:
    sampler = QuotaSampler(RandomSampler(seed=1), quota=quota)
    return optuna.create_study(sampler=sampler, pruner=pruner)


def test_each_trial_is_metered_and_recorded() -> None:
    study = study_of(Quota(wall_time="1h"))
    study.optimize(objective, n_trials=3)
    for trial in study.trials:
        record = read_record(trial)
        assert record.outcome == "completed"
        assert record.reason is None
        assert record.usage.memory is not None and record.usage.memory > 1e6
        assert record.usage.wall_time is not None and record.usage.wall_time > 0
        assert record.usage.cpu_time is not None
        assert record.isolation == "thread"
        assert record.host
        assert metering_loop().find(key_of(study, trial)) is None


def test_metering_starts_after_the_footprint_is_learned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin, metered = CandidateFilter.begin, []

    def recorded(
        self: CandidateFilter, study: optuna.Study, trial: optuna.trial.FrozenTrial, *rest: Any
    ) -> None:
        metered.append(metering_loop().find(key_of(study, trial)) is not None)
        begin(self, study, trial, *rest)

    monkeypatch.setattr(CandidateFilter, "begin", recorded)
    study = study_of(Quota(n_trials=4))
    study.optimize(objective, n_trials=2)
    assert metered == [False, False]
    assert all(read_record(trial).usage.wall_time for trial in study.trials)


def test_optimize_ends_when_a_total_is_used_up() -> None:
    study = study_of(Quota(n_trials=4))
    study.optimize(objective, n_trials=10)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 4


def test_a_further_ask_raises_and_leaves_no_running_row() -> None:
    study = study_of(Quota(n_trials=1))
    study.optimize(objective, n_trials=1)
    with pytest.raises(QuotaExhausted) as caught:
        study.ask()
    assert caught.value.resource == "n_trials"
    last = study.trials[-1]
    assert last.state == TrialState.FAIL
    assert read_record(last).outcome == "rejected"
    assert read_record(last).reason == str(caught.value)


def test_optimize_on_an_exhausted_study_runs_no_objective() -> None:
    study = study_of(Quota(n_trials=2))
    study.optimize(objective, n_trials=2)
    ran = []

    def witness(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        ran.append(x)
        return x

    study.enqueue_trial({"x": 0.5})
    study.optimize(witness, n_trials=5)
    assert ran == []
    # It is enqueued again, for a larger quota.
    assert [trial.state.name for trial in study.trials[2:]] == ["PRUNED", "WAITING"]
    assert read_record(study.trials[2]).outcome == "rejected"


def test_a_breached_trial_is_terminated_and_constrained() -> None:
    pruner = QuotaPruner(limits=Limits(memory="1GiB", wall_time=1e-6))
    study = study_of(Quota(wall_time="1h"), pruner)

    def asks(trial: optuna.Trial) -> float:
        if trial.should_prune():
            raise optuna.TrialPruned
        return 0.0

    study.optimize(asks, n_trials=2)
    for trial in study.trials:
        record = read_record(trial)
        assert trial.state == TrialState.PRUNED
        assert record.outcome == "terminated"
        assert record.breach is not None and record.breach.resource == "wall_time"
        assert record.reason is not None and record.reason.startswith("Time limit")
        memory, wall_time = _optuna.constraints_of(trial).values()
        assert memory < 0 < wall_time
    assert study.user_attrs["quota:limits"] == {"memory": 2**30, "wall_time": 1e-6}
    assert study.user_attrs["quota:quota"] == {"wall_time": 3600}


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_used_sampler_can_be_copied_and_pickled(remake) -> None:  # type: ignore[no-untyped-def]
    study = study_of(Quota(n_trials=5))
    study.optimize(objective, n_trials=2)
    study.sampler = remake(study.sampler)
    study.optimize(objective, n_trials=9)
    assert len(study.trials) == 5


def test_a_quota_sampler_in_another_is_an_error() -> None:
    inner: BaseSampler = QuotaSampler(quota=Quota(n_trials=5))
    for base in (inner, PartialFixedSampler({"x": 1}, inner)):
        with pytest.raises(ValueError, match="must hold no QuotaSampler but got"):
            QuotaSampler(base, quota=Quota(n_trials=9))


def test_a_sampler_or_pruner_in_the_others_place() -> None:
    sampler, pruner = QuotaSampler(quota=Quota(n_trials=5)), QuotaPruner(limits=Limits())
    with pytest.raises(TypeError, match=r"`sampler` must be .* as `pruner=QuotaPruner"):
        optuna.create_study(sampler=pruner)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`pruner` must be .* as `sampler=QuotaSampler"):
        optuna.create_study(pruner=sampler)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`base_sampler` .* as `pruner=NopPruner.*to QuotaPruner"):
        QuotaSampler(NopPruner(), quota=Quota(n_trials=5))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`base_pruner` .* as `sampler=RandomS.*to QuotaSampler"):
        QuotaPruner(RandomSampler(), limits=Limits())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`base_sampler` .* Pass it as `quota=Quota\(…\)`"):
        QuotaSampler(Quota(n_trials=5))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`quota` .* Pass it as `limits=Limits\(…\)`"):
        QuotaSampler(quota=Limits())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_sampler", RandomSampler()),
        ("confidence", 0.9),
        ("quota", Quota(n_trials=9)),
        ("deadline", 60),
    ],
)
def test_an_option_that_would_be_ignored_can_t_be_set(name: str, value: Any) -> None:
    sampler = QuotaSampler(quota=Quota(n_trials=1))
    before = getattr(sampler, name)
    with pytest.raises(AttributeError, match=f"`{name}` can't be changed"):
        setattr(sampler, name, value)
    assert getattr(sampler, name) == before
    for same in (copy.copy(sampler), pickle.loads(pickle.dumps(sampler))):
        with pytest.raises(AttributeError, match=f"`{name}` can't be changed"):
            setattr(same, name, value)
    sampler.limits = Limits(wall_time=5)
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=1)
    assert study.user_attrs["quota:limits"] == {"wall_time": 5}


def test_limits_that_disagree_raise() -> None:
    sampler = QuotaSampler(quota=Quota(n_trials=5), limits=Limits(memory="1GiB"))
    pruner = QuotaPruner(limits=Limits(memory="2GiB"))
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    with pytest.raises(ValueError, match=r"1GiB.*2GiB"):
        study.optimize(objective, n_trials=1)
    assert [t.state for t in study.trials] == [TrialState.FAIL]


def test_memory_of_a_breached_trial_does_not_count_for_the_next_one() -> None:
    held = 200_000_000
    at_rest = QuotaSampler(RandomSampler(seed=1), quota=Quota(n_trials=1))
    before = optuna.create_study(sampler=at_rest)
    before.optimize(objective, n_trials=1)
    rest = read_record(before.trials[0]).usage.memory
    assert rest is not None
    study = study_of(Quota(n_trials=9), QuotaPruner(limits=Limits(memory=rest + held / 2)))

    def holds(trial: optuna.Trial) -> float:
        block = bytearray(b"x" * held) if trial.number == 0 else bytearray(1)
        trial.suggest_float("x", 0, 1)
        if trial.should_prune():
            raise optuna.TrialPruned
        return float(len(block))

    study.optimize(holds, n_trials=3)
    outcomes = [read_record(t).outcome for t in study.trials]
    assert outcomes == ["terminated", "completed", "completed"]
