"""Completions of partial points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from optuna_quota._footprint.search_space import certain_completions, likely_completions


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
