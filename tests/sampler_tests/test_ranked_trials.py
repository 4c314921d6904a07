"""Several points for each trial of a study, of which the best for its cost runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import copy
import json
import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    NSGAIISampler,
    PartialFixedSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import create_trial, FrozenTrial, TrialState
import pytest

from optuna_quota import Limits, Quota, QuotaSampler, Usage
from optuna_quota._footprint import fit as fit_module, user_given
from optuna_quota._footprint.resource_model import fit_resource, ResourceData, ResourceModel
from optuna_quota._footprint.user_given import as_footprint
from optuna_quota._sampler.ranking import (
    Choice,
    choose,
    MAX_FITTED,
    MIN_COMPLETED,
    Points,
    RankedTrial,
    Ranking,
    Row,
)
from tests.sampler_tests.ranked_studies import (
    cost_of,
    medians,
    Offers,
    points_of,
    rows,
    run_study,
    SPACE,
)


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many points were compared for each trial, as the test goes on."""
    counts: list[int] = []
    choose_of = RankedTrial.choose

    def counted(trial: RankedTrial, points: Points) -> Choice:
        counts.append(len(points))
        return choose_of(trial, points)

    monkeypatch.setattr(RankedTrial, "choose", counted)
    return counts


# Which trials it is made by.


def finished(state: TrialState = TrialState.COMPLETE, **given: Any) -> FrozenTrial:
    given = {"value": 1.0, **given} if state == TrialState.COMPLETE else given
    return create_trial(
        state=state, params=dict.fromkeys(SPACE, 0.5), distributions=SPACE, **given
    )


def test_only_completed_feasible_trials_with_a_value_count() -> None:
    ranking = Ranking(optuna.create_study(direction="maximize"), 8)
    infeasible = finished(system_attrs={"constraints": [0.5]})
    feasible = finished(system_attrs={"constraints": [-0.5]}, value=3.0)
    odd = finished(value=2.0)
    odd.values = [math.nan]
    trials = [
        finished(TrialState.PRUNED),
        finished(TrialState.FAIL),
        infeasible,
        odd,
        feasible,
        finished(value=math.inf),
    ]
    assert [row.loss for row in ranking.rows(trials)] == [-3.0, -math.inf]


def test_hyperparameters_are_searched_again_only_as_trials_grow_by_a_quarter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranking = Ranking(optuna.create_study(), 8)
    sizes: list[int] = []

    def fit(data: ResourceData, start: ResourceModel | None) -> ResourceModel:
        sizes.append(len(data.amounts))
        return start or fit_resource(data)

    monkeypatch.setattr(fit_module, "fit_resource", fit)
    known = rows(1_000)
    points = [{"x": 0.7, "dear": 1.0}, {"x": 0.7, "dear": 0.0}]
    for count in range(MIN_COMPLETED, 1_001):
        choose(known[:count], points, medians, {"cpu_time": 1.0}, ranking.fit)
    # 1.25 ** 24 is 212, and from 5 on each trial counts whole.
    assert 15 < len(sizes) < 25
    assert max(sizes) == MAX_FITTED


def test_parameters_that_are_fixed_or_of_one_value_are_part_of_each_point() -> None:
    seen: list[Mapping[str, Any]] = []

    def usage(points: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        seen.extend(points)
        return medians(points)

    space = {**SPACE, "one": FloatDistribution(3.0, 3.0)}
    known = [Row({**row.params, "one": 3.0}, space, row.loss) for row in rows(10)]
    fixed, ranking = {"dear": 0.25}, Ranking(optuna.create_study(), 2)
    trial = RankedTrial(ranking, known, SPACE, usage, {"cpu_time": 1.0}, fixed, 2)
    trial.choose([{"x": 0.1, "dear": 0.9}, {"x": 0.7}])
    assert seen == [{"x": x, "dear": 0.25, "one": 3.0} for x in (0.1, 0.7)]


def kib_of(params: dict[str, Any]) -> Usage:
    return Usage(memory=1024 * params["x"])


def of_another(params: dict[str, Any]) -> Usage:
    return Usage(cpu_time=params["epochs"])


@pytest.mark.parametrize("usage", [kib_of, of_another])
def test_one_point_is_drawn_where_nothing_is_predicted_of_the_totals(
    usage: Callable[[dict[str, Any]], Usage],
) -> None:
    ranking, left = Ranking(optuna.create_study(), 8), {"cpu_time": 10.0}
    trials = [finished()] * MIN_COMPLETED
    assert ranking.begin(trials, as_footprint(usage, lenient=True), left, {}) is None
    stated = as_footprint(lambda params: Usage(cpu_time=params["x"]))
    assert ranking.begin(trials[1:], stated, left, {}) is None
    begun = ranking.begin(trials, stated, left, {})
    assert begun is not None
    assert begun.n_points == 8


@pytest.mark.parametrize(("seconds", "drawn"), [(0.01, 8), (0.25, 4), (0.6, 1), (30.0, 1)])
def test_a_slow_function_is_asked_for_as_many_points_as_a_second_allows(
    seconds: float, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr(user_given, "time", clock)

    def usage(params: dict[str, Any]) -> Usage:
        now[0] += seconds
        return Usage(cpu_time=cost_of(params))

    base = Offers({"x": 0.7, "dear": 1.0}, {"x": 0.7, "dear": 0.0})
    run_study(base, 2, earlier=20, arguments={"footprint": usage})
    assert base.n_drawn == 2 * drawn * len(SPACE)


# Studies.


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_cheap_good_point_runs(sign: float) -> None:
    direction = "minimize" if sign > 0 else "maximize"
    offered = [{"x": 0.7, "dear": 1.0}, {"x": 0.05, "dear": 0.0}, {"x": 0.7, "dear": 0.0}]
    study = run_study(
        Offers(*offered), 3, n_candidates=3, earlier=20, sign=sign, direction=direction
    )
    assert points_of(study)[20:] == [offered[2]] * 3


def test_the_first_points_of_a_study_run_as_they_are_drawn() -> None:
    offered = [{"x": 0.7, "dear": 1.0}, {"x": 0.7, "dear": 0.0}]
    study = run_study(Offers(*offered), MIN_COMPLETED + 1, n_candidates=2)
    # Each trial draws one point until it is ranked, then both.
    assert points_of(study)[:MIN_COMPLETED] == [offered[i % 2] for i in range(MIN_COMPLETED)]
    assert points_of(study)[MIN_COMPLETED] == offered[1]


@pytest.mark.parametrize(
    "arguments",
    [{"quota": Quota(n_trials=100)}, {"quota": None}],
    ids=["no total that a point decides", "no quota"],
)
def test_without_a_total_the_first_point_runs(arguments: dict[str, Any]) -> None:
    offered = [{"x": 0.7, "dear": 1.0}, {"x": 0.7, "dear": 0.0}]
    study = run_study(Offers(*offered), 2, n_candidates=2, earlier=20, arguments=arguments)
    assert points_of(study)[20:] == offered


def sometimes_y(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0.0, 1.0)
    return x + (trial.suggest_float("y", 0.0, 1.0) if x > 0.5 else 0.0)


def k_up_to_n(trial: optuna.Trial) -> float:
    return trial.suggest_int("k", 1, trial.suggest_int("n", 1, 10))


@pytest.mark.parametrize("suggest", [sometimes_y, k_up_to_n])
def test_parameters_that_differ_between_trials_leave_the_first_point(
    suggest: Callable[[optuna.Trial], float],
) -> None:
    sampler = QuotaSampler(
        RandomSampler(seed=0), quota=Quota(cpu_time=1e6), metering="reported", n_candidates=8
    )
    bare = optuna.create_study(sampler=RandomSampler(seed=0))
    study = optuna.create_study(sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        value = suggest(trial)
        trial.set_user_attr("quota:cpu_time", 1.0 + value)
        return value

    for each in (study, bare):
        each.optimize(objective, n_trials=20)
    assert points_of(study) == points_of(bare)


def test_only_admitted_points_are_ranked() -> None:
    """The best for its cost breaches the limit; what runs is the better of the rest."""
    offered = [{"x": 0.7, "dear": 0.0}, {"x": 0.05, "dear": 0.9}, {"x": 0.7, "dear": 0.9}]

    def usage(params: dict[str, Any]) -> Usage:
        memory = 2e9 if params["dear"] < 0.5 else 1e6
        return Usage(cpu_time=cost_of(params), memory=memory)

    arguments = {"footprint": usage, "limits": Limits(memory="1GB"), "audits": 0.0}
    study = run_study(Offers(*offered), 1, n_candidates=3, earlier=20, arguments=arguments)
    trial = study.trials[-1]
    assert trial.params == offered[2]
    assert trial.user_attrs["quota:proposed"]["action"] == "redrawn"
    assert trial.user_attrs["quota:proposed"]["params"] == offered[0]


def test_with_none_admitted_the_first_is_replaced_as_without_ranking() -> None:
    offered = [{"x": 0.7, "dear": 0.1}, {"x": 0.2, "dear": 0.1}]

    def usage(params: dict[str, Any]) -> Usage:
        return Usage(cpu_time=1.0, memory=2e9 if params["dear"] < 0.5 else 1e6)

    arguments = {"footprint": usage, "limits": Limits(memory="1GB"), "audits": 0.0}
    arguments["on_veto"] = "nearest"
    ranked, plain = (
        run_study(Offers(*offered), 1, n_candidates=n, earlier=20, arguments=arguments).trials[-1]
        for n in (2, 1)
    )
    assert ranked.params == plain.params
    assert ranked.params["dear"] >= 0.5
    assert ranked.user_attrs["quota:proposed"] == plain.user_attrs["quota:proposed"]
    assert ranked.user_attrs["quota:proposed"]["action"] == "moved"


def test_skipping_applies_where_no_point_is_admitted() -> None:
    def usage(params: dict[str, Any]) -> Usage:
        return Usage(cpu_time=1.0, memory=2e9 if params["dear"] < 0.5 else 1e6)

    arguments = {"footprint": usage, "limits": Limits(memory="1GB"), "on_veto": "skip"}
    over, under = {"x": 0.7, "dear": 0.1}, {"x": 0.2, "dear": 0.9}
    states = []
    for second in (under, over):
        study = run_study(Offers(over, second), 1, n_candidates=2, earlier=20, arguments=arguments)
        assert study.trials[-1].params == second
        states.append(study.trials[-1].user_attrs["quota:proposed"]["action"])
    assert states == ["redrawn", "rejected"]


def test_enqueued_and_fixed_parameters_stay(ranked: list[int]) -> None:
    base = PartialFixedSampler({"x": 0.25}, TPESampler(seed=0))
    study = run_study(base, 3, earlier=20)
    assert [point["x"] for point in points_of(study)[20:]] == [0.25] * 3
    assert ranked == [8] * 3
    study.enqueue_trial({"x": 0.125, "dear": 0.5})
    trial = study.ask(SPACE)
    assert trial.params == {"x": 0.125, "dear": 0.5}
    study.tell(trial, 1.0)


@pytest.mark.parametrize("state", [TrialState.PRUNED, TrialState.FAIL])
def test_trials_that_did_not_complete_do_not_break_it(
    state: TrialState, ranked: list[int]
) -> None:
    sampler = QuotaSampler(
        TPESampler(seed=0), quota=Quota(cpu_time=1e6), metering="reported", n_candidates=4
    )
    study = optuna.create_study(sampler=sampler)
    for number in range(24):
        trial = study.ask(SPACE)
        trial.set_user_attr("quota:cpu_time", cost_of(trial.params))
        values = [math.inf, 0.5, -1.0]
        if number % 4:
            study.tell(trial, values[number % 3])
        else:
            study.tell(trial, state=state)
    # All from the fifth that completed.
    assert ranked == [4] * 17


def test_tpe_shares_the_point_that_runs() -> None:
    base = TPESampler(seed=0, multivariate=True, constant_liar=True, n_startup_trials=5)
    study = run_study(base, 0, earlier=20)
    for _ in range(6):
        trial = study.ask(SPACE)
        # What other workers avoid while it runs.
        assert json.loads(study.trials[-1].system_attrs["tpe:relative_params:0"]) == trial.params
        trial.set_user_attr("quota:cpu_time", cost_of(trial.params))
        study.tell(trial, trial.params["x"])


def test_the_chosen_children_are_the_generation_of_nsga(ranked: list[int]) -> None:
    base = NSGAIISampler(seed=0, population_size=6)
    study = run_study(base, 30)
    assert ranked == [8] * (30 - MIN_COMPLETED)
    generations = [base.get_trial_generation(study, trial) for trial in study.trials]
    assert generations == [number // 6 for number in range(30)]
    parents = base.get_parent_population(study, 4)
    assert len(parents) == 6
    assert {trial.number for trial in parents} <= set(range(24))
    # The elite of all that ran before.
    best = sorted(study.trials[:24], key=lambda trial: trial.value)[0]
    assert best.number in {trial.number for trial in parents}


@pytest.mark.parametrize("base", [TPESampler, NSGAIISampler, RandomSampler])
def test_ranked_points_are_better(base: type[BaseSampler]) -> None:
    arguments = {"quota": Quota(cpu_time=1e6)}
    plain, ranked = (
        run_study(base(seed=1), 40, n_candidates=count, arguments=arguments) for count in (1, 8)
    )
    middle = [np.median([trial.value for trial in study.trials]) for study in (ranked, plain)]
    assert middle[0] < 0.7 * middle[1]


@pytest.mark.parametrize("base", [TPESampler, NSGAIISampler, RandomSampler])
def test_one_candidate_draws_as_the_base_sampler(base: type[BaseSampler]) -> None:
    bare = optuna.create_study(sampler=base(seed=3))
    bare.optimize(
        lambda trial: (
            (trial.suggest_float("x", 0, 1) - 0.7) ** 2 + 0 * trial.suggest_float("dear", 0, 1)
        ),
        n_trials=60,
    )
    plain = run_study(base(seed=3), 60, n_candidates=1, arguments={"quota": Quota(cpu_time=1e6)})
    assert points_of(plain) == points_of(bare)


def test_threads_rank_beside_each_other(ranked: list[int]) -> None:
    sampler = QuotaSampler(
        TPESampler(seed=0), quota=Quota(cpu_time=1e6), metering="reported", n_candidates=4
    )
    study = optuna.create_study(sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        params = {name: trial.suggest_float(name, 0.0, 1.0) for name in SPACE}
        trial.set_user_attr("quota:cpu_time", cost_of(params))
        return float(params["x"])

    study.optimize(objective, n_trials=40, n_jobs=4)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 40
    # At most four completed and four ran when any other began.
    assert ranked == [4] * len(ranked)
    assert len(ranked) >= 40 - 8


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_rank_alike(copied: Any) -> None:
    offered = [{"x": 0.7, "dear": 1.0}, {"x": 0.7, "dear": 0.5}, {"x": 0.7, "dear": 0.0}]
    study = run_study(Offers(*offered), 1, n_candidates=3, earlier=20)
    study.sampler = copied(study.sampler)
    assert study.ask(SPACE).params == offered[2]


# What is refused.


@pytest.mark.parametrize("n_candidates", [0, -1, 1.5, 8.0, True, "8", None])
def test_an_invalid_number_of_candidates_is_refused(n_candidates: Any) -> None:
    error = ValueError if n_candidates in (0, -1) else TypeError
    with pytest.raises(error, match=f"`n_candidates` must be .* but got {n_candidates!r}"):
        QuotaSampler(n_candidates=n_candidates)


@pytest.mark.parametrize(
    "base",
    [
        GPSampler(),
        GridSampler({"x": [1, 2]}),
        BruteForceSampler(),
        PartialFixedSampler({"x": 1}, BruteForceSampler()),
        CmaEsSampler(with_margin=True),
        type("BoTorchSampler", (RandomSampler,), {})(),
    ],
    ids=lambda base: type(base).__name__,
)
def test_samplers_that_offer_one_point_are_refused(base: BaseSampler) -> None:
    QuotaSampler(base, n_candidates=1)
    with pytest.raises(ValueError, match=r"must be 1 with a .*Sampler.* but got 8"):
        QuotaSampler(base, n_candidates=8)


def test_several_objectives_are_refused_at_the_first_trial() -> None:
    sampler = QuotaSampler(quota=Quota(cpu_time=10.0), n_candidates=8, metering="reported")
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
    with pytest.raises(ValueError, match="got 8 and 2 objectives"):
        study.ask()
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]
