"""Stops a trial while the process of its study is stopped, by Ctrl-Z or SIGSTOP.

A trial's processes are in a session of their own: what a terminal sends to its foreground group
does not reach them.
"""

from __future__ import annotations

import signal

from optuna_quota._isolation import processes


class Suspension:
    """Keeps the trial's tree stopped for as long as the study's process is; in its supervisor.

    Args:
        study: A pidfd of the study's process.
    """

    def __init__(self, study: int) -> None:
        self.is_on = False
        self._study = processes.pid_of(study)
        self._stopped: list[int] = []

    def look(self) -> None:
        """Stop the tree or let it go on, as the study's process does."""
        self.is_on = self._study is not None and processes.state_of(self._study) == "T"
        if self.is_on:
            self._stop()
        elif self._stopped:
            self._go_on()

    def _stop(self) -> None:
        # Parents first, which start no further child then; what was stopped before stays out.
        while running := [pid for pid in processes.descendants() if self._is_running(pid)]:
            processes.send(signal.SIGSTOP, running, processes.descendants())
            self._stopped += running

    def _is_running(self, pid: int) -> bool:
        return pid not in self._stopped and processes.state_of(pid) not in ("", *"TtZX")

    def _go_on(self) -> None:
        # Children first: a parent that waits for stopped ones, as shells do, need not know.
        processes.send(signal.SIGCONT, reversed(self._stopped), processes.descendants())
        self._stopped.clear()
