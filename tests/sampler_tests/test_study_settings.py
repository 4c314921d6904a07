"""The quota and limits in the study's attributes, and workers that disagree about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.samplers import RandomSampler

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler


def worker(path: Path, quota: Quota, limits: Limits) -> optuna.Study:
    return optuna.create_study(
        study_name="shared",
        storage=f"sqlite:///{path}/s.db",
        load_if_exists=True,
        sampler=QuotaSampler(RandomSampler(), quota=quota),
        pruner=QuotaPruner(limits=limits),
    )


def run(study: optuna.Study, n_trials: int = 1) -> None:
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=n_trials)


def test_settings_are_stored_as_plain_numbers_in_base_units(tmp_path: Path) -> None:
    quota = Quota(wall_time="2h", memory="1GiB", cost=5, prices={"cpu_time": 0.5})
    study = worker(tmp_path, quota, Limits(memory="0.5GiB"))
    run(study)
    assert study.user_attrs["quota:quota"] == {"wall_time": 7200, "memory": 2**30, "cost": 5}
    assert study.user_attrs["quota:limits"] == {"memory": 2**29}
    assert study.user_attrs["quota:prices"] == {"cpu_time": 0.5}


def test_workers_that_agree_are_not_warned(
    tmp_path: Path, quota_warnings: Callable[[], list[str]]
) -> None:
    for _ in range(2):
        run(worker(tmp_path, Quota(n_trials=9), Limits(memory="1GiB")))
    assert quota_warnings() == []


def test_a_worker_that_disagrees_is_warned_and_enforces_its_own_quota(
    tmp_path: Path, quota_warnings: Callable[[], list[str]]
) -> None:
    run(worker(tmp_path, Quota(n_trials=9), Limits(memory="1GiB")))
    second = worker(tmp_path, Quota(n_trials=3), Limits(memory="1GiB", wall_time="5s"))
    run(second, n_trials=9)
    assert len(second.trials) == 3
    quota, limits, *_ = quota_warnings()
    assert "n_trials 9 stored, 3 here" in quota
    assert "wall_time unset stored, 5 s here" in limits
    assert second.user_attrs["quota:quota"] == {"n_trials": 9}
