"""Points of the trials to come."""

from __future__ import annotations

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from optuna_quota import Usage
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.search_space import draw_future_points


def test_an_adaptive_sampler_stays_around_its_newest_points() -> None:
    space: dict[str, BaseDistribution] = {
        "x": FloatDistribution(1.0, 1000.0, log=True),
        "n": IntDistribution(1, 100),
        "kind": CategoricalDistribution(["a", "b"]),
    }
    old = [Observation({"x": 1.0, "n": 1, "kind": "a"}, space, Usage()) for _ in range(30)]
    new = [Observation({"x": 900.0, "n": 90, "kind": "b"}, space, Usage()) for _ in range(20)]
    staying = draw_future_points([*old, *new], 400, adaptive=True)
    spread = draw_future_points([*old, *new], 400, adaptive=False)
    assert sum(point["x"] > 300 for point in staying) > 250
    assert 80 < sum(point["x"] > 100 for point in spread) < 200
    assert {point["kind"] for point in spread} == {"a", "b"}
    for point in (*staying, *spread):
        assert 1 <= point["x"] <= 1000
        assert isinstance(point["n"], int)
        assert 1 <= point["n"] <= 100


def test_choices_with_conditional_parameters_are_drawn_uniformly() -> None:
    kind = CategoricalDistribution(["tree", "net", "never"])
    tree: dict[str, BaseDistribution] = {"kind": kind, "depth": IntDistribution(1, 8)}
    net: dict[str, BaseDistribution] = {
        "kind": kind,
        "width": IntDistribution(8, 64),
        "bias": CategoricalDistribution([True, False]),
    }
    rows = [Observation({"kind": "tree", "depth": 3}, tree, Usage())] * 18
    rows += [Observation({"kind": "net", "width": 9, "bias": True}, net, Usage())] * 2
    points = draw_future_points(rows, 600, adaptive=False)
    trees = [point for point in points if point["kind"] == "tree"]
    nets = [point for point in points if point["kind"] == "net"]
    assert len(trees) + len(nets) == 600
    # A third each; the choice that no trial had is replaced by the most frequent one.
    assert 200 <= len(nets) <= 250
    assert {frozenset(point) for point in trees} == {frozenset(tree)}
    assert {frozenset(point) for point in nets} == {frozenset(net)}
    assert {point["bias"] for point in nets} == {True, False}
    assert len({point["width"] for point in nets}) > 30
