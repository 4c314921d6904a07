"""Limits as Optuna constraints, beside those of the user and of other samplers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
import time
from typing import Any

import optuna
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import TrialState
import pytest

from optuna_quota import _optuna, check, isolated, Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota._enforcement.trial_result import limit_constraints, uniform_constraints
from optuna_quota._usage import Breach


needs_set_constraint = pytest.mark.skipif(
    not hasattr(optuna.Trial, "set_constraint"), reason="Optuna 4 has no constraints by key"
)
LIMITS = Limits(wall_time="10s", memory="1TiB", gpu_memory="1GiB")


def study_with(base: BaseSampler, limits: Limits = LIMITS, **kwargs: Any) -> optuna.Study:
    sampler = QuotaSampler(base, quota=Quota(n_trials=1000))
    return optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=limits), **kwargs)


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    if trial.number % 3 == 1:
        raise optuna.TrialPruned
    return x


def test_limit_constraints_are_sorted_by_resource() -> None:
    limits = Limits(wall_time=10, memory="100B", custom={"disk": 4})
    amounts = {"memory": 150.0, "wall_time": 5.0, "cpu_time": 3.0}
    found = limit_constraints(limits, amounts)
    assert found == {"disk": 0.0, "memory": 0.5, "wall_time": -0.5}
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    ("breach", "expected"),
    [
        (None, -0.5),
        (Breach("memory", 100, 300, 1.0), 2.0),
        (Breach("memory", 100, 120, 1.0, forecast=True), pytest.approx(0.2)),
        (Breach("memory", 20, 50, 1.0, quota=True), -0.5),
    ],
)
def test_the_breached_limit_counts(breach: Breach | None, expected: float) -> None:
    assert limit_constraints(Limits(memory="100B"), {"memory": 50.0}, breach) == {
        "memory": expected
    }


def test_pruned_trials_have_constraints_and_completed_ones_within_limits_have_none() -> None:
    study = study_with(RandomSampler(seed=0))
    study.optimize(objective, n_trials=4)
    completed = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert [_optuna.constraints_of(t) for t in completed] == [{}] * 3
    gpu_memory, memory, wall_time = study.trials[1].system_attrs["constraints"]
    assert gpu_memory == 0.0 or -1 <= gpu_memory < 0
    assert -1 < memory < 0
    assert -1 < wall_time < 0


def test_without_limits_there_are_no_constraints() -> None:
    study = study_with(RandomSampler(seed=0), Limits())
    study.optimize(objective, n_trials=2)
    assert all("constraints" not in t.system_attrs for t in study.trials)


def test_a_failed_trial_has_no_constraints() -> None:
    study = study_with(RandomSampler(seed=0))
    study.optimize(lambda trial: float("nan"), n_trials=1)
    assert study.trials[0].state == TrialState.FAIL
    assert _optuna.constraints_of(study.trials[0]) == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.constraints_func:FutureWarning")
@pytest.mark.parametrize("sampler", [TPESampler, NSGAIISampler])
def test_the_base_samplers_constraints_come_first(sampler: Any, tmp_path: Path) -> None:
    base = sampler(constraints_func=lambda trial: (trial.params["x"] - 0.5, -7.0), seed=0)
    study = study_with(base, storage=f"sqlite:///{tmp_path}/s.db")
    study.optimize(objective, n_trials=5)
    for trial in study.trials:
        own, seven, *ours = trial.system_attrs["constraints"]
        assert own == trial.params["x"] - 0.5
        assert seven == -7.0
        assert len(ours) == (3 if trial.state == TrialState.PRUNED else 0)


@needs_set_constraint
@pytest.mark.parametrize("key", ["latency", "0", "2"])
def test_the_users_constraints_are_untouched(key: str) -> None:
    study = study_with(TPESampler(n_startup_trials=2, seed=0))

    def constrained(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        trial.set_constraint(key, x - 0.25)
        if trial.number % 2:
            raise optuna.TrialPruned
        return x

    # A key that hides one of ours would make Optuna warn, which is an error here.
    study.optimize(constrained, n_trials=6)
    for trial in study.trials:
        assert _optuna.constraints_of(trial)[key] == trial.params["x"] - 0.25
        assert len(_optuna.constraints_of(trial)) == (4 if trial.state == TrialState.PRUNED else 1)


BASES: list[Any] = [
    pytest.param(lambda: TPESampler(n_startup_trials=3, seed=0), id="TPE"),
    pytest.param(lambda: NSGAIISampler(population_size=4, seed=0), id="NSGA-II"),
    pytest.param(lambda: CmaEsSampler(n_startup_trials=3, seed=0), id="CMA-ES"),
    pytest.param(
        lambda: GPSampler(n_startup_trials=3, seed=0),
        id="GP",
        marks=[
            pytest.mark.integration,
            pytest.mark.slow,
            pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed"),
        ],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_samplers_accept_breaches_failures_and_rejections(base: Any) -> None:
    study = study_with(base(), Limits(wall_time=0.05, memory="1TiB"))

    def breaches(trial: optuna.Trial) -> float:
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        if trial.number % 4 == 3:
            raise ValueError
        while x > 0.5 and not trial.should_prune():
            time.sleep(0.005)
        if trial.should_prune():
            raise optuna.TrialPruned
        return x + y

    study.optimize(breaches, n_trials=14, catch=ValueError)
    pruned = [t for t in study.trials if t.state == TrialState.PRUNED]
    assert pruned
    assert {len(_optuna.constraints_of(t)) for t in pruned} == {2}
    assert study.best_trial.params["x"] <= 0.5


def test_the_best_trial_is_one_within_its_limits() -> None:
    study = study_with(RandomSampler(seed=0), Limits(wall_time=0.5))

    def slow_is_better(trial: optuna.Trial) -> float:
        slow = trial.suggest_categorical("slow", [True, False])
        if slow:
            time.sleep(0.6)
        return 0.0 if slow else 1.0

    study.enqueue_trial({"slow": True})
    study.enqueue_trial({"slow": False})
    study.optimize(slow_is_better, n_trials=2)
    assert study.best_trial.params == {"slow": False}


def sets_constraint_late(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    if trial.number % 3 == 1:
        raise optuna.TrialPruned
    if trial.number % 3 == 2:
        while True:
            time.sleep(0.005)
            check(trial)
    trial.set_user_attr("c", x - 0.5)
    return x


def by_key(trial: optuna.trial.FrozenTrial) -> Any:
    return (trial.user_attrs["c"],)


def by_get(trial: optuna.trial.FrozenTrial) -> Any:
    return trial.user_attrs.get("constraint") or (trial.user_attrs.get("c") and (-1.0,))


def not_a_number(trial: optuna.trial.FrozenTrial) -> Any:
    return (float("nan") if "c" not in trial.user_attrs else -1.0,)


@pytest.mark.filterwarnings("ignore:.constraints_func:FutureWarning")
@pytest.mark.parametrize("function", [by_key, by_get, not_a_number])
@pytest.mark.parametrize("sampler", [TPESampler, NSGAIISampler])
def test_a_constraints_func_that_fails_for_a_stopped_trial_ends_no_study(
    sampler: Any, function: Any, caplog: pytest.LogCaptureFixture
) -> None:
    study = study_with(sampler(constraints_func=function, seed=0), Limits(wall_time=0.05))
    study.optimize(sets_constraint_late, n_trials=6)
    outcomes = [trial.user_attrs["quota:outcome"] for trial in study.trials]
    assert outcomes == ["completed", "pruned", "terminated"] * 2
    assert all(trial.user_attrs["quota:reason"] for trial in study.trials[1:3])
    assert caplog.text.count("`constraints_func` failed") == 1


def stops(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    if trial.number % 2:
        while not trial.should_prune():
            time.sleep(0.005)
        raise optuna.TrialPruned
    trial.set_user_attr("c", x - 0.5)
    return x


def sleeps(trial: optuna.Trial) -> float:
    if trial.number % 2:
        time.sleep(20)
    return stops(trial)


@pytest.mark.filterwarnings("ignore:.constraints_func:FutureWarning")
@pytest.mark.parametrize("how", ["should_prune", pytest.param("isolated", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampler", [TPESampler, NSGAIISampler])
def test_with_quota_pruner_alone_it_ends_no_study_either(
    sampler: Any, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Isolated, long enough for a trial that starts on a busy machine.
    limits = Limits(wall_time=0.05 if how == "should_prune" else 2)
    study = optuna.create_study(
        sampler=sampler(constraints_func=by_key, seed=0), pruner=QuotaPruner(limits=limits)
    )
    study.optimize(stops if how == "should_prune" else isolated(sleeps), n_trials=4)
    outcomes = [trial.user_attrs.get("quota:outcome") for trial in study.trials]
    assert outcomes[1] == outcomes[3] == "terminated"
    assert _optuna.constraints_of(study.trials[0]) == {"0": study.trials[0].params["x"] - 0.5}
    assert caplog.text.count("`constraints_func` failed") == 1


@pytest.mark.filterwarnings("ignore:.constraints_func:FutureWarning")
def test_with_quota_pruner_alone_its_other_errors_are_raised() -> None:
    sampler = TPESampler(constraints_func=by_key, seed=0)
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=Limits(wall_time=0.05)))
    study.optimize(stops, n_trials=2)
    with pytest.raises(KeyError, match="c"):
        study.optimize(lambda trial: 0.0, n_trials=1)


@pytest.mark.filterwarnings("ignore:.constraints_func:FutureWarning")
def test_a_constraints_func_that_fails_for_a_completed_trial_raises() -> None:
    study = study_with(TPESampler(constraints_func=lambda trial: trial.user_attrs["typo"]))
    with pytest.raises(KeyError, match="typo"):
        study.optimize(lambda trial: 0.0, n_trials=1)


A, B = Limits(memory="1TiB"), Limits(memory="1TiB", wall_time="1h")
C = Limits(wall_time=30, gpu_memory="1GiB", custom={"disk": 5})
OVER = Limits(memory="1B", wall_time=1e-6)
needs_torch = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed"),
]


def smooth(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1) ** 2 + trial.suggest_int("n", 1, 9)


def set_by_user(trial: optuna.Trial) -> float:
    value = smooth(trial)
    trial.set_constraint("latency", trial.params["x"] - 0.5)
    return value


def resumed(
    study: optuna.Study, sampler: BaseSampler, limits: Limits | None, wrapped: bool = True
) -> optuna.Study:
    """Return the study as another worker loads it; bare where there are no limits."""
    return optuna.load_study(
        study_name=study.study_name,
        storage=study._storage,
        sampler=QuotaSampler(sampler, quota=Quota(n_trials=999)) if wrapped else sampler,
        pruner=None if limits is None else QuotaPruner(limits=limits),
    )


WAYS: dict[str, list[tuple[Limits | None, bool]]] = {
    "bare, then limits": [(None, False), (A, True), (B, True)],
    "limits, then more and fewer of them": [(A, True), (B, True), (C, True), (A, True)],
    "limits, then bare": [(A, True), (None, False)],
    "limits, then none": [(B, True), (None, True), (B, True)],
    "bare, limits, bare, limits": [(None, False), (B, True), (None, False), (A, True)],
    "over its limits, then others, then bare": [(OVER, True), (C, True), (None, False)],
    "pruner alone between": [(A, True), (A, False), (None, False), (B, True)],
}


@pytest.mark.slow
# GPSampler's own arithmetic where all trials are far over a limit.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("one_object", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "base",
    [
        pytest.param(lambda: TPESampler(n_startup_trials=2, seed=0), id="TPE"),
        pytest.param(lambda: NSGAIISampler(population_size=3, seed=0), id="NSGA-II"),
        pytest.param(
            lambda: GPSampler(n_startup_trials=2, seed=0),
            id="GP",
            marks=needs_torch,
        ),
        pytest.param(
            lambda: optuna.samplers.PartialFixedSampler(
                {"n": 3}, GPSampler(n_startup_trials=2, seed=0)
            ),
            id="GP, fixed",
            marks=needs_torch,
        ),
    ],
)
def test_limits_may_change_during_a_study(base: Any, way: str, one_object: bool) -> None:
    study, sampler = optuna.create_study(), base()
    for limits, wrapped in WAYS[way]:
        sampler = sampler if one_object else base()
        resumed(study, sampler, limits, wrapped).optimize(smooth, n_trials=4)
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize(
    "objectives", [smooth, pytest.param(set_by_user, marks=needs_set_constraint)]
)
def test_gp_accepts_rows_of_other_samplers(objectives: Any) -> None:
    study = optuna.create_study()
    for limits in (A, B, C):
        for constraints in ({}, {"constraints": [-1.0, 0.5]}, {"constraints:other": 0.25}):
            study.add_trial(
                optuna.trial.create_trial(
                    params={"x": 0.5, "n": 3},
                    distributions={
                        "x": optuna.distributions.FloatDistribution(0, 1),
                        "n": optuna.distributions.IntDistribution(1, 9),
                    },
                    value=3.25,
                    system_attrs=constraints,
                )
            )
        gp = GPSampler(n_startup_trials=2, seed=0)
        resumed(study, gp, limits).optimize(objectives, n_trials=3)
    assert len(study.trials) == 18


def completed_row(usage: dict[str, Any], **system: Any) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(
        value=0.0,
        user_attrs={f"quota:{name}": value for name, value in usage.items()},
        system_attrs=system,
    )


def test_equal_constraints_are_those_of_the_limits_in_force() -> None:
    limits = Limits(memory="100B", wall_time=10)
    found = uniform_constraints(
        [
            completed_row({"memory": 50}),
            completed_row({"memory": 90, "wall_time": 20}),
            completed_row({"memory": 150, "wall_time": 15}),
            completed_row({}),
        ],
        limits,
    )
    # What is unknown is the median of what is known, but no breach.
    assert found == [
        {"quota:memory": -0.5, "quota:wall_time": 0.0},
        {"quota:memory": pytest.approx(-0.1), "quota:wall_time": 1.0},
        {"quota:memory": 0.5, "quota:wall_time": 0.5},
        {"quota:memory": pytest.approx(-0.1), "quota:wall_time": 0.0},
    ]
    assert len({tuple(each) for each in found}) == 1
    assert uniform_constraints([completed_row({"memory": 50})], Limits()) == [{}]


def test_equal_constraints_begin_with_those_of_the_user() -> None:
    joined = {"constraints": [0.5, -7.0, 3.0], "quota:constrained": ["memory"]}
    keyed = {"constraints:1": -2.0, "constraints:quota:memory": 3.0}
    rows = [completed_row({"memory": 50}, **each) for each in (joined, keyed, {})]
    assert uniform_constraints(rows, Limits(memory="100B")) == [
        {"0": 0.5, "1": -7.0, "quota:memory": -0.5},
        {"0": 0.0, "1": -2.0, "quota:memory": -0.5},
        {"0": 0.0, "1": 0.0, "quota:memory": -0.5},
    ]
