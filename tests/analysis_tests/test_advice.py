"""Advice is given with its figures, and only where the data support it."""

from __future__ import annotations

import numpy as np
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState
import pytest
import yaml

from optuna_quota import analyze, Usage
from optuna_quota._records import record_attributes, TrialRecord
from optuna_quota._usage import Breach
from tests.analysis_tests.studies import (
    advice_on,
    finished,
    only_advice,
    power_law_study,
    study_of,
    terminated,
)


def test_requests_hold_every_completed_trial() -> None:
    study = power_law_study(40)
    advice = only_advice(study, "requests")
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


def test_the_share_that_is_held_counts_the_resources_together() -> None:
    study = power_law_study(40)
    advice = only_advice(study, "requests")
    assert "of further trials like the completed ones" in str(advice)
    held = advice.figures["share_held"]
    rng = np.random.default_rng(0)

    # Of 40 trials of two independent uniform resources: what stays below both maxima.
    shares = rng.uniform(size=(20_000, 40, 2)).max(axis=1).prod(axis=1)

    assert held == pytest.approx(np.quantile(shares, 0.05), abs=0.01)
    assert held <= np.quantile(shares, 0.05) + 0.002


def test_gpus_are_requested_where_they_were_used() -> None:
    trials = [
        finished(
            {"x": 1.0},
            Usage(memory=1e9, gpu_memory=4e9, wall_time=1.0),
            {"x": FloatDistribution(0, 1)},
        )
        for _ in range(12)
    ]

    advice = only_advice(study_of(*trials), "requests")

    assert (
        yaml.safe_load(advice.snippets["kubernetes"])["resources"]["limits"]["nvidia.com/gpu"] == 1
    )
    assert "--gres=gpu:1" in advice.snippets["sbatch"]


def test_a_container_requests_nothing_where_only_time_is_known() -> None:
    space = {"x": FloatDistribution(0, 1)}
    trials = [finished({"x": 1.0}, Usage(wall_time=1.0), space) for _ in range(12)]

    snippets = only_advice(study_of(*trials), "requests").snippets

    assert snippets.keys() == {"sbatch"}
    time, share = snippets["sbatch"].splitlines()
    assert time == "#SBATCH --time=00:01:00"
    assert share.startswith("# Holds for at least 77% of further trials")


def test_n_jobs_fits_the_memory_quota() -> None:
    study = power_law_study(40, memory=lambda _: 1e9, noise=0.01)
    study.set_user_attr("quota:quota", {"memory": 4.5e9})

    advice = only_advice(study, "n_jobs")

    assert advice.figures["n_jobs_sure"] == 4 and advice.figures["n_jobs"] == 4
    assert "n_jobs=4 always fits the memory quota of 4.19 GiB" in str(advice)


def test_n_jobs_that_rarely_exceeds_the_quota_has_its_probability() -> None:
    rng = np.random.default_rng(3)
    peaks = np.where(rng.random(100) < 0.02, 4e9, 5e8)
    space = {"x": FloatDistribution(0, 1)}
    study = study_of(*(finished({"x": 0.5}, Usage(memory=float(p)), space) for p in peaks))
    study.set_user_attr("quota:quota", {"memory": 5e9})

    figures = only_advice(study, "n_jobs").figures

    assert figures["n_jobs_sure"] == 1 and figures["n_jobs"] > 1
    assert 0 < figures["chance_over"] <= 0.05


def test_without_a_quota_there_is_no_advice_on_n_jobs() -> None:
    assert advice_on(power_law_study(40), "n_jobs") == []


@pytest.mark.parametrize(
    ("ended", "text"),
    [
        (1, " The one that was terminated may have needed more."),
        (2, " The 2 that were terminated may have needed more."),
    ],
)
def test_requests_count_the_trials_that_may_need_more(ended: int, text: str) -> None:
    space = {"x": FloatDistribution(0, 1)}
    breach = terminated({"x": 0.2}, Usage(wall_time=3.0, memory=2e9), "memory", 2e9, space)
    trials = [finished({"x": 0.1}, Usage(wall_time=6.0, memory=1e9), space) for _ in range(20)]
    # A trial that was terminated for the quota does not show what it needs.
    last = terminated({"x": 0.2}, Usage(wall_time=1.0), "wall_time", 1.0, space, quota=True)
    trials.append(last)
    # One that completed over a limit, as none stopped it, is counted by its usage.
    usage, over = Usage(wall_time=6.0, memory=2e9), Breach("memory", 1e9, 2e9, 1.0)
    row = record_attributes(TrialRecord(outcome="completed", usage=usage, breach=over))
    trials.append(finished({"x": 0.1}, usage, space, user_attrs=row))

    assert only_advice(study_of(*trials, *[breach] * ended), "requests").text.endswith(text)


def test_the_budget_is_shared_among_outcomes() -> None:
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

    advice = only_advice(study_of(*trials), "budget")

    assert advice.figures["shares"]["completed"] == pytest.approx(0.6)
    assert sum(advice.figures["shares"].values()) == pytest.approx(1.0)
    assert str(advice) == (
        "60% of trial time went to completed trials, 30% to terminated ones, 10% to failed ones."
    )


@pytest.mark.parametrize(
    ("late_gain", "word"), [(0.0, "improved nothing"), (0.5, "improved the best")]
)
def test_the_last_tenth_of_the_budget(late_gain: float, word: str) -> None:
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

    advice = only_advice(study, "last tenth")

    assert word in str(advice) and "trial time quota" in str(advice)
    assert advice.figures["n_trials"] == 4
    assert advice.figures["best_after"] == pytest.approx(0.8 - late_gain)


def test_an_unfinished_quota_has_no_last_tenth() -> None:
    study = power_law_study(40)
    study.set_user_attr("quota:quota", {"trial_time": 1e9})

    assert advice_on(study, "last tenth") == []


@pytest.mark.parametrize("n", [0, 1, 3])
def test_few_trials_give_little_advice(n: int) -> None:
    assert {advice.topic for advice in analyze(power_law_study(n)).advice} <= {"budget"}


def test_infeasible_trials_are_not_the_best() -> None:
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
    assert "improved nothing" in str(only_advice(study, "last tenth"))
