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
    """

    resource: str
    limit: float
    observed: float
    seconds: float
    quota: bool = False
    forecast: bool = False

    @property
    def reason(self) -> str:
        """One sentence for a person."""
        resource = get_resource(self.resource)
        what = "what is left of the quota" if self.quota else "the limit"
        verb = "was heading for" if self.forecast else "reached"
        return (
            f"{resource.title[0].upper()}{resource.title[1:]} {verb} "
            f"{resource.format(self.observed)}, over {what} of {resource.format(self.limit)}, "
            f"{_units.format_seconds(self.seconds)} after the start."
        )
