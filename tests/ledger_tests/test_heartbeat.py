"""The running trials of a process, and the thread that renews their reservations."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from optuna_quota._ledger.heartbeat import Heartbeat, RunningTrials


def test_a_trial_starts_while_another_thread_looks_through_those_that_run() -> None:
    running: Any = RunningTrials()

    class Trial(SimpleNamespace):
        @property
        def thread(self) -> int:
            # Another thread starts a trial at this moment.
            running[1] = SimpleNamespace(thread=0, in_optimize=False)
            return threading.get_ident()

    running[0] = Trial(trial_id=0, number=0, in_optimize=True, monitor=None)
    assert [trial.number for trial in running.left_behind()] == [0]


class Owner:
    def extend(self, trial_id: int) -> None: ...

    def beat(self, trial_id: int) -> None: ...


def test_a_thread_that_is_to_write_in_a_thousand_years_extends_until_then() -> None:
    extended = threading.Event()

    class Extending(Owner):
        def extend(self, trial_id: int) -> None:
            extended.set()

    owner = Extending()
    heartbeat = Heartbeat(owner.extend, owner.beat, 1e12)
    heartbeat.add(0)
    thread = heartbeat._thread
    assert thread is not None
    # Its first wait is over before it is asked.
    thread.join(0.1)
    heartbeat.request_extension(0)
    assert extended.wait(60)
    heartbeat.remove(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_frees_the_owner_though_the_thread_held_its_lock() -> None:
    owner = Owner()
    heartbeat = Heartbeat(owner.extend, owner.beat, 60)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(heartbeat._wake.acquire).result()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            del owner
            os._exit(0)
        thread.submit(heartbeat._wake.release).result()
    assert os.waitpid(pid, 0)[1] == 0
