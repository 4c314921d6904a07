"""What a meter is: the small protocol for a resource of the user's own."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence
from typing import Protocol
from typing import runtime_checkable

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

    A meter is read when the trial starts, then by the metering loop's thread ten times a second,
    or as seldom as its ``period`` says where it has one (seconds, an optional attribute), and once
    more when the trial ends. It should return at once: while it reads, the next look at memory has
    to wait. It may be asked for several trials, so it must not mind two threads.

    Trials in threads of one process have the same ``pids``: the growth of a total is then split
    evenly among them, and a peak, which can't be told apart, is not recorded.

    Attributes:
        name: An identifier. The trial table gets the column, ``Limits(custom={name: ...})`` sets
            the limit.
        peak: True where a trial's usage is the maximum over time of what is read (a size, a
            count), False where what is read is a running total: the trial's usage is then the
            growth since its start.
    """

    name: str
    peak: bool

    def read(self, pids: Sequence[int]) -> float | None:
        """Return the amount at this moment, None where it can't be told.

        Args:
            pids: The processes of the trial. An exception counts as None; the first is logged.
        """
        ...


def check_names(meters: Iterable[Meter]) -> tuple[Meter, ...]:
    """Return meters of the user's own whose names can be used.

    Raises:
        TypeError: If one is not a meter.
        ValueError: If a name is no identifier, is taken by a resource, or comes twice.
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
                "A meter's `name` must be an identifier that is no resource's and no word of the "
                f"trial table but got {meter.name!r}."
            )
        if meter.name in seen:
            raise ValueError(
                f"Each meter must have a name of its own but {meter.name!r} is twice."
            )
        seen.add(meter.name)
    return meters
