"""Studies with trials as this library records them, made without running any."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
import math
import random
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from optuna_quota import Limits, Quota, Usage
from optuna_quota._records import (
    amounts_object,
    Interval,
    record_attributes,
    RESERVATION,
    STUDY_LIMITS,
    STUDY_QUOTA,
    system_attributes,
    TrialRecord,
)
from optuna_quota._usage import Breach


MIB = 2**20
SPACE: dict[str, BaseDistribution] = {
    "width": IntDistribution(64, 4096, log=True),
    "layers": IntDistribution(1, 8),
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "optimizer": CategoricalDistribution(["sgd", "adam", "lbfgs"]),
}
LIMITS = Limits(memory="1GiB", wall_time="3min")
STATES = {
    "completed": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "terminated": TrialState.PRUNED,
    "rejected": TrialState.FAIL,
    "failed": TrialState.FAIL,
    "preempted": TrialState.FAIL,
}
BEGIN = datetime(2026, 11, 23, 9, 0, 0)


def empty_study(
    *,
    storage: Any = None,
    name: str | None = None,
    directions: tuple[str, ...] = ("minimize",),
    quota: Quota | None = None,
    limits: Limits | None = None,
) -> optuna.Study:
    study = optuna.create_study(storage=storage, study_name=name, directions=list(directions))
    if quota is not None:
        study.set_user_attr(STUDY_QUOTA, amounts_object(quota))
    if limits is not None:
        study.set_user_attr(STUDY_LIMITS, amounts_object(limits))
    return study


def add_row(
    study: optuna.Study,
    record: TrialRecord,
    *,
    params: Mapping[str, Any] | None = None,
    space: Mapping[str, BaseDistribution] | None = None,
    values: tuple[float, ...] = (0.5,),
    start: datetime = BEGIN,
    seconds: float | None = None,
    constraint: float | None = None,
    reservation: Mapping[str, Any] | None = None,
) -> None:
    state = STATES[record.outcome or "completed"]
    took = seconds if seconds is not None else record.usage.wall_time or 0.0
    given = dict(params or {})
    study.add_trial(
        FrozenTrial(
            number=-1,
            state=state,
            value=None,
            values=list(values) if state == TrialState.COMPLETE else None,
            datetime_start=start,
            datetime_complete=start + timedelta(seconds=took),
            params=given,
            distributions={k: (space or SPACE)[k] for k in given},
            user_attrs=record_attributes(record),
            system_attrs={
                **system_attributes(record),
                **({} if constraint is None else {"constraints": [constraint]}),
                **({} if reservation is None else {RESERVATION: dict(reservation)}),
            },
            intermediate_values={},
            trial_id=-1,
        )
    )


def made_study(n_trials: int, *, seed: int = 7, **kwargs: Any) -> optuna.Study:
    """Trials of a network whose memory grows with layers · width²: about a sixth breach 1 GiB."""
    kwargs.setdefault(
        "quota", Quota(wall_time=14.0 * n_trials, cpu_time=40.0 * n_trials, n_trials=2 * n_trials)
    )
    kwargs.setdefault("limits", LIMITS)
    study = empty_study(**kwargs)
    rng = random.Random(seed)
    clock = BEGIN
    for number in range(n_trials):
        params = _point(rng)
        record, value = _run(rng, params, number)
        start = clock
        clock = clock + timedelta(seconds=(record.usage.wall_time or 0.0) * 0.55 + 0.2)
        memory = record.usage.memory
        add_row(
            study,
            record,
            params=params,
            values=(value,) * len(study.directions),
            start=start,
            constraint=None if memory is None else memory / 2**30 - 1,
        )
    return study


def _point(rng: random.Random) -> dict[str, Any]:
    return {
        "width": round(math.exp(rng.uniform(math.log(64), math.log(4096)))),
        "layers": rng.randint(1, 8),
        "lr": math.exp(rng.uniform(math.log(1e-5), math.log(1e-1))),
        "optimizer": rng.choice(["sgd", "adam", "lbfgs"]),
    }


def _run(rng: random.Random, params: dict[str, Any], number: int) -> tuple[TrialRecord, float]:
    copies = {"sgd": 2, "adam": 4, "lbfgs": 7}[params["optimizer"]]
    memory = 310 * MIB + copies * 12.0 * params["layers"] * params["width"] ** 2
    seconds = 4 + 9e-6 * params["layers"] * params["width"] ** 1.8 * rng.lognormvariate(0, 0.3)
    value = 0.2 + 0.05 * abs(math.log10(params["lr"]) + 3) + 8 / params["width"] + rng.random() / 9
    width = max(0.03, 0.6 / (1 + number / 8))
    guess = memory * rng.lognormvariate(0, width / 2)
    footprint = {"memory": Interval(guess * (1 - width / 1.2), guess, guess * (1 + 1.3 * width))}
    if guess > 4 * 2**30 and number > 5:
        reason = f"Memory of {guess / 2**30:.1f} GiB is projected, over the limit of 1 GiB."
        return TrialRecord(outcome="rejected", reason=reason, footprint=footprint), value
    if memory > 2**30:
        return _terminated(memory, seconds, footprint), value
    roll = rng.random()
    usage = Usage(memory=memory, wall_time=seconds, cpu_time=1.7 * seconds)
    if roll < 0.05:
        return TrialRecord(usage, "failed", "ValueError: loss is NaN", None, footprint), value
    if roll < 0.2:
        short = Usage(memory=memory, wall_time=seconds / 3, cpu_time=1.7 * seconds / 3)
        return TrialRecord(short, "pruned", "Pruned at step 3.", None, footprint), value
    line = _timeline(memory, seconds)
    return TrialRecord(usage, "completed", None, None, footprint, "process", "host-1", line), value


def _terminated(memory: float, seconds: float, footprint: dict[str, Interval]) -> TrialRecord:
    share = (2**30 / memory) ** 0.7
    seen = 2**30 + 3 * MIB
    breach = Breach("memory", 2**30, seen, round(seconds * share, 2))
    usage = Usage(memory=seen, wall_time=seconds * share + 0.1, cpu_time=seconds * share)
    line = _timeline(seen, seconds * share)
    return TrialRecord(
        usage, "terminated", breach.reason, breach, footprint, "process", "host-1", line
    )


def _timeline(memory: float, seconds: float) -> tuple[tuple[float, float], ...]:
    start = 180 * MIB
    shares = [i / 39 for i in range(40)]
    return tuple((s * seconds, start + (memory - start) * s**0.8) for s in shares)
