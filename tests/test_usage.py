"""What a trial used, and the reason of a breach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optuna_quota import Usage
from optuna_quota._usage import Breach


def test_unknown_usage_is_none_and_never_zero() -> None:
    usage = Usage(memory=5, wall_time=0)
    assert usage.gpu_memory is None
    assert usage.amounts() == {"memory": 5, "wall_time": 0}
    assert usage.get("trial_time") == 0
    assert usage.get("disk") is None


def test_usage_parses_units() -> None:
    usage = Usage(memory="2GiB", wall_time="90s", gpu_time="1min", energy="1kWh")
    assert usage == Usage(memory=2**31, wall_time=90, gpu_time=60, energy=3.6e6)
    assert (
        repr(Usage(memory="2GiB", wall_time="90s")) == "Usage(memory='2GiB', wall_time='1.5min')"
    )


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "3"])
def test_invalid_usage(value: Any) -> None:
    with pytest.raises(ValueError, match="`memory`"):
        Usage(memory=value)


@pytest.mark.parametrize("value", [True, np.True_, b"1", [1], np.array([1, 2])])
def test_usage_of_the_wrong_type(value: Any) -> None:
    with pytest.raises(TypeError, match="`memory` must be"):
        Usage(memory=value)


def test_usage_of_a_tensor_of_one_element() -> None:
    assert Usage(memory=np.array(2**20)) == Usage(memory=2**20)


def test_the_reason_of_a_breach() -> None:
    breach = Breach("memory", 2 * 2**30, 2.5 * 2**30, 3.21)
    assert breach.reason == ("Memory limit exceeded after 3.21 s: 2.5 GiB used, 2 GiB allowed.")
    of_quota = Breach("cpu_time", 60, 61, 50, quota=True)
    assert of_quota.reason == "CPU time quota exceeded after 50 s: 1 min 1 s used, 1 min was left."
    forecast = Breach("wall_time", 300, 400, 100, forecast=True)
    assert "about to be exceeded" in forecast.reason
    assert "heading for 6 min 40 s" in forecast.reason
    assert Breach("wall_time", 3, 3.01, 3.01).reason == "Time limit of 3 s exceeded."


@pytest.mark.parametrize(
    ("resource", "observed", "refused", "words"),
    [
        ("memory", 500.3 * 2**20, False, "500.3 MiB used, 500 MiB allowed"),
        ("memory", 500.02 * 2**20, False, "500.02 MiB used"),
        ("memory", 500 * 2**20 + 1, True, "more than 500 MiB asked for, 500 MiB allowed"),
        ("memory", 900 * 2**20, True, "900 MiB asked for"),
        (
            "gpu_memory",
            500.3 * 2**20,
            False,
            "GPU memory limit exceeded after 1 s: 500.3 MiB used",
        ),
        ("scratch", 500.3 * 2**20, False, "Scratch limit exceeded"),
    ],
)
def test_a_reason_has_enough_digits_to_show_the_excess(
    resource: str, observed: float, refused: bool, words: str
) -> None:
    assert words in Breach(resource, 500 * 2**20, observed, 1.0, refused=refused).reason
