"""A worker that gets a signal saves its trials, whose objectives check for it."""

from __future__ import annotations

from collections.abc import Callable
import multiprocessing
import os
from pathlib import Path
import signal
import threading
import time
from typing import Any

import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
import pytest

from optuna_quota import (
    check,
    LimitBreached,
    Limits,
    preemptible,
    Quota,
    QuotaPruner,
    QuotaSampler,
    TrialPreempted,
)
from optuna_quota._records import read_record
from tests.waiting import until


pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs POSIX signals")


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def objective_that_prunes(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    if trial.number == 1:
        send()
    trial.report(x, 0)
    if trial.should_prune():
        raise optuna.TrialPruned
    return x


def objective_that_checks(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    if trial.number == 1:
        send(signal.SIGUSR1)
    check(trial)
    return x


def test_an_objective_in_the_place_of_the_study_is_an_error_at_once() -> None:
    study = optuna.create_study()
    for given in (objective_that_checks, "study", None):
        with pytest.raises(
            TypeError, match=r"`study` must be a study .*`with preemptible\(study\)"
        ):
            study.optimize(preemptible(given), n_trials=2)  # type: ignore[arg-type]
    assert not study.trials


@pytest.mark.parametrize("signals", [signal.SIGTERM, ("SIGTERM",), (signal.SIGKILL,), (999,)])
def test_what_is_no_signal_to_handle_is_an_error_at_once(signals: Any) -> None:
    with pytest.raises(ValueError, match="`signals` must be .* but got"):
        preemptible(optuna.create_study(), signals)
    with pytest.raises(TypeError, match="`requeue` must be True or False but got 3"):
        preemptible(optuna.create_study(), requeue=3)  # type: ignore[arg-type]


def make_study(kind: str, storage: InMemoryStorage | None = None) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler(seed=1)
    if kind == "plain":
        return optuna.create_study(storage=storage, sampler=sampler)
    return optuna.create_study(
        storage=storage,
        sampler=QuotaSampler(sampler, quota=Quota(n_trials=9)),
        pruner=QuotaPruner(limits=Limits(wall_time="1h")),
    )


@pytest.mark.parametrize("kind", ["plain", "quota"])
@pytest.mark.parametrize("objective", [objective_that_prunes, objective_that_checks])
def test_a_preempted_trial_runs_again(
    kind: str, objective: Callable[[optuna.Trial], float]
) -> None:
    study = make_study(kind)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    pruner = study.pruner
    with preemptible(study):
        study.optimize(objective, n_trials=5)
        study.optimize(objective, n_trials=5)  # starts nothing
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    assert study.pruner is pruner
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "WAITING"]
    ended, retry = study.trials[1:]
    assert read_record(ended).outcome == "preempted"
    assert "SIG" in (read_record(ended).reason or "")
    assert retry.user_attrs["quota:retry_of"] == 1
    study.optimize(objective, n_trials=2)
    assert [t.state.name for t in study.trials[2:]] == ["COMPLETE", "COMPLETE"]
    assert study.trials[2].params == ended.params
    assert study.trials[2].user_attrs["quota:retry_of"] == 1


def test_all_trials_of_several_threads_end() -> None:
    running = threading.Barrier(3, timeout=60)

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        running.wait()
        if trial.number == 0:
            send()
        until(trial.should_prune)
        raise optuna.TrialPruned

    study = optuna.create_study()
    with preemptible(study):
        study.optimize(objective, n_trials=9, n_jobs=3)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL] * 3 + [TrialState.WAITING] * 3
    again = [trial.user_attrs["quota:retry_of"] for trial in study.trials[3:]]
    assert sorted(again) == [0, 1, 2]


def test_without_requeue() -> None:
    study = make_study("quota")
    with preemptible(study, requeue=False):
        study.optimize(objective_that_prunes, n_trials=5)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL"]


def test_a_trial_that_returns_a_value_is_completed() -> None:
    def objective(trial: optuna.Trial) -> float:
        send()
        return trial.suggest_float("x", 0, 1)

    study = make_study("quota")
    with preemptible(study):
        study.optimize(objective, n_trials=5)
    assert [t.state.name for t in study.trials] == ["COMPLETE"]


def test_the_base_pruner_still_prunes() -> None:
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0.5))

    def objective(trial: optuna.Trial) -> float:
        trial.report(1.0, 0)
        if trial.should_prune():
            raise optuna.TrialPruned
        return 1.0

    with preemptible(study):
        study.optimize(objective, n_trials=1)
    assert study.trials[0].state == TrialState.PRUNED


def test_a_second_signal_ends_a_trial_that_does_not_check() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        send()
        time.sleep(0.2)  # two signals at once count as one
        send()
        raise AssertionError("It went on.")

    study = make_study("quota")
    with preemptible(study):
        study.optimize(objective, n_trials=5)
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]
    assert read_record(study.trials[0]).outcome == "preempted"


def test_no_trial_starts_after_a_signal_before_optimize() -> None:
    study = make_study("plain")
    with preemptible(study):
        send()
        study.optimize(objective_that_checks, n_trials=5)
    assert study.trials == []
    study.optimize(objective_that_checks, n_trials=1)
    assert len(study.trials) == 1


def test_a_block_within_another(tmp_path: Path) -> None:
    study = make_study("plain")

    def objective(trial: optuna.Trial) -> float:
        assert "quota:checkpoint" in trial.user_attrs
        return trial.suggest_float("x", 0, 1)

    with preemptible(study, checkpoints=tmp_path):
        with preemptible(study):
            study.optimize(objective_that_checks, n_trials=1)
        study.optimize(objective, n_trials=1)
        with preemptible(study):
            send()
        study.optimize(objective, n_trials=1)  # starts nothing
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE"]
    study.optimize(objective_that_prunes, n_trials=1)
    assert len(study.trials) == 3


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="needs real-time signals")
def test_a_signal_without_a_name() -> None:
    number = signal.SIGRTMIN + 3

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        send(number)
        check(trial)
        return 0.0

    study = make_study("plain")
    with preemptible(study, signals=[number]):
        study.optimize(objective, n_trials=5)
    assert f"signal {number}" in (read_record(study.trials[0]).reason or "")


def test_a_process_that_an_objective_forks_ends_on_the_signal() -> None:
    def objective(trial: optuna.Trial) -> float:
        context = multiprocessing.get_context("fork")
        begun = context.Event()
        child = context.Process(target=lambda: (begun.set(), time.sleep(600)))
        child.start()
        try:
            assert begun.wait(60)
            child.terminate()
            child.join(60)
            return float(child.exitcode or 0)
        finally:
            child.kill()
            child.join()

    study = make_study("plain")
    with preemptible(study), preemptible(study):
        study.optimize(objective, n_trials=1)
    assert study.trials[0].value == -signal.SIGTERM


def test_ask_and_tell() -> None:
    study = make_study("plain")
    with preemptible(study):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        send()
        until(lambda: isinstance(_raised_by(trial), TrialPreempted))
        study.tell(trial, state=TrialState.PRUNED)
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]


def _raised_by(trial: optuna.Trial) -> BaseException | None:
    try:
        check(trial)
    except LimitBreached as error:
        return error
    return None


def test_a_trial_that_was_finished_from_outside_is_not_enqueued() -> None:
    study = make_study("plain")

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        send()
        check(trial)
        return 0.0

    with preemptible(study):
        study.optimize(objective, n_trials=5)
    assert [t.state.name for t in study.trials] == ["FAIL"]


def test_checkpoints_are_shared_with_retries_and_deleted_at_the_end(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="a study: 1/2")
    seen = []

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        folder = Path(trial.user_attrs["quota:checkpoint"])
        seen.append((folder, [path.name for path in folder.iterdir()]))
        (folder / str(trial.number)).touch()
        if trial.number < 2:
            send()
        check(trial)
        return x

    for _ in range(3):
        with preemptible(study, checkpoints=tmp_path):
            study.optimize(objective, n_trials=1)
    assert [t.state.name for t in study.trials] == ["FAIL", "FAIL", "COMPLETE"]
    folder = seen[0][0]
    assert [entry[0] for entry in seen] == [folder] * 3
    assert [sorted(names) for _, names in seen] == [[], ["0"], ["0", "1"]]
    assert tmp_path in folder.parents
    assert not folder.exists()


def test_checkpoints_of_another_study_are_not_found(tmp_path: Path) -> None:
    found: list[Path] = []

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        folder = Path(trial.user_attrs["quota:checkpoint"])
        found.extend(folder.iterdir())
        (folder / "checkpoint").touch()
        send()
        check(trial)
        return 0.0

    # The first name again, as after an earlier study was deleted.
    for name in ("a_b", "a/b", "a:b", "a_b"):
        study = optuna.create_study(study_name=name)
        with preemptible(study, checkpoints=tmp_path):
            study.optimize(objective, n_trials=1)
        assert study.trials[0].state == TrialState.FAIL
    assert found == []
    assert len(list(tmp_path.iterdir())) == 3


def test_handlers_are_refused_outside_of_the_main_thread() -> None:
    errors: list[Exception] = []

    def run() -> None:
        try:
            with preemptible(make_study("plain")):
                pass
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


class FlakyStorage(InMemoryStorage):
    """Fails before a few calls of one method, or once after the call."""

    def __init__(self, method: str, *, lost_answer: bool) -> None:
        super().__init__()
        self.method = method
        self.lost_answer = lost_answer
        self.failures = 0

    def fail(self) -> None:
        """Fail from now on."""
        self.failures = 1 if self.lost_answer else 3

    def _call(self, method: str, *args: Any) -> Any:
        fails = method == self.method and self.failures > 0
        result = None
        if self.lost_answer or not fails:
            result = getattr(InMemoryStorage, method)(self, *args)
        if fails:
            self.failures -= 1
            raise ConnectionError("The server restarts.")
        return result

    def set_trial_state_values(self, *args: Any) -> Any:
        return self._call("set_trial_state_values", *args)

    def create_new_trial(self, *args: Any) -> Any:
        return self._call("create_new_trial", *args)


@pytest.mark.parametrize("kind", ["plain", "quota"])
@pytest.mark.parametrize("lost_answer", [False, True])
@pytest.mark.parametrize("method", ["set_trial_state_values", "create_new_trial"])
def test_a_storage_that_is_away_for_a_while(kind: str, method: str, lost_answer: bool) -> None:
    storage = FlakyStorage(method, lost_answer=lost_answer)
    study = make_study(kind, storage)

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        storage.fail()
        send()
        check(trial)
        return 0.0

    with preemptible(study):
        study.optimize(objective, n_trials=5)
    assert storage.failures == 0
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]
    assert study.trials[1].user_attrs["quota:retry_of"] == 0
    assert read_record(study.trials[0]).outcome == "preempted"


@pytest.mark.parametrize("lost_answer", [False, True])
def test_an_outage_that_outlasts_the_retries_of_a_storage(
    lost_answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study("quota")
    store = study._storage.set_trial_state_values
    failed = []

    def fail_once(*args: Any, **kwargs: Any) -> bool:
        if failed:
            return store(*args, **kwargs)
        failed.append(store(*args, **kwargs) if lost_answer else None)
        raise ConnectionError("The server restarts.")

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        # Above the retries: one that they did not help.
        monkeypatch.setattr(study._storage, "set_trial_state_values", fail_once)
        send()
        check(trial)
        return 0.0

    with preemptible(study):
        study.optimize(objective, n_trials=5)
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]
    assert study.trials[1].user_attrs["quota:retry_of"] == 0


def test_a_value_that_is_stored_although_the_answer_is_lost() -> None:
    storage = FlakyStorage("set_trial_state_values", lost_answer=True)
    study = make_study("plain", storage)

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        storage.fail()
        send()
        assert trial.should_prune()
        return x

    with preemptible(study):
        study.optimize(objective, n_trials=5)
    assert storage.failures == 0
    assert [t.state.name for t in study.trials] == ["COMPLETE"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore:Heartbeat")
def test_the_storage_s_heartbeat_does_not_retry_it_again(tmp_path: Path) -> None:
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{tmp_path / 'study.db'}", heartbeat_interval=1, grace_period=1
    )
    retry = getattr(optuna.storages, "RetryHeartbeatStaleTrialCallback", None)
    retry = retry or optuna.storages.RetryFailedTrialCallback
    for name in ("heartbeat_stale_trial_callback", "failed_trial_callback"):
        setattr(storage, name, retry())
    study = optuna.create_study(storage=storage)
    with preemptible(study):
        study.optimize(objective_that_checks, n_trials=5)
    time.sleep(2.5)
    optuna.storages.fail_stale_trials(study)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "WAITING"]
