"""Hypothesis strategies for studies, and a trial that a worker runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from hypothesis import strategies as st
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import CmaEsSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from optuna_quota import Limits, Quota, Usage
from tests.hardening_tests.simulation import Process


GIB = 2**30
ENDS = {
    TrialState.COMPLETE: {"completed"},
    TrialState.PRUNED: {"pruned", "terminated", "rejected"},
    TrialState.FAIL: {"failed", "terminated", "rejected"},
}
SAMPLERS = {
    "random": lambda seed: RandomSampler(seed=seed),
    "tpe": lambda seed: TPESampler(seed=seed, n_startup_trials=2),
    "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=3),
    "qmc": lambda seed: QMCSampler(seed=seed, warn_independent_sampling=False),
}
if find_spec("cmaes") is not None:
    SAMPLERS["cmaes"] = lambda seed: CmaEsSampler(
        seed=seed, n_startup_trials=1, warn_independent_sampling=False
    )
FAULTS = (optuna.exceptions.StorageInternalError, ConnectionError)

unit = st.floats(0, 1)
distributions = st.one_of(
    st.sampled_from([FloatDistribution(0, 1), FloatDistribution(-2, 2, step=0.25)]),
    st.sampled_from([FloatDistribution(1e-5, 1e-1, log=True), FloatDistribution(3, 3)]),
    st.sampled_from([IntDistribution(1, 8), IntDistribution(1, 64, log=True)]),
    st.sampled_from([IntDistribution(0, 9, step=3), CategoricalDistribution([None, True, 2])]),
    st.just(CategoricalDistribution(["a", "b", "c"])),
)
# Each parameter, and whether it is suggested only where the value of the first one is low.
spaces = st.lists(st.tuples(distributions, st.booleans()), min_size=1, max_size=4)
limits_given = st.builds(
    Limits,
    memory=st.sampled_from([None, 4 * GIB]),
    cpu_time=st.sampled_from([None, 20.0]),
    wall_time=st.sampled_from([None, 60.0]),
)
quotas = st.builds(
    Quota,
    n_trials=st.sampled_from([4, 9, 40]),
    cpu_time=st.sampled_from([None, 40.0, 400.0]),
    trial_time=st.sampled_from([None, 90.0, 900.0]),
    memory=st.sampled_from([None, 8 * GIB]),
)


def is_low(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether a value is in the lower half of its range."""
    if isinstance(distribution, CategoricalDistribution):
        return value == distribution.choices[0]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return bool(value <= (distribution.low + distribution.high) / 2)


def value_at(distribution: BaseDistribution, place: float) -> Any:
    """Return the value of a distribution at a position from 0 to 1."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(place * (len(distribution.choices) - 1))]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    steps = (distribution.high - distribution.low) / (distribution.step or 1)
    return distribution.low + int(place * steps) * (distribution.step or 0)


def claimed_usage(params: Mapping[str, Any]) -> Usage:
    """Return the footprint that a user declares."""
    share = 1.0 if params.get("p0") in ("b", 2, 1.0) else 0.3
    return Usage(memory=6 * GIB * share, cpu_time=15 * share, wall_time=30 * share)


@dataclass(eq=False)
class OpenTrial:
    """A running trial.

    Attributes:
        process: The worker that asked for it.
        trial: The trial as the worker has it.
        started: Seconds of the simulation at its start.
        breached: Whether it was stopped for a breach.
        rejected: Whether it was rejected.
        asked: The number of suggested parameters.
        reports: The number of reported values.
        highest: The peak memory of its process since the start, in bytes.
        steady: Whether its usage can be separated from that of other trials of its process.
        tell_failed: Whether `tell` has failed once.
    """

    process: Process
    trial: optuna.Trial
    started: float
    breached: bool = False
    rejected: bool = False
    asked: int = 0
    reports: int = 0
    highest: float = 0.0
    steady: bool = True
    tell_failed: bool = False
