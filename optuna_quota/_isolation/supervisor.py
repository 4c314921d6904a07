"""The supervisor of one trial: measures its memory, stops it, and leaves nothing behind.

A process of its own, for three reasons. As a subreaper it inherits every orphan of the trial,
whatever session or parent that gave itself. It never waits for the interpreter lock of a busy
study. And it outlives the study's process by the instant that it takes to end the trial.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import resource
import select
import signal
import socket
import time

from optuna_quota._isolation import processes
from optuna_quota._isolation.cgroup import CgroupLeaf
from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.control import BeginMonitoring
from optuna_quota._isolation.control import Breached
from optuna_quota._isolation.control import Interrupt
from optuna_quota._isolation.control import Kill
from optuna_quota._isolation.control import Leave
from optuna_quota._isolation.control import ObjectiveBegins
from optuna_quota._isolation.control import Paused
from optuna_quota._isolation.control import StopFor
from optuna_quota._isolation.ending import Ended
from optuna_quota._isolation.ending import Killer
from optuna_quota._isolation.rlimits import DataLimit
from optuna_quota._isolation.stop import STOP_SIGNAL
from optuna_quota._isolation.suspension import Suspension
from optuna_quota._metering.breach import is_breach
from optuna_quota._metering.linux_process_tree import LinuxProcessTree
from optuna_quota._metering.timing import ASSUMED_GROWTH
from optuna_quota._metering.timing import fastest_growth
from optuna_quota._metering.timing import LONGEST_INTERVAL
from optuna_quota._metering.timing import RunningClock
from optuna_quota._metering.timing import sampling_interval
from optuna_quota._resources import Breach


# What a trial that was told to stop for its memory may still grow by, in bytes: its handlers need
# some, and one that goes on allocating is not to be waited for.
GRACE_MARGIN = 4 * 2**20

# What the kernel itself takes for each byte that a trial holds: 8 bytes for a page of 4 KiB.
PAGE_TABLES = 1 / 512

# Seconds between the first looks at a trial.
YOUNGEST_WAIT = 0.001

# Seconds that processes get to end by themselves once the trial's own has: those that it has told
# to, and those that remove shared memory and temporary files.
LEAVING_TIME = 0.1
CLEANING_TIME = 2.0

# Seconds between looks at whether the study's process is stopped.
_SUSPENSION_PERIOD = 0.05


class Supervisor:
    """Minds one trial from its start until nothing of it is left.

    Args:
        control: The connection to the study's process.
        child: The trial's process, a child of this one.
        link: The connection to the trial's process, which says when its objective begins and
            reads why it is stopped.
        parent: A pidfd of the study's process.
        crash_file: Where the trial's process writes its traceback when it dies of a signal.
        leaf: The trial's control group, None without one.
        order: What is to be enforced, where that is known before the first message. Then this
            process was forked from the study's, and the trial in turn: what they have of its
            memory is the study's.
    """

    def __init__(
        self,
        control: Channel,
        child: int,
        *,
        link: socket.socket,
        parent: int,
        crash_file: int,
        leaf: CgroupLeaf | None,
        order: BeginMonitoring | None = None,
    ) -> None:
        self._control = control
        self._child = child
        self._child_handle = os.pidfd_open(child)
        self._link: socket.socket = link
        self._parent = parent
        self._crash_file = crash_file
        self._leaf = leaf
        self._gauge = _MemoryGauge(child, lends=order is not None)
        self._oom_kills = 0
        self._order: BeginMonitoring | None = None
        self._ordered_at = 0.0
        self._has_begun = False
        # Deadlines and limits on time leave out pauses, of this process and of the study's.
        self._clock = RunningClock()
        self._suspension = Suspension(parent)
        self._suspension_due = 0.0
        self._suspended_at: float | None = None
        self._began = self._clock()
        self._data_limit: DataLimit | None = None
        self._data_due = 0.0
        self._breach: Breach | None = None
        self._is_told = False
        self._deadline: float | None = None
        self._killer_then: Killer = "request"
        self._paused_at: float | None = None
        self._pause_told = False
        self._killer: Killer | None = None
        self._exitcode: int | None = None
        if order is not None:
            self._begin_monitoring(order)

    def run(self) -> Ended:
        """Mind the trial to its end."""
        poll = select.poll()
        link = self._link.fileno()
        for handle in (self._control.fileno(), self._child_handle, self._parent, link):
            poll.register(handle, select.POLLIN)
        while True:
            wait = self._tick()
            self._clock.fall_asleep(wait)
            ready = {handle for handle, _ in _wait(poll, wait)}
            self._clock.wake_up()
            if self._control.fileno() in ready or self._control.pending():
                self._obey()
            # After the first order, which is always sent before the objective can begin.
            if link in ready:
                poll.unregister(link)
                self._begin()
            if self._parent in ready:
                self._kill("request")
            if self._child_handle in ready or self._exitcode is not None:
                break
        return self._finish()

    def _tick(self) -> float | None:
        """Do what is due; return the seconds until something is, None while it is not in use."""
        self._exitcode = processes.reap().get(self._child, self._exitcode)
        if self._exitcode is not None:
            return 0.0
        if self._order is None:
            return None
        now = self._clock()
        if self._is_suspended(now):
            return _SUSPENSION_PERIOD
        if self._deadline is not None and now >= self._deadline:
            self._kill(self._killer_then)
        self._watch_pause(now)
        wait = LONGEST_INTERVAL
        if self._has_begun:
            wait = self._watch_memory(now)
        if self._deadline is not None:
            wait = min(wait, max(0.0, self._deadline - now))
        return wait

    def _is_suspended(self, now: float) -> bool:
        """Return whether the trial is stopped because its study is; then no time passes."""
        if self._suspended_at is not None:
            self._clock.skip(now - self._suspended_at)
        elif now < self._suspension_due:
            return False
        self._suspension.look()
        now = self._clock()
        self._suspended_at = now if self._suspension.is_on else None
        self._suspension_due = now + _SUSPENSION_PERIOD
        return self._suspension.is_on

    def _obey(self) -> None:
        try:
            order = self._control.receive()
        except (EOFError, OSError):
            # The study's process is gone, or doesn't want to hear of the trial any more.
            self._kill("request")
            return
        if isinstance(order, BeginMonitoring):
            self._begin_monitoring(order)
        elif isinstance(order, StopFor):
            self._stop(order.breach, order.grace_period)
        elif isinstance(order, Interrupt):
            self._tell(KeyboardInterrupt(), order.grace_period, "request")
        elif isinstance(order, Leave):
            leave = self._clock() + order.seconds
            self._deadline = leave if self._deadline is None else min(leave, self._deadline)
        elif isinstance(order, Kill):
            self._kill("request")

    def _begin_monitoring(self, order: BeginMonitoring) -> None:
        self._order, self._ordered_at = order, self._clock()
        self._gauge.outsiders = order.outsiders
        processes.be_on_time()
        self._oom_kills = processes.count_oom_kills()

    def _begin(self) -> None:
        """Measure and enforce from now on, if the objective begins now."""
        try:
            begins = pickle.loads(self._link.recv(1 << 16))
        except (OSError, EOFError):
            return  # the trial has ended without
        assert isinstance(begins, ObjectiveBegins) and self._order is not None
        order = self._order
        self._has_begun = True
        self._began = self._clock()
        if order.memory is None:
            return
        if begins.data_limit is not None:
            self._data_limit = DataLimit(
                self._child, order.memory, begins.data_limit, strict=order.strict_memory
            )
        if self._leaf is not None:
            # The kernel kills where a trial that is told to stop goes on to grow as well.
            room = order.memory - self._gauge.read(self._began) + GRACE_MARGIN
            with contextlib.suppress(OSError):
                self._leaf.limit_memory(room + PAGE_TABLES * order.memory)

    def _watch_memory(self, now: float) -> float:
        """Measure; stop the trial when it is over; return how long to wait."""
        assert self._order is not None
        limit = math.inf if self._order.memory is None else self._order.memory
        is_told = self._breach is not None and self._breach.resource == "memory"
        if self._breach is not None and is_told:
            limit = max(limit, self._breach.observed) + GRACE_MARGIN
        # Whether one that is over its limit goes on to grow needs no exact reading.
        memory = self._gauge.read(now, math.inf if is_told else limit)
        if is_told:
            memory = max(memory, self._gauge.at_most())
        # What is soon over is looked at often: a short trial's peak is seen too.
        wait = min(LONGEST_INTERVAL, max(YOUNGEST_WAIT, (now - self._began) / 8))
        if limit == math.inf:
            return wait
        if self._data_limit is not None and now >= self._data_due:
            self._data_due = now + self._data_limit.update(memory)
        if is_breach("memory", memory, limit):
            if is_told:
                self._kill("breach")
            else:
                self._find_breach(memory, limit, now)
        wait = min(wait, sampling_interval(limit - memory, self._gauge.growth))
        return wait if self._data_limit is None else min(wait, max(0.0, self._data_due - now))

    def _find_breach(self, memory: float, limit: float, now: float) -> None:
        assert self._order is not None
        elapsed = self._order.elapsed + now - self._ordered_at
        breach = Breach("memory", limit, memory, elapsed, quota=self._order.quota)
        if self._is_told:
            # It was told to stop for something else already and goes on to grow.
            self._kill("breach")
            return
        with contextlib.suppress(OSError):
            self._control.send(Breached(breach))
        self._stop(breach, self._order.grace_period)

    def _stop(self, breach: Breach, grace_period: float) -> None:
        if not self._is_told:
            self._breach = breach
            self._tell(breach, grace_period, "breach")

    def _tell(self, why: Breach | KeyboardInterrupt, grace_period: float, killer: Killer) -> None:
        """Ask the trial to stop, once."""
        if self._is_told:
            return
        self._is_told = True
        if grace_period <= 0:
            self._kill(killer)
            return
        self._killer_then = killer
        self._deadline = self._clock() + grace_period
        with contextlib.suppress(OSError):
            self._link.send(pickle.dumps(why))
        for number in (STOP_SIGNAL, signal.SIGCONT):
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._child_handle, number)

    def _kill(self, killer: Killer) -> None:
        """Kill the trial's own process now; what it started follows when it is gone."""
        self._killer = self._killer or killer
        self._deadline = None
        if self._leaf is not None:
            self._leaf.kill()
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._child_handle, signal.SIGKILL)

    def _watch_pause(self, now: float) -> None:
        """Kill a process that was stopped by a signal and stays so: it would hang the study."""
        assert self._order is not None
        patience = self._order.grace_period
        if processes.state_of(self._child) != "T":
            self._paused_at, self._pause_told = None, False
        elif self._paused_at is None:
            # Whoever stops all processes, as a cluster that suspends a job, stops one by one.
            self._paused_at = now
        elif not self._pause_told and now > self._paused_at + 2 * _SUSPENSION_PERIOD:
            self._pause_told = True
            with contextlib.suppress(OSError):
                self._control.send(Paused(patience))
        elif now - self._paused_at >= patience:
            self._kill("stopped")

    def _finish(self) -> Ended:
        while self._exitcode is None:
            self._exitcode = processes.reap().get(self._child)
        leftovers = self._sweep()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        leaf_oom_kills = self._close_leaf()
        return Ended(
            exitcode=self._exitcode,
            killer=self._killer,
            memory=self._gauge.peak or None,
            unseen_memory=self._gauge.unseen_peak or None,
            cpu_time=used.ru_utime + used.ru_stime,
            leftovers=leftovers,
            oom_kills=self._count_oom_kills(),
            leaf_oom_kills=leaf_oom_kills,
            traceback=self._read_crash_file(),
        )

    def _count_oom_kills(self) -> int:
        # To read all statistics of the host takes longer than the rest: for a victim only.
        if self._exitcode != -signal.SIGKILL:
            return 0
        return processes.count_oom_kills() - self._oom_kills

    def _close_leaf(self) -> int:
        if self._leaf is None:
            return 0
        kills = self._leaf.oom_kills()
        self._leaf.remove()
        return kills

    def _read_crash_file(self) -> str:
        os.lseek(self._crash_file, 0, os.SEEK_SET)
        return os.read(self._crash_file, 1 << 16).decode(errors="replace")

    def _sweep(self) -> tuple[str, ...]:
        """End all that is left of the trial; return the names of what it had to kill."""
        leftovers: dict[int, str] = {}
        start = time.monotonic()
        patience = LEAVING_TIME if self._killer is None else 0.0
        while True:
            processes.reap()
            left = processes.descendants()
            if not left:
                return tuple(leftovers.values())
            age = time.monotonic() - start
            cleaners = {pid for pid in left if processes.is_cleaner(pid)}
            doomed = left if age > CLEANING_TIME else [p for p in left if p not in cleaners]
            if age >= patience and doomed:
                if self._killer is None:
                    alive = (pid for pid in doomed if not processes.has_ended(pid))
                    leftovers.update({pid: processes.name_of(pid) for pid in alive})
                processes.kill(doomed, left)
            time.sleep(0.0005)


class _MemoryGauge:
    """The memory of the trial's tree, and of the orphans that this process inherits.

    Args:
        child: The trial's process, a child of this one.
        lends: Whether the study's process lends it memory.
    """

    def __init__(self, child: int, *, lends: bool) -> None:
        self.peak = 0.0
        self.growth = ASSUMED_GROWTH
        self._child = child
        self.outsiders = 0
        self._lends = lends
        self._tree: LinuxProcessTree | None = None
        self.unseen_peak = 0.0
        self._last: tuple[float, float] | None = None
        self._thorough_due = 0.0

    def read(self, now: float, limit: float = math.inf) -> float:
        """Return the memory now, in bytes.

        Args:
            now: The time.
            limit: What a verdict hangs on.
        """
        if self._tree is None:
            self._tree = LinuxProcessTree(
                self._child,
                reaper=os.getpid(),
                forked_from_study=self._lends,
                outsiders=self.outsiders,
            )
            self._tree.reset_peak()
        # To look at each process costs more with each one.
        thorough = now >= self._thorough_due
        start = time.thread_time()
        found = self._tree.read(thorough=thorough, ceiling=limit)
        memory = found.memory or 0.0
        if thorough:
            cost = time.thread_time() - start
            self._thorough_due = now + min(LONGEST_INTERVAL, max(0.005, 20 * cost))
        self.peak = max(self.peak, memory)
        self.unseen_peak = max(self.unseen_peak, found.peak or 0.0)
        if self._last is not None and now > self._last[0]:
            growth = (memory - self._last[1]) / (now - self._last[0])
            self.growth = fastest_growth(self.growth, growth)
        self._last = (now, memory)
        return memory

    def at_most(self) -> float:
        """Return the most that the trial can hold now, in bytes."""
        assert self._tree is not None
        return self._tree.at_most()


def _wait(poll: select.poll, seconds: float | None) -> list[tuple[int, int]]:
    """Poll for what is less than the millisecond that poll counts in, too."""
    if seconds is None:
        return poll.poll()
    if 0 < seconds < 0.001:
        time.sleep(seconds)
        seconds = 0.0
    return poll.poll(seconds * 1000)
