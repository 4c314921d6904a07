"""What is read from a process tree, and how a reader of it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from dataclasses import dataclass
import logging
import math
from typing import Protocol


_logger = logging.getLogger("optuna.quota.metering")


@dataclass(frozen=True)
class TreeReading:
    """One look at a process tree.

    Attributes:
        memory: Bytes that all its processes hold together at this moment, anonymous, shared and
            swapped out; None when unknown.
        cpu_time: CPU-seconds of all that ever belonged to it, the dead included; never falls.
            None when unknown.
        peak: The highest such memory of any one of its processes that no look saw, since the
            start (or the last :meth:`Tree.reset_peak`), in bytes, 0 without any; None where the
            kernel does not keep it.
        pids: Its processes.
    """

    memory: float | None
    cpu_time: float | None
    peak: float | None
    pids: tuple[int, ...]


class Tree(Protocol):
    """Reads one process tree."""

    def read(
        self, *, thorough: bool, without: Collection[int] = (), ceiling: float = math.inf
    ) -> TreeReading:
        """Return what the tree holds and has used.

        Args:
            thorough: False for memory alone as cheaply as it goes (what else is known is given
                as it was last), True for all of it.
            without: Roots of subtrees that belong to others.
            ceiling: The memory over which there is a breach, in bytes: where there may be one,
                what processes share is looked at more closely.
        """
        ...

    def glance(self) -> float | None:
        """Return the memory of the processes known so far, at the least possible cost.

        None when only :meth:`read` can tell: a process was created or has ended, or what they
        share has changed.
        """
        ...

    def age(self) -> float:
        """Return the seconds since the root was created."""
        ...

    def reset_peak(self) -> None:
        """Forget the peaks so far, where the kernel allows it."""
        ...

    def close(self) -> None:
        """Release what is held."""
        ...


# From a pid, and the reaper's where there is one.
OpenTree = Callable[..., Tree]


def open_tree(pid: int | None, reaper: int | None = None, outsiders: int = 0) -> Tree:
    """Return the cheapest true reader of the tree under a process.

    Args:
        pid: The root; None for this process.
        reaper: A process that inherits the tree's orphans, and has no other children than these
            and the root; None without one.
        outsiders: How many processes outside of the tree hold, at least, what it was forked with.

    Raises:
        ProcessLookupError: If there is no such process.
    """
    from optuna_quota._metering import proc_tree

    if proc_tree.is_available():
        try:
            return proc_tree.ProcTree(pid, reaper, outsiders=outsiders)
        except ProcessLookupError:
            raise
        except OSError as error:
            _logger.info(f"Processes are measured through psutil: /proc can't be read ({error}).")
    from optuna_quota._metering.psutil_tree import PsutilTree

    return PsutilTree(pid)
