"""Admission of a point: pure."""

from __future__ import annotations

from typing import Any

import pytest

from optuna_quota._footprint.footprint import joint_breach
from optuna_quota._footprint.search_space import likely_completions
from optuna_quota._sampler.admission import admit_point
from optuna_quota._sampler.admission import audit_is_due


LIMITS = {"memory": 2.0 * 2**30, "wall_time": 60.0, "cpu_time": 90.0}


@pytest.mark.parametrize(
    ("breaches", "probability"),
    [
        ({}, 0.0),
        ({"memory": 0.3}, 0.3),
        ({"wall_time": 0.3, "cpu_time": 0.4}, 0.4),
        ({"memory": 0.5, "wall_time": 0.5}, 0.75),
        ({"memory": 0.5, "gpu_memory": 0.5, "wall_time": 0.0}, 0.75),
        ({"memory": 1.0, "wall_time": 0.0}, 1.0),
    ],
)
def test_times_rise_together_and_memory_by_itself(
    breaches: dict[str, float], probability: float
) -> None:
    assert joint_breach(breaches) == pytest.approx(probability)


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5])
def test_up_to_the_threshold_a_point_is_admitted(probability: float) -> None:
    verdict = admit_point({"memory": probability}, {"memory": 1e9}, LIMITS, 0.5)
    assert verdict.admitted
    assert verdict.reason == ""


def test_a_refused_point_says_what_decided() -> None:
    medians = {"memory": 3.0 * 2**30, "wall_time": 70.0}
    verdict = admit_point({"memory": 0.93, "wall_time": 0.6}, medians, LIMITS, 0.5)
    assert not verdict.admitted
    assert (verdict.resource, verdict.limit, verdict.median) == ("memory", 2 * 2**30, 3 * 2**30)
    assert verdict.reason == (
        "Memory of about 3 GiB projected, limit 2 GiB: a breach has the probability 97%."
    )


@pytest.mark.parametrize(
    ("share", "vetoes", "audits"), [(0.0, 100, 0), (0.05, 100, 5), (0.5, 10, 5), (1.0, 7, 7)]
)
def test_audits_are_a_bounded_share(share: float, vetoes: int, audits: int) -> None:
    done = 0
    for veto in range(1, vetoes + 1):
        done += audit_is_due(veto, done, share)
        assert done <= share * veto + 0.5
    assert done == audits


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
def test_a_half_drawn_point_becomes_what_earlier_ones_became(
    known: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    assert likely_completions(known, PAST) == expected


def test_without_a_past_a_point_is_what_it_is() -> None:
    assert likely_completions({"x": 1}, []) == [{"x": 1}]
