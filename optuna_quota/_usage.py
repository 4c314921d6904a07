"""What a trial used, and the breach of a limit.

Values are frozen and can be pickled; numbers are SI base units: bytes, seconds, joules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optuna_quota import _units
from optuna_quota._limits import Amounts, nonnegative, split_custom
from optuna_quota._resources import ceiling_title, CHARGED_RESOURCES, get_resource, USAGE_RESOURCES
from optuna_quota._units import check_mapping


if TYPE_CHECKING:
    from optuna_quota.exceptions import LimitBreached


@dataclass(frozen=True, repr=False)
class Usage(Amounts):
    """What one trial used; an unknown amount is None, never 0.

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
        TypeError: If a value is neither a number nor text, nor for a time a timedelta.
    """

    memory: float | None = None
    wall_time: float | None = None
    cpu_time: float | None = None
    gpu_memory: float | None = None
    gpu_time: float | None = None
    energy: float | None = None
    custom: Mapping[str, float] = field(default_factory=dict, kw_only=True, hash=False)

    _fields = USAGE_RESOURCES

    def __post_init__(self) -> None:
        for name in USAGE_RESOURCES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, nonnegative(value, name))
        check_mapping(self.custom, "custom", "names of meters to numbers")
        custom = {name: nonnegative(v, name) for name, v in self.custom.items()}
        object.__setattr__(self, "custom", custom)

    def get(self, resource: str) -> float | None:
        """Return the amount of a resource, None when unknown."""
        name = CHARGED_RESOURCES.get(resource, resource)
        amount: float | None
        amount = getattr(self, name) if name in USAGE_RESOURCES else self.custom.get(name)
        return amount


def usage_from_amounts(amounts: Mapping[str, float]) -> Usage:
    """Return usage from amounts by resource, as :meth:`Usage.amounts` gives them."""
    known, custom = split_custom(amounts, USAGE_RESOURCES)
    return Usage(**known, custom=custom)


@dataclass(frozen=True)
class Breach:
    """A limit that a trial was over."""

    resource: str
    limit: float  # The limit in force, in SI base units
    observed: float  # What was measured, or what was forecast when ``forecast`` is True
    seconds: float  # Seconds from the start of the trial
    # True when the limit in force was what was left of a total quota of the study
    quota: bool = False
    # True when a predictive stop ended the trial before it was over the limit
    forecast: bool = False
    # True when the allocation that would have exceeded the limit was refused
    refused: bool = False

    @property
    def reason(self) -> str:
        """One sentence that explains the breach."""
        resource = get_resource(self.resource)
        limit = resource.format(self.limit)
        if self.resource == "wall_time" and not self.quota and not self.forecast:
            return f"Time limit of {limit} exceeded."
        what = ceiling_title(self.resource, quota=self.quota)
        room = f"{limit} {'was left' if self.quota else 'allowed'}"
        after = _units.format_seconds(self.seconds)
        if self.forecast:
            observed = resource.format(self.observed)
            return f"{what} about to be exceeded after {after}: heading for {observed}, {room}."
        verb = "asked for" if self.refused else "used"
        return f"{what} exceeded after {after}: {self._observed_text()} {verb}, {room}."

    def _observed_text(self) -> str:
        """Return what was observed, with enough digits to show that a peak is over its limit."""
        resource = get_resource(self.resource)
        observed, limit = resource.format(self.observed), resource.format(self.limit)
        if observed != limit or self.observed <= self.limit or not resource.peak:
            return observed
        number, *unit = limit.split(" ")
        for digits in (1, 2):
            closer = f"{float(number) * self.observed / self.limit:.{digits}f}"
            if float(closer) > float(number):
                return " ".join([closer, *unit])
        return f"more than {limit}"


def breach_error(breach: Breach, reason: str | None = None) -> LimitBreached:
    """Return the error for a breach, by default with its own reason."""
    # Here, as it imports Optuna, which the command line's help does without.
    from optuna_quota.exceptions import LimitBreached

    return LimitBreached(
        reason or breach.reason,
        resource=breach.resource,
        limit=breach.limit,
        observed=breach.observed,
        seconds=breach.seconds,
    )
