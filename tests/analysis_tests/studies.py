"""Studies whose usage follows a formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import create_trial, FrozenTrial, TrialState

from optuna_quota import analyze, Usage
from optuna_quota._analysis.advice import Advice
from optuna_quota._records import record_attributes, TrialRecord
from optuna_quota._usage import Breach


SPACE: dict[str, BaseDistribution] = {
    "rows": IntDistribution(100, 10_000, log=True),
    "width": IntDistribution(16, 1024, log=True),
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "optimizer": CategoricalDistribution(["sgd", "adam"]),
}


def draw(space: Mapping[str, BaseDistribution], rng: np.random.Generator) -> dict[str, Any]:
    return {name: draw_one(distribution, rng) for name, distribution in space.items()}


def draw_one(distribution: BaseDistribution, rng: np.random.Generator) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(rng.integers(len(distribution.choices)))]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    low, high = distribution.low, distribution.high
    if distribution.log:
        value = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    else:
        value = float(rng.uniform(low, high))
    return round(value) if isinstance(distribution, IntDistribution) else value


def finished(
    params: Mapping[str, Any],
    usage: Usage,
    space: Mapping[str, BaseDistribution] = SPACE,
    **changes: Any,
) -> FrozenTrial:
    """A completed trial of the usage given."""
    record = TrialRecord(outcome="completed", usage=usage, isolation="process", host="here")
    arguments = {
        "value": 1.0,
        "params": dict(params),
        "distributions": {name: space[name] for name in params},
        "user_attrs": record_attributes(record),
        **changes,
    }
    return create_trial(**arguments)


def terminated(
    params: Mapping[str, Any],
    usage: Usage,
    resource: str,
    limit: float,
    space: Mapping[str, BaseDistribution] = SPACE,
    *,
    quota: bool = False,
) -> FrozenTrial:
    """A trial that was terminated for a breach, with its usage until then."""
    observed, seconds = usage.get(resource) or limit, usage.wall_time or 1.0
    breach = Breach(resource, limit, observed, seconds, quota=quota)
    record = TrialRecord(outcome="terminated", usage=usage, breach=breach, reason=breach.reason)
    return finished(
        params,
        usage,
        space,
        state=TrialState.PRUNED,
        value=None,
        user_attrs=record_attributes(record),
    )


def study_of(*trials: FrozenTrial, **kwargs: Any) -> optuna.Study:
    study = optuna.create_study(**kwargs)
    study.add_trials(trials)
    return study


def power_law_study(
    n: int = 60,
    *,
    seed: int = 0,
    floor: float = 300e6,
    noise: float = 0.05,
    limit: float | None = None,
    space: Mapping[str, BaseDistribution] = SPACE,
    memory: Callable[[Mapping[str, Any]], float] | None = None,
) -> optuna.Study:
    """Memory is a floor plus ``50 · rows^2`` and time ``1 ms · rows · width^0.5 · 2 [adam]``.

    Args:
        n: Trials.
        seed: Of the random numbers.
        floor: In bytes.
        noise: Standard deviation of the log of the usage.
        limit: On memory, in bytes; trials over it are terminated there.
        space: Distributions to draw from.
        memory: Bytes of a point without noise, instead of the power law.
    """
    rng = np.random.default_rng(seed)
    trials = []
    for _ in range(n):
        params = draw(space, rng)
        amount = memory(params) if memory else floor + 50.0 * params.get("rows", 1) ** 2
        amount *= float(np.exp(noise * rng.standard_normal()))
        seconds = 1e-3 * params.get("rows", 1) * params.get("width", 1) ** 0.5
        seconds *= 2.0 if params.get("optimizer") == "adam" else 1.0
        seconds *= float(np.exp(2 * noise * rng.standard_normal()))
        if limit is not None and amount > limit:
            early = Usage(memory=limit, wall_time=seconds / 3, cpu_time=seconds / 3)
            trials.append(terminated(params, early, "memory", limit, space))
        else:
            usage = Usage(memory=amount, wall_time=seconds, cpu_time=seconds)
            trials.append(finished(params, usage, space))
    return study_of(*trials)


def advice_on(study: optuna.Study, topic: str) -> list[Advice]:
    return [advice for advice in analyze(study).advice if advice.topic == topic]


def only_advice(study: optuna.Study, topic: str) -> Advice:
    (advice,) = advice_on(study, topic)
    return advice
