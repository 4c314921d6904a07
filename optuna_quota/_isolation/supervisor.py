"""The supervisor of one trial: enforces its memory limit, stops it and kills all its processes.

It is a separate process for three reasons. As a subreaper it inherits all orphans among the
trial's processes, whatever their session or parent. It never waits for the interpreter lock of a
busy study. And if the study is killed, it survives to kill the trial.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, KW_ONLY
import math
import os
import pickle
import resource
import select
import signal
import socket
import time

from optuna_quota._isolation import linux, messages
from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.memory_limits import Cgroup, DataLimit
from optuna_quota._isolation.signals import BEGIN, ENDED, STOP_SIGNAL
from optuna_quota._metering.breach import is_breach
from optuna_quota._metering.linux_process import LinuxProcess
from optuna_quota._metering.linux_process_tree import TreeSampler
from optuna_quota._metering.timing import (
    LONGEST_INTERVAL,
    RunningClock,
    sampling_interval,
)
from optuna_quota._usage import Breach


# Bytes by which a trial may grow after it was asked to stop for its memory, as its handlers need
# some. A trial that grows by more is killed at once.
GRACE_MARGIN = 4 * 2**20

# The kernel's own memory per byte that a trial holds: 8 bytes for a page of 4 KiB.
PAGE_TABLES = 1 / 512

# Seconds between the first measurements of a trial.
FIRST_INTERVAL = 0.001

# Seconds that processes get to end by themselves after the trial's own, and those for helpers that
# then remove shared memory and temporary files.
EXIT_TIME = 0.1
CLEANUP_TIME = 2.0

# Seconds after which a killed process counts as one that can't be killed: freeing its memory takes
# time, but in a system call on a failed device or file system it never ends.
KILL_TIME = 60.0

# Seconds in which a trial that was asked to stop for its memory is measured most often, and
# seconds between these measurements: until it has stopped, it takes up to 10 MiB in each
# millisecond.
_HURRY = 0.02
_HURRIED_INTERVAL = 0.0001

# Seconds between checks whether the study's process or the trial's is stopped.
_SUSPENSION_PERIOD = 0.05
# One check of a trial's remaining processes counts as this many seconds at most.
_LONGEST_TURN = 0.05


@dataclass
class Supervisor:
    """Supervises one trial, a child process, until none of its processes is left."""

    control: Channel  # To the study's process
    child: int  # The pid of the trial's own process
    _: KW_ONLY
    link: socket.socket  # To the trial's own process
    parent: int  # A pidfd of the study's process
    crash_file: int  # An open file, to which faulthandler writes in the trial's process
    cgroup: Cgroup | None  # The trial's own control group
    # What to enforce, once known: at once if this process was forked from the study's
    monitoring: messages.BeginMonitoring | None = None

    def __post_init__(self) -> None:
        self._child_handle = os.pidfd_open(self.child)
        self._memory = TreeSampler(self.child, forked_from_study=self.monitoring is not None)
        self._oom_kills_before = 0
        # Deadlines and limits on time exclude pauses of this process and of the study's.
        self._clock = RunningClock()
        self._monitored_since = 0.0
        self._ready_at: float | None = None
        self._suspension = linux.StudySuspension(self.parent)
        self._suspension_due = 0.0
        self._suspended_at: float | None = None
        self._data_limit: DataLimit | None = None
        self._data_limit_due = 0.0
        self._breach: Breach | None = None
        self._stop_requested = False
        self._deadline = math.inf
        self._hurry_until = -math.inf
        self._look_due = -math.inf
        self._paused_at: float | None = None
        self._pause_reported = False
        self._killer: messages.Killer | None = None
        self._killed_at = math.inf
        self._exitcode: int | None = None
        self._poll = select.poll()
        if self.monitoring is not None:
            self._begin_monitoring(self.monitoring)

    def run(self) -> messages.ExitReport:
        link = self.link.fileno()
        for handle in (self.control.fileno(), self._child_handle, self.parent, link):
            self._poll.register(handle, select.POLLIN)
        while True:
            wait = self._tick()
            self._clock.fall_asleep(wait)
            ready = {handle for handle, _ in _poll(self._poll, wait)}
            self._clock.wake_up()
            if self.control.fileno() in ready or self.control.pending():
                self._receive()
            # After the first message, which is sent before the objective can begin.
            if link in ready and self._exitcode is None:
                self._poll.unregister(link)
                self._begin_enforcing()
            if self.parent in ready:
                self._poll.unregister(self.parent)
                self._kill("request")
            if self._child_handle in ready or self._exitcode is not None:
                return self._finish()
            if self._clock() >= self._killed_at + KILL_TIME:
                return self._give_up()

    def _tick(self) -> float | None:
        """Do what is due; return the seconds until the next task, None without one."""
        self._exitcode = linux.reap().get(self.child, self._exitcode)
        if self._exitcode is not None:
            return 0.0
        now = self._clock()
        if self._killed_at < math.inf:
            # Reading the state of a process that hangs in the kernel may hang as well.
            # During one long sleep, a pause of this process would not be noticed.
            return min(LONGEST_INTERVAL, max(0.0, self._killed_at + KILL_TIME - now))
        if self.monitoring is None:
            return None
        if self._is_suspended(now):
            return _SUSPENSION_PERIOD
        if now >= self._deadline:
            self._kill()
        self._check_paused(now)
        wait = LONGEST_INTERVAL if self._ready_at is None else self._check_memory(now)
        return min(wait, max(0.0, self._deadline - now))

    def _receive(self) -> None:
        try:
            message = self.control.receive()
        except (EOFError, OSError):
            # The study's process is gone, or has abandoned this trial.
            with contextlib.suppress(KeyError):
                self._poll.unregister(self.control.fileno())
            self._kill("request")
            return
        if isinstance(message, messages.BeginMonitoring):
            self._begin_monitoring(message)
        elif isinstance(message, messages.StopTrial):
            self._stop(message.reason, message.grace_period)
        elif isinstance(message, messages.ExitWithin):
            self._deadline = min(self._deadline, self._clock() + message.seconds)
        elif isinstance(message, messages.KillTrial):
            self._kill("request")

    # Memory.

    def _begin_monitoring(self, monitoring: messages.BeginMonitoring) -> None:
        self.monitoring, self._monitored_since = monitoring, self._clock()
        self._memory.outsiders = monitoring.outsiders
        linux.raise_priority()
        self._oom_kills_before = linux.count_oom_kills()

    def _begin_enforcing(self) -> None:
        try:
            ready = pickle.loads(self.link.recv(1 << 16))
        except (OSError, EOFError):
            return  # the trial has ended before that
        assert isinstance(ready, messages.Ready)
        if self.monitoring is None:
            # It was sent before, but came just after the poll had looked for it.
            self._receive()
        if self.monitoring is None:
            return  # the study's process is gone
        now = self._ready_at = self._clock()
        self._memory.begin(ready.memory)
        limit = self.monitoring.memory
        if limit is not None and ready.waits:
            memory = self._memory.read(now, limit)
            if is_breach("memory", memory, limit):
                breach = self._breach_of_memory(memory, limit, now)
                self._report(breach, 0.0, before_objective=True)
                self._kill("breach")
                return
        if ready.waits:
            # Even without a limit here, as a message with one may have just arrived.
            with contextlib.suppress(OSError):
                self.link.send(BEGIN)
        if limit is None:
            return
        if ready.data_limit is not None:
            self._data_limit = DataLimit(self.child, limit, ready.data_limit)
        if self.cgroup is not None:
            # The kernel also kills a trial that was asked to stop and continues to grow.
            room = limit - self._memory.read(now) + GRACE_MARGIN
            with contextlib.suppress(OSError):
                self.cgroup.limit_memory(room + PAGE_TABLES * limit)

    def _check_memory(self, now: float) -> float:
        """Measure; stop the trial for a breach; return the seconds until the next measurement."""
        assert self.monitoring is not None and self._ready_at is not None
        limit = self.monitoring.memory
        # Often at first, to see the peak of a short trial.
        wait = min(LONGEST_INTERVAL, max(FIRST_INTERVAL, (now - self._ready_at) / 8))
        self._memory.thorough_interval = wait
        if limit is None:
            self._memory.read(now)
            return wait
        if self._breach is not None and self._breach.resource == "memory":
            # A rough reading shows whether it continues to grow.
            limit = max(limit, self._breach.observed) + GRACE_MARGIN
            memory = max(self._memory.read(now), self._memory.at_most())
        else:
            memory = self._memory.read(now, limit)
        if self._data_limit is not None:
            if now >= self._data_limit_due:
                self._data_limit_due = now + self._data_limit.update(memory)
            wait = min(wait, max(0.0, self._data_limit_due - now))
        if is_breach("memory", memory, limit):
            if self._stop_requested:
                # It gets no grace period while it continues to grow.
                self._kill("breach")
            else:
                # First the stop: the trial takes memory until it has it.
                breach = self._breach_of_memory(memory, limit, now)
                self._stop(breach, self.monitoring.grace_period)
                self._report(breach, self.monitoring.grace_period)
                self._hurry_until = now + _HURRY
        if now < self._hurry_until:
            return _HURRIED_INTERVAL
        headroom = limit - max(memory, self._memory.at_most())
        return min(wait, sampling_interval(headroom, self._memory.growth))

    def _breach_of_memory(self, memory: float, limit: float, now: float) -> Breach:
        assert self.monitoring is not None
        elapsed = self.monitoring.elapsed + now - self._monitored_since
        return Breach("memory", limit, memory, elapsed, quota=self.monitoring.quota)

    def _report(
        self, breach: Breach, grace_period: float, *, before_objective: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            self.control.send(messages.BreachFound(breach, before_objective, grace_period))

    # Stop and kill.

    def _stop(self, reason: messages.StopReason, grace_period: float) -> None:
        """Ask the trial to stop, once, and kill it after the grace period."""
        if self._stop_requested:
            return
        self._stop_requested = True
        if isinstance(reason, Breach):
            self._breach = reason
        if grace_period <= 0:
            self._kill()
            return
        self._deadline = self._clock() + grace_period
        with contextlib.suppress(OSError):
            self.link.send(pickle.dumps(reason))
        for number in (STOP_SIGNAL, signal.SIGCONT):
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._child_handle, number)

    def _kill(self, killer: messages.Killer | None = None) -> None:
        """Kill the trial's processes; any that are missed are killed once its own has ended."""
        self._killer = self._killer or killer or ("breach" if self._breach else "request")
        self._killed_at = min(self._killed_at, self._clock())
        self._deadline = math.inf
        if self.cgroup is not None:
            self.cgroup.kill()
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._child_handle, signal.SIGKILL)
        # Freeing its memory takes time, in which a worker may continue to allocate.
        left = linux.descendants()
        linux.send(signal.SIGKILL, (p for p in left if _is_killable(p)), left)

    # Pauses.

    def _is_suspended(self, now: float) -> bool:
        """Return whether the trial is suspended along with its study; that time does not count."""
        if self._suspended_at is not None:
            self._clock.skip(now - self._suspended_at)
        elif now < self._suspension_due:
            return False
        is_on = self._suspension.update()
        now = self._clock()
        self._suspended_at = now if is_on else None
        self._suspension_due = now + _SUSPENSION_PERIOD
        return is_on

    def _check_paused(self, now: float) -> None:
        """Kill a process that a signal has suspended for too long, as the study would hang."""
        assert self.monitoring is not None
        if now < self._look_due:
            return
        self._look_due = now + _SUSPENSION_PERIOD
        timeout = self.monitoring.grace_period
        if linux.process_state(self.child) != "T":
            self._paused_at, self._pause_reported = None, False
        elif self._paused_at is None:
            # A cluster that suspends a job stops its processes one after another.
            self._paused_at = now
        elif not self._pause_reported and now > self._paused_at + 2 * _SUSPENSION_PERIOD:
            self._pause_reported = True
            with contextlib.suppress(OSError):
                self.control.send(messages.ProcessPaused(timeout))
        elif now - self._paused_at >= timeout:
            self._kill("stopped")

    # The end.

    def _finish(self) -> messages.ExitReport:
        while self._exitcode is None:
            self._exitcode = linux.reap().get(self.child)
        with contextlib.suppress(OSError):  # it was killed
            message = self.link.recv(1 << 16, socket.MSG_DONTWAIT)
            if message.startswith(ENDED):
                self._memory.end(pickle.loads(message.removeprefix(ENDED)))
        return self._exit_report(*self._kill_leftovers())

    def _give_up(self) -> messages.ExitReport:
        """Kill all but the trial's own process, which can't be killed, and report."""
        killed = {self.child}
        while new := [pid for pid in linux.descendants() if pid not in killed]:
            killed.update(new)
            # Reading the command of a process that hangs in the kernel may hang as well.
            hanging = [pid for pid in new if linux.process_state(pid) == "D"]
            linux.send(signal.SIGKILL, hanging, killed)
            # The helpers that remove shared memory wait for that process as well.
            doomed = (p for p in new if p not in hanging and not linux.is_cleaner(p))
            linux.send(signal.SIGKILL, doomed, killed)
        return self._exit_report((), [self.child])

    def _exit_report(self, leftovers: tuple[str, ...], stuck: list[int]) -> messages.ExitReport:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_time = used.ru_utime + used.ru_stime
        for pid in linux.descendants() if stuck else ():
            with contextlib.suppress(OSError), contextlib.closing(LinuxProcess(pid)) as found:
                cpu_time += sum(found.times())
        oom_kills = cgroup_oom_kills = 0
        if self._exitcode == -signal.SIGKILL:  # reading the host's counters takes a while
            oom_kills = linux.count_oom_kills() - self._oom_kills_before
        if self.cgroup is not None:
            cgroup_oom_kills = self.cgroup.oom_kills()
            self.cgroup.remove()
        os.lseek(self.crash_file, 0, os.SEEK_SET)
        return messages.ExitReport(
            exitcode=self._exitcode,
            killer=self._killer,
            memory=self._memory.peak or None,
            unseen_memory=self._memory.unseen_peak or None,
            cpu_time=cpu_time,
            leftovers=leftovers,
            oom_kills=oom_kills,
            cgroup_oom_kills=cgroup_oom_kills,
            traceback=os.read(self.crash_file, 1 << 16).decode(errors="replace"),
            stuck=_describe_stuck(stuck) if stuck else "",
        )

    def _kill_leftovers(self) -> tuple[tuple[str, ...], list[int]]:
        """Kill all processes that the trial has left.

        Returns descriptions of the live ones, and the pids of those that can't be killed.
        """
        leftovers: dict[int, str] = {}
        age, now, give_up = 0.0, time.monotonic(), math.inf
        exit_time = EXIT_TIME if self._killer is None else 0.0
        if self._breach is not None and self._breach.resource == "memory":
            exit_time = 0.0  # one of them may be growing
        while True:
            linux.reap()
            left, before, now = linux.descendants(), now, time.monotonic()
            # They can't end during a pause, which the clock detects only during a sleep.
            age += min(now - before, _LONGEST_TURN)
            if not left or age > give_up:
                return tuple(leftovers.values()), left
            stuck = [p for p in left if linux.process_state(p) == "D"]
            spared = [p for p in left if p in stuck or linux.is_cleaner(p)]
            overdue = left if age > CLEANUP_TIME else [p for p in left if p not in spared]
            if overdue and age >= exit_time:
                if self._killer is None:
                    alive = (p for p in overdue if not (p in stuck or linux.is_exiting(p)))
                    leftovers.update({pid: linux.describe_process(pid) for pid in alive})
                linux.send(signal.SIGKILL, overdue, left)
                give_up = min(give_up, age + KILL_TIME)
            time.sleep(0.0005)


def _is_killable(pid: int) -> bool:
    """Return whether a process neither hangs in the kernel nor cleans up after others."""
    # Reading the command of a process that hangs may hang as well.
    return linux.process_state(pid) != "D" and not linux.is_cleaner(pid)


def _describe_stuck(pids: list[int]) -> str:
    listed = ", ".join(f"{pid} (state {linux.process_state(pid)})" for pid in pids)
    return (
        f"SIGKILL has not ended processes of the trial within {KILL_TIME:g} s: {listed}. They may "
        "wait for a device or a file system that does not answer, and hold what they held."
    )


def _poll(poll: select.poll, seconds: float | None) -> list[tuple[int, int]]:
    """Poll with a timeout that may be below a millisecond, the unit of ``poll``."""
    if seconds is None:
        return poll.poll()
    if 0 < seconds < 0.001:
        time.sleep(seconds)
        seconds = 0.0
    return poll.poll(seconds * 1000)
