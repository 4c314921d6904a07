"""A footprint that a user states as a function: called with complete points only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, Strategy, Usage


LIMITS = Limits(memory="1TiB")
Objective = Callable[[optuna.Trial], float]


def flat(trial: optuna.Trial) -> float:
    return float(trial.suggest_int("width", 1, 64) * trial.suggest_int("depth", 1, 8))


def by_kind(trial: optuna.Trial) -> float:
    lr = trial.suggest_float("lr", 0, 1)
    if trial.suggest_categorical("kind", ["tree", "net"]) == "tree":
        return lr * trial.suggest_int("depth", 1, 8)
    return lr * trial.suggest_int("width", 1, 64) * trial.suggest_float("scale", 1, 2)


def by_layers(trial: optuna.Trial) -> float:
    n = trial.suggest_int("n", 1, 3)
    return float(sum(trial.suggest_int(f"u{i}", 1, 64) for i in range(n)))


def fails_early(trial: optuna.Trial) -> float:
    width = trial.suggest_int("width", 1, 64)
    if trial.number % 3 == 0:
        raise ValueError
    if trial.number % 3 == 1:
        trial.report(0.0, 0)
        raise optuna.TrialPruned
    return float(width * trial.suggest_int("depth", 1, 8))


def is_complete(params: dict[str, Any]) -> bool:
    names = params.keys()
    if "n" in names:
        return names == {"n", *(f"u{i}" for i in range(params["n"]))}
    if "kind" in names or "lr" in names:
        tree, net = {"lr", "kind", "depth"}, {"lr", "kind", "width", "scale"}
        return names == (tree if params.get("kind") == "tree" else net)
    return names == {"width", "depth"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "base",
    [lambda: RandomSampler(seed=1), lambda: TPESampler(n_startup_trials=4, seed=1)],
    ids=["Random", "TPE"],
)
@pytest.mark.parametrize("memory", [1.0, 2e12], ids=["nothing refused", "half refused"])
@pytest.mark.parametrize("objective", [flat, by_kind, by_layers, fails_early])
def test_it_is_called_with_complete_points_only(
    base: Callable[[], BaseSampler], memory: float, objective: Objective
) -> None:
    points = []

    def footprint(params: dict[str, Any]) -> Usage:
        points.append(params)
        # About half of the points are over the limit where any can be.
        return Usage(memory=memory * (sum(map(ord, repr(sorted(params.items())))) % 2) or 1)

    sampler = QuotaSampler(base(), quota=Quota(n_trials=99, cpu_time="9h"), footprint=footprint)
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=LIMITS))
    study.optimize(objective, n_trials=24, catch=ValueError)
    assert len(study.trials) == 24
    assert points
    assert [params for params in points if not is_complete(params)] == []


def estimate(width: int, depth: int) -> float:
    return 1e9 * width * depth


FUNCTIONS: dict[str, Callable[[dict[str, Any]], Usage]] = {
    "by key": lambda p: Usage(memory=estimate(p["width"], p["depth"])),
    "by keywords": lambda p: Usage(memory=estimate(**p)),
    "by get": lambda p: Usage(memory=p.get("width") * p.get("depth") * 1e9),
    "by position": lambda p: Usage(memory=estimate(*list(p.values())[:2])),
    "by attribute": lambda p: Usage(memory=(p.get("width").real * p["depth"]) * 1e9),
}


@pytest.mark.parametrize(
    "objective",
    [
        by_kind,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (flat, by_layers, fails_early)),
    ],
)
@pytest.mark.parametrize("how", FUNCTIONS)
def test_its_errors_end_no_study(
    objective: Objective, how: str, quota_warnings: Callable[[], list[str]]
) -> None:
    sampler = QuotaSampler(
        RandomSampler(seed=1),
        quota=Quota(n_trials=99, wall_time="9h"),
        strategy=Strategy(n_trials=30),
        footprint=FUNCTIONS[how],
    )
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=LIMITS))
    study.optimize(objective, n_trials=20, catch=ValueError)
    assert len(study.trials) == 20
    conditional = objective in (by_kind, by_layers)
    # Any point of layers has two values by position.
    always = conditional and how != "by position"
    n_warnings = sum("`footprint` failed" in warning for warning in quota_warnings())
    assert always <= n_warnings <= conditional


@pytest.mark.parametrize("seed", range(5))
def test_it_judges_as_soon_as_all_parameters_are_known(seed: int) -> None:
    def over(strategy: Strategy | None) -> list[int]:
        sampler = QuotaSampler(
            RandomSampler(seed=seed),
            quota=Quota(n_trials=99),
            strategy=strategy,
            footprint=FUNCTIONS["by keywords"],
        )
        study = optuna.create_study(
            sampler=sampler, pruner=QuotaPruner(limits=Limits(memory=50e9))
        )
        study.optimize(flat, n_trials=8)
        trials = [t for t in study.trials if t.state == TrialState.COMPLETE]
        return [t.number for t in trials if estimate(**t.params) > 50e9]

    space = {"width": IntDistribution(1, 64), "depth": IntDistribution(1, 8)}
    assert over(Strategy(n_trials=15, search_space=space)) == []
    # Two trials show that neither number decides whether there are other parameters.
    assert [number for number in over(None) if number >= 2] == []


def test_a_declared_space_replaces_a_first_point_that_is_too_large() -> None:
    for seed in range(30):
        sampler = QuotaSampler(
            RandomSampler(seed=seed),
            quota=Quota(n_trials=99),
            strategy=Strategy(
                n_trials=1,
                search_space={"width": IntDistribution(1, 64), "depth": IntDistribution(1, 8)},
            ),
            footprint=FUNCTIONS["by keywords"],
        )
        study = optuna.create_study(
            sampler=sampler, pruner=QuotaPruner(limits=Limits(memory=80e9))
        )
        # Without the declaration, depth is unknown until it is drawn: too late to choose a width.
        study.optimize(flat, n_trials=1)
        (first,) = study.trials
        assert first.state == TrialState.COMPLETE
        assert estimate(**first.params) <= 80e9


def test_a_result_of_another_type_raises() -> None:
    sampler = QuotaSampler(
        RandomSampler(seed=1),
        quota=Quota(n_trials=99),
        footprint=lambda params: 5,
        strategy=Strategy(n_trials=15, search_space=None),
    )
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=LIMITS))
    with pytest.raises(TypeError, match="must return a Usage"):
        study.optimize(flat, n_trials=15)


def test_a_declared_space_without_all_its_parameters_ends_no_study() -> None:
    sampler = QuotaSampler(
        RandomSampler(seed=1),
        quota=Quota(n_trials=99, wall_time="9h"),
        strategy=Strategy(n_trials=15, search_space={"width": IntDistribution(1, 64)}),
        footprint=FUNCTIONS["by keywords"],
    )
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=LIMITS))
    study.optimize(flat, n_trials=15)
    assert len(study.trials) == 15
