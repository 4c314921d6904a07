"""The running trials of a process, and the thread that renews their reservations."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from optuna_quota._ledger.heartbeat import RunningTrials


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
