"""The trial's own process: takes the objective, runs it, sends what came of it."""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
from dataclasses import dataclass
import faulthandler
import itertools
import logging
import os
import pickle
import sys
import threading
import traceback
from typing import Any

from optuna_quota._enforcement.isolation import processes
from optuna_quota._enforcement.isolation import rlimits
from optuna_quota._enforcement.isolation.calls import Calls
from optuna_quota._enforcement.isolation.calls import Handle
from optuna_quota._enforcement.isolation.calls import Proxy
from optuna_quota._enforcement.isolation.channel import Channel
from optuna_quota._enforcement.isolation.child_trial import ChildTrial
from optuna_quota._enforcement.isolation.child_trial import TrialFacts
from optuna_quota._enforcement.isolation.errors import pack_error
from optuna_quota._enforcement.isolation.errors import SentError
from optuna_quota._enforcement.isolation.errors import unpack_error
from optuna_quota._enforcement.isolation.gpu_caps import set_gpu_caps
from optuna_quota._enforcement.isolation.job_signals import restore_signals
from optuna_quota._enforcement.isolation.modules import can_preload
from optuna_quota._enforcement.isolation.output import defer_to_handlers
from optuna_quota._enforcement.isolation.output import follow
from optuna_quota._enforcement.isolation.output import OutputRules
from optuna_quota._enforcement.isolation.shortage import find_shortage
from optuna_quota._enforcement.isolation.shortage import Shortage
from optuna_quota._enforcement.isolation.stop import PoliteStop
from optuna_quota._enforcement.isolation.surroundings import enter
from optuna_quota._enforcement.isolation.surroundings import fill_main
from optuna_quota._enforcement.isolation.surroundings import seed
from optuna_quota._enforcement.isolation.surroundings import Surroundings


@dataclass(frozen=True)
class Start:
    """All that a trial's process needs to begin.

    Attributes:
        surroundings: What the objective finds around it.
        output: How it prints, logs and warns.
        trial: What of the trial never changes.
        limits: The ceilings in force, by resource, in SI base units.
        device_memory: The memory of the smallest visible GPU.
        grace_period: Seconds from the polite stop to the hard kill.
        objective: Its pickle; None when the process inherited it.
        strict_memory: Whether the kernel refuses what would pass the memory limit.
    """

    surroundings: Surroundings
    output: OutputRules
    trial: TrialFacts
    limits: Mapping[str, float]
    device_memory: float | None
    grace_period: float
    objective: bytes | None
    strict_memory: bool = False


@dataclass(frozen=True)
class Ready:
    """The objective is about to be called.

    Attributes:
        pid: The trial's process.
        supervisor: Its parent, which inherits the orphans of all that it starts; None where it
            is the study's process.
        data_limit: The soft ``RLIMIT_DATA`` that was set.
    """

    pid: int
    supervisor: int | None = None
    data_limit: int | None = None


@dataclass(frozen=True)
class Returned:
    """The objective returned."""

    value: Any
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Raised:
    """The objective raised.

    Attributes:
        error: What.
        shortage: The failed allocation behind it, if that was why.
        modules: What was imported meanwhile.
    """

    error: SentError
    shortage: Shortage | None = None
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exited:
    """The objective called ``sys.exit``."""

    code: int


@dataclass(frozen=True)
class Unsendable:
    """The objective's value can't be sent."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Inherited:
    """What a process forked from the study's own has without being sent it.

    Attributes:
        start: What others are sent.
        objective: The objective itself.
        sounding: The loggers that do more than pass on what they are given.
    """

    start: Start
    objective: Any
    sounding: Sequence[logging.Logger]


_calls: Calls | None = None


def proxy_of(handle: Handle) -> Any:
    """Return the proxy of an object that stayed behind; pickles of objectives refer to this."""
    assert _calls is not None
    return Proxy(_calls, handle)


def run_child(
    channel: Channel,
    *,
    notice: int | None = None,
    crash_file: int | None = None,
    inherited: Inherited | None = None,
    streams: bool = False,
) -> int:
    """Run one trial from the start message to the end; return the exit code.

    Args:
        channel: The connection to the study's process.
        notice: Where the supervisor says why it stops the trial, before it sends SIGTERM.
        crash_file: A descriptor for Python's traceback when the process dies of a signal.
        inherited: What the process has inherited; without it, the start message is received.
        streams: Whether standard output and error are sent before the start message.
    """
    global _calls
    stop = PoliteStop(notice)
    stop.install()
    _calls = Calls(channel, stop)
    known, own = len(sys.modules), os.getpid()
    try:
        if streams:
            _take_streams(channel)
        start = channel.receive() if inherited is None else inherited.start
        if crash_file is not None:
            faulthandler.enable(crash_file)
            processes.enlarge_signal_stack()
        if inherited is None:
            enter(start.surroundings)
            follow(start.output, _calls)
        else:
            os.environ.update(start.surroundings.added)
            follow(start.output, _calls, inherited.sounding)
        rlimits.raise_oom_score()
        supervisor = None if notice is None else os.getppid()
        objective = None if inherited is None else inherited.objective
        outcome = _prepare_and_run(start, objective, known, supervisor)
    except EOFError:
        return 1
    except BaseException as error:  # noqa: BLE001 - a stop before the objective was called
        # What it had imported, the next trial finds loaded: else none would get any further.
        outcome = Raised(pack_error(error), modules=_imported(known))
    return _finish(outcome) if os.getpid() == own else _leave(outcome)


def _leave(outcome: Any) -> int:
    """End a process that the objective forked and that came out of it: it speaks for no trial."""
    if isinstance(outcome, Raised):
        traceback.print_exception(unpack_error(outcome.error))
    _flush()
    return outcome.code if isinstance(outcome, Exited) else int(isinstance(outcome, Raised))


def _take_streams(channel: Channel) -> None:
    for number, handle in enumerate(channel.receive_descriptors(2), start=1):
        os.dup2(handle, number)
        os.close(handle)


def _prepare_and_run(start: Start, objective: Any, known: int, supervisor: int | None) -> Any:
    assert _calls is not None
    set_gpu_caps(start.limits.get("gpu_memory"), start.device_memory)
    if start.objective is not None:
        objective = pickle.loads(start.objective)
        fill_main(objective)
        defer_to_handlers(start.output)
    seed(start.surroundings)
    trial = ChildTrial(_calls, start.trial)
    rlimits.reset_peak()
    restore_signals()
    _calls.notify(Ready(os.getpid(), supervisor, _limit(start)))
    return _run(objective, trial, known)


def _limit(start: Start) -> int | None:
    """Set the kernel's limits, after the imports: what they take is known by now."""
    memory = start.limits.get("memory")
    cpu_time = start.limits.get("cpu_time")
    if cpu_time is not None:
        rlimits.limit_cpu_time(cpu_time, start.grace_period)
    if memory is None:
        return None
    return rlimits.limit_memory(memory, strict=start.strict_memory)


def _run(objective: Any, trial: ChildTrial, known: int) -> Any:
    try:
        value = objective(trial)
    except SystemExit as error:
        return Exited(_exit_code(error))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the study's to handle
        # First of all: what follows needs some memory itself.
        rlimits.lift_memory_limit()
        shortage = find_shortage(error)
        return Raised(pack_error(error), shortage, _imported(known))
    return Returned(value, _imported(known))


def _finish(outcome: Any) -> int:
    """Send what came of the trial, then end as a Python program does."""
    assert _calls is not None
    try:
        rlimits.lift_memory_limit()
        if isinstance(outcome, Returned):
            outcome = _sendable(outcome)
        _flush()
        _calls.notify(outcome)
        _run_exit_handlers()
        _flush()
    except BaseException:  # noqa: BLE001 - the supervisor reports that nothing was sent
        return 1
    return outcome.code if isinstance(outcome, Exited) else 0


def _run_exit_handlers() -> None:
    """Let pools, executors and temporary folders clean up; threads are not waited for.

    Executors (joblib's too) tell their workers to end in handlers that threading keeps, and
    multiprocessing waits for these workers in one of the others: for ever, if they were not told.
    """
    try:
        for handler in reversed(getattr(threading, "_threading_atexits", ())):
            handler()
    finally:
        atexit._run_exitfuncs()


def _sendable(returned: Returned) -> Any:
    """Return the value in a form that does not depend on the trial's devices or classes."""
    value = returned.value
    if _is_tensor(value):
        with contextlib.suppress(Exception):
            return Returned(float(value), returned.modules)
    try:
        from optuna_quota._enforcement.isolation.channel import dumps

        pickle.loads(dumps(returned))
    except Exception as error:  # noqa: BLE001 - a user's __reduce__ may raise anything
        return Unsendable(type(value).__name__, f"{type(error).__name__}: {error}")
    return returned


def _is_tensor(value: Any) -> bool:
    """Return whether this is a framework's scalar: to send it would start the framework there."""
    return hasattr(type(value), "__float__") and type(value).__module__.partition(".")[0] not in (
        "builtins",
        "numpy",
        "decimal",
        "fractions",
    )


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code
    # As the interpreter does.
    sys.stderr.write(f"{error.code}\n")
    return 1


def _imported(known: int) -> tuple[str, ...]:
    """Return what was imported since there were so many modules, in order."""
    # From the newest: to go through all would copy the pages that the template's names are on.
    new = list(itertools.islice(reversed(sys.modules), max(0, len(sys.modules) - known)))
    return tuple(can_preload(reversed(new))) if new else ()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
