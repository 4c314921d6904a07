"""Admission of a point by the probability of a breach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import FloatDistribution
import pytest

from optuna_quota import Limits
from optuna_quota._footprint.footprint import joint_breach
from optuna_quota._records import Interval
from optuna_quota._sampler.admission import is_audit_due, PointAdmission


LIMITS = Limits(memory="2GiB", wall_time=60, cpu_time=90)


class Fixed:
    """Expects the same at every point, or with the probability ``x`` where a point has one."""

    def __init__(self, breaches: Mapping[str, float], medians: Mapping[str, float]) -> None:
        self._breaches, self._medians = breaches, medians

    def breaches(
        self, points: Sequence[Mapping[str, Any]], limits: Limits
    ) -> dict[str, np.ndarray]:
        return {
            name: np.array([point.get("x", each) for point in points])
            for name, each in self._breaches.items()
        }

    def intervals(self, params: Mapping[str, Any]) -> dict[str, Interval]:
        return {name: Interval(each, each, each) for name, each in self._medians.items()}


def admission_of(
    breaches: Mapping[str, float], medians: Mapping[str, float], **arguments: Any
) -> PointAdmission:
    return PointAdmission(Fixed(breaches, medians), LIMITS, **arguments, threshold=0.5)  # type: ignore[arg-type]


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
def test_times_rise_together_and_memory_is_independent(
    breaches: dict[str, float], probability: float
) -> None:
    assert joint_breach(breaches) == pytest.approx(probability)


@pytest.mark.parametrize(("probability", "admitted"), [(0, True), (0.5, True), (0.51, False)])
def test_a_point_is_admitted_up_to_the_threshold(probability: float, admitted: bool) -> None:
    judge = admission_of({"memory": probability}, {"memory": 1e9}, past=[], space={}).judge
    assert judge({"n": 1}).admitted is admitted
    assert bool(judge({"n": 1}).reason) is not admitted


def test_a_refusal_names_the_resource_that_is_most_likely_breached() -> None:
    medians = {"memory": 3.0 * 2**30, "wall_time": 70.0}
    admission = admission_of({"memory": 0.93, "wall_time": 0.6}, medians, past=[], space={})
    verdict = admission.judge({"n": 1})
    assert not verdict.admitted
    assert (verdict.resource, verdict.limit, verdict.median) == ("memory", 2 * 2**30, 3 * 2**30)
    assert verdict.reason == (
        "Memory limit likely exceeded: 3 GiB projected, 2 GiB allowed, probability 97%."
    )


@pytest.mark.parametrize(("known", "admitted"), [({"n": 1}, True), ({"n": 1, "x": 0.9}, False)])
def test_a_partial_point_is_refused_only_if_its_cheapest_completion_is(
    known: dict[str, Any], admitted: bool
) -> None:
    past = [{"n": 1, "x": 0.8}, {"n": 2, "x": 0.9}]
    space = {"x": FloatDistribution(0, 1)}
    admission = admission_of({"memory": 1.0}, {"memory": 1e9}, past=past, space=space)
    assert admission.judge(known).admitted is admitted


@pytest.mark.parametrize(
    ("share", "n_refusals", "n_audits"), [(0.0, 100, 0), (0.05, 100, 5), (0.5, 10, 5), (1.0, 7, 7)]
)
def test_audits_are_a_bounded_share(share: float, n_refusals: int, n_audits: int) -> None:
    done = 0
    for refusals in range(1, n_refusals + 1):
        done += is_audit_due(refusals, done, share)
        assert done <= share * refusals + 0.5
    assert done == n_audits
