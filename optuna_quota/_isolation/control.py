"""What the study's process and a trial's supervisor tell each other."""

from __future__ import annotations

from dataclasses import dataclass

from optuna_quota._resources import Breach


@dataclass(frozen=True)
class Started:
    """The trial's process exists."""

    pid: int


@dataclass(frozen=True)
class BeginMonitoring:
    """The trial's process is in use from now on.

    Sent before the objective begins, with all that the supervisor needs then: it starts to measure
    and enforce at the trial's own word (:class:`ObjectiveBegins`), however busy the study's
    interpreter is.

    Attributes:
        grace_period: Seconds between the polite stop and the kill.
        memory: The limit in bytes, None without one.
        quota: Whether it is what is left of a quota.
        elapsed: Seconds since the trial's start.
        strict_memory: Whether the kernel refuses what would pass the limit.
        outsiders: How many processes outside of the trial hold, at least, what it was forked with.
    """

    grace_period: float
    memory: float | None
    quota: bool
    elapsed: float
    strict_memory: bool = False
    outsiders: int = 0


@dataclass(frozen=True)
class ObjectiveBegins:
    """The trial's process has loaded the objective and calls it now; sent to the supervisor.

    Attributes:
        data_limit: The ``RLIMIT_DATA`` that it has set itself.
    """

    data_limit: int | None


@dataclass(frozen=True)
class StopFor:
    """Stop the trial politely for a breach, then hard.

    Attributes:
        breach: Which limit it is over.
        grace_period: Seconds in between.
    """

    breach: Breach
    grace_period: float


@dataclass(frozen=True)
class Interrupt:
    """Stop the trial politely by a KeyboardInterrupt, then hard: the study was interrupted.

    Attributes:
        grace_period: Seconds in between.
    """

    grace_period: float


@dataclass(frozen=True)
class Leave:
    """The result has come: kill what is left of the trial when it takes longer to end.

    Attributes:
        seconds: From now.
    """

    seconds: float


@dataclass(frozen=True)
class Kill:
    """Kill the trial now."""


@dataclass(frozen=True)
class Breached:
    """The supervisor has found a breach and is stopping the trial."""

    breach: Breach


@dataclass(frozen=True)
class Paused:
    """The trial's process was stopped by a signal; it will be killed unless it goes on."""

    patience: float
