"""Where there are no supervisors (other systems than Linux): a new interpreter for each trial.

A thread of the study's process minds it. What that can't do as well: processes that left the
trial's tree are found only if they were seen in it, the kernel's limits are not used, and on
Windows the stop is a hard one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any
from typing import TYPE_CHECKING

from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.channel import channel_pair
from optuna_quota._isolation.child import run_child
from optuna_quota._isolation.control import Interrupt
from optuna_quota._isolation.control import Kill
from optuna_quota._isolation.control import Leave
from optuna_quota._isolation.control import Started
from optuna_quota._isolation.control import StopFor
from optuna_quota._isolation.ending import Ended
from optuna_quota._isolation.ending import Killer
from optuna_quota._isolation.launch import interpreter
from optuna_quota._isolation.launch import Launched


if TYPE_CHECKING:
    import psutil


_PERIOD = 0.02
# Seconds for a new interpreter to start and call back.
_START_TIME = 60.0
_TOKEN_SIZE = 32


def launch_portable() -> Launched:
    """Start a trial's process.

    Raises:
        OSError: If it does not start.
    """
    token = secrets.token_bytes(_TOKEN_SIZE)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(_START_TIME)
        command = interpreter("portable", server.getsockname()[1])
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, start_new_session=os.name == "posix"
        )
        try:
            assert process.stdin is not None
            with process.stdin:
                process.stdin.write(token)
            channel = _accept(server, token)
        except OSError:
            process.kill()
            process.wait()
            raise
    control, obey = channel_pair()
    minder = threading.Thread(target=_Minder(process, obey).run, daemon=True)
    minder.start()
    return Launched(channel, control)


def _accept(server: socket.socket, token: bytes) -> Channel:
    """Return the connection of the process that knows the token, and of no other."""
    while True:
        sock, _ = server.accept()
        sock.settimeout(_START_TIME)
        if secrets.compare_digest(_receive(sock, len(token)), token):
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return Channel(sock)
        sock.close()


def _receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < size and (chunk := sock.recv(size - len(data))):
            data += chunk
    return data


def main(port: int) -> None:
    """Run a trial's process.

    Args:
        port: Where the study's process listens on this host.
    """
    token = sys.stdin.buffer.read(_TOKEN_SIZE)
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(token)
    os._exit(run_child(Channel(sock)))


class _Minder:
    """Does a supervisor's work as far as it goes through psutil, in a thread.

    Args:
        process: The trial's process.
        control: The connection to the trial's thread.
    """

    def __init__(self, process: subprocess.Popen[bytes], control: Channel) -> None:
        import psutil

        self._psutil = psutil
        self._process = process
        self._root = psutil.Process(process.pid)
        self._control = control
        self._seen: dict[int, psutil.Process] = {}
        self._deadline: float | None = None
        self._killer: Killer | None = None
        self._cpu_time = 0.0
        self._memory = 0.0

    def run(self) -> None:
        """Mind the process to its end."""
        with contextlib.suppress(OSError):
            self._control.send(Started(self._process.pid))
        while self._process.poll() is None:
            self._look()
            ready, _, _ = select.select([self._control], [], [], _PERIOD)
            if ready or self._control.pending():
                self._obey()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._kill("breach")
        ended = Ended(
            self._process.returncode,
            self._killer,
            memory=self._memory or None,
            cpu_time=self._cpu_time,
            leftovers=self._sweep(),
        )
        with contextlib.suppress(OSError):
            self._control.send(ended)
        self._control.close()

    def _look(self) -> None:
        with contextlib.suppress(self._psutil.Error):
            for child in self._root.children(recursive=True):
                self._seen.setdefault(child.pid, child)
        memory, cpu_time = 0.0, 0.0
        for process in (self._root, *self._seen.values()):
            with contextlib.suppress(self._psutil.Error):
                memory += process.memory_info().rss
                times = process.cpu_times()
                cpu_time += times.user + times.system
        self._memory = max(self._memory, memory)
        self._cpu_time = max(self._cpu_time, cpu_time)

    def _obey(self) -> None:
        try:
            order = self._control.receive()
        except (EOFError, OSError):
            order = Kill()
        if isinstance(order, Kill):
            self._kill("request")
        elif isinstance(order, Leave):
            leave = time.monotonic() + order.seconds
            self._deadline = leave if self._deadline is None else min(leave, self._deadline)
        elif isinstance(order, (StopFor, Interrupt)) and self._deadline is None:
            self._deadline = time.monotonic() + order.grace_period
            if os.name == "posix" and order.grace_period > 0:
                self._process.send_signal(signal.SIGCONT)
                polite = signal.SIGINT if isinstance(order, Interrupt) else signal.SIGTERM
                self._process.send_signal(polite)
            else:
                self._kill("breach")

    def _kill(self, killer: Killer) -> None:
        self._killer = self._killer or killer
        self._look()
        self._process.kill()

    def _sweep(self) -> tuple[str, ...]:
        left = [p for p in self._seen.values() if _is_alive(p)]
        for process in left:
            # psutil knows a process by its time of creation too: never another's.
            with contextlib.suppress(self._psutil.Error):
                process.kill()
        self._psutil.wait_procs(left, timeout=5)
        return tuple(str(p.pid) for p in left) if self._killer is None else ()


def _is_alive(process: Any) -> bool:
    return bool(process.is_running() and process.status() != "zombie")
