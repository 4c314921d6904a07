"""Simulate several workers of one study in a single thread, with fake clocks, meters and faults.

Each worker has what a process of its own would have: a sampler, a pruner, a metering loop, and an
identity whose liveness the ledger checks. Nothing sleeps and no thread runs; where a worker would
wait for another one, :class:`WouldWait` is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import contextlib
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend
import pytest

from optuna_quota._enforcement import active_trials
from optuna_quota._ledger import heartbeat as heartbeat_module, ledger as ledger_module, protocol
from optuna_quota._ledger.heartbeat import LEASE
from optuna_quota._ledger.protocol import Worker
from optuna_quota._metering import replace_loop
from optuna_quota._metering.monitored_tree import ThreadTime
from optuna_quota._storage_retry import retry
from optuna_quota.testing import FakeMetering


KINDS = ("memory", "unknown", "journal")
EPOCH = 1_000_000_000.0


class WouldWait(BaseException):
    """A worker would have to wait for others, which can't run meanwhile."""


class WriteFault:
    """Makes one write fail.

    Attributes:
        fired: Whether the write has failed.
    """

    def __init__(self) -> None:
        self.fired = False
        self._writes_left: int | None = None
        self._error: type[Exception] = ConnectionError

    def set(self, writes: int, error: type[Exception]) -> None:
        """Make a write fail after this number of others."""
        self._writes_left, self._error = writes, error

    def disarm(self) -> None:
        """Make no write fail."""
        self._writes_left = None

    def write(self) -> None:
        """Raise if this write is the one."""
        if self._writes_left is None:
            return
        self._writes_left -= 1
        if self._writes_left < 0:
            self._writes_left, self.fired = None, True
            raise self._error("on purpose")


class UnknownStorage(InMemoryStorage):
    """A storage of an unknown class, to which attributes are written one by one."""

    fault: WriteFault

    def _set_trial(self, trial_id: int, trial: optuna.trial.FrozenTrial) -> None:
        self.fault.write()
        super()._set_trial(trial_id, trial)


class MemoryJournal(BaseJournalBackend):
    """A journal in memory."""

    def __init__(self, fault: WriteFault) -> None:
        self._fault = fault
        self._logs: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return list(self._logs[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._fault.write()
        self._logs += logs


def make_storage(fault: WriteFault, kind: str) -> BaseStorage:
    """Return a storage in memory, one of ``KINDS``, with a fault."""
    if kind == "journal":
        return JournalStorage(MemoryJournal(fault))
    if kind == "unknown":
        unknown = UnknownStorage()
        unknown.fault = fault
        return unknown
    storage = InMemoryStorage()
    set_trial = storage._set_trial

    def write_or_fail(trial_id: int, trial: optuna.trial.FrozenTrial) -> None:
        fault.write()
        set_trial(trial_id, trial)

    storage._set_trial = write_or_fail  # type: ignore[method-assign]
    return storage


class ManualHeartbeat:
    """Extends at once what the heartbeat thread extends soon; beats as simulated time passes."""

    made: list[ManualHeartbeat]

    def __init__(
        self, extend: Callable[[int], None], beat: Callable[[int], None], interval: float
    ) -> None:
        self._extend, self._beat = extend, beat
        self._trials: dict[int, None] = {}
        self.made.append(self)

    def add(self, trial_id: int) -> None:
        self._trials[trial_id] = None

    def remove(self, trial_id: int) -> None:
        self._trials.pop(trial_id, None)

    def request_extension(self, trial_id: int) -> None:
        if trial_id in self._trials:
            heartbeat_module._call(self._extend, trial_id)

    def beat(self) -> None:
        for trial_id in list(self._trials):
            heartbeat_module._call(self._beat, trial_id)


class Process:
    """The state of one worker process.

    Attributes:
        name: Its identity in the ledger.
        metering: Its fake meters.
        study: The study as loaded by this worker.
    """

    def __init__(self, name: Worker, now: float) -> None:
        self.name = name
        self.metering = FakeMetering()
        self.metering.clock.now = now
        self.heartbeats: list[ManualHeartbeat] = []
        self.register = active_trials._Register()
        self.study: optuna.Study


class Simulation:
    """Hosts, their worker processes, and the time.

    Attributes:
        fault: Makes writes to the storage fail.
        processes: The processes.
        now: Seconds.
    """

    def __init__(self, kind: str) -> None:
        self.fault = WriteFault()
        self.storage = make_storage(self.fault, kind)
        self.processes: list[Process] = []
        self.now = 0.0
        self._pids = 100
        self._current = Worker("none", "none")
        self._patch = pytest.MonkeyPatch()
        self._patch_clocks_and_processes()

    def _patch_clocks_and_processes(self) -> None:
        def wait(seconds: float) -> None:
            raise WouldWait

        set_attribute = self._patch.setattr
        clock = SimpleNamespace(
            time=lambda: EPOCH + self.now, monotonic=lambda: self.now, sleep=wait
        )
        set_attribute(ledger_module, "time", clock)
        set_attribute(ledger_module, "Heartbeat", ManualHeartbeat)
        set_attribute(protocol, "_worker", lambda pid: self._current)
        set_attribute(protocol, "process_start", self._started)
        # Trials at once in one process share its CPU time evenly.
        set_attribute(ThreadTime, "growth", lambda thread: 1.0)
        set_attribute(active_trials.gc, "collect", lambda: 0)
        self._patch.setitem(retry.__kwdefaults__, "sleep", lambda seconds: None)

    def close(self) -> None:
        """Restore what was replaced."""
        self._patch.undo()

    def start(self, machine: str) -> Process:
        """Start a worker."""
        self._pids += 1
        name = Worker(machine, machine, "", self._pids, float(self._pids))
        self.processes.append(Process(name, self.now))
        return self.processes[-1]

    def kill(self, process: Process) -> None:
        """Kill a worker."""
        self.processes.remove(process)

    def _started(self, pid: int) -> float | None:
        return float(pid) if any(p.name.pid == pid for p in self.processes) else None

    @contextlib.contextmanager
    def acting_as(self, process: Process) -> Iterator[None]:
        """Act as one of the workers."""
        loop, register = replace_loop(process.metering.loop), active_trials._register
        before, self._current = self._current, process.name
        active_trials._register, ManualHeartbeat.made = process.register, process.heartbeats
        try:
            yield
        finally:
            replace_loop(loop)
            self._current, active_trials._register = before, register

    def advance(self, seconds: float) -> None:
        """Advance the time of all workers, with the heartbeats that are due."""
        end = self.now + seconds
        while self.now < end:
            step = min(end - self.now, LEASE / 4)
            self.now += step
            for process in self.processes:
                with self.acting_as(process):
                    process.metering.advance(step)
                    for heartbeat in process.heartbeats:
                        heartbeat.beat()
