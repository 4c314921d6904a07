"""Several workers of one study, step by step in one thread: fake clocks, meters and faults.

Each worker has what a process of its own would have: a sampler, a pruner, a metering loop, and a
name by which the ledger finds out whether it lives. Nothing sleeps and no thread runs; where a
worker would wait for another one, :class:`WouldWait` is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.storages import InMemoryStorage
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
import pytest

from optuna_quota._enforcement import active_trials
from optuna_quota._ledger import heartbeat as heartbeat_module
from optuna_quota._ledger import ledger as ledger_module
from optuna_quota._ledger import reservation as reservation_module
from optuna_quota._ledger.dead_workers import LEASE
from optuna_quota._ledger.reservation import Worker
from optuna_quota._ledger.state import SystemClock
from optuna_quota._metering import replace_loop
from optuna_quota._metering.monitored_tree import ThreadTime
from optuna_quota._sampler import study_session
from optuna_quota._storage_retry import retry
from optuna_quota.testing import FakeMetering


KINDS = ("together", "apart", "journal")
EPOCH = 1_000_000_000.0


class WouldWait(BaseException):
    """A worker would have to wait for others, who have no turn meanwhile."""


class Trap:
    """Lets one write fail.

    Attributes:
        fired: Whether it did.
    """

    def __init__(self) -> None:
        self.fired = False
        self._writes_left: int | None = None
        self._error: type[Exception] = ConnectionError

    def set(self, writes: int, error: type[Exception]) -> None:
        """Let a write fail after so many others."""
        self._writes_left, self._error = writes, error

    def disarm(self) -> None:
        """Let no write fail."""
        self._writes_left = None

    def write(self) -> None:
        """Raise if this write is the one."""
        if self._writes_left is None:
            return
        self._writes_left -= 1
        if self._writes_left < 0:
            self._writes_left, self.fired = None, True
            raise self._error("on purpose")


class Apart(InMemoryStorage):
    """A storage that this library does not know: it takes attributes one by one."""

    trap: Trap

    def _set_trial(self, trial_id: int, trial: optuna.trial.FrozenTrial) -> None:
        self.trap.write()
        super()._set_trial(trial_id, trial)


class Pages(BaseJournalBackend):
    """A journal in memory."""

    def __init__(self, trap: Trap) -> None:
        self._trap = trap
        self._logs: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return list(self._logs[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._trap.write()
        self._logs += logs


def storage_with(trap: Trap, kind: str) -> BaseStorage:
    """Return a storage in memory, one of ``KINDS``, whose writes go through a trap."""
    if kind == "journal":
        return JournalStorage(Pages(trap))
    if kind == "apart":
        apart = Apart()
        apart.trap = trap
        return apart
    storage = InMemoryStorage()
    set_trial = storage._set_trial

    def trapped(trial_id: int, trial: optuna.trial.FrozenTrial) -> None:
        trap.write()
        set_trial(trial_id, trial)

    storage._set_trial = trapped  # type: ignore[method-assign]
    return storage


class ManualHeartbeat:
    """Calls at once what the heartbeat's thread calls soon; beats as the world's time passes."""

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
    """What one worker has to itself.

    Attributes:
        name: Who it is, to the ledger.
        metering: Its meters.
        study: The study as it has loaded it.
    """

    def __init__(self, name: Worker, now: float) -> None:
        self.name = name
        self.metering = FakeMetering()
        self.metering.clock.now = now
        self.heartbeats: list[ManualHeartbeat] = []
        self.register = active_trials._Register()
        self.study: optuna.Study


class World:
    """Machines, their processes, and the time.

    Attributes:
        trap: Lets writes into the storage fail.
        living: The processes.
        now: Seconds.
    """

    def __init__(self, kind: str) -> None:
        self.trap = Trap()
        self.storage = storage_with(self.trap, kind)
        self.living: list[Process] = []
        self.now = 0.0
        self._pids = 100
        self._current = Worker("none", "none")
        self._patch = pytest.MonkeyPatch()
        self._replace_what_is_real()

    def _replace_what_is_real(self) -> None:
        def wait(clock: SystemClock, seconds: float) -> None:
            raise WouldWait

        set_attribute = self._patch.setattr
        set_attribute(SystemClock, "time", lambda clock: EPOCH + self.now)
        set_attribute(SystemClock, "monotonic", lambda clock: self.now)
        set_attribute(SystemClock, "sleep", wait)
        set_attribute(ledger_module, "Heartbeat", ManualHeartbeat)
        set_attribute(reservation_module, "_worker", lambda pid: self._current)
        set_attribute(reservation_module, "process_start", self._started)
        # Trials at once in one process share its CPU time evenly.
        set_attribute(ThreadTime, "growth", lambda thread: 1.0)
        set_attribute(study_session.gc, "collect", lambda: 0)
        self._patch.setitem(retry.__kwdefaults__, "sleep", lambda seconds: None)

    def close(self) -> None:
        """Give back what is real."""
        self._patch.undo()

    def start(self, machine: str) -> Process:
        """Start a process."""
        self._pids += 1
        name = Worker(machine, machine, "", self._pids, float(self._pids))
        self.living.append(Process(name, self.now))
        return self.living[-1]

    def kill(self, process: Process) -> None:
        """End a process at once."""
        self.living.remove(process)

    def _started(self, pid: int) -> float | None:
        return float(pid) if any(p.name.pid == pid for p in self.living) else None

    @contextlib.contextmanager
    def acting(self, process: Process) -> Iterator[None]:
        """Let all that is done in the block be done by one process."""
        loop, register = replace_loop(process.metering.loop), active_trials._register
        before, self._current = self._current, process.name
        active_trials._register, ManualHeartbeat.made = process.register, process.heartbeats
        try:
            yield
        finally:
            replace_loop(loop)
            self._current, active_trials._register = before, register

    def advance(self, seconds: float) -> None:
        """Let time pass for all; whoever lives says so often enough."""
        end = self.now + seconds
        while self.now < end:
            step = min(end - self.now, LEASE / 4)
            self.now += step
            for process in self.living:
                with self.acting(process):
                    process.metering.advance(step)
                    for heartbeat in process.heartbeats:
                        heartbeat.beat()
