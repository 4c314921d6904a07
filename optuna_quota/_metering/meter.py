"""The protocol of users' own meters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from optuna_quota._records import is_reserved
from optuna_quota._resources import RESOURCES


@runtime_checkable
class Meter(Protocol):
    """Measures one resource of a trial that the library does not measure itself.

    Example:

        .. code-block:: python

            class ScratchSpace:
                name = "scratch"
                peak = True

                def read(self, pids):
                    return sum(f.stat().st_size for f in Path("/scratch").rglob("*"))


            pruner = QuotaPruner(limits=Limits(custom={"scratch": 2e9}), meters=[ScratchSpace()])

    A meter is read when the trial starts, then ten times a second by the metering loop's thread
    (or every ``period`` seconds, an optional attribute), and once more when the trial ends. It
    should return at once: memory is not measured meanwhile. It must be safe to call from two
    threads, for several trials.

    Trials in threads of one process have the same ``pids``: the growth of a total is then split
    evenly among them, and a peak, which can't be attributed, is not recorded.

    Attributes:
        name: An identifier: the column of the trial table, and ``Limits(custom={name: ...})``
            sets the limit.
        peak: True if a trial's usage is the maximum of the readings (a size, a count), False if
            readings are a running total, whose growth since its start is the trial's usage.
    """

    name: str
    peak: bool

    def read(self, pids: Sequence[int]) -> float | None:
        """Return the amount at this moment, None if unknown.

        Args:
            pids: The processes of the trial.

        An exception counts as None; the first is logged.
        """
        ...


def check_names(meters: Iterable[Meter]) -> tuple[Meter, ...]:
    """Check the user's own meters and return them as a tuple.

    Raises:
        TypeError: If one is not a meter.
        ValueError: If a name is no identifier, is reserved, or is used twice.
    """
    meters = tuple(meters)
    seen: set[str] = set()
    for meter in meters:
        if not isinstance(meter, Meter) or not isinstance(meter.peak, bool):
            raise TypeError(
                "A meter must have a `name`, a bool `peak` and a method `read(pids)` "
                f"but got {meter!r}."
            )
        name = str(meter.name)
        if not name.isidentifier() or name in RESOURCES or is_reserved(name):
            raise ValueError(
                "A meter's `name` must be an identifier other than a resource or a column of the "
                f"trial table but got {meter.name!r}."
            )
        if meter.name in seen:
            raise ValueError(f"Meters must have different names but got {meter.name!r} twice.")
        seen.add(meter.name)
    return meters
