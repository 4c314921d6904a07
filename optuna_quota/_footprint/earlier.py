"""What an earlier study teaches the next one."""

from __future__ import annotations

from typing import Any
from typing import TYPE_CHECKING

from optuna_quota._footprint.features import Feature
from optuna_quota._footprint.features import NumericFeature
from optuna_quota._footprint.footprint import Footprint
from optuna_quota._footprint.rows import FootprintRow


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


# A column that is 1 for trials of the earlier study and 0, as what is missing, for all others: how
# much faster or larger the other machine was is learned as the effect of one more parameter.
_EARLIER = "quota:earlier"


def earlier_rows(footprint: Footprint) -> list[FootprintRow]:
    """Return what a footprint was learned from, marked as of an earlier study."""
    from optuna.distributions import FloatDistribution

    contents = footprint.contents
    space = {part.name: distribution_of(part) for part in contents.features.parts}
    space[_EARLIER] = FloatDistribution(0.0, 1.0)
    return [
        FootprintRow(
            params={**point.params, _EARLIER: 1.0},
            distributions=space,
            usage=point.usage,
            censored=point.censored,
        )
        for point in contents.points
    ]


def distribution_of(part: Feature) -> BaseDistribution:
    """Return a distribution that gives the same columns."""
    from optuna.distributions import CategoricalDistribution
    from optuna.distributions import FloatDistribution
    from optuna.distributions import IntDistribution

    found: Any
    if not isinstance(part, NumericFeature):
        found = CategoricalDistribution(part.choices)
    elif part.scale == "log1p":
        found = IntDistribution(int(part.low), int(part.high))
    else:
        found = FloatDistribution(part.low, part.high, log=part.scale == "log")
    return found  # type: ignore[no-any-return]  # one of Optuna's
