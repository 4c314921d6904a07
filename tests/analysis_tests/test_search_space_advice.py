"""Edits of the search space are suggested where they avoid breaches and cost no good trial."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import create_trial, TrialState
import pytest

from optuna_quota import analyze, Footprint, Usage
from optuna_quota._analysis import study_analysis
from optuna_quota._analysis.advice import StudyFacts
from tests.analysis_tests.studies import (
    advice_on,
    draw,
    finished,
    only_advice,
    power_law_study,
    study_of,
    terminated,
)


SPACE = {
    "batch_size": IntDistribution(8, 256, log=True),
    "width": IntDistribution(64, 2048, log=True),
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
}
LIMIT = 3e9


def study_with_breaches(
    n: int = 120, *, over: str = "product", best_inside: bool = False, quota: bool = False
) -> optuna.Study:
    """Breaches depend on two parameters, on one, or on chance."""
    rng = np.random.default_rng(0)
    trials = []
    for i in range(n):
        params = draw(SPACE, rng)
        breached = {
            "product": params["batch_size"] > 96 and params["width"] >= 512,
            "width": params["width"] > 1000,
            "chance": rng.random() < 0.2,
        }[over]
        value = abs(math.log(params["lr"]) + 7) + 1.0
        if breached and not (best_inside and i % 2):
            usage = Usage(memory=LIMIT, wall_time=1.0)
            trials.append(terminated(params, usage, "memory", LIMIT, SPACE, quota=quota))
        else:
            value = 0.5 if breached else value
            trials.append(finished(params, Usage(memory=1e9, wall_time=10.0), SPACE, value=value))
    return study_of(*trials)


def test_breaches_of_the_quota_say_nothing_of_the_points() -> None:
    assert not advice_on(study_with_breaches(over="width", quota=True), "search space")


def test_a_rule_with_a_condition() -> None:
    advice = only_advice(study_with_breaches(), "search space")

    figures = advice.figures
    assert "when" in figures["rule"]
    assert {"batch_size", "width"} <= set(
        figures["rule"].replace("<=", " ").replace(">=", " ").split()
    )
    assert figures["breaches_removed"] >= 0.9 * figures["breaches"]
    assert figures["others_removed"] <= 2 and figures["near_best_removed"] == 0
    assert (
        f"removes {figures['breaches_removed']} of {figures['breaches']} memory breaches"
        in str(advice)
    )
    assert "no trial within 1% of the best" in str(advice)
    assert figures["held_out_share_removed"] >= 0.5 and figures["held_out_precision"] >= 0.7
    assert figures["best_points_lost"] <= 0.1


def test_a_rule_without_a_condition_where_none_is_needed() -> None:
    figures = only_advice(study_with_breaches(over="width"), "search space").figures

    assert figures["rule"].startswith("width <= ") and "when" not in figures["rule"]
    assert 900 <= float(figures["rule"].split()[-1]) <= 1000
    assert figures["breaches_removed"] == figures["breaches"]


def test_a_level_that_breaches_is_excluded() -> None:
    space = {"optimizer": CategoricalDistribution(["sgd", "adam", "lbfgs"])}
    trials = []
    for i in range(60):
        params = {"optimizer": ("sgd", "adam", "lbfgs")[i % 3]}
        if i % 3 == 2:
            usage = Usage(memory=LIMIT, wall_time=1.0)
            trials.append(terminated(params, usage, "memory", LIMIT, space))
        else:
            trials.append(finished(params, Usage(memory=1e9, wall_time=5.0), space))

    assert (
        only_advice(study_of(*trials), "search space").figures["rule"]
        == "without optimizer = lbfgs"
    )


def test_breaches_by_chance_give_no_rule() -> None:
    assert advice_on(study_with_breaches(over="chance"), "search space") == []


def test_no_rule_removes_a_trial_near_the_best() -> None:
    found = advice_on(study_with_breaches(over="width", best_inside=True), "search space")

    assert all(advice.figures["near_best_removed"] == 0 for advice in found)


def test_a_large_bound_is_exact() -> None:
    space = {"rows": IntDistribution(1, 3_000_000)}
    trials = []
    for i in range(60):
        rows = 1_000_001 + i * 12_347
        if rows > 1_500_000:
            usage = Usage(memory=8e9)
            trials.append(terminated({"rows": rows}, usage, "memory", 8e9, space))
        else:
            trials.append(finished({"rows": rows}, Usage(memory=1e9), space))

    advice = only_advice(study_of(*trials), "search space")

    assert advice.figures["rule"] == "rows <= 1493881"


def test_studies_with_several_objectives_have_rules() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    for trial in study_with_breaches(80).trials:
        values = None if trial.value is None else [trial.value, 1.0]
        study.add_trial(
            create_trial(
                state=trial.state,
                values=values,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=trial.user_attrs,
            )
        )

    topics = {advice.topic for advice in analyze(study).advice}

    assert "search space" in topics


def test_a_rule_that_costs_the_best_points_that_fit_is_not_given() -> None:
    space = {name: FloatDistribution(1.0, 100.0, log=True) for name in ("rows", "width")}
    rng = np.random.default_rng(1)
    best_at_limit, elsewhere = [], []
    for _ in range(120):
        params = draw(space, rng)
        size = params["rows"] * params["width"]
        if size > 1000:
            trial = terminated(params, Usage(memory=LIMIT), "memory", LIMIT, space)
            best_at_limit.append(trial)
            elsewhere.append(trial)
            continue
        usage = Usage(memory=1e6 * size)
        best_at_limit.append(finished(params, usage, space, value=-math.log(size)))
        elsewhere.append(finished(params, usage, space, value=math.log(params["rows"])))

    assert advice_on(study_of(*best_at_limit), "search space") == []
    assert advice_on(study_of(*elsewhere), "search space") != []


def test_the_objective_is_fitted_once_and_only_to_compare_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits = []

    def fitted(facts: StudyFacts, footprint: Footprint) -> None:
        fits.append(facts)

    monkeypatch.setattr(study_analysis, "objective_model", fitted)
    assert analyze(power_law_study(40)).advice is not None
    assert fits == []
    breaching = power_law_study(40, limit=2e9).trials
    for row in [t for t in breaching if t.state == TrialState.COMPLETE][:6]:
        over = Usage(memory=1e9, cpu_time=1.0)
        breaching.append(terminated(row.params, over, "cpu_time", 1.0))
    report = analyze(study_of(*breaching))
    assert set(report.table["censored_by"].dropna()) == {"memory", "cpu_time"}
    assert (report.advice is not None, report.cheaper_space, len(fits)) == (True, None, 1)


def test_of_many_parameters_only_few_bounds_are_paired() -> None:
    rng = np.random.default_rng(0)
    space = {f"p{i}": FloatDistribution(0.01, 1) for i in range(60)}
    trials = []
    for _ in range(60):
        params = draw(space, rng)
        usage = Usage(wall_time=params["p1"] ** 2, memory=1e9)
        trials.append(finished(params, usage, space, value=params["p0"] + params["p1"]))
    report = analyze(study_of(*trials))
    tracemalloc.start()
    try:
        found = report.cheaper_space
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found is not None
    assert [bound.split()[0] for bound in found.bounds] == ["p1"]
    # All pairs took 370 MiB, and it grows with the square of their number.
    assert peak < 150 * 2**20
