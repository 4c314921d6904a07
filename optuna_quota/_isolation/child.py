"""The trial's own process: receives the objective, runs it and sends its outcome."""

from __future__ import annotations

import atexit
from collections.abc import Callable
import contextlib
from dataclasses import replace
import faulthandler
import functools
import gc
import io
import itertools
from multiprocessing import process, resource_tracker, util
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from typing import Any
import weakref

from optuna_quota._isolation import linux, memory_limits, messages
from optuna_quota._isolation.channel import Channel, dumps, pack_error, unpack_error
from optuna_quota._isolation.cores import confine
from optuna_quota._isolation.environment import enter_context, seed
from optuna_quota._isolation.generators import find_generators, vary_generators
from optuna_quota._isolation.out_of_memory import find_failed_allocation
from optuna_quota._isolation.output import (
    apply_output_settings,
    apply_to_new_modules,
    flush_streams,
)
from optuna_quota._isolation.pickling import inherited_descriptors, load_objective, receive_buffers
from optuna_quota._isolation.rpc import MEASURE, RemoteTrial, RpcClient, TRIAL
from optuna_quota._isolation.signals import PoliteStop, restore_signals


# Seconds that idle threads of executors get to end; one that waits for something else never does.
_THREADS_TIME = 0.5
_FILES = {io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom}
# The least and the most seconds that exit handlers get.
_EXIT_TIMES = (1.0, 5.0)


def main(handle: int | None) -> None:
    """Run a trial's process; without a descriptor, standard input describes the connection."""
    if handle is None:
        sock = socket.fromshare(sys.stdin.buffer.read())  # type: ignore[attr-defined]
    else:
        sock = socket.socket(fileno=handle)
    os._exit(run_child(Channel(sock)))


def run_child(
    channel: Channel,
    *,
    link: socket.socket | None = None,
    crash_file: int | None = None,
    inherited: messages.InheritedObjective | None = None,
) -> int:
    """Run one trial from the start message to the end; return the exit code.

    ``link`` leads to the supervisor, if there is one; ``crash_file`` takes Python's traceback when
    the process dies of a signal. Without what is ``inherited``, the start message is received.
    """
    own = os.getpid()
    stop = PoliteStop(link)
    calls = RpcClient(channel=channel, stop=stop)
    grace_period = 0.0
    outcome: messages.Outcome
    try:
        if link is not None and inherited is None:
            _receive_streams(channel)
        start = channel.receive() if inherited is None else inherited.start
        grace_period = start.grace_period
        calls.use(start.address)
        buffers = receive_buffers(channel, start.buffers)
        if crash_file is not None:
            faulthandler.enable(crash_file)
            linux.enlarge_signal_stack()
        objective = _prepare(start, buffers, inherited, calls)
        ready = messages.Ready(
            os.getpid(),
            supervisor=None if link is None else os.getppid(),
            data_limit=_set_limits(start, stop),
            waits=link is not None and memory_limits.may_exceed(start.limits.get("memory")),
        )
        if link is not None:
            link.send(pickle.dumps(ready))
            if ready.waits:
                stop.wait_to_begin()
        calls.notify(ready)
        outcome = _call(objective, RemoteTrial(calls, start.trial), stop, calls)
    except EOFError:
        return 1
    except BaseException as error:  # noqa: BLE001 - a stop before the objective was called
        outcome = messages.Raised(pack_error(error))
    stop.end()
    outcome = replace(outcome, stop_requested=stop.requested)
    return _finish(outcome, calls, grace_period) if os.getpid() == own else _exit_fork(outcome)


def _receive_streams(channel: Channel) -> None:
    out, err, *inherited_descriptors[:] = channel.receive_descriptors()
    for number, handle in ((1, out), (2, err)):
        os.dup2(handle, number)
        os.close(handle)


def _prepare(
    start: messages.StartTrial,
    buffers: list[memoryview],
    inherited: messages.InheritedObjective | None,
    calls: RpcClient,
) -> Any:
    if inherited is None:
        set_preparing(True)
        enter_context(start.context)
    else:
        os.environ.update(start.context.environ)
    apply_output_settings(start.output, calls)
    memory_limits.raise_oom_score()
    if start.cores is not None:
        confine(start.cores)
    memory_limits.set_gpu_caps(start.limits.get("gpu_memory"), start.device_memory)
    _leave_shared_memory()
    objective = None if inherited is None else inherited.objective
    if start.objective is not None:
        objective = load_objective(start.objective, buffers)
        # From here on the objective alone holds them.
        buffers.clear()
        apply_to_new_modules(start.output)
    seed(start.context.seeds)
    held = find_generators(objective) if inherited is None else inherited.generators
    vary_generators(start.trial.number, held)
    memory_limits.reset_peak()
    restore_signals(start.worker_signals)
    set_preparing(False)
    return objective


def _set_limits(start: messages.StartTrial, stop: PoliteStop) -> int | None:
    """Set the kernel's limits, given what the imports took; return the RLIMIT_DATA set."""
    memory, cpu_time = start.limits.get("memory"), start.limits.get("cpu_time")
    if cpu_time is not None:
        stop.listen_for_cpu_time()
        memory_limits.limit_cpu_time(cpu_time, start.grace_period)
    if memory is None or not start.strict_memory:
        return None
    return memory_limits.limit_memory(memory)


def _call(
    objective: Any, trial: RemoteTrial, stop: PoliteStop, calls: RpcClient
) -> messages.Outcome:
    try:
        value = objective(trial)
        stop.end()
    except SystemExit as error:
        stop.end()
        argument = "" if error.code is None else repr(error.code)
        return messages.Exited(_exit_code(error), argument)
    except BaseException as error:  # noqa: BLE001 - the study's to handle
        stop.end()
        # First, since the next steps need memory.
        memory_limits.lift_memory_limit()
        failed = find_failed_allocation(error)
        if failed is not None and failed.resource == "gpu_memory":
            # While it holds its memory: the error's traceback keeps the frames.
            calls.call(TRIAL, MEASURE)
        gpu_memory = memory_limits.framework_gpu_memory()
        return messages.Raised(pack_error(error), failed, gpu_memory=gpu_memory)
    return messages.Returned(value, gpu_memory=memory_limits.framework_gpu_memory())


def _finish(outcome: messages.Outcome, calls: RpcClient, grace_period: float) -> int:
    """Send the outcome, then end as a Python program does; return the exit code."""
    try:
        memory_limits.lift_memory_limit()
        if isinstance(outcome, messages.Returned):
            outcome = _sendable(outcome)
        flush_streams()
        calls.notify(outcome)
        _run_exit_handlers(grace_period)
        flush_streams()
        _flush_files()
    except BaseException:  # noqa: BLE001 - the supervisor reports that nothing was sent
        return 1
    return outcome.code if isinstance(outcome, messages.Exited) else 0


def _exit_fork(outcome: messages.Outcome) -> int:
    """Return the exit code of a process that the objective forked and that left the objective."""
    if isinstance(outcome, messages.Raised):
        traceback.print_exception(unpack_error(outcome.error))
    flush_streams()
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
            f"The objective returned a value of type {type(value).__name__} that can't be sent "
            f"from the trial's process: {type(error).__name__}: {error}",
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


def _flush_files() -> None:
    """Write what the objective has left in buffers of files that it didn't close."""
    # Those that the process was forked with are frozen, and so not among these.
    for value in gc.get_objects():
        # Exact classes: of a hundred thousand objects, `issubclass` would take 50 ms.
        if type(value) in _FILES:
            with contextlib.suppress(OSError, ValueError):
                value.flush()


# A forked process is to look like a child that multiprocessing has started. The private functions
# used here are those that `multiprocessing.Process` calls in a child; there are no public ones.

_of_study: list[Any] = []


def become_child(name: str, parent: int) -> None:
    """Make this process a child of the study's process, as far as multiprocessing can see.

    Exit handlers of its parent are left to the parent, and callbacks for a fork run now: pools,
    queues and temporary folders of the study's process stay its own. ``parent`` is a pidfd of it.
    """
    internals: Any = process
    former = internals._current_process
    internals._process_counter = itertools.count(1)
    internals._children = set()
    internals._current_process = process.BaseProcess(name=name, daemon=False)
    internals._parent_process = internals._ParentProcess(
        former.name, former.ident or os.getppid(), parent
    )
    # Handlers that the trial itself adds run at the end of the trial.
    atexit._clear()
    # `atexit` held these. Put aside, as what would be freed with them is in pages of the study.
    _of_study.append(weakref.finalize._registry)  # type: ignore[attr-defined]
    weakref.finalize._registry = {}  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]  # as above
    atexit.register(util._exit_function)  # type: ignore[attr-defined]
    # The trial starts its own resource tracker, which removes what it leaves behind.
    tracker: Any = resource_tracker._resource_tracker
    if tracker._fd is not None:
        with contextlib.suppress(OSError):  # closed with other files of the fork server
            os.close(tracker._fd)
        tracker._fd = tracker._pid = None
    # Queues, locks and managers that were made before the fork have callbacks for it.
    util._finalizer_registry.clear()  # type: ignore[attr-defined]
    util._run_after_forkers()  # type: ignore[attr-defined]


def _leave_shared_memory() -> None:
    """Leave existing shared memory to the process that created it.

    Before Python 3.13, a process that only opens shared memory registers it with its resource
    tracker as if it had created it, and a trial's tracker removes at the trial's end what is
    registered. The trial needs a tracker nevertheless, for what it leaves when it is killed.
    """
    try:
        existing = {f"/{name}" for name in os.listdir("/dev/shm")}
    except OSError:
        return

    def if_own(act: Callable[[str, str], None], name: str, kind: str) -> None:
        if kind != "shared_memory" or name not in existing:
            act(name, kind)

    tracker: Any = resource_tracker
    tracker.register = functools.partial(if_own, tracker.register)
    tracker.unregister = functools.partial(if_own, tracker.unregister)


_is_preparing = False


def set_preparing(is_preparing: bool) -> None:
    """Record whether this process, a trial's or a fork server, only prepares for an objective."""
    global _is_preparing
    _is_preparing = is_preparing


def is_in_preparation() -> bool:
    """Return whether this process, of this package or of multiprocessing, only imports modules.

    A study that one of them runs would run in each such process, and start others.
    """
    return _is_preparing or bool(getattr(process.current_process(), "_inheriting", False))
