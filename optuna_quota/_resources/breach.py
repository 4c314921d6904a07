"""A limit that a trial was over."""

from __future__ import annotations

from dataclasses import dataclass

from optuna_quota import _units
from optuna_quota._resources.resource import get_resource


@dataclass(frozen=True)
class Breach:
    """A limit that a trial was over.

    Attributes:
        resource: The resource.
        limit: The limit in force, in SI base units.
        observed: What was measured, or what was forecast when ``forecast`` is True.
        seconds: Seconds from the start of the trial.
        quota: True when the limit in force was what was left of a total quota of the study.
        forecast: True when the trial was stopped before it was over, by a predictive stop.
        refused: True when an allocation was refused that would have made it so much.
    """

    resource: str
    limit: float
    observed: float
    seconds: float
    quota: bool = False
    forecast: bool = False
    refused: bool = False

    @property
    def reason(self) -> str:
        """One sentence for a person."""
        resource = get_resource(self.resource)
        limit = resource.format(self.limit)
        if self.resource == "wall_time" and not self.quota and not self.forecast:
            return f"Time limit of {limit} exceeded."
        title = f"{resource.title[0].upper()}{resource.title[1:]}"
        what = f"{title} {'quota' if self.quota else 'limit'}"
        room = f"{limit} {'left' if self.quota else 'allowed'}"
        after = _units.format_seconds(self.seconds)
        if self.forecast:
            observed = resource.format(self.observed)
            return f"{what} about to be exceeded after {after}: heading for {observed}, {room}."
        verb = "asked for" if self.refused else "used"
        return f"{what} exceeded after {after}: {_told_apart(self)} {verb}, {room}."


def _told_apart(breach: Breach) -> str:
    """Return what was observed with as many digits as show that a peak is over its limit."""
    resource = get_resource(breach.resource)
    observed, limit = resource.format(breach.observed), resource.format(breach.limit)
    if observed != limit or breach.observed <= breach.limit or not resource.peak:
        return observed
    number, *unit = limit.split(" ")
    for digits in (1, 2):
        closer = f"{float(number) * breach.observed / breach.limit:.{digits}f}"
        if float(closer) > float(number):
            return " ".join([closer, *unit])
    return f"more than {limit}"
