"""What one trial used, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Literal

from optuna_quota._resources.resource import get_resource
from optuna_quota._resources.resource import nonnegative
from optuna_quota._resources.resource import USAGE_RESOURCES


Outcome = Literal["completed", "pruned", "terminated", "rejected", "failed"]


Isolation = Literal["process", "thread", "shared"]


OUTCOMES: tuple[Outcome, ...] = ("completed", "pruned", "terminated", "rejected", "failed")


@dataclass(frozen=True)
class Usage:
    """What one trial used; what is not known is None, never 0.

    Example:

        .. code-block:: python

            footprint = Usage(memory=2 * 2**30, wall_time=90.0)

    Args:
        memory: Peak memory of the trial's whole process tree, in bytes: anonymous, shared (divided
            among its holders) and swapped out, without pages of files.
        wall_time: Seconds on the clock.
        cpu_time: CPU-seconds.
        gpu_memory: Peak GPU memory in bytes over all visible GPUs.
        gpu_time: Busy GPU-seconds.
        energy: Joules.
        custom: What the user's own meters read, by the name of the meter.

    Raises:
        ValueError: If a value is negative or not finite, has no unit as text, or an unknown one.
        TypeError: If a value is neither a number nor text.
    """

    memory: float | None = None
    wall_time: float | None = None
    cpu_time: float | None = None
    gpu_memory: float | None = None
    gpu_time: float | None = None
    energy: float | None = None
    custom: Mapping[str, float] = field(default_factory=dict, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        for name in USAGE_RESOURCES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, nonnegative(value, name))
        custom = {str(name): nonnegative(v, name) for name, v in self.custom.items()}
        object.__setattr__(self, "custom", custom)

    def amounts(self) -> dict[str, float]:
        """Return what is known, by resource, in SI base units."""
        values = ((name, getattr(self, name)) for name in USAGE_RESOURCES)
        known = {name: value for name, value in values if value is not None}
        return {**known, **self.custom}

    def get(self, resource: str) -> float | None:
        """Return the amount of a resource, None when unknown."""
        if resource in USAGE_RESOURCES:
            value: float | None = getattr(self, resource)
            return value
        if resource == "trial_time":
            return self.wall_time
        return self.custom.get(resource)

    def __repr__(self) -> str:
        shown = (f"{k}={get_resource(k).compact(v)!r}" for k, v in self.amounts().items())
        return f"Usage({', '.join(shown)})"
