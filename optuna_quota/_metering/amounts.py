"""Usage under construction."""

from __future__ import annotations

from optuna_quota._resources import Usage
from optuna_quota._resources import USAGE_RESOURCES


class Amounts:
    """What one trial used so far, by resource; what was never told is unknown."""

    __slots__ = ("_told", "_unknown", "_values")

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._unknown: set[str] = set()

    def raise_to(self, resource: str, value: float) -> None:
        """Take in a peak."""
        known = self._values.get(resource)
        if (known is None or value > known) and resource not in self._unknown:
            self._values[resource] = value

    def add(self, resource: str, amount: float) -> None:
        """Add to a total."""
        if resource not in self._unknown:
            self._values[resource] = self._values.get(resource, 0.0) + amount

    def forget(self, resource: str) -> None:
        """Let an amount be unknown for good: what is read later tells only a part."""
        self._unknown.add(resource)
        self._values.pop(resource, None)

    def know(self, resource: str, value: float) -> None:
        """Take in a figure for the whole trial, from whoever knows; the largest counts."""
        self._told[resource] = max(value, self._told.get(resource, 0.0))

    def by_resource(self) -> dict[str, float]:
        """Return what is known."""
        known = dict(self._values)
        for resource, value in self._told.items():
            known[resource] = max(value, known.get(resource, 0.0))
        return known

    def usage(self, elapsed: float) -> Usage:
        """Return it as a value, with the clock time."""
        amounts = self.by_resource()
        known = {n: v for n, v in amounts.items() if n in USAGE_RESOURCES}
        known["wall_time"] = max(elapsed, known.get("wall_time", 0.0))
        custom = {n: v for n, v in amounts.items() if n not in USAGE_RESOURCES}
        return Usage(**known, custom=custom)
