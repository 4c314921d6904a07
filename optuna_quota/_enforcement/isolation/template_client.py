"""This process's template: started when first needed, renewed when it is gone."""

from __future__ import annotations

import atexit
from collections.abc import Iterable
import contextlib
import itertools
import os
from pathlib import Path
import pickle
import socket
import subprocess
import sys
import tempfile
import threading

from optuna_quota._enforcement.isolation.job_signals import job_signals_blocked
from optuna_quota._enforcement.isolation.launch import interpreter
from optuna_quota._enforcement.isolation.launch import Launched
from optuna_quota._enforcement.isolation.launch import order_trial
from optuna_quota._enforcement.isolation.launch import popen
from optuna_quota._enforcement.isolation.template import MESSAGE_SIZE
from optuna_quota._enforcement.isolation.template import Order
from optuna_quota._enforcement.isolation.template import Preload
from optuna_quota._enforcement.isolation.template import Unsafe
from optuna_quota._metering import metering_loop


class TemplateClient:
    """Starts trials from one template; for any thread.

    Args:
        once: Whether the template is for a single trial, as for the start method spawn.
    """

    def __init__(self, *, once: bool = False) -> None:
        self._once = once
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._wanted: dict[str, None] = {}
        self._loaded: set[str] = set()
        self._unsafe: set[str] = set()
        self._safe: set[str] = set()
        self._retired: list[subprocess.Popen[bytes]] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this

    def launch(self, cgroup: Path | None) -> Launched:
        """Start a trial's processes.

        Args:
            cgroup: Where to make their control group, None for none.

        Raises:
            OSError: If no template can be started.
        """
        data = pickle.dumps(Order(cgroup, self._once))
        with self._lock:
            faults = 0
            while True:
                sock = self._connect()
                try:
                    self._preload(sock)
                    launched = order_trial(sock, data)
                    if self._once:
                        self._discard()
                    return launched
                except OSError as error:
                    # Each module found unsafe costs a template; there may be many of them.
                    faults += not self._hear(getattr(error, "last_words", b"") or _rest(sock))
                    self._discard()
                    if faults == 3:
                        raise OSError(
                            f"The template of trials ended: {self._complaint()}"
                        ) from error

    def want(self, modules: Iterable[str]) -> None:
        """Have the template load modules before the next trial."""
        with self._lock:
            self._wanted.update(dict.fromkeys(modules))

    def lost(self) -> None:
        """Tell that a trial was not started: the template may be gone, and say why."""
        with self._lock:
            self._discard()

    def close(self) -> None:
        """Let the template end; trials under way go on."""
        with self._lock:
            self._discard()
            for process in self._retired:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)

    def _connect(self) -> socket.socket:
        if self._sock is not None and not self._once and self._is_alive():
            return self._sock
        self._discard()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = interpreter("template", theirs.fileno())
            self._errors.seek(0)
            self._errors.truncate()
            with job_signals_blocked():
                self._process = popen(command, self._errors, pass_fds=(theirs.fileno(),))
        # It and its forks are no part of a trial in this process.
        metering_loop().left_out.add(self._process.pid)
        self._sock = ours
        self._loaded = set()
        return ours

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _preload(self, sock: socket.socket) -> None:
        new = [m for m in self._wanted if m not in self._loaded and not self._is_unsafe(m)]
        if not new:
            return
        self._loaded.update(new)
        for start in range(0, len(new), 500):
            message = pickle.dumps(Preload(tuple(sys.path), new[start : start + 500]))
            if len(message) <= MESSAGE_SIZE:
                sock.send(message)

    def _discard(self) -> None:
        sock, self._sock = self._sock, None
        process, self._process = self._process, None
        if sock is not None:
            sock.close()
        if process is not None:
            # It ends by itself once it has served what was sent; to wait would hold up a trial.
            self._retired.append(process)
        for ended in [p for p in self._retired if p.poll() is not None]:
            self._retired.remove(ended)
            metering_loop().left_out.discard(ended.pid)

    def _complaint(self) -> str:
        """Return the last line that a template wrote to its standard error."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "without a word."

    def _hear(self, last_words: bytes) -> bool:
        """Note what a template said at its end; return whether that was news."""
        message = pickle.loads(last_words) if last_words else None
        if not isinstance(message, Unsafe) or message.module in self._unsafe:
            return False
        # Those of its package that come later are not tried: each one unsafe costs a template,
        # and the trial waits meanwhile.
        earlier = itertools.takewhile(lambda name: name != message.module, self._wanted)
        self._safe.update([name for name in earlier if not self._is_unsafe(name)])
        self._unsafe.add(message.module)
        return True

    def _is_unsafe(self, module: str) -> bool:
        package = module.partition(".")[0]
        spoilt = any(package == name.partition(".")[0] for name in self._unsafe)
        return spoilt and module not in self._safe


def _rest(sock: socket.socket) -> bytes:
    """Return what a template said before it was gone: it may end before all was sent to it."""
    with contextlib.suppress(OSError):
        return sock.recv(MESSAGE_SIZE, socket.MSG_DONTWAIT)
    return b""


_clients: dict[bool, TemplateClient] = {}
_clients_lock = threading.Lock()
# The parent's, in a fork: they are not this process's to end.
_foreign: list[TemplateClient] = []


def template_client(*, once: bool = False) -> TemplateClient:
    """Return the client of this process's own template; a fork gets another.

    Args:
        once: Whether each trial gets a template of its own.
    """
    with _clients_lock:
        if once not in _clients:
            _clients[once] = client = TemplateClient(once=once)
            atexit.register(client.close)
        return _clients[once]


def _forget() -> None:
    """Let go of the parent's template, in the child after a fork."""
    global _clients_lock
    _clients_lock = threading.Lock()
    _foreign.extend(_clients.values())
    for client in _clients.values():
        atexit.unregister(client.close)
    _clients.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
