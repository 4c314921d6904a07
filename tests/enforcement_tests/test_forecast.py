"""Forecasts stop no trial that fits, and one that does not fit well before its limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
import random
import time

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota._enforcement.forecast import (
    completed_trials,
    CompletedTrials,
    forecast_breach,
    PaceProfile,
)
from optuna_quota._records import read_record


def pace(*durations: float) -> list[tuple[int, float]]:
    return [(step, sum(durations[: step + 1])) for step in range(len(durations))]


WALL = {"wall_time": (100.0, False)}


@pytest.mark.parametrize(
    ("steps", "last_step", "stopped"),
    [
        (pace(*[2.0] * 30), 99, True),
        (pace(*[0.9] * 30), 99, False),
        (pace(*[2.0] * 5), 99, False),
        (pace(*[2.0] * 30), None, False),
        (pace(*[3.0] * 15, *[0.3] * 15), 99, False),
        (pace(*[0.1, 4.0] * 15), 99, False),
        (pace(*[2.0] * 30), 29, False),
    ],
    ids=["too slow", "in time", "too early", "no end known", "speeds up", "irregular", "done"],
)
def test_forecast_of_time(
    steps: list[tuple[int, float]], last_step: int | None, stopped: bool
) -> None:
    elapsed = steps[-1][1]
    breach = forecast_breach(WALL, elapsed, steps=steps, completed=CompletedTrials(last_step))
    assert (breach is not None) is stopped
    if breach is not None:
        assert breach.forecast and breach.observed > breach.limit > elapsed
        assert "heading for" in breach.reason


MEMORY = {"memory": (1000.0, False)}


def test_forecast_of_memory() -> None:
    steps = pace(*[1.0] * 40)
    rising = [(float(t), 15.0 * t) for t in range(40)]
    level = [(float(t), min(15.0 * t, 300.0)) for t in range(40)]
    breach = forecast_breach(
        MEMORY, 40.0, steps=steps, completed=CompletedTrials(99), memory=rising
    )
    assert breach is not None and breach.resource == "memory" and breach.forecast
    assert (
        forecast_breach(MEMORY, 40.0, steps=steps, completed=CompletedTrials(99), memory=level)
        is None
    )
    assert (
        forecast_breach(MEMORY, 40.0, steps=steps, completed=CompletedTrials(45), memory=rising)
        is None
    )
    # Without a known end only a trial that is almost there is stopped.
    assert forecast_breach(MEMORY, 40.0, memory=rising) is None
    near = [(float(t), 23.0 * t) for t in range(40)]
    assert forecast_breach(MEMORY, 40.0, memory=near) is not None


def stopped_at(
    durations: Sequence[float], limit: float, earlier: CompletedTrials, names: str = "wall_time"
) -> float | None:
    """Return the seconds after which a trial is stopped that reports once a step."""
    steps = pace(*durations)
    for i, (_, elapsed) in enumerate(steps):
        ceilings = {names: (limit, False)}
        if forecast_breach(ceilings, elapsed, steps=steps[: i + 1], completed=earlier):
            return elapsed
    return None


def after(*trials: Sequence[float], known: bool = True) -> CompletedTrials:
    """Return what is known after trials of these steps, with or without the steps themselves."""
    profiles = tuple(PaceProfile(pace(*durations)) for durations in trials)
    longest = max(sum(durations) for durations in trials)
    return CompletedTrials(len(trials[0]) - 1, longest, None, profiles if known else ())


def jittered(durations: Sequence[float], seed: int, size: float = 0.2) -> list[float]:
    generator = random.Random(seed)
    return [d * math.exp(generator.gauss(0, size)) for d in durations]


WARM_UP = [0.1] * 10 + [0.02] * 30
LONG_WARM_UP = [0.1] * 20 + [0.02] * 20
FAST = [0.02] * 40
COMPILES_ONCE = [1.2] + [0.02] * 39
COOLS_DOWN = [0.02] * 30 + [0.1] * 10
VALIDATES = ([0.02] * 4 + [0.2]) * 8
RECOMPILES = ([0.1] * 5 + [0.02] * 15) * 2
SLOWS_AND_RECOVERS = [0.02] * 10 + [0.1] * 10 + [0.02] * 20
SPEEDS_UP_SLOWLY = [0.1 * 0.93**i for i in range(40)]
EARLIER = {
    "alike": lambda fits: after(fits, fits, fits),
    "alike, before this process": lambda fits: after(fits, fits, fits, known=False),
    "fast": lambda fits: after(FAST, FAST, FAST),
    "warmed up": lambda fits: after(WARM_UP, WARM_UP, WARM_UP),
    "mixed": lambda fits: after(FAST, WARM_UP, COOLS_DOWN),
}


@pytest.mark.parametrize("before", EARLIER)
@pytest.mark.parametrize(
    "fits",
    [
        WARM_UP,
        FAST,
        COMPILES_ONCE,
        COOLS_DOWN,
        VALIDATES,
        RECOMPILES,
        SLOWS_AND_RECOVERS,
        SPEEDS_UP_SLOWLY,
    ],
    ids=[
        "warm-up",
        "fast",
        "compiles once",
        "cools down",
        "validates",
        "recompiles",
        "slows and recovers",
        "speeds up slowly",
    ],
)
def test_no_trial_that_fits_is_stopped(
    fits: list[float], before: Callable[[list[float]], CompletedTrials]
) -> None:
    earlier = EARLIER[before](fits)  # type: ignore[index]
    for seed in range(20):
        durations = jittered(fits, seed)
        assert sum(durations) < 2.9
        assert stopped_at(durations, 3.0, earlier) is None, seed


def test_a_warm_up_longer_than_before_is_tolerated() -> None:
    earlier = after(WARM_UP, WARM_UP, WARM_UP)
    assert all(stopped_at(jittered(LONG_WARM_UP, s), 3.0, earlier) is None for s in range(30))


@pytest.mark.parametrize(
    ("durations", "before", "at_most"),
    [
        ([0.2] * 40, FAST, 0.65),
        ([0.2] * 40, WARM_UP, 0.75),
        ([0.1] * 40, WARM_UP, 0.95),
        ([0.2] * 5 + [0.1] * 35, WARM_UP, 0.85),
        ([0.2] * 4 + [0.3] + ([0.2] * 4 + [0.3]) * 7, VALIDATES, 0.7),
        ([0.02] * 10 + [0.15] * 30, FAST, 0.99),
    ],
    ids=["steady", "after warm-ups", "slightly", "warms up", "validates", "slows down"],
)
def test_a_trial_that_does_not_fit_is_stopped_before_its_limit(
    durations: list[float], before: list[float], at_most: float
) -> None:
    for seed in range(10):
        at = stopped_at(jittered(durations, seed, 0.05), 3.0, after(before, before, before))
        assert at is not None and at <= at_most * 3.0, seed


def test_speed_up() -> None:
    fast, warmed_up = PaceProfile(pace(*FAST)), PaceProfile(pace(*WARM_UP))
    assert fast.speed_up(5) == pytest.approx(1.0)
    assert warmed_up.speed_up(5) == pytest.approx(5.0)
    assert warmed_up.speed_up(18) == pytest.approx(5.0)
    assert warmed_up.speed_up(38) < 2.0
    assert warmed_up.speed_up(1000) == 1.0
    assert PaceProfile(pace(*COOLS_DOWN)).speed_up(5) == pytest.approx(1.0)
    assert PaceProfile([(0, 1.0)]).speed_up(5) == PaceProfile([]).speed_up(5) == 1.0
    assert PaceProfile(pace(*[0.1] * 5, *[0.0] * 5)).speed_up(0) >= 1.0


def of_memory(course: Callable[[float], float], until: int = 100, usual: float | None = None):  # type: ignore[no-untyped-def]
    """Return the memory at which a trial of 100 s is stopped, with a limit of 1,000."""
    earlier = CompletedTrials(99, None, usual)
    for now in range(20, until):
        memory = [(float(t), course(float(t))) for t in range(now + 1)]
        if forecast_breach(
            MEMORY, now, steps=pace(*[1.0] * (now + 1)), completed=earlier, memory=memory
        ):
            return memory[-1][1]
    return None


@pytest.mark.parametrize(
    "course",
    [
        lambda t: 900 * (1 - math.exp(-t / 20)),
        lambda t: 900 * (1 - math.exp(-t / 40)),
        lambda t: 90 * math.sqrt(t),
        lambda t: 200 * math.log1p(t),
        lambda t: min(20 * t, 840),
        lambda t: 100 * min(t // 10, 8),
        lambda t: 500 + 300 * (int(t) % 10) / 10,
        lambda t: 9 * t,
    ],
    ids=["saturates", "slowly", "root", "log", "fills a cache", "jumps", "saw tooth", "leaks"],
)
def test_memory_that_stays_within_the_limit_stops_nothing(
    course: Callable[[float], float],
) -> None:
    assert max(course(float(t)) for t in range(100)) < 950
    # A cache that fills up is distinguished from a leak by trials that completed with one.
    usual = 850 if course(50.0) == 840 else None
    assert of_memory(course, usual=usual) is None


@pytest.mark.parametrize(("slope", "at_most"), [(20.0, 600), (15.0, 600), (40.0, 900)])
def test_a_leak_is_stopped_before_the_limit(slope: float, at_most: float) -> None:
    found = of_memory(lambda t: slope * t, usual=150)
    assert found is not None and found <= at_most


def test_growth_up_to_the_peak_of_completed_trials_is_ignored() -> None:
    found = of_memory(lambda t: 20.0 * t, usual=700)
    assert found is not None and found > 700


def test_completed_trials() -> None:
    study = optuna.create_study()

    def objective(trial: optuna.Trial) -> float:
        for step in range(trial.number + 5):
            trial.report(0.0, step)
        trial.set_user_attr("quota:wall_time", 10 - trial.number)
        return 0.0

    study.optimize(objective, n_trials=2)
    assert completed_trials(study) == CompletedTrials()
    study.optimize(objective, n_trials=1)
    assert completed_trials(study) == CompletedTrials(last_step=4, longest=10)


@pytest.mark.slow
def test_isolated_trials_that_warm_up_complete() -> None:
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        for step in range(40):
            time.sleep(0.1 if step < 10 else 0.02)
            trial.report(x, step)
        return x

    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=50)),
        pruner=QuotaPruner(limits=Limits(wall_time="3s")),
    )
    study.optimize(isolated(objective, predictive_stop=True), n_trials=5)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 5


@pytest.mark.slow
def test_an_isolated_trial_that_is_too_slow_is_stopped_early() -> None:
    def objective(trial: optuna.Trial) -> float:
        slow = trial.suggest_categorical("slow", [False, True])
        for step in range(40):
            time.sleep(0.25 if slow else 0.05 if step < 5 else 0.01)
            trial.report(0.0, step)
        return 0.0

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time="6s")))
    for slow in (False, False, False, True):
        study.enqueue_trial({"slow": slow})
    study.optimize(isolated(objective, predictive_stop=True), n_trials=4)
    record = read_record(study.trials[-1])
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.forecast
    assert record.usage.wall_time is not None and record.usage.wall_time < 5.5
