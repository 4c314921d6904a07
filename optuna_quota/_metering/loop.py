"""The metering loop: two threads in each process measure all of its trials.

One thread samples process trees and finds breaches. The other reads GPU drivers and the user's
meters, which may hang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
import logging
import math
import threading

from optuna_quota._limits import Limits
from optuna_quota._metering.breach import QuotaExtension
from optuna_quota._metering.gpu_meter import GpuMeter
from optuna_quota._metering.meter import (
    CustomMeter,
    Meter,
    ProcessorEnergyMeter,
    ScheduledMeter,
    TrialMeter,
    warn_of_missing,
)
from optuna_quota._metering.monitored_tree import (
    MonitoredTrees,
    open_tree,
    OpenTree,
    warn_of_sharing,
)
from optuna_quota._metering.monitored_trial import Key, MonitoredTrial
from optuna_quota._metering.process_tree import ProcessTree
from optuna_quota._metering.timing import PauseDetector, RunningClock
from optuna_quota._usage import Breach, Usage


_logger = logging.getLogger("optuna.quota.metering")

# Seconds. Shorter first readings count as the trial's own time.
_LONG_READING = 1.0


class TrialMonitor(MonitoredTrial):
    """One trial under metering, created by :meth:`MeteringLoop.monitor`; thread-safe."""

    def __init__(
        self,
        loop: MeteringLoop,
        key: Key,
        limits: Limits,
        left: Mapping[str, float],
        meters: Sequence[Meter],
    ) -> None:
        super().__init__(key, limits, left, meters, loop.now())
        self.scheduled: Sequence[ScheduledMeter] = ()
        self._loop = loop
        self._paused_before = loop.paused
        self._ended: float | None = None
        # Meters of a trial whose own process does not exist yet.
        self._prepared: Sequence[TrialMeter] = ()

    @property
    def elapsed(self) -> float:
        now = self._loop.now() if self._ended is None else self._ended
        return max(0.0, now - self.started)

    @property
    def paused(self) -> float:
        """Seconds since the start in which this process was stopped."""
        return self._loop.paused - self._paused_before

    def usage(self) -> Usage:
        return self.usage_after(self.elapsed)

    def sample(self, *, fully: bool = False) -> Usage:
        """Measure now, meters only if they are due or ``fully``; return the usage so far."""
        loop = self._loop
        if not self.closed:
            with loop.lock:
                now = loop.now()
                loop.trees.read(self, now)
                due = [m for m in self.scheduled if fully or now >= m.due]
            loop.read_meters(self, due, fully=fully)
            self._check_breach_now()
        return self.usage()

    def limit(self, limits: Limits) -> None:
        """Set limits that become known after the trial's start."""
        self._set_ceilings(limits, self.left)

    def allow(self, left: Mapping[str, float]) -> None:
        """Set how much of the study's total quotas the trial may use in all, by resource."""
        self._set_ceilings(self.limits, left)

    def _set_ceilings(self, limits: Limits, left: Mapping[str, float]) -> None:
        with self._loop.lock:
            self.set_ceilings(limits, left, self._loop.now())
            self._loop.wake()

    def detach(self, waited: float = 0.0) -> None:
        """Measure time only, until :meth:`attach`: the trial gets a process of its own.

        Earlier measurements are of this process and discarded. The first ``waited`` seconds don't
        count as the trial's.
        """
        loop = self._loop
        with loop.lock:
            self._release()
            self.isolate()
            self.postpone(waited)
            meters = () if self._prepared else loop.open_meters(self)
            self._prepared = self._prepared or meters
        before = loop.now()
        for meter in meters:
            if meter.eager:
                meter.read(())  # the baseline before the trial's process begins
        self.leave_out(loop.now() - before)

    def leave_out(self, seconds: float) -> None:
        """Exclude a long first reading from the trial's time.

        A GPU's driver may take seconds to start, or hang.
        """
        if seconds >= _LONG_READING:
            with self._loop.lock:
                self.postpone(seconds)

    def attach(self, pid: int, reaper: int | None = None, outsiders: int = 0) -> None:
        """Measure only the process tree under ``pid`` from now on: the trial is isolated.

        Earlier measurements, except time, are of this process and discarded.

        Args:
            pid: The root; a child not yet waited for, so that its pid is not reused.
            reaper: The process that inherits the tree's orphans, if it has no other children.
            outsiders: At least how many processes outside of the tree share the memory that it
                was forked with.

        Raises:
            ProcessLookupError: If there is no such process.
        """
        loop = self._loop
        with loop.lock:
            reader = loop.open_tree(pid, *(() if reaper is None else (reaper, outsiders)))
            self._release()
            self.isolate()
            self.measure(pid, reader)
            loop.wake()

    def measure(self, pid: int | None = None, reader: ProcessTree | None = None) -> None:
        """Measure the trial in the process tree under a pid, None for this process."""
        now = self._loop.now()
        self._loop.trees.add(self, pid, now, reader)
        warn_of_missing(self.limits.custom, self.meters)
        built_in = self._prepared or self._loop.open_meters(self)
        meters = [*map(CustomMeter, self.meters), *built_in]
        self._prepared, self.scheduled = (), [ScheduledMeter(meter, now) for meter in meters]

    def _release(self) -> None:
        for meter in self.scheduled:
            meter.close()
        self.scheduled = ()
        self._loop.trees.remove(self)

    def on_breach(self, callback: Callable[[Breach], None]) -> None:
        """Call back once at the first breach, from the loop's thread; at once if there was one.

        The callback should return quickly: nothing is measured meanwhile.
        """
        with self._loop.lock:
            breach = self.breach
            if breach is None:
                self._callbacks.append(callback)
        if breach is not None:
            _call(partial(callback, breach))

    def on_low_quota(self, request: Callable[[], None]) -> None:
        """Call back when little is left of a quota, from the loop's thread.

        A breach then waits for the answer, a call of :meth:`allow`, for a limited time.
        """
        self.extension = QuotaExtension(request)

    def finish(self) -> None:
        """Check for a breach a last time, once the trial has its result."""
        with self._loop.lock:
            now = self._loop.now()
            self._loop.trees.read(self, now)
            self.check_breach(now)
            self.is_finished = True

    def add_usage(self, usage: Usage) -> None:
        """Record totals from another source; the maximum of each wins."""
        with self._loop.lock:
            self.used.record_external(usage)
        if not self.closed:
            self._check_breach_now()

    def _check_breach_now(self) -> None:
        with self._loop.lock:
            self.check_breach(self._loop.now())
            if self.breach is not None:
                self._loop.wake()

    def close(self) -> Usage:
        """Measure a last time and end the metering; idempotent."""
        loop = self._loop
        with loop.lock:
            ended = loop.now()
            loop.trees.read(self, ended)
            meters = self.scheduled
        loop.read_meters(self, meters, fully=True)
        with loop.lock:
            if not self.closed:
                self.check_breach(ended)
                warn_of_sharing(self)
                self._release()
                for meter in self._prepared:
                    meter.close()
                loop.forget(self)
                self._ended = ended
                self.end()
        return self.usage()


def open_meters(monitor: MonitoredTrial) -> Sequence[TrialMeter]:
    limited = {*monitor.limits.amounts(), *monitor.left}
    energy = ProcessorEnergyMeter(
        lambda: monitor.used.by_resource().get("cpu_time"), is_limited="energy" in limited
    )
    return (GpuMeter(limited, monitor.environment), energy)


class MeteringLoop:
    """Measures the trials of one process in daemon threads, which sleep while none runs.

    The lock is held while process trees are read, which takes microseconds, and never while a
    GPU's driver, a user's meter or a callback runs.

    Args:
        clock: The time in seconds, without pauses of this process; for tests.
        open_tree: Opens the reader of a process tree; for tests.
        open_meters: Opens what is measured of a trial beside its process tree; for tests.
        threaded: If False, the caller has to call :meth:`tick`; for tests.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] | None = None,
        open_tree: OpenTree = open_tree,
        open_meters: Callable[[MonitoredTrial], Sequence[TrialMeter]] = open_meters,
        threaded: bool = True,
    ) -> None:
        self.lock = threading.RLock()  # Guards the state of all trials
        self.trees = MonitoredTrees(open_tree)  # Their process trees
        self.open_tree = open_tree
        self._clock = RunningClock()
        self.now = clock or self._clock
        self._pause_detector = PauseDetector(self._clock, lambda: bool(self._monitors))
        self.open_meters = open_meters
        self._is_threaded = threaded
        self._watching, self._reading = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._is_stopped = False
        # When something other than a process tree is due.
        self._others_due = -math.inf
        self._monitors: dict[Key, TrialMonitor] = {}

    def monitor(
        self,
        key: Key,
        *,
        limits: Limits | None = None,
        left: Mapping[str, float] | None = None,
        meters: Sequence[Meter] = (),
        here: bool = True,
    ) -> TrialMonitor:
        """Start metering a trial; to be called from the thread that runs it.

        If it does not run ``here``, where this process can measure it, only its time is measured.
        ``left`` is what it may use of the study's total quotas.
        """
        with self.lock:
            monitor = TrialMonitor(self, key, limits or Limits(), left or {}, meters)
            if here:
                monitor.measure()
            else:
                monitor.isolation = None
            self._monitors[key] = monitor
            eager = [meter for meter in monitor.scheduled if meter.eager]
            for meter in eager:
                meter.schedule(self.now())  # the other thread must not be the first to read it
            self._start()
            self.wake()
        begun = self.now()
        self.read_meters(monitor, eager)
        monitor.leave_out(self.now() - begun)
        return monitor

    @property
    def paused(self) -> float:
        """Seconds for which this process was stopped, which its clock excludes."""
        return self._clock.skipped

    def find(self, key: Key) -> TrialMonitor | None:
        return self._monitors.get(key)

    def tick(self) -> float | None:
        """Do what is due; return the seconds until something is, None if nothing will be."""
        waits = self._read_due_meters(), self._watch()
        return min((wait for wait in waits if wait is not None), default=None)

    def _watch(self) -> float | None:
        """Sample process trees, find breaches and call back; return the seconds until the next."""
        with self.lock:
            now = self.now()
            is_quiet = now < self._others_due
            for tree in self.trees:
                if now >= tree.due and tree.sample(now):
                    is_quiet = False
            if is_quiet:
                return self._seconds_to_next()
            self._others_due = math.inf
            callbacks: list[Callable[[], None]] = []
            for monitor in self._monitors.values():
                monitor.check_breach(now)
                if monitor.breach is not None:
                    self.trees.relax(monitor, now)
                callbacks += monitor.take_callbacks()
        for callback in callbacks:
            _call(callback)
        with self.lock:
            now = self.now()
            deadlines = (monitor.deadline(now) for monitor in self._monitors.values())
            self._others_due = min(self._others_due, min(deadlines, default=math.inf))
            return self._seconds_to_next()

    def _seconds_to_next(self) -> float | None:
        return self._seconds_until(min([self._others_due, *(tree.due for tree in self.trees)]))

    def _seconds_until(self, due: float) -> float | None:
        return None if due == math.inf else max(0.0, due - self.now())

    def _read_due_meters(self) -> float | None:
        """Read the meters that are due; return the seconds until the next is."""
        with self.lock:
            now = self.now()
            meters = self._scheduled_meters()
        for trial, meter in meters:
            if now >= meter.due:
                self.read_meters(trial, [meter])
                with self.lock:
                    self._watch_again()
        with self.lock:
            dues = (meter.due for _, meter in self._scheduled_meters())
            return self._seconds_until(min(dues, default=math.inf))

    def _scheduled_meters(self) -> list[tuple[TrialMonitor, ScheduledMeter]]:
        return [(trial, each) for trial in self._monitors.values() for each in trial.scheduled]

    # The methods below are for monitors, which hold the lock, except for `read_meters`.

    def wake(self) -> None:
        """Let the threads check all trials again, at once."""
        self._watch_again()
        self._reading.set()

    def _watch_again(self) -> None:
        self._others_due = -math.inf
        self._watching.set()

    def read_meters(
        self, trial: TrialMonitor, meters: Iterable[ScheduledMeter], *, fully: bool = False
    ) -> None:
        """Read meters of a trial, without the lock, and record the readings."""
        for meter in meters:
            with self.lock:
                if meter not in trial.scheduled:
                    continue  # the trial has ended, or has a process of its own now
                tree = self.trees.of(trial)
                pids = () if tree is None else tree.pids
                sharers = 1 if tree is None else len(tree.trials)
                meter.schedule(self.now())
            try:
                readings = meter.read(pids, fully=fully)
            except Exception:
                _logger.exception("A meter failed.")
                continue
            with self.lock:
                if meter in trial.scheduled:
                    trial.record_readings(readings, meter.growth, sharers)

    def forget(self, monitor: TrialMonitor) -> None:
        if self._monitors.get(monitor.key) is monitor:
            del self._monitors[monitor.key]

    def _start(self) -> None:
        if not self._is_threaded or self._is_stopped:
            return
        self._pause_detector.start()
        jobs = [
            ("optuna-quota-metering", self._watch, self._watching),
            ("optuna-quota-meters", self._read_due_meters, self._reading),
        ]
        for name, work, wakeup in jobs[len(self._threads) :]:
            thread = threading.Thread(
                target=self._run, args=(work, wakeup), name=name, daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def _run(self, work: Callable[[], float | None], wakeup: threading.Event) -> None:
        while not self._is_stopped:
            # Cleared before the work, so that a later `wake` is not lost.
            wakeup.clear()
            seconds = work()
            wakeup.wait(None if seconds is None else min(seconds, threading.TIMEOUT_MAX))

    def stop(self) -> None:
        """End the threads at the interpreter's exit, except one whose meter hangs."""
        with self.lock:
            self._is_stopped = True
            self.wake()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=1.0)

    def reset_after_fork(self) -> None:
        # A thread that the child doesn't have may hold the lock.
        self.lock = threading.RLock()
        self._is_stopped = True
        self.trees.close()
        self._monitors = {}


def _call(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:
        _logger.exception("A callback of the metering loop failed.")
