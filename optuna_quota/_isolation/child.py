"""The trial's own process: takes the objective, runs it, sends what came of it."""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
from dataclasses import dataclass
from dataclasses import replace
import faulthandler
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from typing import Any

from optuna_quota._isolation import processes
from optuna_quota._isolation import rlimits
from optuna_quota._isolation.calls import Calls
from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.child_trial import ChildTrial
from optuna_quota._isolation.child_trial import MEASURE
from optuna_quota._isolation.child_trial import TRIAL
from optuna_quota._isolation.child_trial import TrialFacts
from optuna_quota._isolation.control import BeginMonitoring
from optuna_quota._isolation.control import ObjectiveBegins
from optuna_quota._isolation.environment import enter_context
from optuna_quota._isolation.environment import ProcessContext
from optuna_quota._isolation.environment import seed
from optuna_quota._isolation.gpu_caps import framework_gpu_memory
from optuna_quota._isolation.gpu_caps import set_gpu_caps
from optuna_quota._isolation.job_signals import restore_signals
from optuna_quota._isolation.multiprocessing_child import begin_preparation
from optuna_quota._isolation.multiprocessing_child import end_preparation
from optuna_quota._isolation.multiprocessing_child import leave_shared_memory
from optuna_quota._isolation.output import apply_output_settings
from optuna_quota._isolation.output import apply_to_new_modules
from optuna_quota._isolation.output import OutputSettings
from optuna_quota._isolation.pickling import inherited_descriptors
from optuna_quota._isolation.pickling import load_objective
from optuna_quota._isolation.pickling import receive_buffers
from optuna_quota._isolation.remote_errors import pack_error
from optuna_quota._isolation.remote_errors import SentError
from optuna_quota._isolation.remote_errors import unpack_error
from optuna_quota._isolation.shortage import find_shortage
from optuna_quota._isolation.shortage import Shortage
from optuna_quota._isolation.stop import PoliteStop


@dataclass(frozen=True)
class Start:
    """All that a trial's process needs to begin.

    Attributes:
        context: What the objective finds around it.
        has_main: Whether the process has the study's main module already.
        output: How it prints, logs and warns.
        trial: What of the trial never changes.
        limits: The ceilings in force, by resource, in SI base units.
        device_memory: The memory of the smallest visible GPU.
        grace_period: Seconds from the polite stop to the hard kill.
        objective: The pickled objective; None when the process inherited it.
        buffers: The bytes of each buffer that follows, and whether it is read-only.
        strict_memory: Whether the kernel refuses what would pass the memory limit.
    """

    context: ProcessContext
    has_main: bool
    output: OutputSettings
    trial: TrialFacts
    limits: Mapping[str, float]
    device_memory: float | None
    grace_period: float
    objective: bytes | None
    buffers: Sequence[tuple[int, bool]] = ()
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
    """The objective returned.

    Attributes:
        value: What.
        gpu_memory: The peak of GPU memory by the frameworks' own counters, in bytes.
    """

    value: Any
    told: bool = False
    gpu_memory: float | None = None


@dataclass(frozen=True)
class Raised:
    """The objective raised.

    Attributes:
        error: What.
        shortage: The failed allocation behind it, if that was why.
        told: Whether the objective had been told to stop.
        gpu_memory: The peak of GPU memory by the frameworks' own counters, in bytes.
    """

    error: SentError
    shortage: Shortage | None = None
    told: bool = False
    gpu_memory: float | None = None


@dataclass(frozen=True)
class Exited:
    """The objective called ``sys.exit``."""

    code: int
    told: bool = False


@dataclass(frozen=True)
class Unsendable:
    """The objective's value can't be sent."""

    kind: str
    reason: str
    told: bool = False


@dataclass(frozen=True)
class Inherited:
    """What a process forked from the study's own has without being sent it.

    Attributes:
        start: What others are sent.
        order: What their supervisor is sent.
        objective: The objective itself.
    """

    start: Start
    order: BeginMonitoring
    objective: Any


_calls: Calls | None = None
_stop: PoliteStop | None = None


def run_child(
    channel: Channel,
    *,
    link: socket.socket | None = None,
    crash_file: int | None = None,
    inherited: Inherited | None = None,
    streams: bool = False,
) -> int:
    """Run one trial from the start message to the end; return the exit code.

    Args:
        channel: The connection to the study's process.
        link: The connection to the supervisor, which says why it stops the trial before it sends
            a signal.
        crash_file: A descriptor for Python's traceback when the process dies of a signal.
        inherited: What the process has inherited; without it, the start message is received.
        streams: Whether standard output, standard error and other open files are sent before the
            start message.
    """
    global _calls, _stop
    _stop = stop = PoliteStop(link)
    stop.install()
    _calls = Calls(channel, stop)
    own, grace_period = os.getpid(), 0.0
    try:
        if streams:
            _take_streams(channel)
        start = channel.receive() if inherited is None else inherited.start
        grace_period = start.grace_period
        buffers = receive_buffers(channel, start.buffers)
        if crash_file is not None:
            faulthandler.enable(crash_file)
            processes.enlarge_signal_stack()
        if inherited is None:
            begin_preparation()
            enter_context(start.context, has_main=start.has_main)
        else:
            os.environ.update(start.context.added)
        apply_output_settings(start.output, _calls)
        rlimits.raise_oom_score()
        objective = None if inherited is None else inherited.objective
        outcome = _prepare_and_run(start, objective, buffers, link)
    except EOFError:
        return 1
    except BaseException as error:  # noqa: BLE001 - a stop before the objective was called
        outcome = Raised(pack_error(error))
    stop.end()
    outcome = replace(outcome, told=stop.told)
    return _finish(outcome, grace_period) if os.getpid() == own else _leave(outcome)


def _leave(outcome: Any) -> int:
    """End a process that the objective forked and that came out of it: it speaks for no trial."""
    if isinstance(outcome, Raised):
        traceback.print_exception(unpack_error(outcome.error))
    _flush()
    return outcome.code if isinstance(outcome, Exited) else int(isinstance(outcome, Raised))


def _take_streams(channel: Channel) -> None:
    out, err, *inherited_descriptors[:] = channel.receive_descriptors()
    for number, handle in ((1, out), (2, err)):
        os.dup2(handle, number)
        os.close(handle)


def _prepare_and_run(
    start: Start, objective: Any, buffers: list[memoryview], link: socket.socket | None
) -> Any:
    assert _calls is not None
    set_gpu_caps(start.limits.get("gpu_memory"), start.device_memory)
    leave_shared_memory()
    if start.objective is not None:
        objective = load_objective(start.objective, buffers)
        # The objective alone keeps them.
        buffers.clear()
        apply_to_new_modules(start.output)
    seed(start.context)
    trial = ChildTrial(_calls, start.trial)
    rlimits.reset_peak()
    restore_signals()
    end_preparation()
    data_limit = _limit(start)
    supervisor = None
    if link is not None:
        supervisor = os.getppid()
        link.send(pickle.dumps(ObjectiveBegins(data_limit)))
    _calls.notify(Ready(os.getpid(), supervisor, data_limit))
    return _run(objective, trial)


def _limit(start: Start) -> int | None:
    """Set the kernel's limits, after the imports: what they take is known by now."""
    memory = start.limits.get("memory")
    cpu_time = start.limits.get("cpu_time")
    if cpu_time is not None:
        assert _stop is not None
        _stop.listen_for_cpu_time()
        rlimits.limit_cpu_time(cpu_time, start.grace_period)
    if memory is None:
        return None
    return rlimits.limit_memory(memory, strict=start.strict_memory)


def _run(objective: Any, trial: ChildTrial) -> Any:
    assert _stop is not None
    assert _calls is not None
    try:
        value = objective(trial)
        _stop.end()
    except SystemExit as error:
        _stop.end()
        return Exited(_exit_code(error))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the study's to handle
        _stop.end()
        # First of all: what follows needs some memory itself.
        rlimits.lift_memory_limit()
        shortage = find_shortage(error)
        if shortage is not None and shortage.resource == "gpu_memory":
            # While it holds what it held: the error's traceback keeps the frames.
            _calls.call(TRIAL, MEASURE)
        return Raised(pack_error(error), shortage, gpu_memory=framework_gpu_memory())
    return Returned(value, gpu_memory=framework_gpu_memory())


def _finish(outcome: Any, grace_period: float) -> int:
    """Send what came of the trial, then end as a Python program does."""
    assert _calls is not None
    try:
        rlimits.lift_memory_limit()
        if isinstance(outcome, Returned):
            outcome = _sendable(outcome)
        _flush()
        _calls.notify(outcome)
        _run_exit_handlers(grace_period)
        _flush()
    except BaseException:  # noqa: BLE001 - the supervisor reports that nothing was sent
        return 1
    return outcome.code if isinstance(outcome, Exited) else 0


# Seconds that idle threads of executors get to end; one that waits for something else never does.
_THREADS_TIME = 0.5
# The least and the most seconds that the handlers get at the exit.
_EXIT_TIMES = (1.0, 5.0)


def _run_exit_handlers(grace_period: float) -> None:
    """Let pools, executors and temporary folders clean up, for a limited time.

    The result is with the study already. What the objective has left open may wait for ever: a
    thread for an item, a process for its parent. The kernel's timer ends that.
    """
    least, most = _EXIT_TIMES
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(least, min(grace_period, most)))
    # Executors (joblib's too) tell their workers to end in handlers that threading keeps, and
    # multiprocessing waits for these workers in one of the others.
    threads = threading.Thread(target=_end_executors, daemon=True)
    threads.start()
    threads.join(_THREADS_TIME)
    atexit._run_exitfuncs()


def _end_executors() -> None:
    for handler in reversed(getattr(threading, "_threading_atexits", ())):
        handler()


def _sendable(returned: Returned) -> Any:
    """Return the value in a form that does not depend on the trial's devices or classes."""
    value = returned.value
    if _is_tensor(value):
        with contextlib.suppress(Exception):
            return replace(returned, value=float(value))
    try:
        from optuna_quota._isolation.channel import dumps

        pickle.loads(dumps(returned))
    except Exception as error:  # noqa: BLE001 - a user's __reduce__ may raise anything
        reason = f"{type(error).__name__}: {error}"
        return Unsendable(type(value).__name__, reason, returned.told)
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


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
