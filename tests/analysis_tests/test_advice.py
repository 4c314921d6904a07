"""Advice is given where the data bear it out, with its figures, and nowhere else."""

from __future__ import annotations

import math

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import create_trial
from optuna.trial import TrialState
import pytest
import yaml

from optuna_quota import analyze
from optuna_quota import Usage
from optuna_quota._analysis.advice import Advice
from tests.analysis_tests.studies import draw
from tests.analysis_tests.studies import finished
from tests.analysis_tests.studies import power_law_study
from tests.analysis_tests.studies import study_of
from tests.analysis_tests.studies import terminated


SPACE = {
    "batch_size": IntDistribution(8, 256, log=True),
    "width": IntDistribution(64, 2048, log=True),
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
}
LIMIT = 3e9


def advice_on(study: optuna.Study, topic: str) -> list[Advice]:
    return [advice for advice in analyze(study).advice if advice.topic == topic]


def one(study: optuna.Study, topic: str) -> Advice:
    (advice,) = advice_on(study, topic)
    return advice


def study_with_breaches(
    n: int = 120, *, over: str = "product", best_inside: bool = False
) -> optuna.Study:
    """Who is over the limit is told by the parameters, or by chance alone."""
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
            trials.append(terminated(params, usage, "memory", LIMIT, SPACE))
        else:
            value = 0.5 if breached else value
            trials.append(finished(params, Usage(memory=1e9, wall_time=10.0), SPACE, value=value))
    return study_of(*trials)


def test_an_edit_of_the_search_space_with_a_condition() -> None:
    advice = one(study_with_breaches(), "search space")

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


def test_an_edit_without_a_condition_where_none_is_needed() -> None:
    figures = one(study_with_breaches(over="width"), "search space").figures

    assert figures["rule"].startswith("width <= ") and "when" not in figures["rule"]
    assert 900 <= float(figures["rule"].split()[-1]) <= 1000
    assert figures["breaches_removed"] == figures["breaches"]


def test_a_level_that_breaches_is_named() -> None:
    space = {"optimizer": CategoricalDistribution(["sgd", "adam", "lbfgs"])}
    trials = []
    for i in range(60):
        params = {"optimizer": ("sgd", "adam", "lbfgs")[i % 3]}
        if i % 3 == 2:
            usage = Usage(memory=LIMIT, wall_time=1.0)
            trials.append(terminated(params, usage, "memory", LIMIT, space))
        else:
            trials.append(finished(params, Usage(memory=1e9, wall_time=5.0), space))

    assert one(study_of(*trials), "search space").figures["rule"] == "without optimizer = lbfgs"


def test_breaches_by_chance_are_no_reason_to_edit() -> None:
    assert advice_on(study_with_breaches(over="chance"), "search space") == []


def test_no_edit_removes_a_trial_near_the_best() -> None:
    found = advice_on(study_with_breaches(over="width", best_inside=True), "search space")

    assert all(advice.figures["near_best_removed"] == 0 for advice in found)


def test_requests_hold_every_completed_trial() -> None:
    study = power_law_study(40)
    advice = one(study, "requests")
    greatest = analyze(study).table[["memory", "wall_time"]].max()

    resources = yaml.safe_load(advice.snippets["kubernetes"])["resources"]
    mebibytes = int(resources["limits"]["memory"].removesuffix("Mi"))
    assert 1.1 * greatest["memory"] <= mebibytes * 2**20 <= 1.25 * greatest["memory"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert resources["requests"]["cpu"] == "1"
    options = advice.snippets["sbatch"].removeprefix("#SBATCH ").split()
    assert f"--mem={mebibytes}M" in options and "--cpus-per-task=1" in options
    hours, minutes, _ = next(o for o in options if "--time" in o)[len("--time=") :].split(":")
    assert int(hours) * 3600 + int(minutes) * 60 >= 1.1 * greatest["wall_time"]
    assert "all 40 completed trials" in str(advice)


def test_gpus_are_requested_where_they_were_used() -> None:
    trials = [
        finished(
            {"x": 1.0},
            Usage(memory=1e9, gpu_memory=4e9, wall_time=1.0),
            {"x": FloatDistribution(0, 1)},
        )
        for _ in range(12)
    ]

    advice = one(study_of(*trials), "requests")

    assert (
        yaml.safe_load(advice.snippets["kubernetes"])["resources"]["limits"]["nvidia.com/gpu"] == 1
    )
    assert "--gres=gpu:1" in advice.snippets["sbatch"]


def test_jobs_fit_the_memory_that_they_hold_together() -> None:
    study = power_law_study(40, memory=lambda _: 1e9, noise=0.01)
    study.set_user_attr("quota:quota", {"memory": 4.5e9})

    advice = one(study, "n_jobs")

    assert advice.figures["n_jobs_sure"] == 4 and advice.figures["n_jobs"] == 4
    assert "n_jobs=4 always fits the memory quota of 4.19 GiB" in str(advice)


def test_jobs_that_rarely_exceed_are_named_with_their_chance() -> None:
    rng = np.random.default_rng(3)
    peaks = np.where(rng.random(100) < 0.02, 4e9, 5e8)
    space = {"x": FloatDistribution(0, 1)}
    study = study_of(*(finished({"x": 0.5}, Usage(memory=float(p)), space) for p in peaks))
    study.set_user_attr("quota:quota", {"memory": 5e9})

    figures = one(study, "n_jobs").figures

    assert figures["n_jobs_sure"] == 1 and figures["n_jobs"] > 1
    assert 0 < figures["chance_over"] <= 0.05


def test_no_quota_no_word_on_jobs() -> None:
    assert advice_on(power_law_study(40), "n_jobs") == []


def test_the_cheapest_trial_that_is_about_as_good() -> None:
    space = {"x": FloatDistribution(0, 1)}
    trials = [
        finished({"x": i / 20}, Usage(cpu_time=100.0 - i), space, value=1.0 - 0.02 * i)
        for i in range(20)
    ]
    trials.append(finished({"x": 1.0}, Usage(cpu_time=5.0), space, value=0.622))

    advice = one(study_of(*trials), "cheapest trial")

    assert advice.figures["number"] == 20 and advice.figures["best"] == 19
    assert "at 6% of its CPU time (5 s against 1 min 21 s)" in str(advice)
    assert set(advice.figures["front"]) == {19, 20}


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_best_is_the_best_in_its_direction(direction: str) -> None:
    space = {"x": FloatDistribution(0, 1)}
    sign = 1.0 if direction == "minimize" else -1.0
    trials = [
        finished(
            {"x": 0.1}, Usage(cpu_time=10.0 + 90 * (i == 0)), space, value=sign * (1 + 1e-3 * i)
        )
        for i in range(15)
    ]

    advice = one(study_of(*trials, direction=direction), "cheapest trial")

    assert advice.figures["best"] == 0 and advice.figures["number"] != 0


@pytest.mark.parametrize(
    ("ended", "says"),
    [
        (1, " The one that was terminated may have needed more."),
        (2, " The 2 that were terminated may have needed more."),
    ],
)
def test_requests_say_how_many_needed_more(ended: int, says: str) -> None:
    space = {"x": FloatDistribution(0, 1)}
    breach = terminated({"x": 0.2}, Usage(wall_time=3.0, memory=2e9), "memory", 2e9, space)
    trials = [finished({"x": 0.1}, Usage(wall_time=6.0, memory=1e9), space) for _ in range(20)]
    # One that was ended by what was left of the quota tells nothing of what it needs.
    last = terminated({"x": 0.2}, Usage(wall_time=1.0), "wall_time", 1.0, space, quota=True)
    trials.append(last)

    assert one(study_of(*trials, *[breach] * ended), "requests").text.endswith(says)


def test_shares_of_the_budget_by_outcome() -> None:
    space = {"x": FloatDistribution(0, 1)}
    trials = [
        finished({"x": 0.1}, Usage(wall_time=60.0), space),
        terminated({"x": 0.2}, Usage(wall_time=30.0, memory=1e9), "memory", 1e9, space),
        finished(
            {"x": 0.3},
            Usage(),
            space,
            state=TrialState.FAIL,
            value=None,
            user_attrs={"quota:wall_time": 10.0, "quota:outcome": "failed"},
        ),
    ]

    advice = one(study_of(*trials), "budget")

    assert advice.figures["shares"]["completed"] == pytest.approx(0.6)
    assert sum(advice.figures["shares"].values()) == pytest.approx(1.0)
    assert str(advice) == (
        "60% of trial time went to completed trials, 30% to terminated ones, 10% to failed ones."
    )


@pytest.mark.parametrize(
    ("late_gain", "word"), [(0.0, "improved nothing"), (0.5, "improved the best")]
)
def test_what_the_last_tenth_bought(late_gain: float, word: str) -> None:
    space = {"x": FloatDistribution(0, 1)}
    trials = [
        finished(
            {"x": 0.5},
            Usage(wall_time=10.0),
            space,
            value=1.0 - 0.01 * min(i, 20) - late_gain * (i == 39),
        )
        for i in range(40)
    ]
    study = study_of(*trials)
    study.set_user_attr("quota:quota", {"trial_time": 400.0})

    advice = one(study, "last tenth")

    assert word in str(advice) and "trial time quota" in str(advice)
    assert advice.figures["n_trials"] == 4
    assert advice.figures["best_after"] == pytest.approx(0.8 - late_gain)


def test_an_unfinished_quota_has_no_last_tenth() -> None:
    study = power_law_study(40)
    study.set_user_attr("quota:quota", {"trial_time": 1e9})

    assert advice_on(study, "last tenth") == []


def test_several_objectives() -> None:
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

    assert "search space" in topics and "cheapest trial" not in topics


@pytest.mark.parametrize("n", [0, 1, 3])
def test_little_data_bears_out_little(n: int) -> None:
    assert {advice.topic for advice in analyze(power_law_study(n)).advice} <= {"budget"}


def test_a_trial_that_violates_a_constraint_is_neither_the_cheapest_nor_the_best() -> None:
    space = {"x": IntDistribution(0, 30)}
    trials = []
    for i in range(30):
        cheap = i in (8, 29)
        usage = Usage(cpu_time=0.1 if cheap else 9.0 + i, wall_time=10.0)
        over = {"constraints": [1.0 if cheap else -1.0]}
        value = 0.999 if i == 29 else 1.0 + i * 1e-4
        trials.append(finished({"x": i}, usage, space, value=value, system_attrs=over))
    study = study_of(*trials)

    assert analyze(study).best == [0]
    assert not advice_on(study, "cheapest trial")
    assert "improved nothing" in str(one(study, "last tenth"))


def test_a_large_bound_is_said_exactly() -> None:
    space = {"rows": IntDistribution(1, 3_000_000)}
    trials = []
    for i in range(60):
        rows = 1_000_001 + i * 12_347
        if rows > 1_500_000:
            usage = Usage(memory=8e9)
            trials.append(terminated({"rows": rows}, usage, "memory", 8e9, space))
        else:
            trials.append(finished({"rows": rows}, Usage(memory=1e9), space))

    advice = one(study_of(*trials), "search space")

    assert advice.figures["rule"] == "rows <= 1493881"
