"""What the processes of a tree share among themselves: how much it is, and when to ask anew."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import dataclass
import math


# It is measured again when what may have come to be shared, or ceased to be, has changed by this
# part of the whole.
_DRIFT = 0.1
# Where nothing has changed by as much, it is measured again after so many seconds, unless what is
# shared is a smaller part of the whole than this.
_LATEST = 1.0
_NEGLIGIBLE = 0.02
# The shortest times between two measurements, as multiples of the CPU time that one takes: while
# all is well, when there are other processes or there may be a breach, and before a verdict.
_CALM, _URGENT, _VERDICT = 50.0, 10.0, 1.0
# CPU-seconds that a measurement may take before a verdict that would be the same without it.
_AFFORDABLE = 0.001


@dataclass(frozen=True)
class ProcessMemory:
    """What one process holds of anonymous and shared memory, swapped out or not, in bytes.

    Attributes:
        held: All of it.
        proportional: The same, each page divided by the number of its holders.
        shareable: What of it is shared memory.
        common: Its anonymous pages that others hold too, after a fork.
        common_part: The same, each page divided by the number of its holders.
    """

    held: int
    proportional: int
    shareable: int = 0
    common: int = 0
    common_part: int = 0


def together(shares: Collection[ProcessMemory]) -> int:
    """Return what processes hold together: the sum of their proportional parts."""
    return sum(share.proportional for share in shares)


@dataclass(frozen=True)
class InheritedPages:
    """Pages that a tree's processes have from the process that they were forked from.

    Attributes:
        size: The bytes.
        members: How many processes of the tree hold them.
        holders: How many processes hold them in all, on average.
    """

    size: int
    members: int
    holders: float

    def part(self, outsiders: float | None = None) -> float:
        """Return the tree's part of them in bytes.

        Args:
            outsiders: How many hold them outside of the tree; None for as many as there are.
        """
        holders = self.holders if outsiders is None else self.members + outsiders
        return self.size * self.members / max(1.0, holders)


def find_inherited(
    shares: Collection[ProcessMemory], root: ProcessMemory, lender: ProcessMemory
) -> InheritedPages:
    """Return what processes hold of the pages that were there before their tree: pure.

    The kernel tells how many hold a page, but not who. The supervisor was forked from the same
    process as the tree and writes to next to nothing, so its common pages are those that the tree
    began with, and tell how many hold them on average.

    Args:
        shares: What each process of the tree holds, the root's included.
        root: The root's.
        lender: The supervisor's; not looked at while the root is alone.
    """
    if len(shares) == 1:
        return InheritedPages(root.common, 1, root.common / max(1, root.common_part))
    lent = min(root.common, lender.common)
    members = sum(share.common >= lent / 2 for share in shares) if lent else 0
    return InheritedPages(lent, members, lender.common / max(1, lender.common_part))


@dataclass(frozen=True)
class TreeMemory:
    """What the processes of a tree hold, each by itself, in bytes.

    Attributes:
        sizes: The anonymous, shared and swapped memory of each.
        shareable: What of their sum is shared memory.
    """

    sizes: Mapping[int, int]
    shareable: int = 0

    @property
    def total(self) -> int:
        """The plain sum, in which what is shared counts for each."""
        return sum(self.sizes.values())


class SharedPages:
    """What is known of the overlap of a tree's processes, from one measurement to the next.

    In between, the memory is told from the plain sum, which costs a microsecond a process where a
    measurement costs 0.1 ms and up to 10 ms a gigabyte. What that may miss is bounded: of a
    process that has come since, only its growth counts, and every page that ceases to be shared,
    because somebody wrote to it, costs its writer a page fault.
    """

    def __init__(self) -> None:
        self._bytes = 0
        self._then = TreeMemory({})
        self._faulted = 0
        self._newcomers: dict[int, int] = {}
        self._at = -math.inf
        self._cost = 0.0

    @property
    def known(self) -> int:
        """What the plain sum counts too much, as last measured, in bytes."""
        return self._bytes

    def memory(self, held: TreeMemory) -> int:
        """Return the memory of the tree in bytes: at least so much.

        Anonymous pages come to be shared by a fork alone, which makes a new process, so that what
        is added of them counts at once. What is added of shared memory, others may hold already.

        Args:
            held: What the processes hold.
        """
        return max(0, self.at_most(held) - max(0, held.shareable - self._then.shareable))

    def at_most(self, held: TreeMemory) -> int:
        """Return the same in which all that is added of shared memory counts.

        Args:
            held: What the processes hold.
        """
        if held.sizes.keys() != self._then.sizes.keys():
            self._greet(held.sizes)
        return held.total - self._bytes - sum(self._newcomers.values())

    def has_newcomers(self, held: TreeMemory) -> bool:
        """Return whether there are processes that came since, the first ones not counted."""
        return bool(self._then.sizes) and not held.sizes.keys() <= self._then.sizes.keys()

    def is_due(
        self, held: TreeMemory, ceiling: float, now: float, faulted: Callable[[], int]
    ) -> bool:
        """Return whether it is time to measure again.

        Args:
            held: What the processes hold.
            ceiling: The memory over which there is a breach, infinite without a limit.
            now: The time in seconds.
            faulted: Tells the bytes of the pages that the processes have ever faulted in.
        """
        if not held.sizes:
            return False
        age = (now - self._at) / self._cost if self._cost else math.inf
        if age < _VERDICT:
            return False
        if self.at_most(held) > ceiling:
            return self.memory(held) <= ceiling or self._likely_cost(held) <= _AFFORDABLE
        if age < _URGENT:
            return False
        if held.sizes.keys() != self._then.sizes.keys():
            return True
        total, then = held.total, self._then.total
        if total <= ceiling and age < _CALM:
            return False
        moved = faulted() - self._faulted if self._bytes else 0
        unshared = min(self._bytes, max(0, moved - max(0, total - then)))
        if total - self._bytes + unshared > ceiling:
            return True
        drift = _DRIFT * then
        shared = abs(held.shareable - self._then.shareable)
        late = moved > 0 and now - self._at >= _LATEST and self._bytes > _NEGLIGIBLE * total
        has_changed = max(shared, then - total, unshared) > drift
        return age >= _CALM and (has_changed or late)

    def _likely_cost(self, held: TreeMemory) -> float:
        return self._cost * max(1.0, held.total / max(1, self._then.total))

    def take(
        self,
        shares: Mapping[int, ProcessMemory],
        *,
        faulted: int,
        cost: float,
        now: float,
        lent: int = 0,
    ) -> None:
        """Take in a measurement.

        Args:
            shares: What each process holds; the dead are left out.
            lent: What of their sum is not to count.
            faulted: The bytes of the pages that they had ever faulted in, just before.
            cost: The CPU-seconds that it took.
            now: The time in seconds.
        """
        self._newcomers.clear()
        sizes = {pid: share.held for pid, share in shares.items()}
        self._then = TreeMemory(sizes, sum(share.shareable for share in shares.values()))
        # What was added while they were read one by one is no overlap.
        self._bytes = max(0, self._then.total - together(shares.values()) + lent)
        self._faulted = faulted
        self._cost = cost
        self._at = now

    def _greet(self, sizes: Mapping[int, int]) -> None:
        """Take note of those that came since: a fork begins with pages that were there before."""
        for pid in self._newcomers.keys() - sizes.keys():
            del self._newcomers[pid]
        for pid in sizes.keys() - self._then.sizes.keys() - self._newcomers.keys():
            self._newcomers[pid] = sizes[pid]
