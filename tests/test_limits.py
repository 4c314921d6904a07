"""Limits, quotas and strategies; copies and pickles of all values."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError
from datetime import timedelta
import pickle
from typing import Any

import cloudpickle
from hypothesis import given, strategies as st
import numpy as np
from optuna.distributions import FloatDistribution
import pytest

from optuna_quota import Limits, Quota, Strategy, Usage
from optuna_quota._resources import LIMIT_RESOURCES
from optuna_quota._usage import Breach


VALUES: list[Any] = [
    Limits(),
    Limits(memory="4GiB", wall_time="5min", custom={"disk": 5}),
    Quota(wall_time="2h", cpu_time="6h", memory="12GiB", n_trials=7, energy="2kWh"),
    Quota(cost=10, prices={"cpu_time": 0.05, "gpu_time": 2}),
    Strategy(200, n_jobs=2, search_space={"x": FloatDistribution(0, 1)}),
    Usage(memory=2**30, wall_time=3.5, custom={"disk": 1.0}),
    Breach("memory", 2.0, 3.0, 1.5),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_copies_and_pickles_are_equal(value: Any) -> None:
    for again in (
        pickle.loads(pickle.dumps(value)),
        cloudpickle.loads(cloudpickle.dumps(value)),
        copy.deepcopy(value),
        copy.copy(value),
    ):
        assert again == value
        assert repr(again) == repr(value)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_are_frozen_and_hashable(value: Any) -> None:
    hash(value)
    with pytest.raises(FrozenInstanceError):
        value.memory = 1


def test_units_are_parsed_and_shown_compactly() -> None:
    limits = Limits(memory="4GiB", wall_time="1h30min", gpu_memory=3e9)
    assert (limits.memory, limits.wall_time) == (4 * 2**30, 5400)
    assert repr(limits) == "Limits(memory='4GiB', wall_time='1.5h', gpu_memory='3GB')"
    assert limits.amounts() == {"memory": 4 * 2**30, "wall_time": 5400, "gpu_memory": 3e9}
    assert not Limits()
    assert limits


@pytest.mark.parametrize("name", LIMIT_RESOURCES)
@pytest.mark.parametrize("value", [-1, 0, float("nan"), "12", "-3s", float("inf")])
def test_an_invalid_limit(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as info:
        Limits(**{name: value})
    assert f"`{name}`" in str(info.value)
    assert repr(value) in str(info.value)


@pytest.mark.parametrize("name", LIMIT_RESOURCES)
@pytest.mark.parametrize("value", [True, np.True_, b"1", 1j, [1], np.array([1, 2])])
def test_a_limit_of_the_wrong_type(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be"):
        Limits(**{name: value})


@pytest.mark.parametrize("make", [lambda v: Limits(memory=v), lambda v: Quota(n_trials=v)])
def test_a_number_with_more_digits_than_fit(make: Any) -> None:
    with pytest.raises(ValueError, match="must be .* but got 1000"):
        make(10**400)


@pytest.mark.parametrize("value", [1, "steps", ["steps"], {1: 2}, {"steps"}, 0])
def test_what_is_no_mapping_of_names(value: Any) -> None:
    for make, name in (
        (lambda: Limits(custom=value), "custom"),
        (lambda: Quota(cost=1, prices=value), "prices"),
        (lambda: Usage(custom=value), "custom"),
    ):
        with pytest.raises(TypeError, match=f"`{name}` must map names of .* but got"):
            make()


@pytest.mark.parametrize("cls", [Limits, Quota])
def test_an_unknown_resource_is_refused(cls: Any) -> None:
    with pytest.raises(TypeError, match="memroy"):
        cls(memroy="2GiB")


@pytest.mark.parametrize("cls", [Limits, Quota])
@pytest.mark.parametrize(
    ("value", "meant"),
    [(4, "4GiB"), (0.5, "0.5GiB"), (np.int64(4000), "4000MiB"), (1e6, "1000000KiB")],
)
@pytest.mark.parametrize("name", ["memory", "gpu_memory"])
def test_a_bare_number_that_is_no_size_in_bytes(
    cls: Any, name: str, value: float, meant: str
) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be .* Did you mean '{meant}'\?"):
        cls(**{name: value})
    for text in ("4B", 2**20):
        ceilings = cls(**{name: text})
        assert pickle.loads(pickle.dumps(ceilings)) == ceilings


def test_custom_limits() -> None:
    limits = Limits(custom={"disk": 5e9})
    assert limits.amounts() == {"disk": 5e9}
    assert limits == Limits.from_amounts(limits.amounts())
    with pytest.raises(ValueError, match="identifiers other than .*'memory'"):
        Limits(custom={"memory": 5})
    with pytest.raises(ValueError, match="'my disk'"):
        Limits(custom={"my disk": 5})
    with pytest.raises(ValueError, match="`disk` must be .* but got -1"):
        Limits(custom={"disk": -1})


def test_tightened_limits_never_rise() -> None:
    limits = Limits(memory="100B", wall_time=10)
    assert limits.tightened({"wall_time": 4, "cpu_time": 7, "memory": 200}) == Limits(
        memory="100B", wall_time=4, cpu_time=7
    )
    assert limits == Limits(memory="100B", wall_time=10)


def test_totals_and_held_resources_of_a_quota() -> None:
    quota = Quota(n_trials=5, cpu_time="1h", memory="2GiB", cpu_cores=4)
    assert quota.totals == {"n_trials": 5, "cpu_time": 3600}
    assert quota.held == {"memory": 2**31, "cpu_cores": 4}
    assert repr(quota) == "Quota(n_trials=5, cpu_time='1h', memory='2GiB', cpu_cores=4.0)"


def test_cost_and_prices_need_each_other() -> None:
    with pytest.raises(ValueError, match="`cost` and `prices` must be given together"):
        Quota(cost=5)
    with pytest.raises(ValueError, match="`cost` and `prices` must be given together"):
        Quota(prices={"cpu_time": 1})
    with pytest.raises(ValueError, match="per hour of trial_time, cpu_time, gpu_time .*'memory'"):
        Quota(cost=5, prices={"memory": 1})
    with pytest.raises(ValueError, match=r"prices\['cpu_time'\].* -1"):
        Quota(cost=5, prices={"cpu_time": -1})
    quota = Quota(cost=5, prices={"cpu_time": 0.5, "gpu_time": 2})
    assert quota.price({"cpu_time": 7200, "gpu_time": None}) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_a_strategy_has_whole_positive_counts(value: Any) -> None:
    with pytest.raises(ValueError, match=f"`n_trials` .* got {value}"):
        Strategy(value)
    with pytest.raises(ValueError, match=f"`n_jobs` .* got {value}"):
        Strategy(3, n_jobs=value)


def test_a_strategy_knows_its_search_space() -> None:
    with pytest.raises(TypeError, match=r"`search_space\['x'\]` must be an Optuna distribution"):
        Strategy(3, search_space={"x": 1})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="`search_space` must be a mapping"):
        Strategy(3, search_space=[1])  # type: ignore[arg-type]
    assert Strategy(np.int64(3), n_jobs=np.int64(2)) == Strategy(3, n_jobs=2)


def test_times_are_timedeltas_too() -> None:
    hour = timedelta(hours=1)
    assert Limits(wall_time=hour, cpu_time=hour) == Limits(wall_time="1h", cpu_time="01:00:00")
    assert Quota(trial_time=hour, gpu_time=hour) == Quota(trial_time="1 hour", gpu_time="60m")
    assert Usage(wall_time=hour).wall_time == 3600  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`memory` must be"):
        Usage(memory=hour)  # type: ignore[arg-type]


@given(
    st.dictionaries(st.sampled_from(LIMIT_RESOURCES), st.floats(min_value=1e-6, max_value=1e15))
)
def test_limits_are_rebuilt_from_their_repr(amounts: dict[str, float]) -> None:
    limits = Limits.from_amounts(amounts)
    shown = eval(repr(limits), {"Limits": Limits})
    assert shown == limits
    assert pickle.loads(pickle.dumps(limits)) == limits
