"""What the pictures ask of a footprint model."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from optuna_quota._footprint.footprint import Footprint
    from optuna_quota._records import Interval


def predict(footprint: Footprint, params: Mapping[str, Any], resource: str) -> Interval | None:
    """Return what a model expects of a point, None where it knows nothing of the resource.

    Args:
        footprint: A fitted model.
        params: The point.
        resource: The resource.
    """
    interval = footprint.intervals(params).get(resource)
    if interval is None:
        return None
    bounds = (interval.lower, interval.median, interval.upper)
    return interval if all(map(math.isfinite, bounds)) else None
