"""What the library knows about each computing resource: one table, asked everywhere."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
import math
from types import MappingProxyType
from typing import Any

from optuna_quota import _units


@dataclass(frozen=True)
class Resource:
    """What the library knows about one computing resource.

    Attributes:
        name: The word used everywhere: argument, attribute key, column.
        title: The word for people.
        peak: True when a trial's usage is a maximum over time, False when it is a total.
        parse: Text or number to SI base units.
        format: SI base units to text for a person.
        compact: SI base units to the shortest text that ``parse`` reads back.
    """

    name: str
    title: str
    peak: bool
    parse: Callable[[Any, str], float] = _units.parse_number
    format: Callable[[float], str] = _units.format_number
    compact: Callable[[float], str | int | float] = float


def _bytes(name: str, title: str) -> Resource:
    return Resource(
        name, title, True, _units.parse_bytes, _units.format_bytes, _units.compact_bytes
    )


def _seconds(name: str, title: str) -> Resource:
    return Resource(
        name, title, False, _units.parse_seconds, _units.format_seconds, _units.compact_seconds
    )


RESOURCES: Mapping[str, Resource] = MappingProxyType(
    {
        r.name: r
        for r in (
            _bytes("memory", "memory"),
            _seconds("wall_time", "wall time"),
            _seconds("trial_time", "trial time"),
            _seconds("cpu_time", "CPU time"),
            Resource("cpu_cores", "CPU cores", peak=True),
            _bytes("gpu_memory", "GPU memory"),
            _seconds("gpu_time", "GPU time"),
            Resource(
                "energy",
                "energy",
                peak=False,
                parse=_units.parse_joules,
                format=_units.format_joules,
                compact=_units.compact_joules,
            ),
            Resource("cost", "cost", peak=False),
            Resource("n_trials", "trials", peak=False, parse=_units.parse_count, compact=int),
        )
    }
)


LIMIT_RESOURCES = ("memory", "wall_time", "cpu_time", "cpu_cores", "gpu_memory", "gpu_time")


TOTAL_RESOURCES = (
    "n_trials",
    "wall_time",
    "trial_time",
    "cpu_time",
    "gpu_time",
    "energy",
    "cost",
)


HELD_RESOURCES = ("memory", "gpu_memory", "cpu_cores")


USAGE_RESOURCES = ("memory", "wall_time", "cpu_time", "gpu_memory", "gpu_time", "energy")


PRICED_RESOURCES = ("cpu_time", "gpu_time", "trial_time")


def get_resource(name: str) -> Resource:
    """Return what is known of a resource; one of a user's own meter is a plain peak number."""
    return RESOURCES.get(name) or Resource(name, name.replace("_", " "), peak=True)


def format_amount(resource: str, value: float | None) -> str:
    """Return an amount of a resource for a person, ``"unknown"`` for None."""
    return "unknown" if value is None else get_resource(resource).format(value)


def nonnegative(value: Any, name: str) -> float:
    if isinstance(value, str):
        return get_resource(name).parse(value, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        value = _number(value, name)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"`{name}` must be nonnegative and finite but got {value!r}.")
    return float(value)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"`{name}` must be a number or a string with its unit but got {value!r}.")
    return float(value)
