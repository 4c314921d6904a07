"""`interrupt=True`: interrupt a trial in the main thread that never checks."""

from __future__ import annotations

import signal
import threading
import time

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from optuna_quota import _optuna, Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota._records import read_record


pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGURG"), reason="no SIGURG on this system")

LONG = 30.0


def new_study(*, interrupt: bool = True, wall_time: float = 0.15) -> optuna.Study:
    return optuna.create_study(
        sampler=QuotaSampler(RandomSampler(seed=0), quota=Quota(n_trials=9)),
        pruner=QuotaPruner(limits=Limits(wall_time=wall_time), interrupt=interrupt),
    )


def sleeps(trial: optuna.Trial) -> float:
    time.sleep(LONG)
    return 0.0


def computes(trial: optuna.Trial) -> float:
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        sum(range(1000))
    return 0.0


def waits_for_a_lock(trial: optuna.Trial) -> float:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=LONG)
    return 0.0


@pytest.mark.parametrize("objective", [sleeps, computes, waits_for_a_lock])
def test_it_interrupts(objective) -> None:  # type: ignore[no-untyped-def]
    study = new_study()
    before = signal.getsignal(signal.SIGURG)
    started = time.monotonic()
    study.optimize(objective, n_trials=2)
    assert time.monotonic() - started < LONG
    assert signal.getsignal(signal.SIGURG) == before
    for trial in study.trials:
        record = read_record(trial)
        assert trial.state == TrialState.PRUNED
        assert record.outcome == "terminated"
        assert record.breach is not None and record.breach.resource == "wall_time"


def test_it_does_not_interrupt_optuna_itself() -> None:
    study = new_study(wall_time=0.01)

    def suggests(trial: optuna.Trial) -> float:
        total = 0.0
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            total += trial.suggest_float("x", 0, 1) + sum(range(3000))
            trial.set_user_attr("total", total)
        return total

    study.optimize(suggests, n_trials=3)
    assert [t.state for t in study.trials] == [TrialState.PRUNED] * 3
    assert {read_record(t).outcome for t in study.trials} == {"terminated"}


def test_by_default_nothing_is_interrupted() -> None:
    study = new_study(interrupt=False, wall_time=0.05)

    def short(trial: optuna.Trial) -> float:
        time.sleep(0.2)
        return 0.0

    study.optimize(short, n_trials=1)
    record = read_record(study.trials[0])
    assert record.outcome == "completed"
    assert record.breach is not None
    assert record.reason is not None and "before it could be stopped" in record.reason
    assert _optuna.constraints_of(study.trials[0])["0"] > 0


def test_trials_in_other_threads_are_not_interrupted() -> None:
    study = new_study(wall_time=0.05)

    def short(trial: optuna.Trial) -> float:
        time.sleep(0.2)
        return 0.0

    thread = threading.Thread(target=study.optimize, args=(short,), kwargs={"n_trials": 1})
    thread.start()
    thread.join()
    assert study.trials[0].state == TrialState.COMPLETE
