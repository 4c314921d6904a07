"""Fake clocks, process trees and meters, for tests without sleeping or allocating.

Example:

    .. code-block:: python

        from optuna_quota.testing import fake_metering


        def test_a_hungry_trial_is_terminated():
            with fake_metering() as metering:
                study = optuna.create_study(
                    sampler=QuotaSampler(quota=Quota(cpu_time="1h")),
                    pruner=QuotaPruner(limits=Limits(memory="1GiB")),
                )

                def objective(trial):
                    metering.tree.memory = 2 * 2**30
                    if trial.should_prune():
                        raise optuna.TrialPruned
                    return 0.0

                study.optimize(objective, n_trials=1)
            assert study.trials[0].user_attrs["quota:outcome"] == "terminated"
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
import math
import os
from typing import Any

from optuna_quota._metering import replace_loop
from optuna_quota._metering.loop import MeteringLoop
from optuna_quota._metering.meter import check_names, Meter
from optuna_quota._metering.process_tree import TreeReading


__all__ = [
    "FakeClock",
    "FakeMeter",
    "FakeMetering",
    "FakeProcessTree",
    "check_meter",
    "fake_metering",
]


class FakeClock:
    """A clock that only :meth:`advance` moves.

    Example:

        .. code-block:: python

            clock = FakeClock()
            clock.advance(60)
            assert clock() == 60

    Args:
        now: Seconds at the start.
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move the clock forward.

        Args:
            seconds: By how much.

        Raises:
            ValueError: If it is negative.
        """
        if seconds < 0:
            raise ValueError(f"`seconds` must be nonnegative but got {seconds!r}.")
        self.now += seconds


class FakeProcessTree:
    """A process tree with figures that a test sets.

    Attributes:
        memory: Bytes that all its processes hold.
        cpu_time: CPU-seconds so far.
        peak: The highest bytes between readings, None if the kernel does not keep them.
        shared: Bytes that a quick reading counts too often, because processes share them.
        pids: Its processes.
        is_closed: Whether it was closed.
    """

    def __init__(
        self, memory: float | None = 0.0, cpu_time: float | None = 0.0, pids: Sequence[int] = ()
    ) -> None:
        self.memory = memory
        self.cpu_time = cpu_time
        self.peak: float | None = None
        self.shared = 0.0
        self.pids = tuple(pids) or (os.getpid(),)
        self.is_closed = False

    def read(
        self, *, thorough: bool, without: Collection[int] = (), ceiling: float = math.inf
    ) -> TreeReading:
        """Return the figures that are set; over the ceiling, without ``shared``."""
        pids = tuple(pid for pid in self.pids if pid not in without)
        memory = self.memory
        if memory is not None and memory + self.shared <= ceiling:
            memory += self.shared
        return TreeReading(memory, self.cpu_time, self.peak, pids)

    def reset_peak(self) -> None:
        """Reset the peak."""
        self.peak = None

    def close(self) -> None:
        """Set ``is_closed``."""
        self.is_closed = True


class FakeMeter:
    """A meter with a value that a test sets.

    Args:
        name: Its name.
        value: What it reads: an amount, None for unknown, or an exception that it raises.
        peak: Whether a trial's usage is the maximum of what is read, not its growth.
    """

    def __init__(
        self, name: str = "fake", value: float | BaseException | None = 0.0, *, peak: bool = True
    ) -> None:
        self.name = name
        self.peak = peak
        self.value = value
        self.reads = 0

    def read(self, pids: Sequence[int]) -> float | None:
        """Return the value that is set, or raise it."""
        self.reads += 1
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


class FakeMetering:
    """A metering loop on a fake clock and fake process trees, without a thread.

    Attributes:
        clock: The clock.
        tree: What trials in this process use.
        trees: What isolated trials use, by the pid of their root.
        loop: The loop.
    """

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.tree = FakeProcessTree()
        self.trees: dict[int, FakeProcessTree] = {}
        self.loop = MeteringLoop(
            clock=self.clock, open_tree=self._open, open_meters=lambda monitor: (), threaded=False
        )

    def advance(self, seconds: float) -> None:
        """Move the clock forward, and do what is due in between at its time.

        Args:
            seconds: By how much.
        """
        end = self.clock.now + seconds
        wait = self.loop.tick()
        while wait is not None and self.clock.now + wait < end:
            # By rounding, a deadline may stay slightly ahead of the clock.
            self.clock.advance(max(wait, 1e-9))
            wait = self.loop.tick()
        self.clock.now = max(self.clock.now, end)
        self.loop.tick()

    def _open(self, pid: int | None) -> FakeProcessTree:
        if pid is None:
            return self.tree
        return self.trees.setdefault(pid, FakeProcessTree(pids=[pid]))


@contextmanager
def fake_metering() -> Iterator[FakeMetering]:
    """Measure this process's trials with fakes inside the block."""
    fake = FakeMetering()
    before = replace_loop(fake.loop)
    try:
        yield fake
    finally:
        replace_loop(before)


def check_meter(meter: Meter, pids: Sequence[int] | None = None) -> None:
    """Check that a meter of your own follows the protocol.

    Example:

        .. code-block:: python

            def test_my_meter():
                check_meter(ScratchSpace("/scratch"))

    Args:
        meter: The meter.
        pids: Processes to read; by default this one.

    Raises:
        AssertionError: If it does not; the message says the rule and what was read.
    """
    try:
        check_names([meter])
    except (TypeError, ValueError) as error:
        raise AssertionError(str(error)) from error
    own = [os.getpid()] if pids is None else list(pids)
    first, second = _read(meter, own), _read(meter, own)
    if not meter.peak and first is not None and second is not None and second < first:
        raise AssertionError(
            f"A running total (`peak=False`) must not fall but {meter.name!r} went from {first!r} "
            f"to {second!r}."
        )
    _read(meter, [])
    _read(meter, [2**22 + 1])  # above the highest pid that Linux gives


def _read(meter: Meter, pids: Sequence[int]) -> float | None:
    value: Any = meter.read(pids)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AssertionError(f"`read` must return a number or None but got {value!r}.")
    if not math.isfinite(value) or value < 0:
        raise AssertionError(f"`read` must return a nonnegative, finite number but got {value!r}.")
    return float(value)
