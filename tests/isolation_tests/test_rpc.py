"""A trial is used by the processes that its objective starts, and within signal handlers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
import contextlib
from dataclasses import replace
import multiprocessing
import os
from pathlib import Path
import pickle
import signal
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import check, isolated, LimitBreached, Limits, QuotaPruner
from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.rpc import (
    connect,
    Listener,
    Proxy,
    RemoteObjects,
    RemoteTrial,
    RpcClient,
    TRIAL,
    TrialHandle,
)
from optuna_quota._records import read_record
from tests.isolation_tests.trials import MIB


optuna.logging.set_verbosity(optuna.logging.WARNING)

METHODS = [
    "fork",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver")),
]
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")


def optimize(objective: Callable[..., Any], **options: Any) -> optuna.trial.FrozenTrial:
    study = optuna.create_study(**options)
    study.optimize(isolated(objective), n_trials=1)
    return study.trials[0]


class CountingTrial(optuna.Trial):
    """A user's subclass with an additional method."""

    def mark(self, value: int) -> int:
        self.set_user_attr("marked", value)
        return value


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_method_of_a_subclass_runs_in_the_study(method: Any) -> None:
    study = optuna.create_study()
    asked = study.ask()
    trial = CountingTrial(study, asked._trial_id)
    run = isolated(lambda t: float(t.mark(5)), start_method=method)
    assert run(trial) == 5.0
    assert study.trials[0].user_attrs["marked"] == 5


class Activation:
    """As torch's modules and scikit-learn's estimators, equal to itself alone."""


ACTIVATIONS = [Activation(), Activation(), None]


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution:UserWarning")
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_choices_among_objects_are_the_same_in_each_trial(n_jobs: int) -> None:
    def objective(trial: optuna.Trial) -> float:
        chosen = trial.suggest_categorical("activation", ACTIVATIONS)  # type: ignore[arg-type]
        return float([chosen is activation for activation in ACTIVATIONS].index(True))

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler())
    study.optimize(isolated(objective), n_trials=8, n_jobs=n_jobs)
    places = [trial.value for trial in study.trials]
    assert len(places) == 8 and set(places) <= {0.0, 1.0, 2.0}
    assert len({trial.distributions["activation"].choices for trial in study.trials}) == 1


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution:UserWarning")
def test_a_choice_that_is_enqueued_or_fixed_is_itself() -> None:
    def objective(trial: optuna.Trial) -> float:
        return float(trial.suggest_categorical("width", np.array([8, 16])))  # type: ignore[arg-type]

    study = optuna.create_study()
    study.enqueue_trial({"width": 16})
    study.optimize(isolated(objective), n_trials=1)
    assert study.best_value == 16.0
    assert isolated(objective)(optuna.trial.FixedTrial({"width": 8})) == 8.0


def work_as_rank(trial: optuna.Trial, rank: int) -> None:
    """Make calls like a rank does: each is answered, whatever other ranks ask meanwhile."""
    x = trial.suggest_float("x", 0, 1)
    trial.set_user_attr(f"x of {rank}", x)
    for step in range(10):
        name = f"{rank}-{step}"
        n = trial.suggest_int(name, 0, 1000)
        assert trial.params[name] == n
        trial.report(n, 100 * rank + step)
        assert not trial.should_prune()
        trial.set_user_attr(name, n)
    check(trial)
    assert trial.study.study_name == trial.user_attrs["name"]


def run_ranks(trial: optuna.Trial, method: Any) -> float:
    context = multiprocessing.get_context(method)
    trial.set_user_attr("name", trial.study.study_name)
    ranks = [context.Process(target=work_as_rank, args=(trial, rank)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    work_as_rank(trial, 2)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return trial.suggest_float("x", 0, 1)


@POSIX
@pytest.mark.parametrize("method", METHODS)
def test_ranks_share_the_trial(method: str) -> None:
    trial = optimize(lambda trial: run_ranks(trial, method), pruner=optuna.pruners.NopPruner())
    assert trial.value == trial.params["x"]
    for rank in range(3):
        assert trial.user_attrs[f"x of {rank}"] == trial.value
        for step in range(10):
            n = trial.params[f"{rank}-{step}"]
            assert trial.user_attrs[f"{rank}-{step}"] == n
            assert trial.intermediate_values[100 * rank + step] == n


def square(trial: optuna.Trial, name: str) -> float:
    return trial.suggest_float(name, 0, 1) ** 2


@POSIX
@pytest.mark.slow
def test_workers_of_a_pool_get_the_trial_with_each_task() -> None:
    def objective(trial: optuna.Trial) -> float:
        names = [f"x{i}" for i in range(8)]
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            return sum(pool.map(square, 8 * [trial], names))

    trial = optimize(objective)
    assert trial.value == pytest.approx(sum(x**2 for x in trial.params.values()))
    assert len(trial.params) == 8


@POSIX
def test_a_forked_process_has_its_own_connection() -> None:
    """Otherwise answers to the two processes would be mixed up."""

    def objective(trial: optuna.Trial) -> float:
        pid = os.fork()
        for _ in range(200):
            trial.set_user_attr(str(pid == 0), True)
            assert trial.suggest_int(f"n {pid == 0}", 0, 9) == trial.params[f"n {pid == 0}"]
        if pid == 0:
            os._exit(0)
        return float(os.waitpid(pid, 0)[1])

    trial = optimize(objective)
    assert trial.value == 0
    assert set(trial.params) == {"n True", "n False"}


def prune_in_rank(trial: optuna.Trial, results: Any) -> None:
    trial.report(1, 0)
    results.put(trial.should_prune())


@POSIX
def test_a_rank_learns_that_the_trial_is_to_be_pruned() -> None:
    def objective(trial: optuna.Trial) -> float:
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        rank = context.Process(target=prune_in_rank, args=(trial, results))
        rank.start()
        if results.get():
            raise optuna.TrialPruned
        return 0.0

    threshold = optuna.pruners.ThresholdPruner(upper=0.5)
    trial = optimize(objective, pruner=QuotaPruner(threshold, limits=Limits(memory="1GiB")))
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {0: 1}


def fill_memory(trial: optuna.Trial, folder: str) -> None:
    held = b"x" * (200 * MIB)
    try:
        while True:
            check(trial)
    except LimitBreached as error:
        Path(folder, "breach").write_text(f"{error.resource} {len(held)}")


@POSIX
@pytest.mark.slow
def test_a_rank_that_takes_too_much_memory_ends_the_trial(tmp_path: Path) -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1:
            return 0.0
        context = multiprocessing.get_context("forkserver")
        rank = context.Process(target=fill_memory, args=(trial, str(tmp_path)))
        rank.start()
        rank.join()
        return 1.0

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(memory=150 * MIB)))
    study.optimize(isolated(objective, grace_period=0), n_trials=2)
    record = read_record(study.trials[0])
    assert record.breach is not None and record.breach.resource == "memory"
    assert [t.state for t in study.trials] == [TrialState.PRUNED, TrialState.COMPLETE]


def test_a_proxy_in_the_studys_process_is_the_object_itself() -> None:
    """``study.tell(trial, …)`` and the like get the trial, and make no call to themselves."""
    trial = optuna.create_study().ask()
    with contextlib.closing(RemoteObjects(trial)) as remote:
        calls = RpcClient(remote.listener.address)
        handle = TrialHandle(TRIAL, optuna.Trial, trial.number, None, None, None)
        proxy = Proxy(calls, remote.handle(trial.study))
        assert pickle.loads(pickle.dumps(RemoteTrial(calls, handle))) is trial
        assert pickle.loads(pickle.dumps(proxy)) is trial.study
    assert type(pickle.loads(pickle.dumps(proxy))) is Proxy


def test_a_proxy_that_is_handed_on_passes_for_the_same_class() -> None:
    """Where trials are nested, a trial's process hands on what it has of the study's."""
    study = optuna.create_study()
    with (
        contextlib.closing(RemoteObjects(study.ask())) as outer,
        contextlib.closing(RemoteObjects(study.ask())) as inner,
    ):
        proxy = Proxy(RpcClient(outer.listener.address), outer.handle(study))
        assert isinstance(
            Proxy(RpcClient(inner.listener.address), inner.handle(proxy)), optuna.Study
        )


@POSIX
def test_a_signal_handler_may_call_the_trial_within_a_call() -> None:
    def objective(trial: optuna.Trial) -> float:
        calls = 0

        def handle(*_: Any) -> None:
            nonlocal calls
            calls += 1
            trial.set_user_attr("handler", calls)
            assert trial.user_attrs["handler"] == calls
            signal.setitimer(signal.ITIMER_REAL, 0.001)

        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        n = 0
        while calls < 100:
            n += 1
            trial.set_user_attr("objective", n)
            assert trial.user_attrs["objective"] == n
        signal.setitimer(signal.ITIMER_REAL, 0)
        return float(calls)

    trial = optimize(objective)
    assert trial.value is not None and trial.value >= 100


# Connections of the processes that a trial starts.


def accept(listener: Listener) -> Channel:
    new = listener.accept()
    assert new is not None
    return new


def test_a_message_that_a_signal_handler_cuts_off_leaves_the_next_ones_whole() -> None:
    def objective(trial: optuna.Trial) -> float:
        def time_out(*_: object) -> None:
            raise TimeoutError

        signal.signal(signal.SIGALRM, time_out)
        for step in range(40):
            with contextlib.suppress(TimeoutError):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0005 * (step + 1))
                    trial.set_user_attr("large", "x" * 8_000_000)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            trial.report(float(step), step)
        trial.set_user_attr("large", "")
        return 1.0

    study = optuna.create_study()
    study.optimize(isolated(objective, limits=Limits(wall_time="60s")), n_trials=1)
    (trial,) = study.trials
    assert trial.state == TrialState.COMPLETE
    assert list(trial.intermediate_values) == list(range(40))
    assert trial.user_attrs["large"] == ""


def test_a_connection_needs_the_key() -> None:
    with contextlib.closing(Listener()) as listener:
        assert listener.accept() is None
        with contextlib.closing(connect(listener.address)) as theirs:
            theirs.send("hello")
            with contextlib.closing(accept(listener)) as ours:
                assert ours.receive() == "hello"
                ours.send("hello")
                assert theirs.receive() == "hello"
        for key in (b"", b"x", b"x" * 32, listener.address.key[:-1]):
            with contextlib.closing(connect(replace(listener.address, key=key))) as stranger:
                with contextlib.closing(accept(listener)) as ours:
                    if key:
                        stranger.send("hello" * 10)
                    else:
                        stranger.close()
                    with pytest.raises(EOFError):
                        ours.receive()
                    assert list(ours.drain()) == []
                if key:
                    with pytest.raises((EOFError, ConnectionError)):
                        stranger.receive()


def test_a_connection_without_the_whole_key_is_not_waited_for() -> None:
    with contextlib.closing(Listener()) as listener:
        half = replace(listener.address, key=listener.address.key[:16])
        with contextlib.closing(connect(half)), contextlib.closing(accept(listener)) as ours:
            assert list(ours.arrived()) == []
            assert list(ours.drain()) == []


def test_the_key_is_not_shown() -> None:
    with contextlib.closing(Listener()) as listener:
        assert "key" not in repr(listener.address)


def test_after_the_trial_there_is_no_connection() -> None:
    listener = Listener()
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        connect(listener.address)
