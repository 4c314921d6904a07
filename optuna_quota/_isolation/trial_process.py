"""Forks a trial's supervisor, which forks the trial: the common part of fork and forkserver."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from dataclasses import dataclass
import gc
import os
from pathlib import Path
import socket
from typing import NoReturn
import warnings

from optuna_quota._isolation import processes
from optuna_quota._isolation.cgroup import CgroupLeaf
from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.child import Inherited
from optuna_quota._isolation.child import run_child
from optuna_quota._isolation.control import BeginMonitoring
from optuna_quota._isolation.control import Started
from optuna_quota._isolation.job_signals import hold_signals
from optuna_quota._isolation.job_signals import ignore_job_signals
from optuna_quota._isolation.job_signals import job_signals_blocked
from optuna_quota._isolation.multiprocessing_child import become_child
from optuna_quota._isolation.supervisor import Supervisor


@dataclass(frozen=True)
class Forked:
    """A trial's processes, waiting for their first messages.

    Attributes:
        supervisor: The supervisor's pid.
        channel: The study's end of the connection to the trial.
        control: The study's end of the connection to the supervisor.
    """

    supervisor: int
    channel: socket.socket
    control: socket.socket


def fork_trial(parent: int, *, cgroup: Path | None, inherited: Inherited | None = None) -> Forked:
    """Fork a supervisor with its trial.

    Args:
        parent: A pidfd of the study's process; stays open here.
        cgroup: Where to make the trial's control group, None for none.
        inherited: What the trial has from this process; without it, all is sent to the trial.
    """
    (ours, theirs), (command, obey) = socket.socketpair(), socket.socketpair()
    with theirs, obey, job_signals_blocked():
        pid = fork()
        if pid == 0:
            try:
                _supervise(theirs.fileno(), obey.fileno(), parent, cgroup, inherited)
            finally:
                # Never back into the code that this process is a copy of.
                os._exit(1)
    return Forked(pid, ours, command)


def fork() -> int:
    """Fork this process, whatever threads it has: the child starts from a known state."""
    with warnings.catch_warnings():
        # Python 3.12 warns where it counts a second thread, such as an idle one of OpenBLAS.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _supervise(
    channel: int, control: int, parent: int, cgroup: Path | None, inherited: Inherited | None
) -> NoReturn:
    os.setsid()
    ignore_job_signals()
    processes.become_subreaper()
    # Keeps messages apart, of which a signal handler reads one without waiting.
    link, child_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child_link.setblocking(False)
    crash_file = os.memfd_create("optuna-quota-crash")
    leaf = _make_leaf(cgroup)
    supervisor = os.getpid()
    child = fork()
    if child == 0:
        code = 1
        link.close()
        try:
            _enter_child(supervisor, leaf)
            hold_signals()
            if inherited is None:
                kept = (channel, child_link.fileno(), crash_file, parent)
                _close_all_but(*kept, *_opened_by_modules)
            else:
                # To go through what is inherited would copy its pages.
                gc.freeze()
            become_child(f"Trial-{supervisor}", parent)
            code = run_child(
                Channel(socket.socket(fileno=channel)),
                link=child_link,
                crash_file=crash_file,
                inherited=inherited,
                streams=inherited is None,
            )
        finally:
            os._exit(code)
    child_link.close()
    _close_all_but(control, parent, link.fileno(), crash_file)
    commands = Channel(socket.socket(fileno=control))
    order = None if inherited is None else inherited.order
    _mind(commands, child, link, parent, crash_file, leaf, order)


def _mind(
    control: Channel,
    child: int,
    link: socket.socket,
    parent: int,
    crash_file: int,
    leaf: CgroupLeaf | None,
    order: BeginMonitoring | None,
) -> NoReturn:
    gc.disable()
    with contextlib.suppress(OSError):
        control.send(Started(child))
    supervisor = Supervisor(
        control,
        child,
        link=link,
        parent=parent,
        crash_file=crash_file,
        leaf=leaf,
        order=order,
    )
    ended = supervisor.run()
    with contextlib.suppress(OSError):
        control.send(ended)
    os._exit(0)


def _enter_child(supervisor: int, leaf: CgroupLeaf | None) -> None:
    # A session of its own: a trial that signals its process group must not hit its supervisor.
    os.setsid()
    processes.die_with_parent(supervisor)
    if leaf is not None:
        with contextlib.suppress(OSError):
            leaf.add(os.getpid())


def _make_leaf(folder: Path | None) -> CgroupLeaf | None:
    if folder is None:
        return None
    try:
        return CgroupLeaf(folder)
    except OSError:
        return None


@contextlib.contextmanager
def modules_may_open_files() -> Iterator[None]:
    """Leave open in trials what is opened in the block: logs, databases, shared memory.

    What a module holds would otherwise refer to closed files, or by their numbers to others'.
    """
    before = _open_descriptors()
    try:
        yield
    finally:
        now = _open_descriptors()
        _opened_by_modules.intersection_update(now)
        _opened_by_modules.update(now - before)


_opened_by_modules: set[int] = set()


def _open_descriptors() -> set[int]:
    found = {int(name) for name in os.listdir("/proc/self/fd")}
    # That of the listing itself is closed by now.
    return {handle for handle in found if _is_open(handle)}


def _is_open(handle: int) -> bool:
    try:
        os.fstat(handle)
    except OSError:
        return False
    return True


def _close_all_but(*handles: int) -> None:
    """Close what this process has inherited and does not need.

    A copy of the study's end of a connection would keep it open when the study's process dies.
    """
    kept = {0, 1, 2, *handles}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))
