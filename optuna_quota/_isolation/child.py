"""The trial's own process: receives the objective, runs it and sends its outcome."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable
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
from optuna_quota._isolation.environment import enter_context
from optuna_quota._isolation.module_state import changed_variables, read_variables
from optuna_quota._isolation.modules import LateImports
from optuna_quota._isolation.out_of_memory import find_failed_allocation
from optuna_quota._isolation.output import (
    apply_output_settings,
    apply_to_new_modules,
    flush_streams,
    forward_loguru,
)
from optuna_quota._isolation.payload import Received
from optuna_quota._isolation.random_generators import (
    find_generators,
    seed_global_generators,
    vary_generators,
)
from optuna_quota._isolation.reducers import inherited_descriptors
from optuna_quota._isolation.rpc import MEASURE, RemoteTrial, RpcClient, TRIAL
from optuna_quota._isolation.signals import ENDED, PoliteStop, restore_signals


_FILES = {io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom}
# Bounds of the seconds that threads left by the objective get to end, and then exit handlers.
_EXIT_TIMES = (1.0, 5.0)


def main(handle: int | None) -> None:
    """Run a trial's process; without a descriptor, read the connection from standard input."""
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

    ``link`` connects to the supervisor, if there is one; faulthandler writes to ``crash_file``
    when a signal kills the process. Unless ``inherited``, the start message is received.
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
        source = inherited or Received(channel)
        if crash_file is not None:
            faulthandler.enable(crash_file)
            linux.enlarge_signal_stack()
        objective = _prepare(start, source, calls)
        ready = messages.Ready(
            os.getpid(),
            supervisor=None if link is None else os.getppid(),
            data_limit=_set_limits(start, stop),
            waits=link is not None and memory_limits.may_exceed(start.limits.get("memory")),
            memory=None if link is None else memory_limits.own_memory(),
        )
        if link is not None:
            link.send(pickle.dumps(ready))
            if ready.waits:
                stop.wait_to_begin()
        calls.notify(ready)
        # Of a fork server, which may load them for the trials after this one.
        late_imports = None if link is None or inherited is not None else LateImports()
        variables = read_variables(objective) if inherited is None else inherited.variables
        outcome = _call(objective, RemoteTrial(calls, start.trial), stop, calls)
        # The objective may have left no room for what follows, and its result counts.
        memory_limits.lift_memory_limit()
        if link is not None and os.getpid() == own:
            # A peak after the supervisor's last measurement; this process may end before its next.
            with contextlib.suppress(OSError):
                link.send(ENDED + pickle.dumps(memory_limits.own_memory()))
        # Modules and objects may raise anything when inspected; the trial's own result counts.
        with contextlib.suppress(Exception):
            outcome = replace(outcome, changed=changed_variables(variables))
        if late_imports is not None:
            with contextlib.suppress(Exception):
                outcome = replace(outcome, late_imports=late_imports.found())
    except EOFError:
        return 1
    except BaseException as error:  # noqa: BLE001 - a stop before the objective was called
        outcome = messages.Raised(pack_error(error))
    stop.end()
    outcome = replace(outcome, stop_requested=stop.requested)
    if os.getpid() != own:
        return _exit_fork(outcome)
    return _finish(outcome, calls, grace_period, () if inherited is None else inherited.files)


def _receive_streams(channel: Channel) -> None:
    out, err, *inherited_descriptors[:] = channel.receive_descriptors()
    for number, handle in ((1, out), (2, err)):
        os.dup2(handle, number)
        os.close(handle)


def _prepare(
    start: messages.StartTrial,
    source: Received | messages.InheritedObjective,
    calls: RpcClient,
) -> Any:
    if isinstance(source, Received):
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
    if isinstance(source, Received):
        objective = source.load()
        generators = find_generators(objective)
        apply_to_new_modules(start.output)
    else:
        objective, generators = source.objective, source.generators
    # Until now it had handlers of modules only, from now on also those of the objective.
    forward_loguru(start.output, calls)
    seed_global_generators(start.context.seeds)
    vary_generators(start.trial.number, generators)
    memory_limits.reset_peak()
    restore_signals(start.signals)
    set_preparing(False)
    return objective


def _set_limits(start: messages.StartTrial, stop: PoliteStop) -> int | None:
    """Set the kernel's limits, after the imports; return the RLIMIT_DATA set."""
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
        is_full = failed is not None and failed.resource == "gpu_memory"
        gpu_memory = memory_limits.framework_gpu_memory()
        if is_full or gpu_memory is not None:
            _measure_gpus(calls)  # while the traceback keeps what the objective had there
        return messages.Raised(pack_error(error), failed, gpu_memory=gpu_memory)
    return messages.Returned(value, gpu_memory=memory_limits.framework_gpu_memory())


def _measure_gpus(calls: RpcClient) -> None:
    """Have GPUs read before this process ends, as it still holds what the framework caches."""
    # Whatever it raises, the trial's own result counts.
    with contextlib.suppress(Exception):
        calls.call(TRIAL, MEASURE)


def _finish(
    outcome: messages.Outcome, calls: RpcClient, grace_period: float, files: Iterable[Any]
) -> int:
    """Send the outcome, then end as a Python program does; return the exit code."""
    try:
        memory_limits.lift_memory_limit()
        if isinstance(outcome, messages.Returned):
            outcome = _sendable(outcome)
        flush_streams()
        calls.notify(outcome)
        if outcome.gpu_memory is not None and not isinstance(outcome, messages.Raised):
            # After the result, which a driver that hangs would hold up until a limit on time.
            _measure_gpus(calls)
        _run_exit_handlers(grace_period)
        flush_streams()
        _flush_files(files)
    except BaseException:  # noqa: BLE001 - the supervisor reports that nothing was sent
        return 1
    return outcome.code if isinstance(outcome, messages.Exited) else 0


def _exit_fork(outcome: messages.Outcome) -> int:
    """Return the exit code of a process that the objective forked and that returned from it."""
    if isinstance(outcome, messages.Raised):
        traceback.print_exception(unpack_error(outcome.error))
    flush_streams()
    if isinstance(outcome, messages.Exited):
        return outcome.code
    return int(isinstance(outcome, messages.Raised))


def _run_exit_handlers(grace_period: float) -> None:
    """Let threads, pools, executors and temporary folders end their work, for a limited time.

    The study already has the result. What the objective left open may wait indefinitely: a thread
    for an item, a process for its parent. A kernel timer ends that.
    """
    shortest, longest = _EXIT_TIMES
    seconds = max(shortest, min(grace_period, longest))
    # Before the others, as at the end of any program: a thread may be saving a checkpoint.
    threads = threading.Thread(target=_end_threads, daemon=True)
    threads.start()
    threads.join(seconds)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.setitimer(signal.ITIMER_REAL, seconds)
    atexit._run_exitfuncs()


def _end_threads() -> None:
    """Wait for all threads but daemons, as the end of a program does."""
    # Executors (joblib's too) end their workers in handlers of the threading module, and
    # multiprocessing waits for these workers in an exit handler.
    for handler in reversed(getattr(threading, "_threading_atexits", ())):
        handler()
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            # One that still waits, as a watchdog does, has nothing to complete.
            thread.cancel()
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()


def _sendable(returned: messages.Returned) -> messages.Outcome:
    """Return the value without the trial's devices and classes."""
    value = returned.value
    if _is_tensor(value):
        with contextlib.suppress(Exception):
            return replace(returned, value=float(value))
    try:
        pickle.loads(dumps(returned))
    except Exception as error:  # noqa: BLE001 - a user's __reduce__ may raise anything
        return messages.Unsendable(
            f"The objective returned a value of type {type(value).__name__} that can't be sent "
            f"from the trial's process: {type(error).__name__}: {error}. Return numbers.",
            stop_requested=returned.stop_requested,
            gpu_memory=returned.gpu_memory,
        )
    return returned


def _is_tensor(value: Any) -> bool:
    """Return whether this is a framework's number: unpickling it would load the framework."""
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


def _flush_files(inherited: Iterable[Any]) -> None:
    """Flush files that the objective did not close, and the study's that it may write to."""
    # Objects from before the fork are frozen, so not among the others.
    for value in itertools.chain(inherited, gc.get_objects()):
        # Exact classes: of a hundred thousand objects, `issubclass` would take 50 ms.
        if type(value) in _FILES:
            with contextlib.suppress(OSError, ValueError):
                value.flush()


# A forked process has to look like a child of multiprocessing. The private functions used here are
# those that `multiprocessing.Process` calls in a child; there are no public ones.

_of_study: list[Any] = []


def become_child(name: str, parent: int) -> None:
    """Make this process a child of the study's process in the view of multiprocessing.

    Exit handlers are left to the parent, and callbacks for a fork run now: pools, queues and
    temporary folders stay the study's own. ``parent`` is a pidfd of the study's process.
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
    # From `atexit`. Kept alive, as freeing their objects would copy pages of the study.
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
    """Record whether this process, a trial's or a fork server, is still importing modules."""
    global _is_preparing
    _is_preparing = is_preparing


def is_in_preparation() -> bool:
    """Return whether this process, of this package or of multiprocessing, is importing modules.

    A study that an import runs would run again in each such process, and start others.
    """
    return _is_preparing or bool(getattr(process.current_process(), "_inheriting", False))
