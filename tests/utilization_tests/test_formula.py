"""Formulas and warnings of utilization models."""

from __future__ import annotations

import math
import re

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
import pytest

from optuna_quota import analyze, Usage
from tests.analysis_tests.studies import finished, power_law_study, study_of, terminated
from tests.utilization_tests.test_model import model_of


def test_a_formula_has_the_floor_and_the_significant_exponents() -> None:
    memory = model_of(power_law_study(100)).formula
    time = model_of(power_law_study(100), "wall_time").formula

    assert re.fullmatch(r"memory = 28\d MiB \+ [\d.]+ MiB · \(rows/\d+\)\^2\.0\d", memory)
    assert re.search(r"\(rows/\d+\)\^(1\.0|0\.9)\d", time) and "(width/" in time
    assert "optimizer=" in time


def test_a_formula_without_any_effect_says_so() -> None:
    study = power_law_study(50, memory=lambda _: 5e8, seed=2)

    model = model_of(study)

    assert "no single term is clear" in model.formula
    assert (model.coefficients["p_value"].dropna() > 0.001).all()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("twins", "determine it"),
        ("together", "can hardly be separated"),
        ("outlier", "Cook's distance"),
        ("cut", "ended early"),
    ],
)
def test_diagnostics_warn(change: str, expected: str) -> None:
    model = model_of(flawed_study(change))

    assert any(expected in warning for warning in model.diagnostics), model.diagnostics


def test_a_formula_of_a_bent_law_is_rejected() -> None:
    report = analyze(flawed_study("bend"))

    assert report.prediction_errors["memory"].is_wrong
    assert "follows no floor plus power law" in report.summary()


def test_a_formula_with_an_error_of_few_percent_is_kept() -> None:
    def memory(params: dict[str, float]) -> float:
        return 5e7 + 8 * params["rows"] ** 2 + 3e4 * params["rows"]

    report = analyze(power_law_study(40, memory=memory, noise=0.002))

    error = report.prediction_errors["memory"]
    # The footprint knows better, and a quota does not mind.
    assert error.footprint + 0.01 < error.formula < 0.04
    assert not error.is_wrong
    assert "memory = " in report.summary()


@pytest.mark.slow
def test_a_correct_model_has_no_warnings() -> None:
    found = [model_of(power_law_study(80, seed=s), "cpu_time").diagnostics for s in range(10)]

    assert sum(map(len, found)) <= 2, found


def flawed_study(change: str) -> optuna.Study:
    rng = np.random.default_rng(8)
    space = {name: FloatDistribution(1.0, 1000.0, log=True) for name in ("rows", "other")}
    trials = []
    for i in range(80):
        rows = float(np.exp(rng.uniform(0, math.log(1000))))
        other = float(np.exp(rng.uniform(0, math.log(1000))))
        noise = 0.1 * rng.standard_normal()
        memory, factor = rows, 1.0
        if change == "twins":
            other = rows
        elif change == "together":
            other = min(1000.0, max(1.0, rows * float(np.exp(0.05 * rng.standard_normal()))))
        elif change == "outlier":
            rows = memory = 5.0 + i / 40 if i else 1000.0
            factor = 1.0 if i else 1e-3
        elif change == "bend":
            memory = float(np.exp(0.3 * math.log(rows) ** 2))
        usage = Usage(memory=1e6 * memory * factor * math.exp(noise))
        params = {"rows": rows, "other": other}
        if change == "cut" and i % 3:
            trials.append(terminated(params, usage, "memory", usage.memory or 0.0, space))
        else:
            trials.append(finished(params, usage, space))
    return study_of(*trials)


def test_a_formula_can_be_computed() -> None:
    space = {name: FloatDistribution(1.0, 1000.0, log=True) for name in ("rows", "width")}
    rng = np.random.default_rng(4)
    trials = []
    for _ in range(100):
        point = {name: float(np.exp(rng.uniform(0, math.log(1000)))) for name in space}
        one, other = math.log(point["rows"]), math.log(point["width"])
        seconds = 1e-7 * math.exp(1.04 * one + 0.3 * other + 0.2 * one * other)
        trials.append(finished(point, Usage(cpu_time=seconds * rng.lognormal(0, 0.05)), space))

    formula = model_of(study_of(*trials), "cpu_time").formula

    # All is relative to the middle.
    assert "ln(rows/" in formula and "ln(width/" in formula and "(rows/" in formula
    text = formula.removeprefix("cpu_time = ").replace(" ms", " * 1e-3").replace(" s ", " ")
    text = text.replace("·", "*").replace("^", "**").replace("ln", "math.log")
    text = text.replace("exp(", "math.exp(").replace("−", "-")
    computed = eval(text, {"math": math, "rows": 100.0, "width": 30.0})
    one, other = math.log(100.0), math.log(30.0)
    truth = 1e-7 * math.exp(1.04 * one + 0.3 * other + 0.2 * one * other)
    assert computed == pytest.approx(truth, rel=0.2)
