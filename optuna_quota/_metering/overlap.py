"""What the processes of a tree share among themselves: how much it is, and when to ask anew."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import dataclass
import math


# It is measured again when the tree's memory, or what may have ceased to be shared, has changed
# by this part of the whole.
_DRIFT = 0.1
# Where nothing has changed by as much, it is measured again after so many seconds.
_LATEST = 1.0
# The shortest times between two measurements, as multiples of the CPU time that one takes: while
# all is well, when there are other processes or there may be a breach, and before a verdict.
_CALM, _URGENT, _VERDICT = 50.0, 10.0, 4.0


@dataclass(frozen=True)
class Share:
    """What one process holds of memory, and what of it nobody else does, in bytes.

    Attributes:
        resident: All of it.
        private: What no other process holds.
        proportional: Anonymous and shared memory, each page divided by the number of its holders.
        file: The resident pages of files, such as those of libraries.
    """

    resident: int
    private: int
    proportional: int
    file: int


def together(shares: Collection[Share]) -> int:
    """Return what processes hold together, each page counted once: pure.

    The kernel tells how many hold a page, but not who. Pages of a forked process are often held by
    others than the tree as well, such as the template that it was forked from: to divide them by
    all their holders, as the proportional set size does, would count them for less than they are.
    So the larger of two sums is taken, neither of which is ever more than the truth. The first is
    exact for workers of one parent: all that one process holds, and what the others hold alone.
    The second is exact where nobody else holds anything.

    Args:
        shares: What each process holds.
    """
    if not shares:
        return 0
    private = sum(share.private for share in shares)
    around_one = private + max(share.resident - share.private for share in shares)
    divided = sum(share.proportional for share in shares) + max(share.file for share in shares)
    return max(around_one, divided)


class Overlap:
    """What is known of the overlap of a tree's processes, from one measurement to the next.

    In between, the memory is told from the plain sum, which costs a tenth of a microsecond a
    process where a measurement costs a millisecond a gigabyte. What that may miss is bounded: of a
    process that has come since, only its growth counts, and every page that ceases to be shared,
    because somebody wrote to it, costs its writer a page fault.
    """

    def __init__(self) -> None:
        self._bytes = 0
        self._members: frozenset[int] = frozenset()
        self._total = 0
        self._faulted = 0
        self._newcomers: dict[int, int] = {}
        self._at = -math.inf
        self._cost = 0.0

    def memory(self, sizes: Mapping[int, int]) -> int:
        """Return the memory of the tree in bytes: at least so much.

        Args:
            sizes: The resident bytes of each process.
        """
        total = sum(sizes.values())
        if len(sizes) < 2:
            return total
        if sizes.keys() != self._members:
            self._greet(sizes)
        known = total - self._bytes - sum(self._newcomers.values())
        return max(known, max(sizes.values()))

    def is_due(
        self, sizes: Mapping[int, int], ceiling: float, now: float, faulted: Callable[[], int]
    ) -> bool:
        """Return whether it is time to measure again.

        Args:
            sizes: The resident bytes of each process.
            ceiling: The memory over which there is a breach, infinite without a limit.
            now: The time in seconds.
            faulted: Tells the bytes of the pages that the processes have ever faulted in.
        """
        if len(sizes) < 2:
            return False
        age = (now - self._at) / self._cost if self._cost else math.inf
        if age < _VERDICT:
            return False
        if self.memory(sizes) > ceiling:
            return True
        if age < _URGENT:
            return False
        if sizes.keys() != self._members:
            return True
        total = sum(sizes.values())
        if total <= ceiling and age < _CALM:
            return False
        grown = total - self._total
        moved = faulted() - self._faulted if self._bytes else 0
        unshared = min(self._bytes, max(0, moved - max(0, grown)))
        if total - self._bytes + unshared > ceiling:
            return True
        drift = _DRIFT * self._total
        late = moved > 0 and now - self._at >= _LATEST
        return age >= _CALM and (abs(grown) > drift or unshared > drift or late)

    def take(self, shares: Mapping[int, Share], *, faulted: int, cost: float, now: float) -> None:
        """Take in a measurement.

        Args:
            shares: What each process holds; the dead are left out.
            faulted: The bytes of the pages that they had ever faulted in, just before.
            cost: The CPU-seconds that it took.
            now: The time in seconds.
        """
        self._members = frozenset(shares)
        self._newcomers.clear()
        self._total = sum(share.resident for share in shares.values())
        self._bytes = self._total - together(shares.values())
        self._faulted = faulted
        self._cost = cost
        self._at = now

    def _greet(self, sizes: Mapping[int, int]) -> None:
        """Take note of those that came since: a fork begins with pages that were there before."""
        for pid in self._newcomers.keys() - sizes.keys():
            del self._newcomers[pid]
        for pid in sizes.keys() - self._members - self._newcomers.keys():
            self._newcomers[pid] = sizes[pid]
