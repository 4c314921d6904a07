"""Amounts whose sums exceed the largest float are shown without errors."""

from __future__ import annotations

import optuna
from optuna.distributions import FloatDistribution
import pytest

from optuna_quota import (
    analyze,
    Limits,
    Quota,
    QuotaPruner,
    QuotaSampler,
    replay,
    status,
    Strategy,
    trial_table,
)
from optuna_quota.visualization import plot_burn_down


# Models of such amounts are meaningless, and numpy warns.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

HUGE = 1e308
NAMES = ("wall_time", "cpu_time", "memory", "gpu_memory", "gpu_time", "energy")


def rows() -> list[optuna.trial.FrozenTrial]:
    attributes = {f"quota:{name}": HUGE for name in NAMES} | {"quota:outcome": "completed"}
    return [
        optuna.create_trial(
            params={"x": i / 12},
            distributions={"x": FloatDistribution(0, 1)},
            value=i / 12,
            user_attrs=attributes,
        )
        for i in range(12)
    ]


def run_study(quota: Quota) -> optuna.Study:
    limits = Limits(wall_time=HUGE, cpu_time=HUGE, memory=HUGE)
    sampler = QuotaSampler(
        optuna.samplers.RandomSampler(), quota=quota, strategy=Strategy(30, n_jobs=2)
    )
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=limits))
    study.add_trials(rows())
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    return study


QUOTAS = [
    Quota(wall_time=HUGE, memory=HUGE),
    Quota(trial_time=HUGE, cpu_time=HUGE, gpu_time=HUGE, energy=HUGE),
    Quota(cost=HUGE, prices={"cpu_time": HUGE}),
]


@pytest.mark.parametrize("quota", QUOTAS, ids=["held", "totals", "cost"])
def test_huge_amounts_are_shown(quota: Quota) -> None:
    study = run_study(quota)
    assert str(status(study))
    assert len(trial_table(study)) == len(study.trials) >= 13
    assert [str(advice) for advice in analyze(study).advice]
    assert plot_burn_down(study).layout.title.text
    limits = Limits(wall_time=HUGE, cpu_time=HUGE, memory=HUGE)
    assert str(replay(study, quota=quota, limits=limits))
    assert isinstance(study.sampler, QuotaSampler)
    assert str(study.sampler.project(study))


@pytest.mark.parametrize(
    "quota",
    [QUOTAS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in QUOTAS[1:])],
    ids=["held", "totals", "cost"],
)
def test_huge_amounts_are_analyzed_and_plotted(quota: Quota) -> None:
    report = analyze(run_study(quota))
    assert report.summary() and report.figures()
