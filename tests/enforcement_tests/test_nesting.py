"""A QuotaPruner nested in other pruners is found, and its breaches are not overruled."""

from __future__ import annotations

from collections.abc import Callable
import functools
import threading
import time
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PatientPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from optuna_quota import check, isolated, Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota._enforcement.nesting import (
    find_nested,
    pruner_limits,
    pruner_meters,
    quota_pruners,
)
from optuna_quota._enforcement.pruner import wrap_nesting_pruner
from optuna_quota._records import read_record


LIMITS = Limits(wall_time=0.2)
ROOM = Limits(wall_time="1h")


class Held(BasePruner):
    """Holds pruners in some way, and combines their decisions."""

    def __init__(self, held: Any, answer: Callable[..., bool] = any) -> None:
        self.held = held
        self.answer = answer

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return self.answer([p.prune(study, trial) for p in find_nested(self.held, BasePruner)])


class Slotted(BasePruner):
    __slots__ = ("inner", "unset")

    def __init__(self, inner: BasePruner) -> None:
        self.inner = inner

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return self.inner.prune(study, trial)


def closed_over(pruner: BasePruner) -> Callable[..., bool]:
    return lambda study, trial: pruner.prune(study, trial)


class Meter:
    name = "disk"
    period = 1.0

    def read(self) -> float:
        return 0.0


WAYS: dict[str, Callable[[BasePruner], Any]] = {
    "itself": lambda p: p,
    "list": lambda p: [NopPruner(), p],
    "dict": lambda p: {"a": [NopPruner()], "b": (p,)},
    "set": lambda p: {p},
    "nested": lambda p: PatientPruner(Held([PatientPruner(p, 1)]), 1),
    "slots": lambda p: Slotted(p),
    "partial": lambda p: functools.partial(print, key=p),
    "method": lambda p: p.prune,
    "closure": closed_over,
    "beside what refers to itself": lambda p: (lambda loop: loop.extend([loop, p]) or loop)([]),
    "beside much else": lambda p: [list(range(10_000)), {"x": "y"}, threading.Lock(), p],
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_found(way: str) -> None:
    pruner = QuotaPruner(limits=LIMITS)
    assert find_nested(Held(WAYS[way](pruner)), QuotaPruner) == [pruner]
    assert pruner_limits(quota_pruners(Held(WAYS[way](pruner)))) == LIMITS


def test_nothing_else_is_found() -> None:
    other = optuna.create_study(pruner=QuotaPruner(limits=LIMITS))
    # The pruner of another study does not belong to this one.
    for pruner in (MedianPruner(), HyperbandPruner(), Held([other, QuotaPruner, optuna])):
        assert find_nested(pruner, QuotaPruner) == []
        assert quota_pruners(pruner) == []
    assert pruner_limits([]) is None
    assert pruner_meters([]) == ()


def test_the_tightest_limits_apply() -> None:
    first = QuotaPruner(limits=Limits(memory="100B", wall_time=5))
    second = QuotaPruner(first, limits=Limits(memory="50B", cpu_time=7))
    assert pruner_limits(quota_pruners(Held([second]))) == Limits(
        memory="50B", cpu_time=7, wall_time=5
    )


def runs_on(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    for step in range(40):
        time.sleep(0.02)
        # Better at each step: nothing but a breach is a reason to prune.
        trial.report(-step, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return x


OUTSIDE: dict[str, Callable[[BasePruner], BasePruner]] = {
    "any": lambda p: Held([MedianPruner(), p], any),
    "all": lambda p: Held([MedianPruner(), p], all),
    "never": lambda p: Held([p], lambda answers: False),
    "patient": lambda p: PatientPruner(p, patience=3),
    "patient twice": lambda p: PatientPruner(PatientPruner(p, patience=3), patience=2),
    "never asks": lambda p: Held(p, lambda answers: False),
}


@pytest.mark.parametrize("inside", ["alone", "around Median", "around Hyperband"])
@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_breach_overrules_the_outer_pruner(outside: str, inside: str) -> None:
    base = {"alone": None, "around Median": MedianPruner(), "around Hyperband": HyperbandPruner()}
    pruner = OUTSIDE[outside](QuotaPruner(base[inside], limits=LIMITS))
    sampler = QuotaSampler(RandomSampler(seed=0), quota=Quota(n_trials=9))
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.optimize(runs_on, n_trials=2)
    for trial in study.trials:
        record = read_record(trial)
        assert trial.state == TrialState.PRUNED
        assert record.outcome == "terminated"
        assert record.breach is not None and record.breach.resource == "wall_time"
        assert record.usage.wall_time is not None and record.usage.wall_time < 0.6


@pytest.mark.parametrize("outside", ["any", "all", "never"])
def test_without_the_sampler_limits_apply_from_the_first_call(outside: str) -> None:
    study = optuna.create_study(pruner=OUTSIDE[outside](QuotaPruner(limits=LIMITS)))
    study.optimize(runs_on, n_trials=2)
    for trial in study.trials:
        record = read_record(trial)
        assert trial.state == TrialState.PRUNED
        assert record.outcome == "terminated"


@pytest.mark.parametrize("with_sampler", [True, False])
@pytest.mark.parametrize("outside", ["any", "patient"])
def test_isolated_trials_have_its_limits(outside: str, with_sampler: bool) -> None:
    sampler = QuotaSampler(quota=Quota(n_trials=9)) if with_sampler else None
    pruner = OUTSIDE[outside](QuotaPruner(limits=Limits(wall_time=0.5)))
    study = optuna.create_study(sampler=sampler, pruner=pruner)

    def sleeps(trial: optuna.Trial) -> float:
        time.sleep(10)
        return 0.0

    study.optimize(isolated(sleeps), n_trials=1)
    assert read_record(study.trials[0]).outcome == "terminated"


@pytest.mark.parametrize("with_sampler", [True, False])
def test_check_applies_its_limits(with_sampler: bool) -> None:
    sampler = QuotaSampler(quota=Quota(n_trials=9)) if with_sampler else None
    pruner = PatientPruner(QuotaPruner(limits=Limits(wall_time=1e-6)), patience=3)
    study = optuna.create_study(sampler=sampler, pruner=pruner, directions=["minimize"] * 2)

    def checks(trial: optuna.Trial) -> tuple[float, float]:
        check(trial)
        raise AssertionError("not terminated")

    study.optimize(checks, n_trials=1)
    assert study.trials[0].state == TrialState.PRUNED


def worse(trial: optuna.Trial) -> float:
    level = trial.suggest_float("level", 0, 1)
    for step in range(12):
        # The better half gets better, the other half worse.
        trial.report(step * (level - 0.5), step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return level


class Always(BasePruner):
    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return True


@pytest.mark.parametrize("with_sampler", [True, False])
def test_without_a_breach_the_outer_pruner_decides(with_sampler: bool) -> None:
    def states(pruner: BasePruner) -> list[tuple[TrialState, int]]:
        base = RandomSampler(seed=3)
        sampler = QuotaSampler(base, quota=Quota(n_trials=99)) if with_sampler else base
        study = optuna.create_study(sampler=sampler, pruner=pruner)
        study.optimize(worse, n_trials=15)
        return [(t.state, len(t.intermediate_values)) for t in study.trials]

    found = states(PatientPruner(QuotaPruner(Always(), limits=ROOM), patience=2))
    assert found == states(PatientPruner(Always(), patience=2))
    assert {state for state, _ in found} == {TrialState.PRUNED, TrialState.COMPLETE}


def test_an_overruled_decision_is_not_recorded() -> None:
    pruner = Held(QuotaPruner(Always(), limits=LIMITS), lambda answers: False)
    study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=9)), pruner=pruner)
    study.optimize(runs_on, n_trials=1)
    assert read_record(study.trials[0]).outcome == "terminated"


def test_without_a_quota_sampler_limits_hold_from_the_second_trial_on() -> None:
    study = optuna.create_study(pruner=PatientPruner(QuotaPruner(limits=LIMITS), patience=99))
    study.optimize(runs_on, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]


def test_attributes_of_the_outer_pruner_are_readable() -> None:
    study = optuna.create_study(pruner=PatientPruner(QuotaPruner(limits=ROOM), patience=3))
    wrap_nesting_pruner(study)
    outside = study.pruner
    assert isinstance(outside, QuotaPruner)
    assert isinstance(outside.base_pruner, PatientPruner)
    assert outside._patience == 3
    wrap_nesting_pruner(study)
    assert study.pruner is outside
