"""The messages between the study's process, a trial's supervisor and the trial's own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna_quota._isolation.channel import SentError
from optuna_quota._isolation.cores import Cores
from optuna_quota._isolation.environment import ProcessContext
from optuna_quota._isolation.module_state import Variables
from optuna_quota._isolation.output import OutputSettings
from optuna_quota._isolation.rpc import Address, TrialHandle
from optuna_quota._isolation.signals import SignalState
from optuna_quota._metering.linux_process import MemorySnapshot
from optuna_quota._usage import Breach
from optuna_quota.exceptions import LimitBreached


# From the study's process to the supervisor.


@dataclass(frozen=True)
class BeginMonitoring:
    """The first message: a trial uses this process from now on.

    With it, the supervisor can enforce the memory limit from the trial's :class:`Ready` on,
    however busy the study's interpreter is.
    """

    grace_period: float
    memory: float | None  # The limit in bytes, None without one
    quota: bool  # Whether it is what is left of a quota
    elapsed: float
    # At least how many processes outside of the trial share the memory that it was forked with
    outsiders: int = 0


# A breach, Ctrl-C, or an error that says why the trial has to end.
StopReason = Breach | KeyboardInterrupt | LimitBreached


@dataclass(frozen=True)
class StopTrial:
    """Stop the trial politely, then kill it after the grace period in seconds."""

    reason: StopReason
    grace_period: float


@dataclass(frozen=True)
class ExitWithin:
    """The result has arrived: kill what is left of the trial after this many seconds."""

    seconds: float


@dataclass(frozen=True)
class KillTrial:
    """Kill the trial now."""


# From the supervisor to the study's process.


@dataclass(frozen=True)
class ProcessStarted:
    """The trial's process has started, with the pid of its supervisor, if that is a process."""

    supervisor: int | None = None


@dataclass(frozen=True)
class BreachFound:
    """The supervisor has found a breach and is stopping the trial, which has a grace period."""

    breach: Breach
    before_objective: bool = False
    grace_period: float = 0.0


@dataclass(frozen=True)
class ProcessPaused:
    """A signal has suspended the trial's process; it is killed after this many seconds."""

    timeout: float


Killer = Literal["breach", "request", "stopped"]


@dataclass(frozen=True)
class ExitReport:
    """How the trial's process ended; sent once no process of it is left, or can be killed."""

    # The exit code of the trial's process, negative for a signal; None if unknown
    exitcode: int | None
    # Why the supervisor killed it: a breach, a request of the study's process, or a suspension
    # that lasted too long; None when it ended by itself
    killer: Killer | None = None
    memory: float | None = None  # The highest memory of the tree that was measured, in bytes
    # A peak between two measurements, by the kernel's own counters, in bytes
    unseen_memory: float | None = None
    cpu_time: float | None = None  # CPU-seconds of all processes of the trial
    leftovers: tuple[str, ...] = ()  # Descriptions of the processes that it left behind
    oom_kills: int = 0  # Kills by the kernel's out-of-memory killer on this host meanwhile
    cgroup_oom_kills: int = 0  # Such kills in the trial's own control group
    traceback: str = ""  # The Python traceback of a process that died of a signal
    stuck: str = ""  # Which processes could not be killed, one sentence; else empty


# From the study's process to the trial's own.


@dataclass(frozen=True)
class StartTrial:
    """All that a trial's process needs to begin; the objective follows unless it is inherited."""

    context: ProcessContext
    output: OutputSettings
    address: Address
    trial: TrialHandle
    limits: Mapping[str, float]  # The ceilings in force by resource, in SI base units
    device_memory: float | None  # The memory of the smallest visible GPU, in bytes
    cores: Cores | None  # The cores that it is confined to, None for all
    grace_period: float
    strict_memory: bool
    signals: SignalState


@dataclass(frozen=True)
class InheritedObjective:
    """Messages and objective that a fork of the study's process inherits.

    Also the script's random generators, files and variables: searching for them in the fork would
    copy each page.
    """

    start: StartTrial
    monitoring: BeginMonitoring
    objective: Any
    generators: list[Any]
    files: Sequence[Any]  # Without anything in their buffers
    variables: Variables


# From the trial's process.


@dataclass(frozen=True)
class Ready:
    """The objective is about to be called; for the supervisor and the study's process."""

    pid: int
    # Its parent, which inherits all orphans among its descendants; None where it is the study's
    # process
    supervisor: int | None
    data_limit: int | None  # The ``RLIMIT_DATA`` that makes allocations fail, None without
    # Whether the objective waits until the supervisor has measured the trial without it
    waits: bool
    memory: MemorySnapshot | None  # Its memory so far, for its supervisor


@dataclass(frozen=True)
class Outcome:
    """How the call of the objective ended."""

    # Whether the objective had been asked to stop by then
    stop_requested: bool = field(default=False, kw_only=True)
    # The peak of GPU memory by the frameworks' own counters, in bytes
    gpu_memory: float | None = field(default=None, kw_only=True)
    # The modules that trials after this one should find loaded
    late_imports: tuple[str, ...] = field(default=(), kw_only=True)
    # The variables of the script that the trial has changed in its own process
    changed: tuple[str, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Returned(Outcome):
    """The objective returned a value."""

    value: Any


@dataclass(frozen=True)
class FailedAllocation:
    """A failed allocation: its bytes, if the error names them, and the message."""

    resource: Literal["memory", "gpu_memory"]
    requested: float | None = None
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Raised(Outcome):
    """The objective raised an error, possibly due to a failed allocation."""

    error: SentError
    failed_allocation: FailedAllocation | None = None


@dataclass(frozen=True)
class Exited(Outcome):
    """The objective called ``sys.exit``: the exit code, and its argument as text."""

    code: int
    argument: str


@dataclass(frozen=True)
class Unsendable(Outcome):
    """The objective returned or sent an object that can't be sent; the reason is a sentence."""

    reason: str
