"""This process's template: started when first needed, renewed when it is gone."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
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

from optuna_quota._isolation.job_signals import job_signals_blocked
from optuna_quota._isolation.launch import interpreter
from optuna_quota._isolation.launch import Launched
from optuna_quota._isolation.launch import order_trial
from optuna_quota._isolation.launch import popen
from optuna_quota._isolation.launch import TemplateGone
from optuna_quota._isolation.main_module import find_main_module
from optuna_quota._isolation.main_module import MainModule
from optuna_quota._isolation.modules import loaded_modules
from optuna_quota._isolation.modules import modification_times
from optuna_quota._isolation.modules import modified
from optuna_quota._isolation.modules import modules_to_preload
from optuna_quota._isolation.template import MadeMain
from optuna_quota._isolation.template import MakeMain
from optuna_quota._isolation.template import MESSAGE_SIZE
from optuna_quota._isolation.template import Order
from optuna_quota._isolation.template import Preload
from optuna_quota._isolation.template import Unsafe
from optuna_quota._metering import metering_loop


Answer = TypeVar("Answer")

_MAIN = "__main__"


@dataclass(frozen=True)
class PreparedMain:
    """The main module that trials will have.

    Attributes:
        module: How it is made.
        is_made: Whether a trial's process has it from its template; else the trial makes it.
    """

    module: MainModule
    is_made: bool


class TemplateClient:
    """Starts trials from one template; for any thread.

    Args:
        once: Whether the template is for a single trial, as for the start method spawn.
    """

    def __init__(self, *, once: bool = False) -> None:
        self._once = once
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._wanted: dict[str, None] = {}
        self._known_modules: tuple[int, str] | None = None
        self._loaded: dict[str, None] = {}
        self._files: dict[str, int] = {}
        self._environ: dict[str, str] = {}
        self._main: MainModule | None = None
        self._prepared: PreparedMain | None = None
        # What templates have found out: modules that no fork can follow, and others of the same
        # packages that one can.
        self._unsafe: set[str] = set()
        self._safe: set[str] = set()
        self._retired: list[subprocess.Popen[bytes]] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this

    def for_one_trial(self) -> TemplateClient:
        """Return a client whose template starts a single trial and ends."""
        client = TemplateClient(once=True)
        client._unsafe, client._safe = self._unsafe, self._safe
        client._retired = self._retired
        return client

    def release(self) -> None:
        """Let the template end without waiting for it."""
        with self._lock:
            self._discard()
            self._errors.close()

    def prepare(self, preload: Sequence[str] = ()) -> PreparedMain:
        """Load what a trial is to find loaded: the modules of this process, the main module.

        Args:
            preload: Modules to load beside those that this process has imported.

        Raises:
            OSError: If no template can be started.
        """
        with self._lock:
            self._want(preload)
            return self._insist(self._prepare)

    def launch(self, cgroup: Path | None, descriptors: Sequence[int] = ()) -> Launched:
        """Start a trial's processes.

        Args:
            cgroup: Where to make their control group, None for none.
            descriptors: Open files for the trial.

        Raises:
            OSError: If no template can be started.
        """
        data = pickle.dumps(Order(cgroup, self._once))

        def launch(sock: socket.socket) -> Launched:
            self._prepare(sock)
            return order_trial(sock, data, descriptors)

        with self._lock:
            launched = self._insist(launch)
            if self._once:
                self._discard()
            return launched

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
            self._errors.close()

    def _want(self, preload: Sequence[str]) -> None:
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

    def _insist(self, act: Callable[[socket.socket], Answer]) -> Answer:
        """Do something with the template, with a new one where it ends meanwhile."""
        faults = 0
        while True:
            sock = self._connect()
            try:
                return act(sock)
            except OSError as error:
                # Each module found unsafe costs a template; there may be many of them.
                faults += not self._hear(getattr(error, "last_words", b"") or _rest(sock))
                self._discard()
                if faults == 3:
                    raise OSError(
                        f"The process that starts trials ended: {self._complaint()}"
                    ) from error
            except BaseException:
                # An interrupt (Ctrl-C): this order's answer must not be taken for another's.
                self._discard()
                raise

    def _connect(self) -> socket.socket:
        if self._sock is not None and self._is_alive() and not self._is_stale():
            return self._sock
        self._discard()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = interpreter("template", theirs.fileno())
            self._errors.seek(0)
            self._errors.truncate()
            self._environ = dict(os.environ)
            with job_signals_blocked():
                self._process = popen(command, self._errors, pass_fds=(theirs.fileno(),))
        # It and its forks are no part of a trial in this process.
        metering_loop().excluded_pids.add(self._process.pid)
        self._sock = ours
        self._loaded, self._files, self._prepared = {}, {}, None
        return ours

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _is_stale(self) -> bool:
        """Return whether what the template has loaded is no longer what it would load."""
        if any(modified(file) != time for file, time in self._files.items()):
            return True
        # Libraries read their variables when they are imported.
        return bool(self._new_modules()) and self._environ != os.environ

    def _prepare(self, sock: socket.socket) -> PreparedMain:
        self._preload(sock)
        if self._prepared is None:
            self._prepared = self._make_main(sock)
        return self._prepared

    def _preload(self, sock: socket.socket) -> None:
        new = self._new_modules()
        if not new:
            return
        self._loaded.update(dict.fromkeys(new))
        self._files.update(modification_times(new))
        for start in range(0, len(new), 500):
            message = pickle.dumps(Preload(tuple(sys.path), new[start : start + 500]))
            if len(message) <= MESSAGE_SIZE:
                sock.send(message)

    def _new_modules(self) -> list[str]:
        return [m for m in self._wanted if m not in self._loaded and not self._is_unsafe(m)]

    def _make_main(self, sock: socket.socket) -> PreparedMain:
        main = self._main or MainModule()
        if _MAIN in self._unsafe:
            return PreparedMain(main, is_made=False)
        message = pickle.dumps(MakeMain(main))
        if len(message) > MESSAGE_SIZE:
            main = main.without_statements()
            message = pickle.dumps(MakeMain(main))
        sock.send(message)
        answer = sock.recv(MESSAGE_SIZE)
        made = pickle.loads(answer) if answer else None
        if not isinstance(made, MadeMain):
            raise TemplateGone(answer)
        whole = made.error is None
        return PreparedMain(main if whole else main.without_statements(), is_made=True)

    def _discard(self) -> None:
        sock, self._sock = self._sock, None
        process, self._process = self._process, None
        self._prepared = None
        if sock is not None:
            sock.close()
        if process is not None:
            # It ends by itself once it has served what was sent; to wait would hold up a trial.
            self._retired.append(process)
        for ended in [p for p in self._retired if p.poll() is not None]:
            with contextlib.suppress(ValueError):  # another thread was faster
                self._retired.remove(ended)
            metering_loop().excluded_pids.discard(ended.pid)

    def _complaint(self) -> str:
        """Return the last line that a template wrote to its standard error."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it exited without output."

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


_client: TemplateClient | None = None
_client_lock = threading.Lock()
# The parent's, in a fork: they are not this process's to end.
_foreign: list[TemplateClient] = []


def template_client() -> TemplateClient:
    """Return the client of this process's own template; a fork gets another."""
    global _client
    with _client_lock:
        if _client is None:
            _client = TemplateClient()
            atexit.register(_client.close)
        return _client


def _forget() -> None:
    """Let go of the parent's template, in the child after a fork."""
    global _client, _client_lock
    _client_lock = threading.Lock()
    if _client is not None:
        _foreign.append(_client)
        atexit.unregister(_client.close)
        _client = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
