"""The study's side of its fork server: start it, keep its modules current, start trials."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
import contextlib
import functools
import logging
import os
from pathlib import Path
import socket
import subprocess
import sys
import threading
from typing import Any, TypeVar

from optuna_quota._isolation import linux
from optuna_quota._isolation.channel import Channel, TrialConnections
from optuna_quota._isolation.forkserver import Prepare, Prepared, SpawnRequest
from optuna_quota._isolation.main_module import find_main_module, MainModule
from optuna_quota._isolation.modules import (
    loaded_modules,
    modification_times,
    modified,
    modules_to_preload,
)
from optuna_quota._isolation.signals import block_job_signals
from optuna_quota._metering import metering_loop
from optuna_quota._metering.timing import RunningClock
from optuna_quota._units import format_seconds


T = TypeVar("T")

_logger = logging.getLogger("optuna.quota.isolated")

_MAIN = "__main__"
_ATTEMPTS = 3
# Seconds for one step of a new process: an import may hang there, on a network or a lock, though
# it did not in this process.
ANSWER_TIME = 600.0
# The same for a module that a trial has imported, which later trials can import themselves.
LEARNED_TIME = 60.0
# Seconds between two readings of the clock meanwhile: of a pause, at most as much counts.
_LOOK_PERIOD = 1.0
# Seconds for it to exit by itself when this process ends.
_EXIT_TIME = 5.0


class _Unsafe(OSError):
    """Forks are unsafe after the import of a module, or it ends or hangs the fork server."""

    def __init__(self, module: str) -> None:
        super().__init__(f"{module} is unsafe before a fork.")
        self.module = module


class _ForkServer:
    """One process of the fork server, its connection, and what it has loaded."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        # For a request that its buffer has no room for, and the rest of an answer.
        ours.settimeout(ANSWER_TIME)
        self.channel = Channel(ours)
        # What it writes to its standard error; in memory, as a read-only container or a full disk
        # has no other place.
        self.errors = os.fdopen(os.memfd_create("optuna-quota-errors"), "w+b")
        self.environ = dict(os.environ)
        self.loaded: set[str] = set()
        self.files: dict[str, int] = {}  # When files of loaded modules were last changed
        # The main module that it was to make, and the one that it has made.
        self.wanted_main: MainModule | None = None
        self.main: MainModule | None = None
        with theirs, block_job_signals():
            self.process = subprocess.Popen(
                interpreter("forkserver", theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        # Neither it nor its forks are part of a trial in this process.
        metering_loop().trees.excluded_pids.add(self.process.pid)

    def close(self) -> None:
        self.channel.close()
        self.errors.close()

    def load(
        self, modules: list[str], main: MainModule | None, optional: Container[str]
    ) -> Mapping[str, str]:
        """Load modules and make the main module; return the errors of modules by name.

        Raises _Unsafe for an ``optional`` module that ends the fork server or hangs.
        """
        self.loaded.update(modules)
        self.files.update(modification_times(modules))
        awaited, module = "The start of Python or of an import", ""
        try:
            self.channel.send(Prepare(tuple(sys.path), modules, main))
            while True:
                _wait(self.channel, LEARNED_TIME if module in optional else ANSWER_TIME)
                answer = self.channel.receive()
                if isinstance(answer, Prepared):
                    break
                module = answer
                awaited = f"The import of {'this script' if module == _MAIN else repr(module)}"
        except (EOFError, ConnectionError, TimeoutError) as error:
            if module in optional:
                raise _Unsafe(module) from None
            if isinstance(error, TimeoutError):
                raise _overdue(awaited) from None
            raise
        if answer.unsafe is not None:
            raise _Unsafe(answer.unsafe)
        if main is not None:
            self.wanted_main, self.main = main, answer.main
        return answer.errors

    def describe_exit(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        if not lines:
            return "The fork server exited without output."
        return f"The fork server exited: {lines[-1]}"


class ForkServerClient:
    """Starts trials from one fork server; thread-safe.

    Raises OSError if no fork server can be started. With ``one_trial``, as for the start method
    spawn, the fork server prepares no second trial.
    """

    def __init__(self, *, one_trial: bool = False) -> None:
        self._one_trial = one_trial
        self._lock = threading.Lock()
        self._server: _ForkServer | None = None
        # Processes that exit by themselves once they have served their requests.
        self._retired: list[subprocess.Popen[bytes]] = []
        self._main: MainModule | None = None
        # Modules to load, in their order.
        self._wanted: dict[str, None] = {}
        self._known_modules: tuple[int, str] | None = None
        # Those that trials have imported; no other trial waits for one that fails here.
        self._learned: set[str] = set()
        # Those after which forks are unsafe.
        self._unsafe: set[str] = set()
        # Those named by the user that can't be imported, once this was logged.
        self._warned: set[str] = set()

    def for_one_trial(self) -> ForkServerClient:
        """Return another client, for the start method spawn; reset it after use."""
        client = ForkServerClient(one_trial=True)
        client._unsafe, client._warned = self._unsafe, self._warned
        client._retired = self._retired
        return client

    def prepare(self, preload: Sequence[str] = ()) -> MainModule:
        """Load this process's modules and its main module for trials."""
        with self._lock:
            self._main = find_main_module()
            loaded = loaded_modules()
            if loaded != self._known_modules:
                # What is imported later is mostly this library's or Optuna's.
                names = modules_to_preload(everything=self._known_modules is None)
                self._known_modules = loaded
                self._wanted.update(dict.fromkeys(names))
            self._wanted.update(dict.fromkeys(preload))
            return self._with_server(functools.partial(self._prepare, preload))

    def learn(self, modules: Iterable[str]) -> None:
        """Load modules that a trial has imported, before the next trial starts."""
        with self._lock:
            self._learned.update(modules)
            self._wanted.update(dict.fromkeys(modules))

    def launch(self, cgroup: Path | None, descriptors: Sequence[int] = ()) -> TrialConnections:
        """Start a trial's processes, with open files and in a control group."""

        def launch(server: _ForkServer) -> TrialConnections:
            self._prepare((), server)
            request = SpawnRequest(cgroup, self._one_trial)
            return request_trial(server.channel, request, descriptors)

        with self._lock:
            return self._with_server(launch)

    def reset(self) -> None:
        """Let the fork server exit and use another one from now on; running trials continue."""
        with self._lock:
            self._retire(self._server)
            self._server = None

    def close(self) -> None:
        """Let the fork server exit and wait for it; running trials continue."""
        self.reset()
        for process in list(self._retired):
            try:
                process.wait(timeout=_EXIT_TIME)
            except subprocess.TimeoutExpired:
                # It does not notice that it is not needed while it imports a module.
                process.kill()

    def _with_server(self, act: Callable[[_ForkServer], T]) -> T:
        """Call a function with the fork server, again with a new one if it has exited."""
        faults = 0
        while True:
            if self._server is None or self._is_outdated(self._server):
                self._retire(self._server)
                self._server = None
                self._server = _ForkServer()
            # Kept only after a whole answer, which is another request's after an interrupt.
            server, self._server = self._server, None
            try:
                result = act(server)
                self._server = server
                return result
            except _Unsafe as error:
                # Each costs a fork server, and there may be many of them.
                self._unsafe.add(error.module)
                server.process.kill()  # it exits by itself, unless it hangs
            except TimeoutError:
                server.process.kill()
                raise
            except (OSError, EOFError) as error:
                faults += 1
                if faults == _ATTEMPTS:
                    raise OSError(server.describe_exit()) from error
            finally:
                if self._server is None:
                    self._retire(server)

    def _is_outdated(self, server: _ForkServer) -> bool:
        return (
            server.process.poll() is not None
            or any(modified(file) != time for file, time in server.files.items())
            # Another script, or the same one edited: the former can't be unloaded.
            or (server.main is not None and server.wanted_main != self._main)
            # Libraries read their variables when they are imported.
            or (server.environ != os.environ and bool(self._new_modules(server)))
        )

    def _prepare(self, preload: Sequence[str], server: _ForkServer) -> MainModule:
        new, main = self._new_modules(server), self._main or MainModule()
        makes_main = server.main is None and _MAIN not in self._unsafe
        if new or makes_main:
            errors = server.load(new, main if makes_main else None, self._learned)
            for name in (errors.keys() & set(preload)) - self._warned:
                self._warned.add(name)
                _logger.warning(
                    f"`preload` names {name!r}, which can't be imported in a new process: "
                    f"{errors[name]}. Trials start without it."
                )
        return server.main or main

    def _new_modules(self, server: _ForkServer) -> list[str]:
        """Return the modules to load; of a package with an unsafe module, those before it.

        Each unsafe module costs a new fork server, for which the trial waits.
        """
        new, unsafe_packages = [], set()
        for name in self._wanted:
            package = name.partition(".")[0]
            if name in server.loaded:
                continue
            if name in self._unsafe:
                unsafe_packages.add(package)
            elif package not in unsafe_packages:
                new.append(name)
        return new

    def _retire(self, server: _ForkServer | None) -> None:
        if server is not None:
            server.close()
            self._retired.append(server.process)
        for ended in [p for p in self._retired if p.poll() is not None]:
            with contextlib.suppress(ValueError):  # another thread was faster
                self._retired.remove(ended)
            metering_loop().trees.excluded_pids.discard(ended.pid)


_BOOT = (
    "import sys; sys.path[:] = {path!r}; "
    "from optuna_quota._isolation.{module} import main; main({argument})"
)


def interpreter(module: str, argument: Any) -> list[str]:
    """Return the command that runs ``main`` of one of these modules in a fresh interpreter.

    It has this process's ``sys.path``: the working directory, otherwise first, may have a file
    with the name of a module.
    """
    from multiprocessing.spawn import get_executable

    folder = str(Path(__file__).resolve().parents[2])
    path = [entry for entry in sys.path if isinstance(entry, str)]
    path += [] if folder in path else [folder]
    code = _BOOT.format(path=path, module=module, argument=repr(argument))
    return [os.fsdecode(get_executable()), *_options(), "-c", code]


# Their output would not be read.
_PRINTING = ("importtime", "showrefcount")


def _options() -> list[str]:
    """Return the options of this interpreter that change what code does, such as ``-O``."""
    letters = {
        "O": sys.flags.optimize,
        "b": sys.flags.bytes_warning,
        "B": sys.flags.dont_write_bytecode,
        "E": sys.flags.ignore_environment,
        "s": sys.flags.no_user_site,
    }
    found = ["-" + letter * int(count) for letter, count in letters.items() if count > 0]
    named = {name: value for name, value in sys._xoptions.items() if name not in _PRINTING}
    return [*found, *(f"-X{n}" if v is True else f"-X{n}={v}" for n, v in named.items())]


def request_trial(
    server: Channel, request: SpawnRequest, descriptors: Sequence[int] = ()
) -> TrialConnections:
    """Request a trial's processes from a fork server, and send the trial its open files."""
    try:
        server.send(request)
        _wait(server, ANSWER_TIME)
        handles = server.receive_descriptors()
    except TimeoutError:
        raise _overdue("The start of a trial") from None
    if len(handles) != 2:
        for handle in handles:
            os.close(handle)
        raise OSError(
            "The fork server started no trial: it has exited, or this process has too many open "
            "files (`ulimit -n`)."
        )
    channel, control = (Channel(socket.socket(fileno=handle)) for handle in handles)
    trial = TrialConnections(channel, control)
    try:
        with open(os.devnull, "wb") as null:
            streams = [n if _is_standard_open(n) else null.fileno() for n in (1, 2)]
            trial.channel.send_descriptors([*streams, *descriptors])
    except OSError:
        trial.close()
        raise
    return trial


def _is_standard_open(number: int) -> bool:
    # Where it was closed from the start, another file may have its number.
    if (sys.__stdout__, sys.__stderr__)[number - 1] is None:
        return False
    with contextlib.suppress(OSError):
        os.fstat(number)
        return True
    return False


def _overdue(awaited: str) -> TimeoutError:
    within = format_seconds(ANSWER_TIME)
    return TimeoutError(f"{awaited} has not ended within {within} in a new process.")


def _wait(server: Channel, seconds: float) -> None:
    """Wait for a message; raises TimeoutError, where pauses of this process don't count."""
    clock = RunningClock()
    due = clock() + seconds
    while not server.pending():
        clock.fall_asleep(_LOOK_PERIOD)
        is_ready = linux.is_ready(server.fileno(), _LOOK_PERIOD)
        clock.wake_up()
        if is_ready:
            return
        if clock() >= due:
            raise TimeoutError


_client: ForkServerClient | None = None
_client_lock = threading.Lock()
# In a fork, those of its parent: kept alive, so that they are not closed.
_inherited: list[ForkServerClient] = []


def fork_server_client() -> ForkServerClient:
    """Return the client of this process's fork server; a fork of this process gets another."""
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
