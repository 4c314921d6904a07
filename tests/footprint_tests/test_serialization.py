"""Footprints as JSON."""

from __future__ import annotations

from collections.abc import Callable
import json
import math
import pickle
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution
import pytest

from optuna_quota import Footprint, Limits, Usage
from optuna_quota._footprint.fit import ChainedModel
from optuna_quota._footprint.observations import Observation
from tests.footprint_tests.test_footprint import draw_rows


LIMITS = Limits(memory="400MB", wall_time=2)


@pytest.fixture(scope="module")
def footprint() -> Footprint:
    return Footprint.fit(draw_rows(25, limits=Limits(memory="400MB")))


@pytest.mark.parametrize("copy", [lambda f: Footprint.from_json(f.to_json()), pickle.dumps])
def test_a_copy_predicts_exactly_the_same(footprint: Footprint, copy: Any) -> None:
    other = copy(footprint)
    other = pickle.loads(other) if isinstance(other, bytes) else other
    for row in draw_rows(10, seed=5):
        assert other.predict(row.params).equals(footprint.predict(row.params))
        assert other.probability(row.params, LIMITS) == footprint.probability(row.params, LIMITS)
    assert other.to_json() == footprint.to_json()


def test_a_file_of_version_2_is_read_from_its_points(footprint: Footprint) -> None:
    document = json.loads(footprint.to_json())
    for point in document["points"]:
        del point["maybe_censored"]
    document |= {"version": 2, "models": {"memory": {"floor": 1e8}}, "ratios": {}}
    other = Footprint.from_json(json.dumps(document))
    for row in draw_rows(3, seed=5):
        assert other.predict(row.params).equals(footprint.predict(row.params))


def test_an_unknown_version_says_what_to_do(footprint: Footprint) -> None:
    document = json.loads(footprint.to_json()) | {"version": 1}
    with pytest.raises(ValueError, match=r"version 1: write it again with `analyze\(study\)"):
        Footprint.from_json(json.dumps(document))


def test_too_many_columns_are_not_written() -> None:
    space = {"x": CategoricalDistribution([str(i) for i in range(2001)])}
    footprint = Footprint.fit([Observation({"x": "0"}, space, Usage(memory=1e9))])
    with pytest.raises(ValueError, match="at most 2000 columns"):
        footprint.to_json()


def test_a_chained_model_is_kept() -> None:
    rows = [
        Observation(
            row.params,
            row.distributions,
            Usage(wall_time=row.usage.wall_time, cpu_time=(row.usage.wall_time or 0) * 0.5),
        )
        for row in draw_rows(20, noise=0.2)
    ]
    footprint = Footprint.fit(rows)
    copied = Footprint.from_json(footprint.to_json())
    assert isinstance(copied.contents.models["wall_time"], ChainedModel)
    assert copied.predict(rows[0].params).equals(footprint.predict(rows[0].params))


def test_choices_of_mixed_types_are_kept() -> None:
    choices = CategoricalDistribution([None, True, "x", 2, 0.5])
    rows = [
        Observation({"odd": choice, "y": 2.0}, {"odd": choices, "y": FloatDistribution(1, 4)}, u)
        for choice in choices.choices
        for u in (Usage(memory=1e8), Usage(memory=1.1e8))
    ]
    footprint = Footprint.fit(rows)
    copied = Footprint.from_json(footprint.to_json())
    for choice in choices.choices:
        assert copied.predict({"odd": choice}).equals(footprint.predict({"odd": choice}))


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("others", [[1.0], [1.0, 5.0]], ids=repr)
def test_choices_that_json_lacks_are_kept_as_text(odd: float, others: list[float]) -> None:
    choices = [*others, odd]
    rows = [
        # One distribution each, as a storage returns them.
        Observation({"norm": c}, {"norm": CategoricalDistribution(choices)}, Usage(memory=amount))
        for c in choices
        for amount in ([4.0e9, 4.1e9, 4.2e9] if c is odd else [1.0e9, 1.1e9, 1.2e9])
    ]
    footprint = Footprint.fit(rows)
    copied = Footprint.from_json(footprint.to_json())
    assert footprint.predict({"norm": float(odd)}).loc["memory", "median"] > 3e9
    for choice in [*choices, float(odd), np.float64(odd)]:
        assert copied.predict({"norm": choice}).equals(footprint.predict({"norm": choice}))


@pytest.mark.parametrize(("low", "high"), [(1e301, 1e307), (1e-320, 1e-305)])
def test_the_largest_and_the_smallest_numbers_are_kept(low: float, high: float) -> None:
    space = {"x": FloatDistribution(low, high, log=True)}
    rows = [
        Observation({"x": float(x)}, space, Usage(memory=float(x), wall_time=1.0))
        for x in np.geomspace(low * 1.01, high * 0.99, 9)
    ]
    footprint = Footprint.fit(rows)
    copied = Footprint.from_json(footprint.to_json())
    assert copied.predict(rows[3].params).equals(footprint.predict(rows[3].params))


def _set(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set(["format"], "other"),
        _set(["version"], 1),
        _set(["version"], 4),
        _set(["version"], True),
        _set(["version"], None),
        _set(["confidence"], 0.5),
        _set(["confidence"], "0.95"),
        _set(["features"], {}),
        _set(["features", 0], 7),
        _set(["features", 0, "name"], 7),
        _set(["features", 0, "low"], -1),
        _set(["features", 0, "scale"], "__import__('os')"),
        _set(["features", 0, "scale"], ["log"]),
        _set(["features", 1, "choices"], []),
        _set(["features", 1, "choices"], [str(i) for i in range(2001)]),
        _set(["points", 0, "usage"], {f"meter_{i}": 1.0 for i in range(51)}),
        _set(["features", 1, "choices"], [[1], {}]),
        _set(["features", 1, "name"], "depth"),
        _set(["points"], {}),
        _set(["points", 0], None),
        _set(["points", 0, "params"], [1]),
        _set(["points", 0, "params", "width"], {"a": 1}),
        _set(["points", 0, "usage", "memory"], -1),
        _set(["points", 0, "usage", "memory"], "1GB"),
        _set(["points", 0, "usage", "not a name"], 1),
        _set(["points", 0, "censored"], "memory"),
        _set(["points", 0, "censored"], [7]),
        _set(["points", 0, "maybe_censored"], None),
        _set(["points", 0, "params", "width"], math.inf),
    ],
)
def test_damaged_files_are_refused(
    footprint: Footprint, change: Callable[[dict[str, Any]], None]
) -> None:
    document = json.loads(footprint.to_json())
    change(document)
    with pytest.raises(ValueError, match=r"\w"):
        Footprint.from_json(json.dumps(document))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', '{"format": NaN}', "[" * 100_000, b"{}", None, 7],
    ids=lambda text: repr(text)[:20],
)
def test_other_texts_are_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="footprint must"):
        Footprint.from_json(text)
