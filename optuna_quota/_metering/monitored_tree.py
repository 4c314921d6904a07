"""The process trees under metering, the trials that run in each, and when to read them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
import contextlib
import logging
import math
import sys
import threading
import time

from optuna_quota._metering import timing
from optuna_quota._metering.linux_process_tree import is_available, LinuxProcessTree
from optuna_quota._metering.meter import log_once
from optuna_quota._metering.monitored_trial import MonitoredTrial
from optuna_quota._metering.process_tree import ProcessTree, PsutilProcessTree, TreeReading


_logger = logging.getLogger("optuna.quota.metering")

# From a pid; and the reaper's and the number of outsiders, where there is a reaper.
OpenTree = Callable[..., ProcessTree]

# Seconds after which a trial in this process is no longer expected to be isolated.
_SURELY_SHARED = 10.0
# Seconds between readings of CPU time and peaks in a long trial without a ceiling on CPU time.
_LONGEST_THOROUGH_INTERVAL = 1.0


def open_tree(pid: int | None, reaper: int | None = None, outsiders: int = 0) -> ProcessTree:
    """Return the reader of the tree under a process: by /proc, else by psutil.

    Arguments and errors are those of :class:`LinuxProcessTree`.
    """
    if is_available():
        try:
            return LinuxProcessTree(pid, reaper, outsiders=outsiders)
        except ProcessLookupError:
            raise
        except OSError as error:
            _logger.info(f"Processes are measured through psutil: /proc can't be read ({error}).")
    return PsutilProcessTree(pid)


class MonitoredTree:
    """A process tree and the trials that run in it: several if trials run in threads."""

    def __init__(
        self,
        reader: ProcessTree,
        pid: int | None,
        now: float,
        excluded: Callable[[MonitoredTree], Collection[int]],
    ) -> None:
        self.reader = reader
        self._excluded = excluded  # Returns the roots of subtrees that don't belong to it
        self.pid = pid  # Its root, made for one trial; None for this process
        self.pids: tuple[int, ...] = ()
        self.due = now
        self.trials: dict[MonitoredTrial, ThreadTime] = {}
        self._thorough_due = self._read_at = now
        self._memory: float | None = None
        self._cpu_time: float | None = None
        self._keeps_peak = False
        # The memory up to which a quick reading shows no new peak and no breach.
        self._quiet_below = -math.inf
        self._ceiling = math.inf
        self._growth = timing.ASSUMED_GROWTH
        self._period = timing.LONGEST_INTERVAL  # between samples far from any limit

    def add(self, trial: MonitoredTrial, now: float) -> None:
        """Add a trial; if several run in the tree at once, they are marked as shared."""
        if self.trials:
            self.read(now)  # what was used so far is not the new trial's
        self.trials[trial] = ThreadTime()
        self._quiet_below = -math.inf
        if len(self.trials) == 1:
            self._begin(trial, now)
        else:
            for each, thread in self.trials.items():
                each.mark_shared()
                thread.growth()  # counts from now
        self.schedule(now)

    def _begin(self, trial: MonitoredTrial, now: float) -> None:
        """Take the first reading of a trial that is alone in the tree."""
        with contextlib.suppress(OSError):
            self.reader.reset_peak()
        self.update_thresholds()
        reading = self._measure(thorough=True)
        self._memory, self._cpu_time = reading.memory, reading.cpu_time
        trial.record_memory(now, reading.memory, None)
        trial.held = reading.memory if self.pid is None else None
        if reading.cpu_time is not None:
            # A process made for the trial counts from its creation.
            trial.used.add("cpu_time", 0.0 if self.pid is None else reading.cpu_time)
        self.update_thresholds()

    def sample(self, now: float) -> bool:
        """Measure as cheaply as possible; return whether to check for a breach.

        Mostly a quick reading shows that memory is no higher than before and far from its limit,
        and that is enough.
        """
        thorough, before = now >= self._thorough_due, self.pids
        reading = self._measure(thorough=thorough)
        memory = reading.memory
        is_quiet = not thorough and memory is not None and memory <= self._quiet_below
        # The peak of a process that is alone is the kernel's; of several, more samples find it.
        is_quiet = is_quiet and self.pids == before
        if is_quiet:
            self._update_growth(memory, now)
        else:
            self._record(reading, now, thorough=thorough)
        self.schedule(now)
        return not is_quiet

    def read(self, now: float) -> None:
        """Measure thoroughly, and record each trial's part."""
        self._record(self._measure(thorough=True), now, thorough=True)
        self.schedule(now)

    def _measure(self, *, thorough: bool) -> TreeReading:
        without = self._excluded(self)
        try:
            reading = self.reader.read(thorough=thorough, without=without, ceiling=self._ceiling)
        except OSError as error:
            log_once(
                "trees",
                "Memory and CPU time of trials are not known while their processes can't be "
                f"read: {error!r}.",
            )
            return TreeReading(None, None, None, self.pids)
        self.pids, self._keeps_peak = reading.pids, reading.peak is not None
        return reading

    def _record(self, reading: TreeReading, now: float, *, thorough: bool) -> None:
        self._update_growth(reading.memory, now)
        if reading.cpu_time is not None:  # usage during an error is counted after it
            before, self._cpu_time = self._cpu_time, reading.cpu_time
            if before is not None and reading.cpu_time > before:
                self._apportion(reading.cpu_time - before)
        for trial in self.trials:
            if trial.isolation != "shared":
                trial.record_memory(now, reading.memory, reading.peak)
            elif now - trial.started > _SURELY_SHARED:
                warn_of_sharing(trial)
        if thorough:
            self._thorough_due = now + self._thorough_interval(now)
        self.update_thresholds()

    def update_thresholds(self) -> None:
        """Set the memory up to which a quick reading suffices, and the time between samples."""
        ceilings = [
            ceiling
            for trial in self.trials
            if trial.breach is None and trial.isolation != "shared"
            if (ceiling := trial.ceiling("memory")) is not None
            # Measuring exactly here too would delay the supervisor's own measurement.
            and ceiling != trial.supervised
        ]
        self._ceiling = min(ceilings, default=math.inf)
        is_alone = len(self.pids) == 1 and self._keeps_peak
        self._period = timing.LONGEST_INTERVAL_ALONE if is_alone else timing.LONGEST_INTERVAL
        if self._memory is None:
            self._quiet_below = -math.inf
        elif all(trial.isolation == "shared" for trial in self.trials):
            self._quiet_below = math.inf
        else:
            self._quiet_below = min(max(self._memory, self._quiet_below), self._ceiling)

    def _thorough_interval(self, now: float) -> float:
        """Return the seconds until CPU time and peaks must be read again.

        Rarely in a long trial, as often as memory in a short one, and before a ceiling on CPU
        time can be reached even if all cores are busy.
        """
        intervals = [_LONGEST_THOROUGH_INTERVAL]
        for trial in self.trials:
            elapsed = max(0.0, now - trial.started)
            intervals += [elapsed / 5, trial.cpu_seconds_left() / timing.CORES]
        return max(self._period, min(intervals))

    def _update_growth(self, memory: float | None, now: float) -> None:
        before, seconds = self._memory, now - self._read_at
        if memory is not None and before is not None and seconds > 0 and memory > before:
            self._growth = timing.fastest_growth(self._growth, (memory - before) / seconds)
        self._memory, self._read_at = memory, now

    def _apportion(self, spent: float) -> None:
        """Split CPU-seconds of the tree by those of each trial's own thread, evenly if all are 0.

        Those of BLAS's and other helper threads are split in proportion: the sum over trials is
        exact, the parts are estimates.
        """
        weights = [1.0]
        if len(self.trials) > 1:
            weights = [thread.growth() for thread in self.trials.values()]
        whole = sum(weights)
        for trial, weight in zip(self.trials, weights, strict=True):
            trial.used.add("cpu_time", spent * (weight / whole if whole > 0 else 1 / len(weights)))

    def schedule(self, now: float) -> None:
        """Set when to measure next: sooner near a limit."""
        headroom = None if self._memory is None else self._ceiling - self._memory
        interval = timing.sampling_interval(headroom, self._growth, longest=self._period)
        is_regular = interval == self._period
        self.due = timing.next_due(self.due, now, interval) if is_regular else now + interval


class MonitoredTrees:
    """All process trees of a metering loop, which holds its lock meanwhile."""

    def __init__(self, open_tree: OpenTree) -> None:
        # Children of this process that, with their descendants, belong to no trial.
        self.excluded_pids: set[int] = set()
        self._open_tree = open_tree
        self._trees: list[MonitoredTree] = []
        # Kept from trial to trial: opening takes longer than reading.
        self._own: ProcessTree | None = None

    def __iter__(self) -> Iterator[MonitoredTree]:
        return iter(self._trees)

    def of(self, trial: MonitoredTrial) -> MonitoredTree | None:
        """Return the tree that a trial runs in, None without one."""
        return next((tree for tree in self._trees if trial in tree.trials), None)

    def read(self, trial: MonitoredTrial, now: float) -> None:
        tree = self.of(trial)
        if tree is not None:
            tree.read(now)

    def relax(self, trial: MonitoredTrial, now: float) -> None:
        """Sample a trial that has a breach at the usual interval again."""
        tree = self.of(trial)
        if tree is not None:
            tree.update_thresholds()
            tree.schedule(now)

    def add(
        self, trial: MonitoredTrial, pid: int | None, now: float, reader: ProcessTree | None = None
    ) -> None:
        tree = next((t for t in self._trees if t.pid == pid), None)
        if tree is None:
            if pid is None:
                self._own = reader = self._own or self._open_tree(None)
            tree = MonitoredTree(reader or self._open_tree(pid), pid, now, self._excluded)
            self._trees.append(tree)
        tree.add(trial, now)

    def _excluded(self, tree: MonitoredTree) -> Sequence[int]:
        others = [t.pid for t in self._trees if t.pid is not None and t is not tree]
        return others if tree.pid is not None else [*others, *self.excluded_pids]

    def remove(self, trial: MonitoredTrial) -> None:
        tree = self.of(trial)
        if tree is None:
            return
        del tree.trials[trial]
        if not tree.trials:
            self._trees.remove(tree)
            if tree.reader is not self._own:
                tree.reader.close()

    def close(self) -> None:
        for reader in (*(tree.reader for tree in self._trees), self._own):
            if reader is not None:
                reader.close()
        self._trees, self._own = [], None


def warn_of_sharing(trial: MonitoredTrial) -> None:
    """Warn, once, that a memory limit can't be enforced on trials in threads."""
    is_limited = any(trial.ceiling(name) is not None for name in ("memory", "gpu_memory"))
    if trial.isolation == "shared" and is_limited:
        log_once(
            "shared",
            "Trials run at once in one process: their memory can't be told apart, is not "
            "recorded, and no memory limit is enforced on them. `isolated(objective)` gives "
            "each trial a process of its own.",
        )


class ThreadTime:
    """CPU-seconds of the thread that made this object, 0 where the system has no such clock."""

    def __init__(self) -> None:
        self._clock: int | None = None
        if sys.platform.startswith("linux"):
            # As pthread_getcpuclockid(3) makes it, which would crash with the identifiers that
            # gevent makes up, and for a thread that has ended: reading such a clock merely fails.
            self._clock = ~threading.get_native_id() << 3 | 6
        self._last = self._now()

    def growth(self) -> float:
        """Return what was used since the last call, 0 once the thread has ended."""
        now = self._now()
        spent, self._last = max(0.0, now - self._last), now
        return spent

    def _now(self) -> float:
        if self._clock is None:
            return 0.0
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return 0.0
