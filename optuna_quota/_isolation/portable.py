"""Start and supervise a trial's process where no supervisor process is possible.

Each trial starts in a new interpreter. Compared with Linux, processes that left the trial's tree
are found only if they were seen in it, the kernel's limits are not used, and on Windows there is
no polite stop.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil

from optuna_quota._isolation import messages
from optuna_quota._isolation.channel import Channel, channel_pair, TrialConnections
from optuna_quota._isolation.child import run_child
from optuna_quota._isolation.forkserver_client import interpreter


# Seconds between two readings of the trial's processes.
_INTERVAL = 0.02


def launch_portable() -> TrialConnections:
    """Start a trial's process; raises OSError if that fails."""
    ours, theirs = socket.socketpair()
    with theirs:
        if os.name == "posix":
            handle = theirs.fileno()
            process = subprocess.Popen(
                interpreter("portable", handle),
                stdin=subprocess.DEVNULL,
                pass_fds=[handle],
                start_new_session=True,
            )
        else:
            for sock in (ours, theirs):
                # A message sent in two parts would wait for an acknowledgement in between.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            process = subprocess.Popen(interpreter("portable", None), stdin=subprocess.PIPE)
            assert process.stdin is not None
            with process.stdin:
                process.stdin.write(theirs.share(process.pid))  # type: ignore[attr-defined]
    control, commands = channel_pair()
    threading.Thread(target=_Supervisor(process, commands).run, daemon=True).start()
    return TrialConnections(Channel(ours), control)


def main(handle: int | None) -> None:
    """Run a trial's process; without a descriptor, standard input describes the connection."""
    if handle is None:
        sock = socket.fromshare(sys.stdin.buffer.read())  # type: ignore[attr-defined]
    else:
        sock = socket.socket(fileno=handle)
    os._exit(run_child(Channel(sock)))


class _Supervisor:
    """Supervises a trial's process from a thread of the study's process."""

    def __init__(self, process: subprocess.Popen[bytes], control: Channel) -> None:
        self._process = process
        self._root = psutil.Process(process.pid)
        self._control = control
        self._descendants: dict[int, psutil.Process] = {}
        self._deadline: float | None = None
        self._killer: messages.Killer | None = None
        self._cpu_time = 0.0

    def run(self) -> None:
        with contextlib.suppress(OSError):
            self._control.send(messages.ProcessStarted())
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            while self._process.poll() is None:
                self._find_descendants()
                if selector.select(_INTERVAL) or self._control.pending():
                    self._obey()
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._kill("breach")
        leftovers = self._kill_descendants()
        ended = messages.ExitReport(
            self._process.returncode,
            self._killer,
            cpu_time=self._cpu_time,
            leftovers=leftovers if self._killer is None else (),
        )
        with contextlib.suppress(OSError):
            self._control.send(ended)
        self._control.close()

    def _find_descendants(self) -> None:
        with contextlib.suppress(psutil.Error):
            for child in self._root.children(recursive=True):
                self._descendants.setdefault(child.pid, child)
        cpu_time = 0.0
        for process in (self._root, *self._descendants.values()):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                cpu_time += times.user + times.system
        self._cpu_time = max(self._cpu_time, cpu_time)

    def _obey(self) -> None:
        try:
            command = self._control.receive()
        except (EOFError, OSError):
            command = messages.KillTrial()
        if isinstance(command, messages.KillTrial):
            self._kill("request")
        elif isinstance(command, messages.ExitWithin):
            leave = time.monotonic() + command.seconds
            self._deadline = leave if self._deadline is None else min(leave, self._deadline)
        elif isinstance(command, messages.StopTrial) and self._deadline is None:
            self._deadline = time.monotonic() + command.grace_period
            if os.name == "posix" and command.grace_period > 0:
                is_interrupt = isinstance(command.reason, KeyboardInterrupt)
                self._process.send_signal(signal.SIGCONT)
                self._process.send_signal(signal.SIGINT if is_interrupt else signal.SIGTERM)
            else:
                self._kill("breach")

    def _kill(self, killer: messages.Killer) -> None:
        self._killer = self._killer or killer
        self._find_descendants()
        self._process.kill()

    def _kill_descendants(self) -> tuple[str, ...]:
        """Kill all processes of the trial that are left, and return their pids."""
        left = [p for p in self._descendants.values() if _is_alive(p)]
        for process in left:
            # psutil knows a process by its time of creation too: never another's.
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        return tuple(str(p.pid) for p in left)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
