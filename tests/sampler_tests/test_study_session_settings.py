"""The quota and limits in the study's attributes, and workers that disagree about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
import logging
from pathlib import Path
import subprocess
import sys
import time

import optuna
from optuna.samplers import RandomSampler
import pytest

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, status
from optuna_quota._ledger.protocol import (
    process_start,
    Reservation,
    reservation_object,
    this_worker,
)
from optuna_quota._records import RESERVATION
from optuna_quota.cli import main


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


def test_a_worker_without_the_sampler_and_pruner_is_warned_once(
    tmp_path: Path, quota_warnings: Callable[[], list[str]]
) -> None:
    run(worker(tmp_path, Quota(n_trials=9), Limits(memory="1GiB")))
    study = optuna.load_study(study_name="shared", storage=f"sqlite:///{tmp_path}/s.db")
    study.optimize(isolated(lambda trial: trial.suggest_float("x", 0, 1)), n_trials=2)
    (warned,) = quota_warnings()
    assert warned.startswith("The storage of the study 'shared' has a quota and limits, which")


def test_a_footprint_of_another_type_is_an_error() -> None:
    with pytest.raises(TypeError, match="`footprint` must be a Usage, a function"):
        QuotaSampler(footprint={"memory": "1GiB"})


def test_a_worker_that_comes_alone_changes_the_studys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run(worker(tmp_path, Quota(n_trials=1, wall_time="2h"), Limits(memory="1GiB")))
    quota, limits = Quota(n_trials=3, wall_time="4h"), Limits(memory="2GiB", wall_time="5s")
    second = worker(tmp_path, quota, limits)
    optuna.logging.enable_propagation()
    caplog.set_level(logging.INFO, logger="optuna.quota")
    run(second, n_trials=9)
    assert len(second.trials) == 3
    changes = {r.getMessage() for r in caplog.records if "changed" in r.getMessage()}
    assert changes == {
        "Quota changed from 1 to 3 (trials), from 2 h to 4 h (wall time). "
        "Limits changed from 1 GiB to 2 GiB (memory), from none to 5 s (wall time)."
    }
    assert second.user_attrs["quota:quota"] == {"n_trials": 3, "wall_time": 14400}
    assert second.user_attrs["quota:limits"] == {"memory": 2**31, "wall_time": 5}
    assert status(second).table.loc["n_trials", "quota"] == 3
    capsys.readouterr()
    url = f"sqlite:///{tmp_path}/s.db"
    main(["status", "--storage", url, "--study-name", "shared", "--format", "json"])
    assert "14400" in capsys.readouterr().out


def test_limits_that_change_between_trials_are_the_studys_too() -> None:
    study = optuna.create_study(
        sampler=QuotaSampler(RandomSampler(), quota=Quota(n_trials=9)),
        pruner=QuotaPruner(limits=Limits(memory="1GiB")),
    )
    run(study)
    study.pruner = QuotaPruner(limits=Limits(memory="2GiB"))
    run(study)
    assert study.user_attrs["quota:limits"] == {"memory": 2**31}


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate()


def test_a_worker_that_disagrees_is_warned_and_enforces_its_own_quota(
    tmp_path: Path,
    quota_warnings: Callable[[], list[str]],
    other_process: subprocess.Popen[bytes],
) -> None:
    run(worker(tmp_path, Quota(n_trials=9), Limits(cpu_time="90s")))
    second = worker(tmp_path, Quota(n_trials=5), Limits(cpu_time="90s", wall_time="5s"))
    running = second._storage.create_new_trial(second._study_id)
    started = process_start(other_process.pid)
    assert started is not None
    other = replace(this_worker(), pid=other_process.pid, started=started)
    held = Reservation(running, granted={"n_trials": 1}, worker=other, began=time.time())
    second._storage.set_trial_system_attr(running, RESERVATION, reservation_object(held))

    run(second, n_trials=2)
    assert second.user_attrs["quota:quota"] == {"n_trials": 9}
    [warning] = quota_warnings()
    assert "Quota changed from 9 to 5 (trials)" in warning
    assert "Limits changed from none to 5 s (wall time)" in warning

    other_process.communicate()
    run(second, n_trials=9)
    assert second.user_attrs["quota:quota"] == {"n_trials": 5}
    # The trial of the process that ended counts.
    assert len(second.trials) == 5
    assert not any("changed" in each for each in quota_warnings())


def test_a_result_is_stored_where_the_limits_disagree() -> None:
    study = optuna.create_study(sampler=RandomSampler())
    trial = study.ask()
    study.sampler = QuotaSampler(quota=Quota(n_trials=9), limits=Limits(memory="1GiB"))
    study.pruner = QuotaPruner(limits=Limits(memory="2GiB"))
    study.tell(trial, 1.0)
    assert study.best_value == 1
