"""The study's side of its fork server: start it, keep its modules current, start trials."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Collection, Iterable, Sequence
import contextlib
import io
import logging
import os
from pathlib import Path
import select
import socket
import subprocess
import sys
import threading
from typing import Any, BinaryIO, TypeVar

from optuna_quota._isolation.channel import Channel, TrialConnections
from optuna_quota._isolation.forkserver import (
    Importing,
    Prepare,
    Prepared,
    SpawnRequest,
    UnsafeModule,
)
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
    def __init__(self, module: str) -> None:
        super().__init__(f"{module} is unsafe before a fork.")
        self.module = module


class ForkServerClient:
    """Starts trials from one fork server; thread-safe.

    Raises OSError if no fork server can be started. With ``one_trial``, as for the start method
    spawn, the fork server prepares no second trial.
    """

    def __init__(self, *, one_trial: bool = False) -> None:
        self._one_trial = one_trial
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._errors: BinaryIO = io.BytesIO()  # what it writes to its standard error
        # Processes that exit by themselves once they have served their requests.
        self._retired: list[subprocess.Popen[bytes]] = []
        # Modules to load, in their order; those loaded, the times of their files, and the
        # environment that they were loaded in.
        self._wanted: dict[str, None] = {}
        self._known_modules: tuple[int, str] | None = None
        self._loaded: dict[str, None] = {}
        self._files: dict[str, int] = {}
        self._environ: dict[str, str] = {}
        self._main: MainModule | None = None
        self._prepared: MainModule | None = None
        # Modules that trials have imported; no other trial waits for one that fails here.
        self._learned: set[str] = set()
        # Modules after which forks are unsafe.
        self._unsafe: set[str] = set()
        # Those that the user has named, and of these, those that can't be imported.
        self._named: set[str] = set()
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
            self._update_wanted(preload)
            return self._with_server(self._prepare)

    def learn(self, modules: Iterable[str]) -> None:
        """Load modules that a trial has imported, before the next trial starts."""
        with self._lock:
            self._learned.update(modules)
            self._wanted.update(dict.fromkeys(modules))

    def launch(self, cgroup: Path | None, descriptors: Sequence[int] = ()) -> TrialConnections:
        """Start a trial's processes, with open files and in a control group."""

        def launch(channel: Channel) -> TrialConnections:
            self._prepare(channel)
            return request_trial(channel, SpawnRequest(cgroup, self._one_trial), descriptors)

        with self._lock:
            return self._with_server(launch)

    def reset(self) -> None:
        """Let the fork server exit and use another one from now on; running trials continue."""
        with self._lock:
            self._discard()

    def close(self) -> None:
        """Let the fork server exit and wait for it; running trials continue."""
        self.reset()
        for process in list(self._retired):
            try:
                process.wait(timeout=_EXIT_TIME)
            except subprocess.TimeoutExpired:
                # It does not notice that it is not needed while it imports a module.
                process.kill()

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
        self._named.update(preload)

    def _with_server(self, act: Callable[[Channel], T]) -> T:
        """Call a function with the fork server, again with a new one if it has exited."""
        faults = 0
        while True:
            channel = self._connect()
            try:
                return act(channel)
            except TimeoutError:
                if self._process is not None:
                    self._process.kill()
                self._discard()
                raise
            except (OSError, EOFError) as error:
                reason = self._describe_exit()
                if isinstance(error, _Unsafe) and self._process is not None:
                    self._process.kill()  # it exits by itself, unless it hangs
                self._discard()
                if isinstance(error, _Unsafe) and error.module not in self._unsafe:
                    # Each costs a fork server, and there may be many of them.
                    self._unsafe.add(error.module)
                    continue
                faults += 1
                if faults == _ATTEMPTS:
                    raise OSError(reason) from error
            except BaseException:
                # An interrupt (Ctrl-C): a later request must not receive this answer.
                self._discard()
                raise

    def _connect(self) -> Channel:
        if self._channel is not None and self._is_alive() and not self._is_stale():
            return self._channel
        self._discard()
        ours, theirs = socket.socketpair()
        # For a request that its buffer has no room for, and the rest of an answer.
        ours.settimeout(ANSWER_TIME)
        with theirs:
            command = interpreter("forkserver", theirs.fileno())
            # In memory: a read-only container or a full disk has no other place.
            self._errors = os.fdopen(os.memfd_create("optuna-quota-errors"), "w+b")
            self._environ = dict(os.environ)
            with block_job_signals():
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    start_new_session=True,
                    pass_fds=(theirs.fileno(),),
                )
        # Neither it nor its forks are part of a trial in this process.
        metering_loop().trees.excluded_pids.add(self._process.pid)
        self._channel = Channel(ours)
        self._loaded, self._files, self._prepared = {}, {}, None
        return self._channel

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _is_stale(self) -> bool:
        if any(modified(file) != time for file, time in self._files.items()):
            return True
        # Libraries read their variables when they are imported.
        return bool(self._new_modules()) and self._environ != os.environ

    def _prepare(self, channel: Channel) -> MainModule:
        new, main = self._new_modules(), self._main or MainModule()
        makes_main = self._prepared is None and _MAIN not in self._unsafe
        if new or makes_main:
            self._loaded.update(dict.fromkeys(new))
            self._files.update(modification_times(new))
            request = Prepare(tuple(sys.path), new, main if makes_main else None)
            answer = _ask(channel, request, self._learned)
            self._prepared = answer.main or self._prepared
            for name in self._named & (answer.errors.keys() - self._warned):
                self._warned.add(name)
                _logger.warning(
                    f"`preload` names {name!r}, which can't be imported in a new process: "
                    f"{answer.errors[name]}. Trials start without it."
                )
        return self._prepared or main

    def _new_modules(self) -> list[str]:
        """Return the modules to load; of a package with an unsafe module, those before it.

        Each unsafe module costs a new fork server, for which the trial waits.
        """
        new, unsafe_packages = [], set()
        for name in self._wanted:
            if name not in self._loaded:
                package = name.partition(".")[0]
                if name in self._unsafe:
                    unsafe_packages.add(package)
                elif package not in unsafe_packages:
                    new.append(name)
        return new

    def _discard(self) -> None:
        channel, self._channel = self._channel, None
        process, self._process = self._process, None
        self._prepared = None
        self._errors.close()
        if channel is not None:
            channel.close()
        if process is not None:
            self._retired.append(process)
        for ended in [p for p in self._retired if p.poll() is not None]:
            with contextlib.suppress(ValueError):  # another thread was faster
                self._retired.remove(ended)
            metering_loop().trees.excluded_pids.discard(ended.pid)

    def _describe_exit(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        if not lines:
            return "The fork server exited without output."
        return f"The fork server exited: {lines[-1]}"


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
    try:
        with contextlib.ExitStack() as stack:
            streams = [_standard_stream(number, stack) for number in (1, 2)]
            channel.send_descriptors([*streams, *descriptors])
    except OSError:
        channel.close()
        control.close()
        raise
    return TrialConnections(channel, control)


def _standard_stream(number: int, stack: contextlib.ExitStack) -> int:
    """Return a standard stream's descriptor, that of a null device if it is closed."""
    try:
        # Where it was closed from the start, another file may have its number.
        if (sys.__stdout__, sys.__stderr__)[number - 1] is None:
            raise OSError
        os.fstat(number)
    except OSError:
        number = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, number)
    return number


def _ask(server: Channel, request: Prepare, optional: Collection[str] = ()) -> Prepared:
    awaited, module = "The start of Python or of an import", ""
    try:
        server.send(request)
        while True:
            _wait(server, LEARNED_TIME if module in optional else ANSWER_TIME)
            answer = server.receive()
            if isinstance(answer, UnsafeModule):
                raise _Unsafe(answer.name)
            if isinstance(answer, Prepared):
                return answer
            assert isinstance(answer, Importing)
            module, is_main = answer.name, answer.name == _MAIN
            awaited = f"The import of {'this script' if is_main else repr(module)}"
    except (EOFError, ConnectionError):
        if module in optional:
            raise _Unsafe(module) from None
        raise
    except TimeoutError:
        if module in optional:
            raise _Unsafe(module) from None
        raise _overdue(awaited) from None


def _overdue(awaited: str) -> TimeoutError:
    within = format_seconds(ANSWER_TIME)
    return TimeoutError(f"{awaited} has not ended within {within} in a new process.")


def _wait(server: Channel, seconds: float) -> None:
    """Wait for a message; raises TimeoutError, where pauses of this process don't count."""
    poll = select.poll()
    poll.register(server.fileno(), select.POLLIN)
    clock = RunningClock()
    due = clock() + seconds
    while not server.pending():
        clock.fall_asleep(_LOOK_PERIOD)
        is_ready = poll.poll(_LOOK_PERIOD * 1000)
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
