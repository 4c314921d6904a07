"""Utilization models recover the power law that generated the data; intervals cover it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
import math
import pickle
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
import pytest

from optuna_quota import analyze, Usage
from optuna_quota._records import record_attributes, TrialRecord
from optuna_quota._utilization.data import study_data
from optuna_quota._utilization.model import fit_utilization_model, UtilizationModel
from tests.analysis_tests.studies import (
    draw,
    finished,
    power_law_study,
    SPACE,
    study_of,
    terminated,
)


def model_of(study: optuna.Study, resource: str = "memory") -> UtilizationModel:
    found = fit_utilization_model(study_data(study), resource)
    assert isinstance(found, UtilizationModel)
    return found


def test_the_exponent_of_a_quadratic_over_a_floor_is_found() -> None:
    model = model_of(power_law_study(60))

    rows = model.coefficients.loc["rows"]
    assert rows["lower"] < 2.0 < rows["upper"] and rows["upper"] - rows["lower"] < 0.3
    assert rows["kind"] == "exponent" and rows["p_value"] < 1e-10
    floor = model.coefficients.loc["floor"]
    assert floor["lower"] < 300e6 < floor["upper"]
    assert list(model.coefficients.columns[:4]) == ["estimate", "lower", "upper", "p_value"]


def test_a_ratio_of_levels_is_found_on_the_log_scale() -> None:
    table = model_of(power_law_study(100, seed=1), "wall_time").coefficients

    (term,) = [t for t in table.index if t.startswith("optimizer[")]
    ratio = math.log(2.0) if term == "optimizer[adam]" else -math.log(2.0)
    assert table.loc[term, "lower"] < ratio < table.loc[term, "upper"]
    assert table.loc[term, "kind"] == "log ratio"


def test_terminated_trials_do_not_bias_the_exponent() -> None:
    study = power_law_study(80, limit=5e8, seed=3)

    model = model_of(study)

    assert model.kind.startswith("Tobit")
    assert model.n_censored > 20 and model.n_observed + model.n_censored == 80
    rows = model.coefficients.loc["rows"]
    assert rows["lower"] < 2.0 < rows["upper"]


def test_times_of_trials_ended_by_a_time_are_survival_data() -> None:
    trials = []
    for trial in power_law_study(80, seed=4).trials:
        seconds = trial.user_attrs["quota:wall_time"]
        usage = Usage(wall_time=min(seconds, 30.0), cpu_time=min(seconds, 30.0))
        if seconds > 30.0:
            trials.append(terminated(trial.params, usage, "wall_time", 30.0))
        else:
            trials.append(finished(trial.params, usage))

    for resource in ("wall_time", "cpu_time"):
        model = model_of(study_of(*trials), resource)
        assert "failure time" in model.kind and model.n_censored > 20
        rows = model.coefficients.loc["rows"]
        assert rows["lower"] < 1.0 < rows["upper"]


def test_times_of_trials_ended_by_their_memory_are_left_out() -> None:
    study = power_law_study(80, limit=5e8, seed=4)

    report = analyze(study)
    model = report.models["wall_time"]

    n_completed = int((report.table["outcome"] == "completed").sum())
    assert (model.n_observed, model.n_censored) == (n_completed, 0)
    rows = model.coefficients.loc["rows"]
    assert rows["lower"] < 1.0 < rows["upper"]
    pairs = report.correlations.set_index(["param", "resource"])
    assert pairs.loc[("rows", "wall_time"), "n"] == n_completed


def test_a_floor_that_may_exist_widens_the_intervals() -> None:
    # The largest trials are missing, so that the others hardly show the floor below the law.
    trials = power_law_study(40, floor=1e6, noise=0.3, seed=2).trials
    small = sorted(trials, key=lambda t: t.params["rows"])[:20]

    model = model_of(study_of(*small))

    assert model.floor == 0 and model.selected.floored is not None
    joined = model.coefficients.loc["rows"]
    without = replace(model.selected, floored=None)
    plain = UtilizationModel("memory", without, model.numbers).coefficients.loc["rows"]
    assert plain["upper"] < 2.0 and joined["lower"] <= plain["lower"]
    assert joined["lower"] < 2.0 < joined["upper"]


def test_a_floor_that_few_trials_do_not_exclude_widens_the_intervals() -> None:
    held = 0
    for seed in range(8):
        # With the larger half cut off, the likeliest floor is often none, and few trials tell.
        trials = power_law_study(20, floor=4e8, noise=0.2, seed=seed).trials
        limit = float(np.median([t.user_attrs["quota:memory"] for t in trials]))
        cut = [
            terminated(t.params, Usage(memory=limit), "memory", limit)
            if t.user_attrs["quota:memory"] > limit
            else t
            for t in trials
        ]
        model = model_of(study_of(*cut))
        if "rows" not in model.coefficients.index:
            held += 1
            continue
        assert model.floor or model.selected.floored is not None
        row = model.coefficients.loc["rows"]
        held += row["lower"] < 2.0 < row["upper"]
    assert held >= 7


def pruning_study(share: float, n: int = 60) -> optuna.Study:
    """Memory of 100 MB and a law in rows; every third trial pruned at a share of that law."""
    rng = np.random.default_rng(5)
    trials = []
    for number in range(n):
        params = draw(SPACE, rng)
        cut = number % 3 == 0
        memory = 1e8 + (share if cut else 1.0) * 40.0 * params["rows"] ** 2.0
        usage = Usage(memory=memory * math.exp(0.02 * rng.standard_normal()))
        record = TrialRecord(outcome="pruned" if cut else "completed", usage=usage)
        state = TrialState.PRUNED if cut else TrialState.COMPLETE
        changes = {"state": state, "user_attrs": record_attributes(record)}
        trials.append(finished(params, usage, **changes))
    return study_of(*trials)


def test_peaks_that_pruned_trials_had_not_reached_are_left_out() -> None:
    report = analyze(pruning_study(share=0.25))

    model = report.models["memory"]
    assert (model.n_stopped_peaks, model.n_observed, model.n_censored) == (20, 40, 0)
    assert model.coefficients.loc["rows", "estimate"] == pytest.approx(2.0, abs=0.05)
    assert any("20 stopped trials" in line for line in model.diagnostics)
    found = report.correlations.set_index(["param", "resource"]).loc[("rows", "memory")]
    assert found["n"] == 40


def test_peaks_that_pruned_trials_had_reached_are_values() -> None:
    report = analyze(pruning_study(share=1.0))

    model = report.models["memory"]
    assert model.n_stopped_peaks == model.n_censored == 0
    found = report.correlations.set_index(["param", "resource"]).loc[("rows", "memory")]
    assert found["n"] == 60


def test_statsmodels_results_are_available() -> None:
    whole = model_of(power_law_study(60))
    cut = model_of(power_law_study(60, limit=2e9))

    for model in (whole, cut):
        assert "rows" in str(model.results.summary())
        assert model.bse.shape == model.params.shape
        assert np.isfinite(model.llf)
    assert whole.results.cov_type == "HC3"
    assert 0.9 < whole.rsquared <= 1
    with pytest.raises(AttributeError):
        whole.nothing_of_the_kind  # noqa: B018  # the access is the point


@pytest.mark.parametrize("limit", [None, 2e9])
def test_a_model_can_be_pickled(limit: float | None) -> None:
    model = model_of(power_law_study(30, limit=limit))

    assert model.coefficients is not None
    copied = pickle.loads(pickle.dumps(model))

    assert copied.coefficients.equals(model.coefficients)
    assert copied.formula == model.formula


@pytest.mark.slow
def test_an_interaction_is_included_only_if_there_is_one() -> None:
    def by_kind(params: Mapping[str, Any]) -> float:
        return 1e8 + 1e5 * params["rows"] ** (1.3 if params["optimizer"] == "adam" else 0.8)

    with_one = model_of(power_law_study(120, memory=by_kind, seed=1))
    without = [model_of(power_law_study(60, seed=s), "wall_time") for s in range(10)]

    (term,) = [t for t in with_one.coefficients.index if ":" in t and "optimizer" in t]
    assert "rows" in term
    assert abs(abs(with_one.coefficients.loc[term, "estimate"]) - 0.5) < 0.15
    assert any("extended BIC" in note for note in with_one.notes)
    assert sum(":" in t for m in without for t in m.coefficients.index) <= 2


def test_terms_are_adjusted_for_all_terms_of_the_study() -> None:
    found = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        space = {f"p{i}": FloatDistribution(1.0, 100.0, log=True) for i in range(8)}
        noise = [
            finished(
                draw(space, rng),
                Usage(memory=1e9 * rng.lognormal(0, 0.1), cpu_time=rng.lognormal(0, 0.3)),
                space,
            )
            for _ in range(40)
        ]
        models = analyze(study_of(*noise)).models
        tables = [model.coefficients for model in models.values()]
        assert all((t["p_adjusted"] >= t["p_value"]).sum() == 8 for t in tables)
        clear = [m for m in models.values() if (m.coefficients["p_adjusted"] < 0.05).any()]
        assert all(
            ("no single term is clear" in m.formula) == (m not in clear) for m in models.values()
        )
        found += bool(clear)
    assert found <= 2


def test_conditional_parameters_have_exponents() -> None:
    space = {
        "model": CategoricalDistribution(["net", "kernel"]),
        "width": IntDistribution(10, 1000, log=True),
        "rows": IntDistribution(100, 5000, log=True),
    }
    rng = np.random.default_rng(5)
    trials = []
    for i in range(80):
        params = {k: v for k, v in draw(space, rng).items() if k != "model"}
        kernel = i % 2 == 0
        params.pop("width" if kernel else "rows")
        params["model"] = "kernel" if kernel else "net"
        power = 8.0 * params["rows"] ** 2 if kernel else 4e4 * params["width"] ** 1.3
        usage = Usage(memory=(1e8 + power) * float(np.exp(0.03 * rng.standard_normal())))
        trials.append(finished(params, usage, space))

    table = model_of(study_of(*trials)).coefficients

    assert table.loc["rows", "lower"] < 2.0 < table.loc["rows", "upper"]
    assert table.loc["width", "lower"] < 1.3 < table.loc["width", "upper"]
    assert not any("[set]" in term for term in table.index), "the choice of model says it"


def test_user_attributes_are_regressors() -> None:
    rng = np.random.default_rng(6)
    space = {"x": FloatDistribution(1.0, 10.0)}
    trials = []
    for _ in range(40):
        rows, x = float(rng.uniform(1e3, 1e5)), float(rng.uniform(1, 10))
        memory = 1e8 + 1e3 * rows * x * float(np.exp(0.02 * rng.standard_normal()))
        attributes = {"rows": rows, "quota:memory": memory}
        trials.append(finished({"x": x}, Usage(), space, user_attrs=attributes))

    table = analyze(study_of(*trials), user_attrs=["rows"]).models["memory"].coefficients

    assert table.loc["rows", "lower"] < 1.0 < table.loc["rows", "upper"]


def test_multi_objective_studies_have_models() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    for trial in power_law_study(30).trials:
        study.add_trial(
            optuna.trial.create_trial(
                values=[1.0, 2.0],
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=trial.user_attrs,
            )
        )

    assert "rows" in analyze(study).models["memory"].coefficients.index


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_unit_of_memory_does_not_matter(scale: float) -> None:
    study = power_law_study(40, memory=lambda p: scale * (3e8 + 50.0 * p["rows"] ** 2))

    rows = model_of(study).coefficients.loc["rows"]

    assert rows["lower"] < 2.0 < rows["upper"]


@pytest.mark.slow
def test_of_too_many_parameters_the_strongest_are_kept() -> None:
    space = {f"p{i}": FloatDistribution(1e-3, 1.0, log=True) for i in range(30)}
    rng = np.random.default_rng(7)
    trials = []
    for _ in range(20):
        params = draw(space, rng)
        trials.append(finished(params, Usage(memory=1e9 * params["p3"]), space))

    model = model_of(study_of(*trials))

    assert len(model.coefficients) <= 8
    assert "p3" in model.coefficients.index
    assert any("too few" in warning for warning in model.diagnostics)


def test_a_choice_of_none_is_a_level_of_its_own() -> None:
    space = {"weight": CategoricalDistribution([None, "", "balanced"])}
    amounts = {None: 4e9, "": 2e9, "balanced": 1e9}
    rng = np.random.default_rng(0)
    chosen = [None, "", "balanced", "balanced"] * 10
    model = model_of(
        study_of(
            *(
                finished({"weight": c}, Usage(memory=amounts[c] * rng.lognormal(0, 0.02)), space)
                for c in chosen
            )
        )
    )

    estimates = model.coefficients["estimate"]
    assert estimates["weight[None]"] == pytest.approx(math.log(4), abs=0.03)
    assert estimates["weight[]"] == pytest.approx(math.log(2), abs=0.03)


def test_an_infinite_choice_is_a_level_not_a_missing_value() -> None:
    space = {"max_norm": CategoricalDistribution([1.0, math.inf])}
    rng = np.random.default_rng(0)
    report = analyze(
        study_of(
            *(
                finished(
                    {"max_norm": norm},
                    Usage(memory=1e9 * (1 + math.isinf(norm)) * rng.lognormal(0, 0.02)),
                    space,
                )
                for norm in [1.0, math.inf] * 15
            )
        )
    )

    found = report.correlations.iloc[0]

    assert (found["param"], found["n"], found["branch"]) == ("max_norm", 30, "")
    assert found["p_value"] < 1e-3
    assert "2[max_norm=inf]" in report.models["memory"].formula
