"""Makes a forked process one of multiprocessing's own, for all that looks.

The functions used here are what :class:`multiprocessing.Process` itself does in a child; there
are no public ones.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
import contextlib
import functools
import itertools
from multiprocessing import process
from multiprocessing import resource_tracker
from multiprocessing import util
import os
from typing import Any
import weakref


def become_child(name: str, parent: int) -> None:
    """Let this process be a child of the study's, as far as multiprocessing knows.

    What its parent has registered to be done at exit, or in its children, is left to the parent
    or done now: pools, queues and temporary folders of the study's process stay its own.

    Args:
        name: The name of the process.
        parent: A pidfd of the study's process, which becomes readable when that ends.
    """
    internals: Any = process
    former = internals._current_process
    child: Any = process.BaseProcess(name=name, daemon=False)
    internals._process_counter = itertools.count(1)
    internals._children = set()
    internals._current_process = child
    internals._parent_process = internals._ParentProcess(
        former.name, former.ident or os.getppid(), parent
    )
    forget_exit_handlers()
    _leave_tracker()
    # Queues, locks and managers that were made before the fork take note of it.
    util._finalizer_registry.clear()  # type: ignore[attr-defined]
    util._run_after_forkers()  # type: ignore[attr-defined]


def _leave_tracker() -> None:
    """Let a resource tracker of this process's own remove what it leaves behind, when it ends."""
    tracker: Any = resource_tracker._resource_tracker
    if tracker._fd is not None:
        with contextlib.suppress(OSError):  # closed with all that the template has open
            os.close(tracker._fd)
        tracker._fd = tracker._pid = None


def forget_exit_handlers() -> None:
    """Leave to the process that this is a copy of what it is to do at its own exit.

    Its handlers would end its helpers and remove its temporary folders with the first trial. What
    the trial itself adds is still done at the end of the trial.
    """
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # `atexit` held these
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]  # as above
    atexit.register(util._exit_function)  # type: ignore[attr-defined]


def leave_shared_memory() -> None:
    """Leave shared memory that exists already to whoever made it.

    Before Python 3.13, a process that only opens some registers it with its resource tracker, as
    if it had made it, and a trial's tracker removes at the trial's end what is registered. A
    tracker of the trial's own is wanted nevertheless: it removes what a killed trial leaves.
    """
    try:
        there = {f"/{name}" for name in os.listdir("/dev/shm")}
    except OSError:
        return
    tracker: Any = resource_tracker
    register, unregister = tracker.register, tracker.unregister

    def of_own(act: Callable[[str, str], None], name: str, kind: str) -> None:
        if kind != "shared_memory" or name not in there:
            act(name, kind)

    tracker.register = functools.partial(of_own, register)
    tracker.unregister = functools.partial(of_own, unregister)


def begin_preparation() -> None:
    """Note that this process, of a trial or of a template, gets ready for an objective."""
    global _is_in_preparation
    _is_in_preparation = True


def end_preparation() -> None:
    """Note that the objective begins: what it imports may run studies of its own."""
    global _is_in_preparation
    _is_in_preparation = False


def is_in_preparation() -> bool:
    """Return whether this process, one of ours or of multiprocessing's, still imports modules.

    A study that one of them runs would run in each such process, and start others.
    """
    return _is_in_preparation or bool(getattr(process.current_process(), "_inheriting", False))


_is_in_preparation = False
