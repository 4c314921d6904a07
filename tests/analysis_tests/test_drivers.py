"""Rank correlations and shares have correct figures, and none from too few trials."""

from __future__ import annotations

import math

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from optuna_quota import analyze, Usage
from optuna_quota._analysis.drivers import spearman
from tests.analysis_tests.studies import draw, finished, power_law_study, study_of, terminated


COLUMNS = ["param", "resource", "rho", "lower", "upper", "p_value", "p_adjusted", "n"]
ONE = {"x": FloatDistribution(0.0, 100.0)}


def row(table: pd.DataFrame, param: str, resource: str) -> pd.Series:
    (found,) = table[(table.param == param) & (table.resource == resource)].index
    return table.loc[found]


def test_there_is_a_row_for_every_parameter_and_resource() -> None:
    table = analyze(power_law_study(40)).correlations

    assert list(table.columns[:8]) == COLUMNS
    assert len(table) == 4 * 3
    assert (table["n"] == 40).all()


def test_rho_and_its_p_value_are_those_of_scipy() -> None:
    study = power_law_study(40)
    frame = study.trials_dataframe()
    expected = stats.spearmanr(frame["params_width"], frame["user_attrs_quota:wall_time"])

    found = row(analyze(study).correlations, "width", "wall_time")

    assert found["rho"] == pytest.approx(expected.statistic)
    assert found["p_value"] == pytest.approx(expected.pvalue)


def test_categories_have_the_kruskal_wallis_test() -> None:
    study = power_law_study(50)
    frame = study.trials_dataframe()
    times = frame["user_attrs_quota:wall_time"]
    groups = [times[frame["params_optimizer"] == o] for o in ("sgd", "adam")]
    expected = stats.kruskal(*groups)

    found = row(analyze(study).correlations, "optimizer", "wall_time")

    assert found["measure"] == "epsilon2"
    assert found["rho"] == pytest.approx(expected.statistic / 49)
    assert found["p_value"] == pytest.approx(expected.pvalue)
    assert 0 <= found["lower"] <= found["rho"] <= found["upper"] <= 1


def test_p_values_are_corrected_over_all_tests() -> None:
    table = analyze(power_law_study(40)).correlations

    assert (
        table["p_adjusted"].tolist() == multipletests(table["p_value"], method="holm")[1].tolist()
    )
    assert (table["p_adjusted"] >= table["p_value"]).all()


def test_only_parameters_with_an_effect_are_significant() -> None:
    table = analyze(power_law_study(100)).correlations

    assert row(table, "rows", "memory")["p_adjusted"] < 1e-6
    assert row(table, "rows", "memory")["lower"] > 0.9
    assert row(table, "lr", "memory")["p_adjusted"] > 0.05


def test_intervals_cover_the_true_rho() -> None:
    rng = np.random.default_rng(1)
    pearson = 0.6
    truth = 6 / np.pi * np.arcsin(pearson / 2)
    covered = 0
    for _ in range(400):
        x, e = rng.standard_normal((2, 40))
        y = pearson * x + np.sqrt(1 - pearson**2) * e
        found = spearman(x, y)
        covered += found["lower"] <= truth <= found["upper"]
    assert 369 <= covered <= 391, "95% of 400 is 380, give or take two and a half deviations"


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_too_few_trials_have_no_figures(n: int) -> None:
    table = analyze(power_law_study(n)).correlations

    assert table[["rho", "lower", "upper", "p_value", "p_adjusted"]].isna().all(axis=None)
    assert (table["n"] == n).all(), "their number is given"


@pytest.mark.parametrize("sign", [1, -1])
def test_the_interval_of_a_perfect_order_contains_it(sign: int) -> None:
    x = np.arange(10.0)

    found = spearman(x, sign * x)

    assert found["lower"] <= found["rho"] <= found["upper"]
    assert sign * found["rho"] == pytest.approx(1.0)


def test_a_perfect_order_of_eight_trials_has_an_interval() -> None:
    trials = [finished({"x": float(i)}, Usage(cpu_time=i + 1.0), ONE) for i in range(8)]

    found = row(analyze(study_of(*trials)).correlations, "x", "cpu_time")

    assert found["rho"] == pytest.approx(1.0)
    assert 0 < found["lower"] < 1 and 0 < found["p_value"] < 0.01


def test_a_constant_parameter_or_usage_has_no_correlation() -> None:
    trials = [finished({"x": 1.0}, Usage(cpu_time=i + 1.0, memory=5.0), ONE) for i in range(12)]

    table = analyze(study_of(*trials)).correlations

    assert table["rho"].isna().all()


def test_a_conditional_parameter_is_tested_within_its_branch() -> None:
    space = {
        "model": CategoricalDistribution(["net", "tree"]),
        "width": IntDistribution(1, 1000),
        "depth": IntDistribution(1, 20),
    }
    trials = []
    for i in range(1, 13):
        net = {"model": "net", "width": 10 * i}
        tree = {"model": "tree", "depth": i}
        trials.append(finished(net, Usage(memory=1e6 * i), space))
        trials.append(finished(tree, Usage(memory=1e9 / i), space))

    table = analyze(study_of(*trials)).correlations

    assert row(table, "width", "memory")["rho"] == pytest.approx(1.0)
    assert row(table, "depth", "memory")["rho"] == pytest.approx(-1.0)
    assert row(table, "width", "memory")["n"] == 12
    assert row(table, "width", "memory")["branch"] == "model=net"
    assert row(table, "model", "memory")["branch"] == ""


def test_a_parameter_of_the_trials_that_were_not_pruned_is_conditional() -> None:
    space = {"n": IntDistribution(1, 2), "u1": FloatDistribution(0, 20)}
    trials = []
    for i in range(12):
        pruned = {"state": TrialState.PRUNED, "value": None, "intermediate_values": {0: 1.0}}
        trials.append(finished({"n": 1}, Usage(memory=1e6 * (i + 1)), space, **pruned))
        trials.append(finished({"n": 2, "u1": i}, Usage(memory=2e6 * (i + 1)), space))

    table = analyze(study_of(*trials)).correlations

    assert row(table, "u1", "memory")["branch"] == "where set"


def test_a_terminated_trial_is_ranked_by_the_breached_resource_only() -> None:
    trials = [
        finished({"x": float(i)}, Usage(memory=1e6 * i, wall_time=float(i)), ONE)
        for i in range(1, 11)
    ]
    trials += [
        terminated({"x": 50.0 + i}, Usage(memory=2e7, wall_time=0.1), "memory", 2e7, ONE)
        for i in range(5)
    ]

    table = analyze(study_of(*trials)).correlations

    assert row(table, "x", "memory")["n"] == 15
    assert row(table, "x", "memory")["rho"] > 0.95
    assert row(table, "x", "wall_time")["n"] == 10, "its time only depends on when it was stopped"


@pytest.mark.slow
def test_a_trial_with_a_refused_allocation_is_ranked_at_the_limit() -> None:
    trials = [finished({"x": float(i)}, Usage(memory=1e6 * i), ONE) for i in range(1, 11)]
    trials += [
        terminated({"x": 50.0 + i}, Usage(memory=5e5), "memory", 2e7, ONE) for i in range(5)
    ]

    report = analyze(study_of(*trials))

    assert row(report.correlations, "x", "memory")["rho"] > 0.95
    assert report.table["memory"].min() == 5e5, "the table has what was measured"
    assert report.models["memory"].coefficients["estimate"].iloc[-1] > 0


def test_the_times_of_pruned_trials_are_left_out() -> None:
    study = optuna.create_study()
    for i in range(10):
        trial = study.ask({"x": FloatDistribution(0, 1)})
        study.tell(trial, float(i)) if i % 2 else study.tell(
            trial, state=optuna.trial.TrialState.PRUNED
        )

    assert row(analyze(study).correlations, "x", "wall_time")["n"] == 5


def test_numeric_choices_are_numbers() -> None:
    space = {"batch": CategoricalDistribution([16, 32, 64, 128])}
    trials = [
        finished({"batch": b}, Usage(memory=1e6 * b * (1 + 0.01 * i)), space)
        for i in range(4)
        for b in (16, 32, 64, 128)
    ]

    found = row(analyze(study_of(*trials)).correlations, "batch", "memory")

    assert found["measure"] == "rho" and found["rho"] > 0.95


def test_shares_of_a_power_law_are_those_of_its_exponents() -> None:
    drivers = {d.param: d.share[1] for d in analyze(power_law_study(60)).drivers["cpu_time"]}

    # The variance of b · log(x) is b² · (log range)² / 12, that of a factor of 2 (log 2)² / 4.
    rows, width = math.log(100) ** 2 / 12, 0.25 * math.log(64) ** 2 / 12
    kind = math.log(2) ** 2 / 4
    for name, variance in (("rows", rows), ("width", width), ("optimizer", kind)):
        assert drivers[name] == pytest.approx(variance / (rows + width + kind), abs=0.05)
    assert sum(drivers.values()) < 1.01


def test_a_choice_that_decides_all_has_all_of_the_variance() -> None:
    space = {
        "kind": CategoricalDistribution([f"k{i}" for i in range(12)]),
        "other": FloatDistribution(1.0, 100.0, log=True),
    }
    rng = np.random.default_rng(0)
    trials = []
    for _ in range(120):
        params = draw(space, rng)
        even = int(params["kind"][1:]) % 2
        trials.append(finished(params, Usage(memory=1e9 * (1 + even)), space))

    first, second = analyze(study_of(*trials)).drivers["memory"]

    assert first.param == "kind" and first.share[0] > 0.9 and second.share[2] < 0.05
