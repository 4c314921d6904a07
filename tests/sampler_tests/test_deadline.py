"""No trial starts that would most likely not be done by the deadline; running ones are stopped."""

from __future__ import annotations

import contextlib
from datetime import datetime, timedelta
import os
from pathlib import Path
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import (
    check,
    isolated,
    Limits,
    preemptible,
    Quota,
    QuotaExhausted,
    QuotaSampler,
    status,
    Usage,
)
from optuna_quota._enforcement.preemption import Preemption, preemption_of
from optuna_quota._records import read_record
from tests.isolation_tests.trials import needs_supervisor
from tests.sampler_tests.test_options import fake_slurm


NOW = 1_800_000_000.0


@pytest.mark.parametrize("value", [datetime.max, "1000000000d", 1e300])
def test_a_deadline_that_never_comes_ends_no_trial(value: Any) -> None:
    study = optuna.create_study(sampler=QuotaSampler(deadline=value))
    study.optimize(isolated(lambda trial: trial.suggest_float("x", 0, 1)), n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE]


@pytest.mark.parametrize("value", ["soon", 0, -1, "90", "2027-01-15 18:00"])
def test_invalid_deadlines(value: Any) -> None:
    with pytest.raises(ValueError, match=r"deadline.* Give a point in time as a datetime\."):
        QuotaSampler(quota=Quota(n_trials=9), deadline=value)


def completed(hours: float) -> optuna.trial.FrozenTrial:
    trial = optuna.trial.create_trial(
        state=TrialState.COMPLETE,
        value=1.0,
        params={"x": 0.5},
        distributions={"x": optuna.distributions.FloatDistribution(0, 1)},
    )
    end = datetime.now()
    trial.datetime_start, trial.datetime_complete = end - timedelta(hours=hours), end
    return trial


@pytest.mark.parametrize("n_before", [0, 1])
def test_a_deadline_ends_a_study_quietly_where_a_quota_would_raise(n_before: int) -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.number >= n_before:
            preemption_of(study).set_deadline(time.time())
        return trial.suggest_float("x", 0, 1)

    sampler = QuotaSampler(
        quota=Quota(n_trials=9), deadline="1h", on_exhausted="raise", footprint=Usage(wall_time=60)
    )
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=5)
    assert len(study.trials) == n_before + 1
    # As it had become late between two trials.
    study.optimize(objective, n_trials=5)
    assert read_record(study.trials[-1]).outcome == "rejected"
    with pytest.raises(QuotaExhausted, match="deadline") as caught:
        study.ask()
    assert caught.value.observed == 60


@pytest.mark.parametrize(("hours", "starts"), [(0.5, True), (2.0, False)])
@pytest.mark.parametrize("known_from", ["footprint", "trials"])
def test_a_trial_that_would_not_be_done_does_not_start(
    hours: float, starts: bool, known_from: str, caplog: pytest.LogCaptureFixture
) -> None:
    footprint = Usage(wall_time=3600 * hours) if known_from == "footprint" else None
    sampler = QuotaSampler(quota=Quota(n_trials=9), deadline="1h", footprint=footprint)
    study = optuna.create_study(sampler=sampler)
    if known_from == "trials":
        study.add_trials([completed(hours)] * 3)
    before = len(study.trials)
    optuna.logging.enable_propagation()
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    done = [t for t in study.trials[before:] if t.state == TrialState.COMPLETE]
    assert len(done) == (3 if starts else 0)
    # With propagation, one record may come by two handlers.
    messages = {id(record): record.getMessage() for record in caplog.records}.values()
    lines = [line for line in messages if "The study ends here" in line]
    assert len(lines) == (0 if starts else 1)
    if not starts:
        assert "are left until the deadline" in lines[0]
        with pytest.raises(QuotaExhausted, match="deadline"):
            study.ask()


@pytest.mark.parametrize("by", ["optimize", "ask"])
def test_an_enqueued_trial_that_is_too_late_here_is_left_for_another_worker(by: str) -> None:
    each = Usage(wall_time="2h")
    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=9), deadline="1h", footprint=each)
    )
    study.enqueue_trial({"x": 0.25}, user_attrs={"mine": 1})
    if by == "ask":
        with pytest.raises(QuotaExhausted, match="deadline"):
            study.ask()
    else:
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    assert [trial.state.name for trial in study.trials][1:] == ["WAITING"]
    study.sampler = QuotaSampler(quota=Quota(n_trials=9), footprint=each)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    again = study.trials[1]
    assert again.params == {"x": 0.25}
    assert again.user_attrs["mine"] == 1 and again.user_attrs["quota:retry_of"] == 0


def test_the_checkpoint_of_a_trial_that_is_too_late_here_is_kept(tmp_path: Path) -> None:
    folders = []

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        folders.append(Path(trial.user_attrs["quota:checkpoint"]))
        if trial.number == 0:
            (folders[0] / "weights").touch()
            preemption_of(study).set_deadline(time.time())
        check(trial)
        return x

    study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=9), deadline="1h"))
    with preemptible(study, checkpoints=tmp_path):
        study.optimize(objective, n_trials=1)
        # The next worker is as late.
        study.optimize(objective, n_trials=1)
        assert [trial.state.name for trial in study.trials] == ["FAIL", "PRUNED", "WAITING"]
        assert (folders[0] / "weights").exists()
        preemption_of(study).set_deadline(time.time() + 3600)
        study.optimize(objective, n_trials=1)
    assert study.trials[2].params == study.trials[0].params
    assert folders[1] == folders[0] and not folders[0].exists()


@pytest.mark.parametrize("asks", [True, False])
def test_a_trial_in_process_is_stopped_and_the_study_ends(asks: bool) -> None:
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        if trial.number == 1:
            preemption_of(study).set_deadline(time.time())
        if asks and trial.should_prune():
            raise optuna.TrialPruned
        check(trial)
        return x

    sampler = QuotaSampler(quota=Quota(n_trials=9), deadline="1h")
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=5)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "WAITING"]
    record = read_record(study.trials[1])
    assert record.outcome == "preempted"
    assert "deadline" in (record.reason or "")


def test_an_isolated_trial_is_stopped_ahead_by_its_grace_period() -> None:
    preemption, stopped = Preemption(), threading.Event()
    preemption.set_deadline(time.time() + 3600)
    with preemption.handled_by(0, lambda reason: stopped.set(), stopped.set, 1.0):
        assert not stopped.is_set()
        assert preemption.margin == 1.0
    assert preemption.grace(10_000.0) <= 3600
    preemption.set_deadline(time.time() + 1)
    with preemption.handled_by(0, lambda reason: stopped.set(), stopped.set, 0.9):
        assert stopped.wait(timeout=60)


SCRIPT = """
    import sys, time
    import optuna
    from optuna_quota import LimitBreached, Quota, QuotaSampler, isolated

    def objective(trial):
        trial.suggest_float("x", 0, 1)
        time.sleep(600)

    study = optuna.create_study(
        storage=sys.argv[1], study_name="s",
        sampler=QuotaSampler(quota=Quota(n_trials=9), deadline="slurm"),
    )
    study.enqueue_trial({"x": 0.5})
    study.optimize(isolated(objective, grace_period=600))
    sys.exit(3)
"""


@pytest.mark.slow
@needs_supervisor
def test_a_slurm_job(tmp_path: Path) -> None:
    """Its only trial takes longer than the job: it is stopped, and enqueued for the next job."""
    script, storage = tmp_path / "tune.py", f"sqlite:///{tmp_path / 'study.db'}"
    script.write_text(textwrap.dedent(SCRIPT))
    squeue = "date -d '+20 seconds' +%Y-%m-%dT%H:%M:%S"
    environment = {**os.environ, **fake_slurm(tmp_path, squeue=squeue)}
    ended = subprocess.run(
        [sys.executable, str(script), storage],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 3
    study = optuna.load_study(study_name="s", storage=storage)
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]
    assert read_record(study.trials[0]).outcome == "preempted"
    assert study.trials[1].user_attrs["quota:retry_of"] == 0


def test_an_isolated_trial_without_a_deadline_is_not_disturbed() -> None:
    study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=9), deadline="1h"))
    study.optimize(isolated(lambda trial: trial.suggest_float("x", 0, 1)), n_trials=1)
    assert study.trials[0].state == TrialState.COMPLETE


def test_a_deadline_ends_with_its_sampler() -> None:
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        return x if not trial.should_prune() else float("nan")

    late = QuotaSampler(quota=Quota(n_trials=9), deadline=60)
    study = optuna.create_study(sampler=late)
    study.optimize(objective, n_trials=1)
    for sampler in (optuna.samplers.RandomSampler(), QuotaSampler(quota=Quota(n_trials=9))):
        preemption_of(study).set_deadline(time.time())
        study.sampler = sampler
        study.optimize(objective, n_trials=1)
        study.optimize(isolated(objective), n_trials=1)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 5
    assert preemption_of(study).deadline is None
    study.sampler = late
    study.optimize(objective, n_trials=1)
    assert preemption_of(study).deadline == late._options.deadline


def test_a_preempted_trial_does_not_count_as_one_of_the_study() -> None:
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        if trial.number == 0:
            preemption_of(study).set_deadline(time.time())
            check(trial)
        return x

    study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=2), deadline=60))
    study.optimize(objective)
    preemption_of(study).set_deadline(time.time() + 60)
    study.optimize(objective)
    states = [t.state for t in study.trials]
    assert states == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert status(study).table.loc["n_trials", "used"] == 2


@pytest.mark.parametrize("how", ["deadline", "preemptible"])
def test_limits_of_the_sampler_hold_beside_a_pruner_that_saves_trials(how: str) -> None:
    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_float("x", 0, 1)

    sampler = QuotaSampler(
        quota=Quota(n_trials=9),
        limits=Limits(wall_time=60),
        deadline="2h" if how == "deadline" else None,
    )
    study = optuna.create_study(sampler=sampler)
    with preemptible(study) if how == "preemptible" else contextlib.nullcontext():
        study.optimize(objective, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2
    assert study.user_attrs["quota:limits"] == {"wall_time": 60.0}
