"""The trial's own process: receives the objective, runs it and sends its outcome."""

from __future__ import annotations

import atexit
import contextlib
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

from optuna_quota._isolation import linux, memory_limits, messages
from optuna_quota._isolation.channel import Channel, dumps, pack_error, unpack_error
from optuna_quota._isolation.cores import confine
from optuna_quota._isolation.environment import enter_context
from optuna_quota._isolation.gpu_caps import framework_gpu_memory, set_gpu_caps
from optuna_quota._isolation.multiprocessing_child import (
    begin_preparation,
    end_preparation,
    leave_shared_memory,
)
from optuna_quota._isolation.out_of_memory import find_failed_allocation
from optuna_quota._isolation.output import apply_output_settings, apply_to_new_modules
from optuna_quota._isolation.pickling import inherited_descriptors, load_objective, receive_buffers
from optuna_quota._isolation.rpc import MEASURE, RemoteTrial, RpcClient, TRIAL
from optuna_quota._isolation.seeds import seed, vary_generators
from optuna_quota._isolation.signals import PoliteStop, restore_signals


# Seconds that idle threads of executors get to end; one that waits for something else never does.
_THREADS_TIME = 0.5
# The least and the most seconds that exit handlers get.
_EXIT_TIMES = (1.0, 5.0)


def run_child(
    channel: Channel,
    *,
    link: socket.socket | None = None,
    crash_file: int | None = None,
    inherited: messages.InheritedObjective | None = None,
    streams: bool = False,
) -> int:
    """Run one trial from the start message to the end; return the exit code.

    Args:
        channel: The connection to the study's process.
        link: The connection to the supervisor; None where there is none.
        crash_file: A descriptor for Python's traceback when the process dies of a signal.
        inherited: What the process has inherited; without it, the start message is received.
        streams: Whether standard output, standard error and other open files are sent before the
            start message.
    """
    own = os.getpid()
    stop = PoliteStop(link)
    stop.install()
    child = _Child(channel, stop)
    outcome: messages.Outcome
    try:
        if streams:
            _receive_streams(channel)
        start = channel.receive() if inherited is None else inherited.start
        child.grace_period = start.grace_period
        child.calls.use(start.trial.address)
        buffers = receive_buffers(channel, start.buffers)
        if crash_file is not None:
            faulthandler.enable(crash_file)
            linux.enlarge_signal_stack()
        objective = child.prepare(start, buffers, inherited)
        ready = messages.Ready(
            os.getpid(),
            supervisor=None if link is None else os.getppid(),
            data_limit=child.set_limits(start),
            waits=link is not None and memory_limits.may_exceed(start.limits.get("memory")),
        )
        if link is not None:
            link.send(pickle.dumps(ready))
            if ready.waits:
                stop.wait_to_begin()
        child.calls.notify(ready)
        outcome = child.call(objective, RemoteTrial(child.calls, start.trial))
    except EOFError:
        return 1
    except BaseException as error:  # noqa: BLE001 - a stop before the objective was called
        outcome = messages.Raised(pack_error(error))
    stop.end()
    outcome = replace(outcome, stop_requested=stop.requested)
    return child.finish(outcome) if os.getpid() == own else _exit_fork(outcome)


class _Child:
    """The steps of one trial in its process.

    Args:
        channel: The connection to the study's process.
        stop: Raises in the objective when the trial is to stop.
    """

    def __init__(self, channel: Channel, stop: PoliteStop) -> None:
        self.calls = RpcClient(channel=channel, stop=stop)
        self.grace_period = 0.0
        self._stop = stop

    def prepare(
        self,
        start: messages.StartTrial,
        buffers: list[memoryview],
        inherited: messages.InheritedObjective | None,
    ) -> Any:
        """Set up the process; return the objective."""
        if inherited is None:
            begin_preparation()
            enter_context(start.context, has_main=start.has_main)
        else:
            os.environ.update(start.context.added)
        apply_output_settings(start.output, self.calls)
        memory_limits.raise_oom_score()
        if start.cores is not None:
            confine(start.cores)
        set_gpu_caps(start.limits.get("gpu_memory"), start.device_memory)
        leave_shared_memory()
        objective = None if inherited is None else inherited.objective
        if start.objective is not None:
            objective = load_objective(start.objective, buffers)
            # From here on the objective alone holds them.
            buffers.clear()
            apply_to_new_modules(start.output)
        seed(start.context.seeds)
        vary_generators(start.trial.number, objective)
        memory_limits.reset_peak()
        restore_signals(start.worker_signals)
        end_preparation()
        return objective

    def set_limits(self, start: messages.StartTrial) -> int | None:
        """Set the kernel's limits, given what the imports took; return the RLIMIT_DATA set."""
        memory, cpu_time = start.limits.get("memory"), start.limits.get("cpu_time")
        if cpu_time is not None:
            self._stop.listen_for_cpu_time()
            memory_limits.limit_cpu_time(cpu_time, start.grace_period)
        if memory is None or not start.strict_memory:
            return None
        return memory_limits.limit_memory(memory)

    def call(self, objective: Any, trial: RemoteTrial) -> messages.Outcome:
        """Call the objective."""
        try:
            value = objective(trial)
            self._stop.end()
        except SystemExit as error:
            self._stop.end()
            return messages.Exited(_exit_code(error))
        except BaseException as error:  # noqa: BLE001 - the study's to handle
            self._stop.end()
            # First, since the next steps need memory.
            memory_limits.lift_memory_limit()
            failed = find_failed_allocation(error)
            if failed is not None and failed.resource == "gpu_memory":
                # While it holds its memory: the error's traceback keeps the frames.
                self.calls.call(TRIAL, MEASURE)
            return messages.Raised(pack_error(error), failed, gpu_memory=framework_gpu_memory())
        return messages.Returned(value, gpu_memory=framework_gpu_memory())

    def finish(self, outcome: messages.Outcome) -> int:
        """Send the outcome, then end as a Python program does."""
        try:
            memory_limits.lift_memory_limit()
            if isinstance(outcome, messages.Returned):
                outcome = _sendable(outcome)
            _flush()
            self.calls.notify(outcome)
            _run_exit_handlers(self.grace_period)
            _flush()
        except BaseException:  # noqa: BLE001 - the supervisor reports that nothing was sent
            return 1
        return outcome.code if isinstance(outcome, messages.Exited) else 0


def _receive_streams(channel: Channel) -> None:
    out, err, *inherited_descriptors[:] = channel.receive_descriptors()
    for number, handle in ((1, out), (2, err)):
        os.dup2(handle, number)
        os.close(handle)


def _exit_fork(outcome: messages.Outcome) -> int:
    """Return the exit code of a process that the objective forked and that left the objective."""
    if isinstance(outcome, messages.Raised):
        traceback.print_exception(unpack_error(outcome.error))
    _flush()
    if isinstance(outcome, messages.Exited):
        return outcome.code
    return int(isinstance(outcome, messages.Raised))


def _run_exit_handlers(grace_period: float) -> None:
    """Let pools, executors and temporary folders clean up, for a limited time.

    The study already has the result. What the objective has left open may wait without end: a
    thread for an item, a process for its parent. The kernel's timer ends that.
    """
    shortest, longest = _EXIT_TIMES
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(shortest, min(grace_period, longest)))
    # Executors (joblib's too) tell their workers to end in handlers that threading keeps, and
    # multiprocessing waits for these workers in one of the others.
    threads = threading.Thread(target=_run_threading_handlers, daemon=True)
    threads.start()
    threads.join(_THREADS_TIME)
    atexit._run_exitfuncs()


def _run_threading_handlers() -> None:
    for handler in reversed(getattr(threading, "_threading_atexits", ())):
        handler()


def _sendable(returned: messages.Returned) -> messages.Outcome:
    """Return the value in a form that does not depend on the trial's devices or classes."""
    value = returned.value
    if _is_tensor(value):
        with contextlib.suppress(Exception):
            return replace(returned, value=float(value))
    try:
        pickle.loads(dumps(returned))
    except Exception as error:  # noqa: BLE001 - a user's __reduce__ may raise anything
        return messages.Unsendable(
            type(value).__name__,
            f"{type(error).__name__}: {error}",
            stop_requested=returned.stop_requested,
            gpu_memory=returned.gpu_memory,
        )
    return returned


def _is_tensor(value: Any) -> bool:
    """Return whether this is a framework's scalar: unpickling it would load the framework."""
    package = type(value).__module__.partition(".")[0]
    is_plain = package in ("builtins", "numpy", "decimal", "fractions")
    return hasattr(type(value), "__float__") and not is_plain


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
