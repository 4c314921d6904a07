"""Options of QuotaSampler: their ranges and types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optuna_quota import Quota, QuotaSampler
from optuna_quota._sampler.options import checked_gpus_per_trial


@pytest.mark.parametrize(
    "arguments",
    [
        {"breach_probability": 0},
        {"breach_probability": 1.1},
        {"on_veto": "other"},
        {"audits": -0.1},
        {"audits": 2},
        {"confidence": 0.5},
        {"confidence": 1},
    ],
)
def test_options_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        QuotaSampler(quota=Quota(n_trials=1), **arguments)


@pytest.mark.parametrize("value", ["0.9", True, None, [0.9], 1j])
@pytest.mark.parametrize("name", ["breach_probability", "confidence", "audits"])
def test_options_that_are_no_numbers_are_refused(name: str, value: Any) -> None:
    if (name, value) != ("audits", None):
        with pytest.raises(TypeError, match=f"`{name}` must be .* but got"):
            QuotaSampler(quota=Quota(n_trials=1), **{name: value})


@pytest.mark.parametrize(
    "arguments",
    [{"one_gpu": 2}, {"one_gpu": "no"}, {"meters": 1}, {"meters": "steps"}, {"n_candidates": 2.0}],
)
def test_options_of_the_wrong_type_are_refused(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(TypeError, match=f"`{name}` must be .* but got"):
        QuotaSampler(quota=Quota(n_trials=1), **arguments)


def test_counts_may_be_numpys() -> None:
    QuotaSampler(quota=Quota(n_trials=1), n_candidates=np.int64(3))
    found = checked_gpus_per_trial(np.int64(2), False)
    assert type(found) is int and found == 2
