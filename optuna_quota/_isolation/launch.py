"""Start a trial's processes by its start method, and send them what they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import ctypes
from dataclasses import dataclass
import errno
import functools
import math
import os
from pathlib import Path
import selectors
import signal
import socket
import subprocess
import threading
import time
from typing import Any, Literal

from optuna.trial import BaseTrial, Trial
import psutil

from optuna_quota import _optuna
from optuna_quota._enforcement.preemption import preemption_of
from optuna_quota._isolation import linux, messages
from optuna_quota._isolation.channel import Channel, channel_pair, TrialConnections
from optuna_quota._isolation.cores import Cores
from optuna_quota._isolation.environment import read_context
from optuna_quota._isolation.forkserver import fork_trial
from optuna_quota._isolation.forkserver_client import fork_server_client, interpreter
from optuna_quota._isolation.main_module import find_main_module, MainModule
from optuna_quota._isolation.memory_limits import find_delegated, own_cgroup
from optuna_quota._isolation.module_state import read_variables
from optuna_quota._isolation.output import (
    flush_streams,
    prepare_logging,
    read_output_settings,
)
from optuna_quota._isolation.payload import Payload
from optuna_quota._isolation.pickling import dump_objective, NeedsFork
from optuna_quota._isolation.random_generators import find_generators
from optuna_quota._isolation.reducers import flush_files_within_reach
from optuna_quota._isolation.rpc import RemoteObjects, TRIAL, TrialHandle
from optuna_quota._isolation.signals import read_signal_state
from optuna_quota._limits import Limits
from optuna_quota._metering import TrialMonitor
from optuna_quota._metering.host import device_memory


StartMethod = Literal["forkserver", "spawn", "fork"]
OnCrash = Literal["fail", "raise"]


@dataclass(frozen=True)
class IsolationOptions:
    """The options of :func:`~optuna_quota.isolated`."""

    grace_period: float
    start_method: StartMethod
    limits: Limits | None
    predictive_stop: bool
    on_crash: OnCrash
    strict_memory: bool
    preload: tuple[str, ...]

    @property
    def outsiders(self) -> int:
        """How many other processes share the memory that the trial was forked with.

        The fork server, the trial's supervisor, and the two processes forked for the next trial.
        """
        return 4 if self.start_method == "forkserver" else 0


class CannotStart(Exception):
    """No process can be started for a trial, also not after a retry with a new fork server."""

    def __init__(self, error: OSError) -> None:
        reason = f"The trial's process could not be started: {str(error).removesuffix('.')}."
        if error.errno in (errno.EMFILE, errno.ENFILE):
            reason += " Allow more open files (`ulimit -n`), or run fewer trials at once."
        super().__init__(reason)


@dataclass
class TrialLauncher:
    """Starts a trial's processes, then sends their first messages."""

    objective: Callable[..., Any]
    options: IsolationOptions
    trial: BaseTrial
    monitor: TrialMonitor
    remote: RemoteObjects
    cores: Cores | None
    _to_send: tuple[messages.StartTrial, Payload] | None = None

    def launch(self) -> TrialConnections:
        """Start the processes; raises OSError if that fails."""
        method = self.options.start_method
        if not linux.can_supervise():
            self._prepare_messages(find_main_module().without_statements())
            return _launch_portable()
        if method == "fork":
            return self._fork()
        client = fork_server_client()
        if method == "spawn":
            client = client.for_one_trial()
        before = self.monitor.elapsed
        try:
            descriptors = self._prepare_messages(client.prepare(self.options.preload))
            connections = client.launch(_delegated_cgroup(), descriptors)
        except NeedsFork:
            # The default start method of multiprocessing where such a lock is created.
            if linux.uses_cuda():
                raise
            return self._fork()
        finally:
            if method == "spawn":
                client.reset()
        # What the fork server loads first serves all trials, so this one is not charged for it.
        self.monitor.detach(waited=self.monitor.elapsed - before)
        return connections

    def _fork(self) -> TrialConnections:
        if linux.uses_cuda():
            raise RuntimeError(
                "`start_method` must not be 'fork' once this process uses CUDA, which a forked "
                "process can't use; choose 'forkserver'."
            )
        # Before the fork: after it, each page that this process writes to is copied.
        inherited = messages.InheritedObjective(
            self._start_message(MainModule()),
            self._monitoring(),
            self.objective,
            generators=find_generators(self.objective),
            files=flush_files_within_reach(self.objective),
            variables=read_variables(self.objective),
        )
        prepare_logging(reset=False)
        flush_streams()
        _end_openmp_threads()
        parent = os.pidfd_open(os.getpid())
        try:
            return fork_trial(parent, cgroup=_delegated_cgroup(), inherited=inherited)
        finally:
            os.close(parent)

    def begin(self, connections: TrialConnections) -> None:
        """Send the messages; while the trial runs, it alone holds what was sent to it."""
        to_send, self._to_send = self._to_send, None
        if to_send is not None:
            start, payload = to_send
            with contextlib.suppress(ConnectionError):
                connections.control.send(self._monitoring())
                connections.channel.send(start)
                payload.send(connections.channel)

    def _prepare_messages(self, main: MainModule) -> Sequence[int]:
        """Make the messages, and return the open files that the trial needs."""
        payload = dump_objective(self.objective, self.remote, main)
        self._to_send = self._start_message(main), payload
        return payload.descriptors

    def _start_message(self, main: MainModule) -> messages.StartTrial:
        trial, monitor = self.trial, self.monitor
        study = trial.study if isinstance(trial, Trial) else None
        # Limits that can be set only once use the largest possible grant of a quota; the
        # metering loop enforces what is granted so far.
        limits = {name: ceiling.limit for name, ceiling in monitor.hard_ceilings.items()}
        environment = {**os.environ, **monitor.environment}
        return messages.StartTrial(
            context=read_context(monitor.environment, main),
            output=read_output_settings(),
            address=self.remote.listener.address,
            trial=TrialHandle(
                TRIAL,
                Trial,
                number=trial.number,
                trial_id=None if study is None else _optuna.trial_id_of(trial),
                datetime_start=trial.datetime_start,
                study=None if study is None else self.remote.handle(study),
            ),
            limits=limits,
            device_memory=device_memory(environment) if "gpu_memory" in limits else None,
            cores=self.cores,
            grace_period=self.options.grace_period,
            strict_memory=self.options.strict_memory,
            signals=read_signal_state(() if study is None else preemption_of(study).signals),
        )

    def _monitoring(self) -> messages.BeginMonitoring:
        ceiling = self.monitor.hard_ceilings.get("memory")
        return messages.BeginMonitoring(
            grace_period=self.options.grace_period,
            memory=None if ceiling is None else ceiling.limit,
            quota=ceiling is not None and ceiling.quota,
            elapsed=self.monitor.elapsed,
            outsiders=self.options.outsiders,
        )


@functools.cache
def _delegated_cgroup() -> Path | None:
    return find_delegated(own_cgroup())


_OMP_PAUSE_HARD = 2


def _end_openmp_threads() -> None:
    """Make GNU's OpenMP end the idle threads of this thread; it starts them again when needed.

    It does not notice that a forked process lacks these threads, and would wait for them forever.
    LLVM's and Intel's OpenMP do notice.
    """
    paths: set[str] = set()
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as file:
        paths = {line.split(None, 5)[5].strip() for line in file if "libgomp" in line}
    for path in paths:
        if path.startswith("/"):
            with contextlib.suppress(OSError, AttributeError):
                library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
                library.omp_pause_resource_all(_OMP_PAUSE_HARD)


# Without a supervisor process, as on systems other than Linux. Each trial starts in a new
# interpreter. Processes that left the trial's tree are found only if they were seen in it, the
# kernel's limits are not used, and on Windows there is no polite stop.

# Seconds between readings of the trial's processes.
_PORTABLE_INTERVAL = 0.02


def _launch_portable() -> TrialConnections:
    ours, theirs = socket.socketpair()
    with theirs:
        if os.name == "posix":
            handle = theirs.fileno()
            process = subprocess.Popen(
                interpreter("child", handle),
                stdin=subprocess.DEVNULL,
                pass_fds=[handle],
                start_new_session=True,
            )
        else:
            for sock in (ours, theirs):
                # A message sent in two parts would wait for an acknowledgement in between.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            process = subprocess.Popen(interpreter("child", None), stdin=subprocess.PIPE)
            assert process.stdin is not None
            with process.stdin:
                process.stdin.write(theirs.share(process.pid))  # type: ignore[attr-defined]
    control, commands = channel_pair()
    threading.Thread(target=_PortableSupervisor(process, commands).run, daemon=True).start()
    return TrialConnections(Channel(ours), control)


class _PortableSupervisor:
    """Supervises a trial's process from a thread of the study's process."""

    def __init__(self, process: subprocess.Popen[bytes], control: Channel) -> None:
        self._process = process
        self._root = psutil.Process(process.pid)
        self._control = control
        self._descendants: dict[int, psutil.Process] = {}
        self._deadline = math.inf
        self._killer: messages.Killer | None = None
        self._cpu_time = 0.0

    def run(self) -> None:
        # The study waits until this connection is closed.
        with contextlib.closing(self._control):
            try:
                self._supervise()
            finally:
                self._process.kill()

    def _supervise(self) -> None:
        with contextlib.suppress(OSError):
            self._control.send(messages.ProcessStarted())
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            while self._process.poll() is None:
                self._find_descendants()
                if selector.select(_PORTABLE_INTERVAL) or self._control.pending():
                    self._obey()
                if time.monotonic() >= self._deadline:
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
            self._deadline = min(self._deadline, time.monotonic() + command.seconds)
        elif isinstance(command, messages.StopTrial) and self._deadline == math.inf:
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
        left = []
        for process in self._descendants.values():
            # psutil compares the creation time too, so it kills no other process.
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    left.append(process)
        psutil.wait_procs(left, timeout=5)
        return tuple(str(process.pid) for process in left)
