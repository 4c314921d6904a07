"""The columns that footprint models see."""

from __future__ import annotations

import time

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
import pytest

from optuna_quota._footprint.features import Features


SPACE: dict[str, BaseDistribution] = {
    "batch": CategoricalDistribution([16, 32, 64]),
    "dropout": FloatDistribution(0.0, 0.5),
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "share": FloatDistribution(0.1, 1.0),
    "width": IntDistribution(8, 1024, log=True),
}
LARGEST = {"batch": 64, "dropout": 0.5, "lr": 0.1, "share": 1.0, "width": 1024}


def test_rates_weigh_less_and_sizes_have_a_sum() -> None:
    features = Features.of([SPACE])

    assert features.scale([LARGEST])[0] == pytest.approx([1.0] * 5)
    columns = features.encode([LARGEST, {**LARGEST, "width": 8, "share": 0.1}, {}])
    assert columns[0] == pytest.approx([1.0, 1.0, 0.3, 1.0, 1.0, 3**0.5])
    assert columns[1, -1] == pytest.approx(-(3**-0.5))
    assert not columns[2].any()
    assert features.width == columns.shape[1] == 6


def test_one_size_has_no_sum() -> None:
    features = Features.of([{name: SPACE[name] for name in ("lr", "width")}])

    assert features.width == 2


def test_features_outlive_their_distributions() -> None:
    features = Features.of([SPACE])

    assert Features.of([features.distributions()]) == features


def test_thousands_of_choices_are_told_apart_at_once() -> None:
    names = [f"choice {index}" for index in range(4000)]
    began = time.process_time()
    # As a storage returns them: one distribution for each trial.
    features = Features.of([{"c": CategoricalDistribution(names)} for _ in range(5)])
    columns = features.scale([{"c": name} for name in names[::100]])
    # 15 ms; 6 s where each choice is compared with all others.
    assert time.process_time() - began < 1
    assert features.width == 4000
    assert (columns.argmax(axis=1) == range(0, 4000, 100)).all()
    assert (columns == 1).sum() == 40
