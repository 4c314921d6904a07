"""A footprint that a user states as a function, and the end of a quota by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import time
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    GridSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState
import pytest

from optuna_quota import (
    Limits,
    Quota,
    QuotaExhausted,
    QuotaPruner,
    QuotaSampler,
    status,
    Strategy,
    TrialRejected,
    Usage,
)
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.user_given import UserFootprint
from optuna_quota._ledger.ledger import Ledger
from optuna_quota._records import read_record
from optuna_quota._sampler import study_footprint
from optuna_quota._sampler.study_footprint import Margins, margins_of, medians_of
from optuna_quota._sampler.study_session import StudySession


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


@pytest.mark.parametrize("kind", [ArithmeticError, OSError, RuntimeError, ValueError])
def test_a_point_that_it_fails_for_runs(
    kind: type[Exception], quota_warnings: Callable[[], list[str]]
) -> None:
    def footprint(params: dict[str, Any]) -> Usage:
        if params["width"] % 2:
            raise kind("no model has this width")
        return Usage(memory=1e9 * params["width"])

    def objective(trial: optuna.Trial) -> float:
        width = trial.suggest_int("width", 1, 64)
        if width % 2:
            raise optuna.TrialPruned("no model has this width")
        return float(width)

    sampler = QuotaSampler(
        RandomSampler(seed=1), quota=Quota(n_trials=99, wall_time="9h"), footprint=footprint
    )
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=LIMITS))
    study.optimize(objective, n_trials=20)
    outcomes = [read_record(trial).outcome for trial in study.trials]
    assert set(outcomes) == {"completed", "pruned"}
    assert all(read_record(trial).usage.wall_time for trial in study.trials)
    failures = [warning for warning in quota_warnings() if "`footprint` failed" in warning]
    assert [kind.__name__ in failure for failure in failures] == [True]


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


@pytest.mark.parametrize("seed", range(3))
def test_parameters_that_fit_only_together_are_found(seed: int) -> None:
    def footprint(params: dict[str, Any]) -> Usage:
        copies = 2 if params["optimizer"] == "adam" else 1
        return Usage(memory=1e9 * params["width"] * copies / (1 + params["checkpoint"]))

    space: dict[str, BaseDistribution] = {
        "width": IntDistribution(40, 64),
        "optimizer": CategoricalDistribution(["adam", "sgd"]),
        "checkpoint": CategoricalDistribution([False, True]),
    }
    sampler = QuotaSampler(
        TPESampler(seed=seed),
        quota=Quota(n_trials=99),
        strategy=Strategy(n_trials=15, search_space=space),
        footprint=footprint,
    )
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=Limits(memory=36e9)))

    def objective(trial: optuna.Trial) -> float:
        width = trial.suggest_int("width", 40, 64)
        trial.suggest_categorical("optimizer", ["adam", "sgd"])
        trial.suggest_categorical("checkpoint", [False, True])
        return float(width)

    study.optimize(objective, n_trials=10)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 10


def test_a_refused_row_has_its_parameters_in_the_order_of_earlier_ones() -> None:
    space = {name: IntDistribution(1, 3) for name in ("depth", "width")}
    sampler = QuotaSampler(
        BruteForceSampler(seed=1),
        quota=Quota(n_trials=99),
        strategy=Strategy(n_trials=9, search_space=space),
        footprint=FUNCTIONS["by keywords"],
    )
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=Limits(memory=8e9)))

    def objective(trial: optuna.Trial) -> float:
        return float(trial.suggest_int("width", 1, 3) * trial.suggest_int("depth", 1, 3))

    study.optimize(objective, n_trials=2)
    study.enqueue_trial({"width": 3, "depth": 3})
    study.optimize(objective)
    assert {tuple(t.params.values()) for t in study.trials} >= {
        (i, j) for i in (1, 2, 3) for j in (1, 2, 3) if i * j <= 8
    }
    assert TrialState.FAIL not in [t.state for t in study.trials]


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
    assert read_record(study.trials[0]).usage.wall_time


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


def cores_of(params: dict[str, Any]) -> Usage:
    return Usage(cpu_time=params["size"])


def run(sampler: BaseSampler, quota: Quota, n_jobs: int = 1) -> optuna.Study:
    """Run trials that report the usage of their footprint, on a fake clock."""
    study = optuna.create_study(
        sampler=QuotaSampler(sampler, quota=quota, footprint=cores_of, metering="reported")
    )

    def objective(trial: optuna.Trial) -> float:
        size = trial.suggest_float("size", 1.0, 20.0)
        time.sleep(0.01)
        trial.set_user_attr("quota:cpu_time", size)
        return size

    study.optimize(objective, n_trials=300, n_jobs=n_jobs)
    return study


@pytest.mark.parametrize("n_jobs", [1, 4])
@pytest.mark.parametrize("kind", [RandomSampler, TPESampler])
def test_a_known_footprint_uses_the_quota_and_never_exceeds_it(
    kind: Callable[..., BaseSampler], n_jobs: int, quota_warnings: Callable[[], list[str]]
) -> None:
    study = run(kind(seed=0), Quota(cpu_time=100), n_jobs)
    completed = study.get_trials(states=(TrialState.COMPLETE,))
    used = sum(trial.params["size"] for trial in completed)
    assert 90 < used <= 100 * (1 + 1e-9)
    assert status(study).table.loc["cpu_time", "used"] == pytest.approx(used)
    [end] = [text for text in quota_warnings() if "The study ends here" in text]
    assert "The quota of 1 min 40 s of CPU time" in end


def test_a_point_that_others_always_reserve_first_is_within_what_its_trial_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    granted: dict[int, bool] = {}
    promise = StudySession.promise

    def recorded(self: StudySession, trial: FrozenTrial, drawn: Mapping[str, Any]) -> bool:
        granted[trial.number] = promise(self, trial, drawn)
        return granted[trial.number]

    monkeypatch.setattr(StudySession, "promise", recorded)
    monkeypatch.setattr(Ledger, "_extend", lambda *args, **options: None)
    study = run(RandomSampler(seed=0), Quota(cpu_time=100))
    assert len(granted) == len(study.trials) > 10
    assert all(granted.values())


@pytest.mark.parametrize("n_told", [0, 1, 4])
@pytest.mark.parametrize("is_declared", [False, True])
@pytest.mark.parametrize("kind", [RandomSampler, TPESampler])
def test_a_batch_reserves_what_its_points_need(
    kind: Callable[..., BaseSampler], is_declared: bool, n_told: int
) -> None:
    space = {"size": FloatDistribution(1.0, 20.0)}
    strategy = Strategy(n_trials=5, search_space=space) if is_declared else None
    study = optuna.create_study(
        sampler=QuotaSampler(
            kind(seed=0),
            quota=Quota(cpu_time=100),
            footprint=cores_of,
            strategy=strategy,
            metering="reported",
        )
    )
    batch = [study.ask(space) for _ in range(4)]
    for trial in batch[:n_told]:
        trial.set_user_attr("quota:cpu_time", trial.params["size"])
        study.tell(trial, 0.0)
    with pytest.raises(QuotaExhausted, match="ask again after a `tell`"):
        while len(batch) < 100:
            batch.append(study.ask(space))
    # Before a trial has completed, an undeclared space may have smaller points.
    assert 80 < sum(trial.params["size"] for trial in batch) <= 100
    assert status(study).table.loc["cpu_time", "left"] < 20


def test_the_least_need_is_computed_once_for_each_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def counted(expected: Any, points: Any) -> dict[str, Any]:
        computed.append(len(points))
        return medians_of(expected, points)

    monkeypatch.setattr(study_footprint, "medians_of", counted)
    sampler = QuotaSampler(
        RandomSampler(seed=0), quota=Quota(cpu_time=60), metering="reported", breach_probability=1
    )
    study = optuna.create_study(sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("quota:cpu_time", 1.0 + trial.suggest_float("x", 0.0, 2.0))
        return 0.0

    study.optimize(objective, n_trials=40)
    assert 0 < len(computed) <= len(study.trials)


@pytest.mark.slow
def test_a_study_ends_where_each_total_has_room_but_no_point_fits_all(
    quota_warnings: Callable[[], list[str]],
) -> None:
    def both(params: dict[str, Any]) -> Usage:
        return Usage(cpu_time=params["size"], gpu_time=21 - params["size"])

    def objective(trial: optuna.Trial) -> float:
        used = both({"size": trial.suggest_float("size", 1.0, 20.0)})
        trial.set_user_attr("quota:cpu_time", used.cpu_time)
        trial.set_user_attr("quota:gpu_time", used.gpu_time)
        return 0.0

    quota = Quota(cpu_time=100, gpu_time=100)
    sampler = QuotaSampler(RandomSampler(seed=0), quota=quota, footprint=both, metering="reported")
    study = optuna.create_study(sampler=sampler)
    for _ in range(9):
        study.enqueue_trial({"size": 10.5})
    # Of both, 5.5 s are left, and any other point needs 21 s of the two together.
    study.optimize(objective, n_trials=300)
    outcomes = [read_record(t).outcome for t in study.trials]
    assert outcomes == ["completed"] * 9 + ["rejected"] * 20
    [end] = [text for text in quota_warnings() if "The study ends here" in text]
    assert "points did not fit what is left" in end
    # Only a trial with parameters of its own is judged from here on.
    with pytest.raises(QuotaExhausted, match="did not fit"):
        study.ask()
    study.enqueue_trial({"size": 20.0})
    trial = study.ask()
    with pytest.raises(TrialRejected):
        trial.suggest_float("size", 1.0, 20.0)


def test_a_refusal_says_what_was_left() -> None:
    study = run(GridSampler({"size": [12.0, 2.0, 14.0, 13.0]}, seed=0), Quota(cpu_time=20))
    refused = [t for t in study.trials if read_record(t).outcome == "rejected" and t.params]
    assert refused
    for trial in refused:
        reason = read_record(trial).reason or ""
        assert reason.startswith("CPU time quota likely exceeded: ") and " left, " in reason
    used = sum(t.params["size"] for t in study.get_trials(states=(TrialState.COMPLETE,)))
    assert used <= 20


def test_the_margins_are_what_trials_used_beyond_the_footprint() -> None:
    margins = Margins(factors={"cpu_time": 2.0}, extras={"cpu_time": 1.0})
    assert margins.need("cpu_time", 3.0) == 7
    assert margins.within({"cpu_time": 7.0}) == {"cpu_time": 3}
    assert margins.within({"cpu_time": 0.5})["cpu_time"] > 0
    assert margins_of(UserFootprint(cores_of), []) == Margins()
    stated = UserFootprint(cores_of, lenient=True)
    rows = [
        Observation(params, {}, Usage(cpu_time=5.0)) for params in ({"size": 2.0}, {"other": 1.0})
    ]
    # The function fails for the last one.
    assert margins_of(stated, rows) == Margins(extras={"cpu_time": 3.0})
