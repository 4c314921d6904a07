"""Make a forked process look like a child that multiprocessing has started.

The private functions used here are those that :class:`multiprocessing.Process` calls in a child;
there are no public ones.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
import contextlib
import functools
import itertools
from multiprocessing import process, resource_tracker, util
import os
from typing import Any
import weakref


def become_child(name: str, parent: int) -> None:
    """Make this process a child of the study's process, as far as multiprocessing can see.

    Exit handlers of its parent are left to the parent, and callbacks for a fork run now: pools,
    queues and temporary folders of the study's process stay its own.

    Args:
        name: The name of the process.
        parent: A pidfd of the study's process, which becomes readable when that ends.
    """
    internals: Any = process
    former = internals._current_process
    internals._process_counter = itertools.count(1)
    internals._children = set()
    internals._current_process = process.BaseProcess(name=name, daemon=False)
    internals._parent_process = internals._ParentProcess(
        former.name, former.ident or os.getppid(), parent
    )
    _clear_exit_handlers()
    _detach_resource_tracker()
    # Queues, locks and managers that were made before the fork have callbacks for it.
    util._finalizer_registry.clear()  # type: ignore[attr-defined]
    util._run_after_forkers()  # type: ignore[attr-defined]


def _clear_exit_handlers() -> None:
    """Remove the exit handlers of the process that this is a copy of.

    They would end its helpers and remove its temporary folders with the first trial. Handlers that
    the trial itself adds run at the end of the trial.
    """
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # `atexit` held these
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]  # as above
    atexit.register(util._exit_function)  # type: ignore[attr-defined]


def _detach_resource_tracker() -> None:
    """Let this process start its own resource tracker, which removes what it leaves behind."""
    tracker: Any = resource_tracker._resource_tracker
    if tracker._fd is not None:
        with contextlib.suppress(OSError):  # closed with other files of the fork server
            os.close(tracker._fd)
        tracker._fd = tracker._pid = None


def resource_tracker_pid() -> int | None:
    """Return the pid of this process's resource tracker, None without one."""
    tracker: Any = resource_tracker._resource_tracker
    pid: int | None = tracker._pid
    return pid


def leave_shared_memory() -> None:
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


_is_in_preparation = False


def begin_preparation() -> None:
    """Note that this process, a trial's or a fork server, prepares for an objective."""
    global _is_in_preparation
    _is_in_preparation = True


def end_preparation() -> None:
    """Note that the objective begins: what it imports may run studies of its own."""
    global _is_in_preparation
    _is_in_preparation = False


def is_in_preparation() -> bool:
    """Return whether this process, of this package or of multiprocessing, only imports modules.

    A study that one of them runs would run in each such process, and start others.
    """
    return _is_in_preparation or bool(getattr(process.current_process(), "_inheriting", False))
