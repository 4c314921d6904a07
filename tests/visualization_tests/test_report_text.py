"""The summary suits a terminal."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial, TrialState
import pytest

from optuna_quota import analyze, Usage
from optuna_quota.visualization._report_text import refused_points
from tests.analysis_tests.studies import (
    draw,
    finished,
    power_law_study,
    SPACE,
    study_of,
    terminated,
)
from tests.utilization_tests.test_formula import flawed_study


def test_the_summary_has_outcomes_and_correlations() -> None:
    text = analyze(power_law_study(80, limit=2e9)).summary()

    assert "80 trials finished" in text and "terminated" in text
    assert "Spearman" in text and "Holm" in text
    line = next(x for x in text.splitlines() if x.startswith("  memory  ") and " rows " in x)
    assert "p < 0.001" in line and "n = 80" in line


@pytest.mark.slow
def test_every_line_fits_a_terminal() -> None:
    long = optuna.create_study(study_name="study-" + "x" * 300)
    long.add_trials(power_law_study(30).trials)

    for report in (analyze(power_law_study(60)), analyze(long)):
        assert max(map(len, report.summary().splitlines())) <= 100


def test_a_wide_scatter_is_formatted_without_an_exponent() -> None:
    text = " ".join(analyze(power_law_study(60, noise=0.8)).summary().split())

    shown = re.findall(r"scatter (\S+)%\.", text)
    assert len(shown) >= 2 and max(map(float, shown)) > 100
    assert all(figure.replace(".", "", 1).isdigit() for figure in shown)


def test_figures_beside_a_constant_are_said_to_be_of_all_terms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "all terms together" not in analyze(power_law_study(40)).summary()

    report = analyze(power_law_study(40))
    model = report.models["memory"]
    assert model.has_clear_term
    monkeypatch.setitem(vars(model), "formula", "memory = 1 GiB (no single term is clear)")
    text = " ".join(report.summary().split())
    assert "memory = 1 GiB (no single term is clear) With all terms together:" in text
    assert "rows correlates with the memory, but which term has the effect" in text


def test_trials_that_finish_after_the_analysis_are_not_in_it() -> None:
    study = power_law_study(20)
    report, as_it_was = analyze(study), analyze(power_law_study(20)).summary()

    point = study.trials[0].params
    study.add_trials([finished(point, Usage(memory=1e8, wall_time=1.0), value=-1.0)] * 4)

    assert set(report.best) <= set(range(20))
    assert len(report.feasible) == len(report.table) == 20
    assert len(report.footprint.points) == 20
    assert report.summary().partition("\n")[2] == as_it_was.partition("\n")[2]


def test_an_empty_study() -> None:
    text = analyze(optuna.create_study(study_name="new")).summary()

    assert text == "Study 'new': no trial has finished, nothing to analyze yet."


BREACH = {"resource": "memory", "limit": 1e9, "observed": 2e9, "seconds": 1.0}


def trial_with(action: Any, outcome: str, **attrs: Any) -> optuna.trial.FrozenTrial:
    state = TrialState.COMPLETE if outcome == "completed" else TrialState.PRUNED
    attrs = {f"quota:{name}": value for name, value in attrs.items()}
    return create_trial(
        state=state,
        value=1.0,
        user_attrs={"quota:proposed": action, "quota:outcome": outcome, **attrs},
    )


def test_audits_give_the_rate_of_false_refusals() -> None:
    trials = [
        trial_with({"action": "redrawn"}, "completed"),
        trial_with({"action": "moved"}, "completed"),
        trial_with({"action": "rejected"}, "rejected"),
        trial_with({"action": "audited"}, "completed"),
        *[trial_with({"action": "audited"}, "terminated", breach=BREACH) for _ in range(3)],
        trial_with({"action": "audited"}, "pruned"),
        trial_with({"action": "audited"}, "terminated", breach={**BREACH, "quota": True}),
        trial_with({"action": 7}, "completed"),
        trial_with("junk", "completed"),
        create_trial(value=1.0),
    ]
    assert refused_points(trials) == (
        "Points refused: 7 (1 redrawn, 1 moved, 1 rejected, 4 run anyway as an audit, 1 of "
        "which stayed within the limits (25% false refusals))."
    )
    assert refused_points([]) == ""


def test_the_summary_says_what_drives_cost() -> None:
    report = analyze(power_law_study(40))

    first = report.drivers["memory"][0]
    assert first.param == "rows" and first.share[0] > 0.8
    assert report.drivers["wall_time"][0].param == "rows"
    text = report.summary()
    assert "What drives cost" in text and "rows" in text.split("What drives cost")[1]
    assert re.search(r"At the best trial, (doubl|halv)ing rows multiplies the memory by \d", text)


def test_trials_that_ended_before_they_drew_all_make_no_parameter_conditional() -> None:
    study = power_law_study(40)
    study.add_trial(create_trial(state=TrialState.PRUNED))  # as one that the quota has no room for
    study.add_trial(terminated({"rows": 9_000}, Usage(memory=2e9, wall_time=1.0), "memory", 2e9))

    report = analyze(study)

    assert report.drivers["memory"][0].param == "rows"
    assert (report.correlations["branch"] == "").all()
    assert "What drives cost: shares" in report.summary()


def test_a_user_attribute_that_is_missing_makes_no_hyperparameter_conditional() -> None:
    rows = power_law_study(40).trials
    for i, trial in enumerate(rows[1:]):
        trial.user_attrs["a"] = float(i)

    report = analyze(study_of(*rows), user_attrs=["a"])

    assert report.drivers["memory"][0].param == "rows"
    assert "What drives cost: shares" in report.summary()


def test_bounds_halve_the_cost_and_keep_the_best() -> None:
    rng = np.random.default_rng(1)
    trials = []
    for _ in range(60):
        params = draw(SPACE, rng)
        seconds = 1e-3 * params["rows"] * rng.lognormal(0, 0.05)
        # The best is at 700 rows, in the lower half of their logarithms, and at any width.
        value = (math.log(params["rows"]) - math.log(700)) ** 2 + 0.01 * rng.standard_normal()
        trials.append(finished(params, Usage(cpu_time=seconds), value=value))
    report = analyze(study_of(*trials))

    found = report.cheaper_space
    assert found is not None and found.resource == "cpu_time"
    assert found.bounds[0].startswith("rows <= ") and found.best_kept >= 0.9
    bound = float(found.bounds[0].removeprefix("rows <= "))
    assert bound > 700
    # Of rows, whose logarithm is uniform from 100 to 10,000.
    mean, whole = ((b - 100) / math.log(b / 100) for b in (bound, 10_000))
    assert found.cost == pytest.approx(mean / whole, abs=0.05)
    assert "Half the cost: with rows <= " in report.summary()

    # Nothing is known of the best where the value is noise.
    noise = [
        finished(t.params, Usage(cpu_time=t.params["rows"]), value=rng.random()) for t in trials
    ]
    assert analyze(study_of(*noise)).cheaper_space is None


def test_code_stands_between_backticks() -> None:
    summary = " ".join(analyze(flawed_study("bend")).summary().split())
    assert summary.count("`report.footprint.predict(params)`") == 2
    assert summary.count("report.footprint.predict") == 2


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_front_of_cost_and_quality(direction: str) -> None:
    space = {"x": FloatDistribution(0, 100)}
    sign = 1.0 if direction == "minimize" else -1.0
    costs_and_losses = [(10.0 + i, 9.0 - i) for i in range(6)]
    costs_and_losses += [(30.0, 5.0)] * 6 + [(12.0, 7.0), (1.0, 0.0)]
    trials = []
    for i, (cost, loss) in enumerate(costs_and_losses):
        # The last one violates a constraint.
        attrs = {"constraints": [1.0 if cost == 1.0 else -1.0]}
        usage = Usage(cpu_time=cost, wall_time=1.0)
        trials.append(finished({"x": i}, usage, space, value=sign * loss, system_attrs=attrs))
    report = analyze(study_of(*trials, direction=direction))

    assert report.front is not None
    assert report.front["number"].tolist() == [0, 1, 2, 3, 4, 5]
    assert report.front["cpu_time"].tolist() == [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
    lines = report.summary().split("Cost against quality")[1].splitlines()
    assert lines[2].split() == ["0", f"{sign * 9:g}", "10", "s", "67%"]


def test_the_only_parameter_drives_nothing_where_usage_is_noise() -> None:
    space = {"p": FloatDistribution(1.0, 100.0, log=True)}
    for seed in range(2):
        rng = np.random.default_rng(seed)
        trials = [
            finished(draw(space, rng), Usage(memory=1e9 * rng.lognormal(0, 0.05)), space)
            for _ in range(30)
        ]
        report = analyze(study_of(*trials))

        assert report.drivers["memory"][0].share[1] < 0.2
        assert "What drives cost" not in report.summary()


def test_the_summary_says_how_many_trials_a_formula_leaves_out() -> None:
    report = analyze(power_law_study(80, limit=5e8, seed=4))

    n = int((report.table["outcome"] == "terminated").sum())
    text = " ".join(report.summary().split())
    assert f"{80 - n} trials, {n} left out as something else stopped them" in text
