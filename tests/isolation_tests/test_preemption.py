"""Isolated trials of a worker that gets a signal save themselves, or are killed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap
import time

import optuna
from optuna.trial import TrialState
import psutil
import pytest

from optuna_quota import isolated, LimitBreached, Limits, preemptible, Quota, QuotaSampler
from optuna_quota._isolation.launch import StartMethod
from optuna_quota._records import read_record
from tests.isolation_tests.trials import needs_supervisor
from tests.waiting import until


pytestmark = needs_supervisor


def make_study(kind: str) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler(seed=1)
    quota = QuotaSampler(sampler, quota=Quota(n_trials=9))
    return optuna.create_study(sampler=sampler if kind == "plain" else quota)


@pytest.mark.parametrize("kind", ["plain", "quota"])
def test_a_trial_is_asked_to_stop_and_runs_again(kind: str, tmp_path: Path) -> None:
    folder = str(tmp_path)

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        try:
            while True:
                if trial.number == 0:
                    os.kill(trial.study.user_attrs["worker"], signal.SIGTERM)
                time.sleep(0.01)
        except LimitBreached as error:
            Path(folder, "saved").write_text(str(error))
            raise

    study = make_study(kind)
    study.set_user_attr("worker", os.getpid())
    with preemptible(study):
        study.optimize(isolated(objective, grace_period=60), n_trials=5)
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]
    assert "SIGTERM" in (tmp_path / "saved").read_text()
    record = read_record(study.trials[0])
    assert record.outcome == "preempted"
    assert record.usage.wall_time is not None
    assert "killed" not in (record.reason or "")
    assert study.trials[1].user_attrs["quota:retry_of"] == 0
    study.optimize(isolated(lambda trial: trial.suggest_float("x", 0, 1)), n_trials=1)
    assert study.trials[1].params == study.trials[0].params


def ignore_stops(trial: optuna.Trial) -> float:
    trial.suggest_float("x", 0, 1)
    worker, signals = trial.study.user_attrs["worker"], trial.study.user_attrs["signals"]
    sent = 0.0
    while True:
        with contextlib.suppress(LimitBreached):
            if sent == 0 or (signals > 1 and time.monotonic() > sent + 0.3):
                sent = time.monotonic()
                os.kill(worker, signal.SIGUSR1)
            time.sleep(0.05)


@pytest.mark.parametrize(("signals", "grace_period"), [(1, 0.5), (2, 600.0)])
def test_a_trial_that_ignores_the_stop_is_killed(signals: int, grace_period: float) -> None:
    study = make_study("quota")
    study.set_user_attr("worker", os.getpid())
    study.set_user_attr("signals", signals)
    with preemptible(study):
        study.optimize(isolated(ignore_stops, grace_period=grace_period), n_trials=5)
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]
    record = read_record(study.trials[0])
    assert record.outcome == "preempted"
    assert "killed" in (record.reason or "")


def test_a_value_that_is_returned_in_the_grace_period_counts() -> None:
    def objective(trial: optuna.Trial) -> float:
        try:
            os.kill(trial.study.user_attrs["worker"], signal.SIGTERM)
            time.sleep(60)
        except LimitBreached:
            return 1.0
        return 2.0

    study = make_study("plain")
    study.set_user_attr("worker", os.getpid())
    with preemptible(study):
        study.optimize(isolated(objective), n_trials=5)
    assert [t.value for t in study.trials] == [1.0]


def test_limits_of_isolated_stay() -> None:
    study = make_study("plain")
    with preemptible(study):
        study.optimize(isolated(lambda trial: 1.0, limits=Limits(memory="2GiB")), n_trials=1)
    assert [t.value for t in study.trials] == [1.0]


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_signals_to_all_processes_of_a_job(method: StartMethod) -> None:
    """They end a trial's pool, but not the trial, which has its grace period."""

    def objective(trial: optuna.Trial) -> float:
        import multiprocessing

        trial.suggest_float("x", 0, 1)
        context = multiprocessing.get_context("fork")
        child = context.Process(target=time.sleep, args=(600,))
        child.start()
        worker = psutil.Process(trial.study.user_attrs["worker"])
        pids = {worker.pid, os.getpid(), os.getppid(), child.pid}
        pids |= {each.pid for each in worker.children(recursive=True)}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(pid, signal.SIGTERM)
        child.join()
        assert child.exitcode == -signal.SIGTERM
        trial.set_user_attr("survived", True)
        raise RuntimeError("A worker of the pool was killed.")

    study = make_study("plain")
    study.set_user_attr("worker", os.getpid())
    with preemptible(study):
        study.optimize(isolated(objective, start_method=method, grace_period=60), n_trials=5)
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]
    assert read_record(study.trials[0]).outcome == "preempted"


SCRIPT = """
    import sys, time
    from pathlib import Path
    import optuna
    from optuna_quota import Quota, QuotaSampler, isolated, preemptible

    folder = Path(sys.argv[1])

    def objective(trial):
        trial.suggest_float("x", 0, 1)
        (folder / f"begun-{trial.number}").touch()
        if trial.number < 2:
            time.sleep(600)
        return 1.0

    study = optuna.create_study(
        storage=f"sqlite:///{folder}/study.db", study_name="s", load_if_exists=True,
        sampler=QuotaSampler(quota=Quota(n_trials=20)),
    )
    with preemptible(study):
        study.optimize(isolated(objective), n_trials=int(sys.argv[2]), n_jobs=2)
    sys.exit(3)
"""


@pytest.mark.slow
def test_a_job_that_is_preempted_and_started_again(tmp_path: Path) -> None:
    script = tmp_path / "tune.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def start(n_trials: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(n_trials)],
            stderr=subprocess.DEVNULL,
        )

    worker = start(9)
    try:
        until(lambda: all((tmp_path / f"begun-{n}").exists() for n in (0, 1)))
        worker.terminate()
        assert worker.wait(timeout=120) == 3
    finally:
        worker.kill()
        worker.wait()
    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.load_study(study_name="s", storage=storage)
    waiting = [TrialState.WAITING] * 2
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.FAIL, *waiting]
    assert start(2).wait(timeout=120) == 3
    trials = study.trials
    assert [t.state for t in trials[2:]] == [TrialState.COMPLETE] * 2
    by_number = {t.user_attrs["quota:retry_of"]: t.params for t in trials[2:]}
    assert by_number == {0: trials[0].params, 1: trials[1].params}
