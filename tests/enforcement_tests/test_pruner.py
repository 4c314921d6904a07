"""QuotaPruner prunes at a breach, else as its base pruner; with interrupts and QuotaSampler."""

from __future__ import annotations

from collections.abc import Callable
import copy
import gc
import inspect
import pickle
import signal
import threading
import time

import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from optuna_quota import _optuna, Limits, Quota, QuotaPruner, QuotaSampler, Usage
from optuna_quota._metering import key_of, metering_loop, TrialMonitor
from optuna_quota._records import read_record


# Without memory: QuotaSampler would collect garbage after each pruned trial, 0.3 s under pytest.
ROOM = Limits(wall_time="1h", cpu_time="1h")
NONE = Limits(wall_time=1e-6)


def curve(trial: optuna.Trial) -> float:
    level = trial.suggest_float("level", 0, 1)
    for step in range(12):
        trial.report(level * (1 + abs(step - 3)), step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return level


def checks_once(trial: optuna.Trial) -> float:
    if trial.should_prune():
        raise optuna.TrialPruned
    return 0.0


def alone(pruner: BasePruner) -> optuna.Study:
    return optuna.create_study(
        study_name="by which brackets go", sampler=RandomSampler(seed=3), pruner=pruner
    )


def beside(pruner: BasePruner) -> optuna.Study:
    sampler = QuotaSampler(
        RandomSampler(seed=3), quota=Quota(n_trials=1000), footprint=Usage(wall_time=1)
    )
    return optuna.create_study(study_name="by which brackets go", sampler=sampler, pruner=pruner)


@pytest.mark.parametrize("make", [alone, beside])
@pytest.mark.parametrize("base", [None, NopPruner(), MedianPruner(), HyperbandPruner()])
def test_a_breach_prunes_whatever_was_reported(
    make: Callable[[BasePruner], optuna.Study], base: BasePruner | None
) -> None:
    study = make(QuotaPruner(base, limits=NONE))
    study.optimize(checks_once, n_trials=2)
    study.optimize(curve, n_trials=2)
    for trial in study.trials:
        record = read_record(trial)
        assert trial.state == TrialState.PRUNED
        assert record.outcome == "terminated"
        assert record.breach is not None
        assert record.breach.resource == "wall_time"
        assert record.breach.observed > record.breach.limit == 1e-6
        assert record.reason and "Time limit" in record.reason
        assert record.usage.memory is not None and record.usage.wall_time is not None


@pytest.mark.parametrize("make", [alone, beside])
@pytest.mark.parametrize(
    "base",
    [
        lambda: MedianPruner(n_startup_trials=2),
        lambda: SuccessiveHalvingPruner(),
        lambda: PatientPruner(None, patience=4),
        lambda: HyperbandPruner(max_resource=12),
        lambda: HyperbandPruner(),
    ],
    ids=["Median", "SuccessiveHalving", "Patient", "Hyperband", "Hyperband, auto"],
)
def test_without_a_breach_it_prunes_as_the_base_pruner(
    make: Callable[[BasePruner], optuna.Study], base: Callable[[], BasePruner]
) -> None:
    def states(study: optuna.Study) -> list[tuple[TrialState, int]]:
        study.optimize(curve, n_trials=15)
        return [(t.state, len(t.intermediate_values)) for t in study.trials]

    wrapped, bare = make(QuotaPruner(base(), limits=ROOM)), make(base())
    assert states(wrapped) == states(bare)
    pruned = [t for t in wrapped.trials if t.state == TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        record = read_record(trial)
        name = type(base()).__name__
        assert record.outcome == "pruned"
        assert record.reason == f"{name} pruned it at step {trial.last_step}."


def test_without_a_base_pruner_it_never_prunes_by_itself() -> None:
    study = alone(QuotaPruner(limits=ROOM))
    study.optimize(curve, n_trials=10)
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}


def test_help_shows_its_arguments() -> None:
    assert list(inspect.signature(QuotaPruner).parameters) == [
        "base_pruner",
        "limits",
        "interrupt",
        "meters",
    ]


def test_it_is_a_hyperband_pruner_if_its_base_is() -> None:
    assert isinstance(QuotaPruner(HyperbandPruner(), limits=ROOM), HyperbandPruner)
    assert isinstance(QuotaPruner(HyperbandPruner(), limits=ROOM), QuotaPruner)
    assert not isinstance(QuotaPruner(MedianPruner(), limits=ROOM), HyperbandPruner)


@pytest.mark.parametrize("base", [None, MedianPruner(), HyperbandPruner(max_resource=12)])
@pytest.mark.parametrize(
    "remake", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_it_can_be_copied_and_pickled_after_use(base, remake) -> None:  # type: ignore[no-untyped-def]
    pruner = QuotaPruner(base, limits=ROOM)
    alone(pruner).optimize(curve, n_trials=3)
    again = remake(pruner)
    assert type(again) is type(pruner)
    assert again.limits == pruner.limits
    study = alone(again)
    study.optimize(curve, n_trials=10)
    assert len(study.trials) == 10


def test_alone_it_records_usage_when_it_is_called() -> None:
    study = alone(QuotaPruner(limits=ROOM))
    kept = []

    def grows(trial: optuna.Trial) -> float:
        for step in range(3):
            kept.append(bytearray(b"x" * 40_000_000))
            trial.report(0.0, step)
            assert not trial.should_prune()
        kept.clear()
        return 0.0

    study.optimize(grows, n_trials=1)
    record = read_record(study.trials[0])
    assert record.usage.memory is not None and record.usage.memory > 120_000_000
    assert record.usage.wall_time is not None and record.usage.wall_time > 0
    assert record.outcome is None
    assert record.isolation == "thread"


def test_alone_it_counts_time_from_the_start_of_the_trial() -> None:
    study = alone(QuotaPruner(limits=Limits(wall_time=0.05)))

    def late(trial: optuna.Trial) -> float:
        time.sleep(0.1)
        return checks_once(trial)

    study.optimize(late, n_trials=1)
    record = read_record(study.trials[0])
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "wall_time"
    assert record.breach.observed >= 0.1


def test_alone_it_closes_monitors_of_trials_that_ended() -> None:
    study = alone(QuotaPruner(limits=ROOM))
    study.optimize(checks_once, n_trials=100)
    gc.collect()
    assert sum(metering_loop().find(key_of(study, t)) is not None for t in study.trials) <= 1
    assert len(metering_loop()._monitors) <= 1
    keys = {key_of(study, trial) for trial in study.trials}
    alive = [each for each in gc.get_objects() if type(each) is TrialMonitor and each.key in keys]
    assert len(alive) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_pruner": "median", "limits": ROOM}, "`base_pruner`"),
        ({"limits": {"memory": 1}}, "`limits`"),
        ({"interrupt": 5}, "`interrupt` must be True or False but got 5"),
        ({"meters": 5}, "`meters` must be a sequence of meters but got 5"),
        ({"base_pruner": ROOM}, r"Pass it as `limits=Limits\(…\)`"),
    ],
)
def test_invalid_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        QuotaPruner(**arguments)  # type: ignore[arg-type]


needs_sigurg = pytest.mark.skipif(not hasattr(signal, "SIGURG"), reason="no SIGURG on this system")

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


@needs_sigurg
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


@needs_sigurg
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


@needs_sigurg
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


@needs_sigurg
def test_trials_in_other_threads_are_not_interrupted() -> None:
    study = new_study(wall_time=0.05)

    def short(trial: optuna.Trial) -> float:
        time.sleep(0.2)
        return 0.0

    thread = threading.Thread(target=study.optimize, args=(short,), kwargs={"n_trials": 1})
    thread.start()
    thread.join()
    assert study.trials[0].state == TrialState.COMPLETE
