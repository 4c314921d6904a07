"""CPU time of a process tree whose members come and go: pure bookkeeping."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Times:
    """CPU times of one process at one moment, in seconds.

    Attributes:
        own: What it used itself.
        reaped: What its children had used that ended and were waited for, theirs included.
        parent: The identity of the process that it was found under, None for the root.
        foreign: True when it belongs to another trial; its time is not counted, nor when its
            parent inherits it.
    """

    own: float
    reaped: float = 0.0
    parent: Hashable | None = None
    foreign: bool = False

    @property
    def used(self) -> float:
        """All that is known under it."""
        return self.own + self.reaped


class TreeTime:
    """Sums CPU time over all processes that ever belonged to a tree; the sum never falls.

    The kernel adds the time of a child that was waited for to its parent's ``reaped``. A child
    that was not (its parent ignores it, or died first) just vanishes: what it had used when last
    seen is kept here.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._known: dict[Any, Times] = {}
        self._settled = 0.0  # of the vanished that nobody inherited, less what foreigners left

    def update(self, now: Mapping[Any, Times]) -> float:
        """Take in the times of all living members by identity; return the total in seconds."""
        gone = [(who, times) for who, times in self._known.items() if who not in now]
        owed: dict[Hashable | None, float] = {}
        foreign: dict[Hashable | None, float] = {}
        for _, times in gone:
            heir = self._heir(times, now)
            purse = foreign if times.foreign else owed
            purse[heir] = purse.get(heir, 0.0) + times.used
        for heir in {**owed, **foreign}:
            inherited = self._inherited(heir, now)
            not_ours = min(foreign.get(heir, 0.0), inherited)
            unclaimed = max(0.0, owed.get(heir, 0.0) - (inherited - not_ours))
            self._settled += unclaimed - not_ours
        # What a process had used before it became another trial's was counted: that stays.
        self._settled += sum(self._known[who].used for who in now if self._turns_foreign(who, now))
        self._known = dict(now)
        alive = sum(times.used for times in _ours(now.values()))
        self.total = max(self.total, alive + self._settled)
        return self.total

    def _turns_foreign(self, who: Hashable, now: Mapping[Any, Times]) -> bool:
        known = self._known.get(who)
        return known is not None and now[who].foreign and not known.foreign

    def _heir(self, times: Times, now: Mapping[Any, Times]) -> Hashable | None:
        """Return the nearest ancestor alive: the dead in between passed on what they inherited."""
        parent = times.parent
        while parent is not None and parent not in now:
            parent = self._known[parent].parent if parent in self._known else None
        return parent

    def _inherited(self, heir: Hashable | None, now: Mapping[Any, Times]) -> float:
        if heir is None or heir not in now:
            return 0.0
        before = self._known[heir].reaped if heir in self._known else 0.0
        return max(0.0, now[heir].reaped - before)


def _ours(times: Iterable[Times]) -> Iterable[Times]:
    return (t for t in times if not t.foreign)
