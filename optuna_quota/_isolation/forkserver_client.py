"""The study's side of its fork server: start it when needed, keep it current, get trials of it."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
import contextlib
from dataclasses import dataclass
import itertools
import os
from pathlib import Path
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
from typing import TypeVar

from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.forkserver import (
    MainModuleMade,
    MakeMainModule,
    MESSAGE_SIZE,
    PreloadModules,
    SpawnRequest,
    UnsafeModule,
)
from optuna_quota._isolation.launch import interpreter, popen, send_streams, TrialConnections
from optuna_quota._isolation.main_module import find_main_module, MainModule
from optuna_quota._isolation.modules import (
    loaded_modules,
    modification_times,
    modified,
    modules_to_preload,
)
from optuna_quota._isolation.signals import block_job_signals
from optuna_quota._metering import metering_loop


T = TypeVar("T")

_MAIN = "__main__"
_ATTEMPTS = 3
# Modules in one message, which has a size limit.
_MODULES_PER_MESSAGE = 500


class ForkServerExited(OSError):
    """The fork server has exited; ``last_message`` is what it sent at the end, or nothing."""

    def __init__(self, last_message: bytes) -> None:
        super().__init__("The fork server has exited.")
        self.last_message = last_message


@dataclass(frozen=True)
class PreparedMain:
    """The main module that trials will have.

    Attributes:
        module: How it is made.
        is_made: Whether a trial's process has it from the fork server; else the trial makes it.
    """

    module: MainModule
    is_made: bool


class ForkServerClient:
    """Starts trials from one fork server; for any thread.

    Args:
        once: Whether it is for a single trial, as for the start method spawn.
    """

    def __init__(self, *, once: bool = False) -> None:
        self._once = once
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this
        # Processes that exit by themselves once they have served what was sent.
        self._retired: list[subprocess.Popen[bytes]] = []
        # Modules to load, in their order; those loaded, the times of their files, and the
        # environment that they were loaded in.
        self._wanted: dict[str, None] = {}
        self._known_modules: tuple[int, str] | None = None
        self._loaded: dict[str, None] = {}
        self._files: dict[str, int] = {}
        self._environ: dict[str, str] = {}
        self._main: MainModule | None = None
        self._prepared: PreparedMain | None = None
        # Modules after which forks are unsafe, and others of the same packages that are safe.
        self._unsafe: set[str] = set()
        self._safe: set[str] = set()

    def for_one_trial(self) -> ForkServerClient:
        """Return a client whose fork server starts a single trial and exits."""
        client = ForkServerClient(once=True)
        client._unsafe, client._safe = self._unsafe, self._safe
        client._retired = self._retired
        return client

    def prepare(self, preload: Sequence[str] = ()) -> PreparedMain:
        """Load what trials are to find loaded: this process's modules, and its main module.

        Args:
            preload: Modules to load beside those that this process has imported.

        Raises:
            OSError: If no fork server can be started.
        """
        with self._lock:
            self._update_wanted(preload)
            return self._with_server(self._prepare)

    def launch(self, cgroup: Path | None, descriptors: Sequence[int] = ()) -> TrialConnections:
        """Start a trial's processes.

        Args:
            cgroup: Where to make their control group, None for none.
            descriptors: Open files for the trial.

        Raises:
            OSError: If no fork server can be started.
        """
        request = pickle.dumps(SpawnRequest(cgroup, self._once))

        def launch(sock: socket.socket) -> TrialConnections:
            self._prepare(sock)
            return request_trial(sock, request, descriptors)

        with self._lock:
            connections = self._with_server(launch)
            if self._once:
                self._discard()
            return connections

    def reset(self) -> None:
        """Use another fork server from now on; trials under way continue."""
        with self._lock:
            self._discard()

    def release(self) -> None:
        """Let the fork server exit without waiting for it."""
        with self._lock:
            self._discard()
            self._errors.close()

    def close(self) -> None:
        """Let the fork server exit and wait for it; trials under way continue."""
        with self._lock:
            self._discard()
            for process in self._retired:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
            self._errors.close()

    def _update_wanted(self, preload: Sequence[str]) -> None:
        main = find_main_module()
        if main != self._main:
            # Another script's, or the same one edited: the former can't be unloaded.
            if self._prepared is not None:
                self._discard()
            self._main = main
        loaded = loaded_modules()
        if loaded != self._known_modules:
            # What is imported later is mostly this library's or Optuna's.
            names = modules_to_preload(everything=self._known_modules is None)
            self._known_modules = loaded
            self._wanted.update(dict.fromkeys(names))
        self._wanted.update(dict.fromkeys(preload))

    def _with_server(self, act: Callable[[socket.socket], T]) -> T:
        """Do something with the fork server, with a new one where it exits meanwhile."""
        faults = 0
        while True:
            sock = self._connect()
            try:
                return act(sock)
            except OSError as error:
                # Each unsafe module costs a fork server; there may be many of them.
                last_message = getattr(error, "last_message", b"") or _unread(sock)
                faults += not self._note_unsafe(last_message)
                self._discard()
                if faults == _ATTEMPTS:
                    raise OSError(self._describe_exit()) from error
            except BaseException:
                # An interrupt (Ctrl-C): the answer must not be taken for a later request's.
                self._discard()
                raise

    def _connect(self) -> socket.socket:
        if self._sock is not None and self._is_alive() and not self._is_stale():
            return self._sock
        self._discard()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = interpreter("forkserver", theirs.fileno())
            self._errors.seek(0)
            self._errors.truncate()
            self._environ = dict(os.environ)
            with block_job_signals():
                self._process = popen(command, self._errors, pass_fds=(theirs.fileno(),))
        # Neither it nor its forks are part of a trial in this process.
        metering_loop().excluded_pids.add(self._process.pid)
        self._sock = ours
        self._loaded, self._files, self._prepared = {}, {}, None
        return ours

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _is_stale(self) -> bool:
        """Return whether it would load something else now than it has loaded."""
        if any(modified(file) != time for file, time in self._files.items()):
            return True
        # Libraries read their variables when they are imported.
        return bool(self._new_modules()) and self._environ != os.environ

    def _prepare(self, sock: socket.socket) -> PreparedMain:
        self._preload(sock)
        if self._prepared is None:
            self._prepared = self._make_main_module(sock)
        return self._prepared

    def _preload(self, sock: socket.socket) -> None:
        new = self._new_modules()
        self._loaded.update(dict.fromkeys(new))
        self._files.update(modification_times(new))
        for start in range(0, len(new), _MODULES_PER_MESSAGE):
            modules = new[start : start + _MODULES_PER_MESSAGE]
            message = pickle.dumps(PreloadModules(tuple(sys.path), modules))
            if len(message) <= MESSAGE_SIZE:
                sock.send(message)

    def _new_modules(self) -> list[str]:
        return [m for m in self._wanted if m not in self._loaded and not self._is_unsafe(m)]

    def _make_main_module(self, sock: socket.socket) -> PreparedMain:
        main = self._main or MainModule()
        if _MAIN in self._unsafe:
            return PreparedMain(main, is_made=False)
        message = pickle.dumps(MakeMainModule(main))
        if len(message) > MESSAGE_SIZE:
            main = main.without_statements()
            message = pickle.dumps(MakeMainModule(main))
        sock.send(message)
        answer = sock.recv(MESSAGE_SIZE)
        made = pickle.loads(answer) if answer else None
        if not isinstance(made, MainModuleMade):
            raise ForkServerExited(answer)
        return PreparedMain(
            main if made.with_statements else main.without_statements(), is_made=True
        )

    def _discard(self) -> None:
        sock, self._sock = self._sock, None
        process, self._process = self._process, None
        self._prepared = None
        if sock is not None:
            sock.close()
        if process is not None:
            self._retired.append(process)
        for ended in [p for p in self._retired if p.poll() is not None]:
            with contextlib.suppress(ValueError):  # another thread was faster
                self._retired.remove(ended)
            metering_loop().excluded_pids.discard(ended.pid)

    def _describe_exit(self) -> str:
        """Return how a fork server exited, with the last line of its standard error."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        if not lines:
            return "The fork server exited without output."
        return f"The fork server exited: {lines[-1]}"

    def _note_unsafe(self, last_message: bytes) -> bool:
        """Note which module a fork server found unsafe; return whether that was news."""
        message = pickle.loads(last_message) if last_message else None
        if not isinstance(message, UnsafeModule) or message.module in self._unsafe:
            return False
        # The later ones of its package are not tried: each unsafe one costs a fork server, and
        # the trial waits meanwhile.
        earlier = itertools.takewhile(lambda name: name != message.module, self._wanted)
        self._safe.update([name for name in earlier if not self._is_unsafe(name)])
        self._unsafe.add(message.module)
        return True

    def _is_unsafe(self, module: str) -> bool:
        package = module.partition(".")[0]
        is_suspect = any(package == name.partition(".")[0] for name in self._unsafe)
        return is_suspect and module not in self._safe


def request_trial(
    sock: socket.socket, request: bytes, descriptors: Sequence[int] = ()
) -> TrialConnections:
    """Request a trial's processes from a fork server, and send the trial its open files.

    Raises:
        OSError: If the fork server is gone.
    """
    sock.send(request)
    answer, handles, _, _ = socket.recv_fds(sock, 1 << 16, 2)
    if len(handles) != 2:
        raise ForkServerExited(answer)
    channel, control = (Channel(socket.socket(fileno=handle)) for handle in handles)
    try:
        send_streams(channel, descriptors)
    except OSError:
        channel.close()
        control.close()
        raise
    return TrialConnections(channel, control)


def _unread(sock: socket.socket) -> bytes:
    """Return what a fork server sent before it exited: it may exit before all was sent to it."""
    with contextlib.suppress(OSError):
        return sock.recv(MESSAGE_SIZE, socket.MSG_DONTWAIT)
    return b""


_client: ForkServerClient | None = None
_client_lock = threading.Lock()
# In a fork, those of its parent: they are referred to, so that they are not closed.
_inherited: list[ForkServerClient] = []


def fork_server_client() -> ForkServerClient:
    """Return the client of this process's own fork server; a fork of this process gets another."""
    global _client
    with _client_lock:
        if _client is None:
            _client = ForkServerClient()
            atexit.register(_client.close)
        return _client


def _after_fork_in_child() -> None:
    global _client, _client_lock
    _client_lock = threading.Lock()
    if _client is not None:
        _inherited.append(_client)
        atexit.unregister(_client.close)
        _client = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
