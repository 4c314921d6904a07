"""Completions of partial points, and simulated future points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
import pytest

from optuna_quota import Usage
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.search_space import (
    certain_completions,
    draw_future_points,
    likely_completions,
)


FLAT = [{"lr": 0.1, "width": 8}, {"lr": 0.2, "width": 16}]
KINDS = [
    {"kind": "tree", "depth": 3},
    {"kind": "net", "width": 8, "bias": True},
    {"kind": "tree", "depth": 5},
    {"kind": "net", "width": 16, "bias": True},
]
LAYERS = [
    {"n": 1, "u0": 8},
    {"n": 2, "u0": 16, "u1": 8},
    {"n": 1, "u0": 16},
    {"n": 2, "u0": 8, "u1": 16},
]


@pytest.mark.parametrize(
    ("known", "past", "expected"),
    [
        ({"lr": 0.3}, [], []),
        ({"lr": 0.3}, FLAT, [{"lr": 0.3, "width": 16}, {"lr": 0.3, "width": 8}]),
        ({"lr": 0.3, "width": 9}, FLAT, [{"lr": 0.3, "width": 9}]),
        ({"lr": 0.3, "width": 9, "new": 1}, FLAT, []),
        ({"kind": "tree"}, KINDS, [{"kind": "tree", "depth": 5}, {"kind": "tree", "depth": 3}]),
        ({"kind": "tree", "depth": 9}, KINDS, [{"kind": "tree", "depth": 9}]),
        ({"kind": "forest"}, KINDS, []),
        ({"kind": "net", "width": 9}, KINDS, [{"kind": "net", "width": 9, "bias": True}] * 2),
        ({"kind": "net", "width": 9, "bias": False}, KINDS, []),
        ({"n": 2}, LAYERS, [{"n": 2, "u0": 8, "u1": 16}, {"n": 2, "u0": 16, "u1": 8}]),
        ({"n": 2, "u0": 9}, LAYERS, [{"n": 2, "u0": 9, "u1": 16}, {"n": 2, "u0": 9, "u1": 8}]),
        ({"n": 1, "u0": 9}, LAYERS, [{"n": 1, "u0": 9}]),
        ({"n": 3, "u0": 9}, LAYERS, []),
        ({"n": 3, "u0": 9, "u1": 9}, LAYERS, []),
        # A choice may be a list.
        (
            {"n": 2, "shape": [1]},
            [{"n": 1, "shape": [1, 2], "w": 3}, {"n": 2, "shape": [1], "w": 4}],
            [{"n": 2, "shape": [1], "w": 4}, {"n": 2, "shape": [1], "w": 3}],
        ),
        # One trial does not tell whether a whole number decides.
        ({"n": 3, "u0": 9}, LAYERS[:1], []),
    ],
)
def test_certain_completions(
    known: Mapping[str, Any], past: list[Mapping[str, Any]], expected: list[Mapping[str, Any]]
) -> None:
    assert certain_completions(known, past) == expected


PAST: list[dict[str, Any]] = [
    {"kind": "forest", "trees": 10},
    {"kind": "net", "layers": 2, "width": 64},
    {"kind": "net", "layers": 5, "width": 8},
]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"kind": "forest"}, [{"kind": "forest", "trees": 10}]),
        ({"kind": "forest", "trees": 3}, [{"kind": "forest", "trees": 3}]),
        (
            {"kind": "net", "layers": 3},
            [
                {"kind": "net", "layers": 3, "width": 8},
                {"kind": "net", "layers": 3, "width": 64},
            ],
        ),
        ({"kind": "never seen"}, [{"kind": "never seen"}]),
    ],
)
def test_a_partial_point_is_completed_as_in_earlier_trials(
    known: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    assert likely_completions(known, PAST) == expected


def test_without_earlier_trials_a_point_is_complete() -> None:
    assert likely_completions({"x": 1}, []) == [{"x": 1}]


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
