"""The table of computing resources.

To add a resource, add a row, a field of ``Usage`` (``_usage.py``), one of ``Limits`` or ``Quota``
(``_limits.py``) if it can be limited, and a meter, opened in ``_metering/loop.py``. Amounts are in
SI base units: bytes, seconds, joules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args, Literal

from optuna_quota import _units
from optuna_quota._units import BYTES, COUNT, JOULES, NUMBER, SECONDS


Outcome = Literal["completed", "pruned", "terminated", "rejected", "preempted", "failed"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Isolation = Literal["process", "thread", "shared"]


@dataclass(frozen=True)
class Resource:
    """One computing resource: a row of the table."""

    name: str  # The name everywhere: argument, attribute key, column
    title: str  # The name in messages
    unit: _units.Unit = NUMBER  # How amounts are parsed and formatted
    # True when a trial's usage is a maximum over time, False when it is a total
    peak: bool = False
    # What measures it: ``"clock"``, ``"process"``, ``"gpu"``, ``"processor"`` (the processor's own
    # energy counters)
    meters: tuple[str, ...] = ()
    measured: bool = False  # Whether a trial's :class:`Usage` has it
    limited: bool = False  # Whether :class:`Limits` has it
    # How :class:`Quota` counts it: ``"total"`` over the study, or ``"held"`` by all trials that
    # run at one moment on one host
    quota: Literal["total", "held"] | None = None
    # For a total that is the sum over trials of what they used: the name of that usage
    charged_from: str | None = None
    priced: bool = False  # Whether it can have a price

    def format(self, value: float) -> str:
        """Return an amount as text with its unit."""
        return self.unit.format(value)


# fmt: off
_TABLE = (
    Resource("n_trials", "trials", COUNT, quota="total"),
    Resource("memory", "memory", BYTES, peak=True, meters=("process",), measured=True,
             limited=True, quota="held"),
    Resource("wall_time", "wall time", SECONDS, meters=("clock",), measured=True,
             limited=True, quota="total"),
    Resource("trial_time", "trial time", SECONDS, meters=("clock",),
             quota="total", charged_from="wall_time", priced=True),
    Resource("cpu_time", "CPU time", SECONDS, meters=("process",), measured=True,
             limited=True, quota="total", charged_from="cpu_time", priced=True),
    Resource("cpu_cores", "CPU cores", NUMBER, peak=True, meters=("process",),
             limited=True, quota="held"),
    Resource("gpu_memory", "GPU memory", BYTES, peak=True, meters=("gpu",), measured=True,
             limited=True, quota="held"),
    Resource("gpu_time", "GPU time", SECONDS, meters=("gpu",), measured=True,
             limited=True, quota="total", charged_from="gpu_time", priced=True),
    Resource("energy", "energy", JOULES, meters=("gpu", "processor"), measured=True,
             quota="total", charged_from="energy"),
    Resource("cost", "cost", NUMBER, quota="total"),
)
# fmt: on
RESOURCES: Mapping[str, Resource] = MappingProxyType({r.name: r for r in _TABLE})

USAGE_RESOURCES = tuple(r.name for r in _TABLE if r.measured)
LIMIT_RESOURCES = tuple(r.name for r in _TABLE if r.limited)
TOTAL_RESOURCES = tuple(r.name for r in _TABLE if r.quota == "total")
HELD_RESOURCES = tuple(r.name for r in _TABLE if r.quota == "held")
PRICED_RESOURCES = tuple(r.name for r in _TABLE if r.priced)
# Totals by resource, and the usage that each trial adds to them.
CHARGED_RESOURCES: Mapping[str, str] = MappingProxyType(
    {r.name: r.charged_from for r in _TABLE if r.charged_from}
)
# What one trial's own clock says, whether the ceiling is a limit or what is left of a quota.
CLOCK_RESOURCES = tuple(r.name for r in _TABLE if "clock" in r.meters)
GPU_RESOURCES = tuple(r.name for r in _TABLE if "gpu" in r.meters)


def get_resource(name: str) -> Resource:
    """Return a resource by name; one of a user's own meter is a plain number and a peak."""
    return RESOURCES.get(name) or Resource(name, name.replace("_", " "), peak=True)


def format_amount(resource: str, value: float | None) -> str:
    """Return an amount of a resource as text, ``"unknown"`` for None."""
    return "unknown" if value is None else get_resource(resource).format(value)


def ceiling_title(resource: str, *, quota: bool) -> str:
    """Return what a sentence calls a ceiling on a trial, such as "Memory limit"."""
    # A trial's time may be what is left of the study's clock time or of its trials' time.
    title = "time" if quota and resource == "wall_time" else get_resource(resource).title
    return f"{title[0].upper()}{title[1:]} {'quota' if quota else 'limit'}"
