"""Admit a point or refuse it, with the reason: pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optuna_quota._footprint.footprint import joint_breach
from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource


@dataclass(frozen=True)
class PointVerdict:
    """Whether a point may run.

    Attributes:
        admitted: Whether it may.
        probability: That it breaches any limit.
        reason: One sentence for a person; empty when it may run.
        resource: The likeliest to be breached.
        limit: Its limit, in SI base units.
        median: What is expected of it, in SI base units.
    """

    admitted: bool
    probability: float = 0.0
    reason: str = ""
    resource: str | None = None
    limit: float | None = None
    median: float | None = None


def admit_point(
    breaches: Mapping[str, float],
    medians: Mapping[str, float],
    limits: Mapping[str, float],
    threshold: float,
) -> PointVerdict:
    """Return whether a point may run.

    The gate is the probability of a breach and not the upper bound: that would refuse half of
    what fits.

    Args:
        breaches: Probability of a breach of each limit that something is known of.
        medians: What is expected of these resources.
        limits: The limits, in SI base units.
        threshold: The probability of any breach above which a point is refused.
    """
    probability = joint_breach(breaches)
    if probability <= threshold:
        return PointVerdict(True, probability)
    name = max(breaches, key=lambda each: breaches[each])
    title = get_resource(name).title
    reason = (
        f"{title[0].upper()}{title[1:]} of about {format_amount(name, medians[name])} projected, "
        f"limit {format_amount(name, limits[name])}: a breach has the probability "
        f"{format_chance(probability)}."
    )
    return PointVerdict(False, probability, reason, name, limits[name], medians[name])


def format_chance(probability: float) -> str:
    """Return a probability in percent, never rounded to a certainty that is none."""
    return "over 99%" if 0.995 <= probability < 1 else f"{probability:.0%}"


def audit_is_due(vetoes: int, audits: int, share: float) -> bool:
    """Return whether the veto at hand is to be tried, so that a wrong one is found.

    Args:
        vetoes: Points refused so far, this one included.
        audits: Of these, how many were run all the same.
        share: How many may be.
    """
    return audits + 0.5 < share * vetoes
