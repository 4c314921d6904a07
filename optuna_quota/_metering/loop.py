"""The metering loop: one thread a process measures all of its trials."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import logging
import math
import os
import threading

from optuna_quota._metering.energy import ProcessorEnergyMeter
from optuna_quota._metering.gpu_meter import forget_gpus
from optuna_quota._metering.gpu_meter import GpuMeter
from optuna_quota._metering.meter import CustomMeter
from optuna_quota._metering.meter import Meter
from optuna_quota._metering.meter import ScheduledMeter
from optuna_quota._metering.meter import TrialMeter
from optuna_quota._metering.monitored_tree import MonitoredTree
from optuna_quota._metering.monitored_tree import open_tree
from optuna_quota._metering.monitored_tree import OpenTree
from optuna_quota._metering.monitored_tree import warn_of_sharing
from optuna_quota._metering.process_tree import ProcessTree
from optuna_quota._metering.timing import PauseDetector
from optuna_quota._metering.timing import RunningClock
from optuna_quota._metering.trial_monitor import Key
from optuna_quota._metering.trial_monitor import TrialMonitor
from optuna_quota._resources import Breach
from optuna_quota._resources import Limits
from optuna_quota._resources import Usage


_logger = logging.getLogger("optuna.quota.metering")

# Seconds that the end of a trial waits for a gauge that another thread is reading.
_PATIENCE = 1.0
# Seconds. Locks can't wait for ever longer; a wakeup an hour costs nothing.
_LONGEST_SLEEP = 3600.0


def open_meters(watch: TrialMonitor) -> Sequence[TrialMeter]:
    """Return the gauges of a trial: GPUs, and the processors' energy."""
    asked = {*watch.limits.amounts(), *watch.left}
    energy = ProcessorEnergyMeter(lambda: watch.usage().cpu_time, is_asked="energy" in asked)
    return (GpuMeter(asked, watch.environment), energy)


OpenMeters = Callable[[TrialMonitor], Sequence[TrialMeter]]


class MeteringLoop:
    """Measures the trials of one process from one daemon thread, which sleeps while none runs.

    The lock is held while process trees are read, which takes microseconds, and never while a
    GPU's driver, a user's meter or a callback runs.

    Args:
        clock: The time in seconds; by default one that leaves out pauses of this process. For
            tests.
        open_tree: Opens the reader of the process tree under a pid, None for this process; for
            tests.
        open_meters: Opens what is measured of a trial beside its process tree; for tests.
        period: Seconds between looks at a process tree while there is headroom in plenty; for
            benchmarks.
        threaded: False leaves it to the caller to call :meth:`tick`; for tests.

    Attributes:
        excluded_pids: Children of this process that belong to no trial, nor do theirs.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] | None = None,
        open_tree: OpenTree = open_tree,
        open_meters: OpenMeters = open_meters,
        period: float | None = None,
        threaded: bool = True,
    ) -> None:
        self._clock = RunningClock()
        self.now = clock or self._clock
        self._pulse = PauseDetector(self._clock, lambda: bool(self._watches))
        self._open_tree = open_tree
        self._open_gauges = open_meters
        self._period = period
        self._threaded = threaded
        self._lock = threading.RLock()
        # A lock as a flag: taken it means nothing new, and waiting for it is one call in C.
        self._news = threading.Lock()
        self._news.acquire()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._attention = -math.inf
        self._watches: dict[Key, TrialMonitor] = {}
        self._targets: list[MonitoredTree] = []
        self._probes: dict[TrialMonitor, list[ScheduledMeter]] = {}
        # Gauges of trials whose own process does not exist yet.
        self._prepared: dict[TrialMonitor, Sequence[TrialMeter]] = {}
        self._own_tree: ProcessTree | None = None
        self.excluded_pids: set[int] = set()

    def monitor(
        self,
        key: Key,
        *,
        limits: Limits | None = None,
        left: Mapping[str, float] | None = None,
        meters: Sequence[Meter] = (),
        pid: int | None = None,
        here: bool = True,
    ) -> TrialMonitor:
        """Put a trial under metering; to be called from the thread that runs it.

        Args:
            key: Which trial, see :func:`key_of`.
            limits: Its limits.
            left: What it may use of the study's total quotas, by resource.
            meters: The user's own meters.
            pid: The root of the trial's process tree; None when it runs in this process.
            here: False when it runs where this process can't see it: the clock alone is read.

        Raises:
            ProcessLookupError: If there is no such process.
        """
        with self._lock:
            watch = TrialMonitor(self, key, limits or Limits(), left or {}, meters, self.now())
            if pid is not None:
                watch.isolate()
            if here:
                self._join(watch, pid)
            else:
                watch.isolation = None
            self._watches[key] = watch
            eager = [probe for probe in self._probes.get(watch, ()) if probe.eager]
            self._start()
            self._poke()
        self._probe(eager)
        return watch

    @property
    def paused(self) -> float:
        """Seconds of pauses of this process that its clock has left out."""
        return self._clock.skipped

    def find(self, key: Key) -> TrialMonitor | None:
        """Return the watch of a trial, None when it is not (or no longer) metered."""
        return self._watches.get(key)

    def tick(self) -> float | None:
        """Do what is due; return the seconds until something is, None when nothing will be."""
        with self._lock:
            now = self.now()
            is_calm = now < self._attention
            for target in self._targets:
                if now >= target.due and target.look(now, self._others(target)):
                    is_calm = False
            if is_calm:
                return self._wait()
            self._attention = math.inf
            due = [p for probes in self._probes.values() for p in probes if now >= p.due]
        self._probe(due)
        with self._lock:
            now = self.now()
            for watch in self._watches.values():
                watch.judge(now)
                if watch.breach is not None:
                    self._calm_down(watch, now)
            calls = self._due_calls()
            asks = [watch.take_ask() for watch in self._watches.values()]
        for callback, breach in calls:
            _safely(callback, breach)
        for ask in asks:
            if ask is not None:
                _safely(ask)
        with self._lock:
            self._attention = min(self._attention, self._next_attention())
            return self._wait()

    def _wait(self) -> float | None:
        due = self._attention
        for target in self._targets:
            due = min(due, target.due)
        return None if due == math.inf else max(0.0, due - self.now())

    def _next_attention(self) -> float:
        """Return when something but a process tree needs to be looked at."""
        dues = [probe.due for probes in self._probes.values() for probe in probes]
        deadlines = (watch.deadline() for watch in self._watches.values())
        return min([math.inf, *dues, *(d for d in deadlines if d is not None)])

    def stop(self) -> None:
        """End the thread, at the interpreter's exit."""
        with self._lock:
            self._stopped = True
            self._poke()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=1.0)

    def abandon(self) -> None:
        """Let go of the parent's trials, in the child after a fork."""
        # The lock may be held for ever by a thread that the child doesn't have.
        self._lock = threading.RLock()
        self._stopped = True
        trees = [target.tree for target in self._targets]
        for tree in trees if self._own_tree is None else [*trees, self._own_tree]:
            tree.close()
        self._targets, self._watches, self._probes, self._prepared = [], {}, {}, {}

    # What follows is called by watches.

    def sample(self, watch: TrialMonitor, *, fully: bool = False) -> None:
        """Measure a trial now; gauges only when they are due, or ``fully``."""
        with self._lock:
            now = self.now()
            self._read_target_of(watch, now)
            due = [p for p in self._probes.get(watch, ()) if fully or now >= p.due]
        self._probe(due, patience=_PATIENCE if fully else 0.0)
        self._judge(watch)

    def allow(self, watch: TrialMonitor, left: Mapping[str, float]) -> None:
        """Set what a trial may use of total quotas."""
        with self._lock:
            watch.replace_left(left, self.now())
            self._poke()

    def detach(self, watch: TrialMonitor, waited: float = 0.0) -> None:
        """Take a trial out of this process, before its own exists."""
        with self._lock:
            self._leave(watch)
            watch.isolate()
            watch.postpone(waited)
            if watch in self._prepared:
                return
            gauges = self._prepared[watch] = self._open_gauges(watch)
        for gauge in gauges:
            if gauge.eager:
                gauge.read(())  # what there is before the trial's process begins is not its own

    def attach(
        self, watch: TrialMonitor, pid: int, reaper: int | None = None, outsiders: int = 0
    ) -> None:
        """Move a trial to a process tree of its own."""
        with self._lock:
            of_reaper = () if reaper is None else (reaper, outsiders)
            tree = self._open_tree(pid, *of_reaper)
            self._leave(watch)
            watch.isolate()
            self._join(watch, pid, tree)
            self._poke()

    def on_breach(self, watch: TrialMonitor, callback: Callable[[Breach], None]) -> None:
        """Keep a callback of a trial."""
        with self._lock:
            breach = watch.breach
            if breach is None:
                watch.add_callback(callback)
        if breach is not None:
            _safely(callback, breach)

    def finish(self, watch: TrialMonitor) -> None:
        """Judge a trial by what it used until now."""
        with self._lock:
            now = self.now()
            self._read_target_of(watch, now)
            watch.judge(now)
            watch.stop_judging()

    def add_usage(self, watch: TrialMonitor, usage: Usage) -> None:
        """Merge figures into a trial's."""
        with self._lock:
            watch.merge(usage)
        if not watch.closed:
            self._judge(watch)

    def close_watch(self, watch: TrialMonitor) -> None:
        """Measure a trial a last time and let it go."""
        with self._lock:
            if watch.closed:
                return
            ended = self.now()
            self._read_target_of(watch, ended)
            probes = list(self._probes.get(watch, ()))
        self._probe(probes, patience=_PATIENCE)
        with self._lock:
            if watch.closed:
                return
            watch.judge(ended)
            warn_of_sharing(watch)
            self._leave(watch)
            for gauge in self._prepared.pop(watch, ()):
                gauge.close()
            watch.end(ended)
            if self._watches.get(watch.key) is watch:
                del self._watches[watch.key]

    def _join(self, watch: TrialMonitor, pid: int | None, tree: ProcessTree | None = None) -> None:
        now = self.now()
        target = next((t for t in self._targets if t.pid == pid), None)
        if target is None:
            target = MonitoredTree(tree or self._tree_of(pid), pid, now, self._period)
            self._targets.append(target)
        target.join(watch, now, self._others(target))
        target.schedule(now)
        own = self._prepared.pop(watch, None) or self._open_gauges(watch)
        gauges = [*map(CustomMeter, watch.meters), *own]
        self._probes[watch] = [ScheduledMeter(watch, gauge, now) for gauge in gauges]

    def _tree_of(self, pid: int | None) -> ProcessTree:
        if pid is not None:
            return self._open_tree(pid)
        # Kept from trial to trial: opening costs more than reading.
        if self._own_tree is None:
            self._own_tree = self._open_tree(None)
        return self._own_tree

    def _leave(self, watch: TrialMonitor) -> None:
        for probe in self._probes.pop(watch, ()):
            probe.close()
        target = self._target_of(watch)
        if target is None:
            return
        del target.watches[watch]
        if not target.watches:
            self._targets.remove(target)
            if target.tree is not self._own_tree:
                target.tree.close()

    def _target_of(self, watch: TrialMonitor) -> MonitoredTree | None:
        return next((t for t in self._targets if watch in t.watches), None)

    def _others(self, target: MonitoredTree) -> Sequence[int]:
        others = [t.pid for t in self._targets if t.pid is not None and t is not target]
        return others if target.pid is not None else [*others, *self.excluded_pids]

    def _read(self, target: MonitoredTree, now: float, *, thorough: bool = False) -> None:
        target.read(now, self._others(target), thorough=thorough)
        target.schedule(now)

    def _read_target_of(self, watch: TrialMonitor, now: float) -> None:
        target = self._target_of(watch)
        if target is not None:
            self._read(target, now, thorough=True)

    def _probe(self, probes: Iterable[ScheduledMeter], *, patience: float = 0.0) -> None:
        """Read gauges without the lock, then take in what they read."""
        for probe in probes:
            with self._lock:
                target = self._target_of(probe.watch)
                pids = () if target is None else target.pids
                sharers = 1 if target is None else len(target.watches)
                probe.schedule(self.now())
            amounts = probe.read(pids, patience=patience)
            with self._lock:
                if probe in self._probes.get(probe.watch, ()):
                    probe.take(amounts, sharers)

    def _judge(self, watch: TrialMonitor) -> None:
        with self._lock:
            watch.judge(self.now())
            if watch.breach is not None:
                self._poke()

    def _calm_down(self, watch: TrialMonitor, now: float) -> None:
        """TrialMonitor a trial that is over its limit no more closely than others."""
        target = self._target_of(watch)
        if target is not None:
            target.take_stock()
            target.schedule(now)

    def _due_calls(self) -> list[tuple[Callable[[Breach], None], Breach]]:
        return [
            (callback, watch.breach)
            for watch in self._watches.values()
            if watch.breach is not None
            for callback in watch.take_callbacks()
        ]

    def _start(self) -> None:
        if self._threaded and not self._stopped:
            self._pulse.start()
        if self._threaded and self._thread is None and not self._stopped:
            self._thread = threading.Thread(
                target=self._run, name="optuna-quota-metering", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        while not self._stopped:
            wait = self.tick()
            self._news.acquire(timeout=-1 if wait is None else min(wait, _LONGEST_SLEEP))

    def _poke(self) -> None:
        """Let the loop look at everything again, at once."""
        self._attention = -math.inf
        with contextlib.suppress(RuntimeError):  # there is news already
            self._news.release()


def _safely(callback: Callable[..., None], *arguments: Breach) -> None:
    try:
        callback(*arguments)
    except Exception:
        _logger.exception("What was to be called back from the metering loop failed.")


_loop: MeteringLoop | None = None
_loop_lock = threading.Lock()


def metering_loop() -> MeteringLoop:
    """Return the loop of this process."""
    global _loop
    with _loop_lock:
        if _loop is None:
            _loop = MeteringLoop()
            atexit.register(_loop.stop)
        return _loop


def replace_loop(loop: MeteringLoop | None) -> MeteringLoop | None:
    """Make another loop the process's own; return the one before. For tests."""
    global _loop
    with _loop_lock:
        before, _loop = _loop, loop
        return before


def _after_fork_in_child() -> None:
    global _loop, _loop_lock
    _loop_lock = threading.Lock()
    forget_gpus()
    if _loop is not None:
        _loop.abandon()
        _loop = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
