"""Confines isolated trials to cores of their own: CPU affinity, and threads of libraries.

Libraries that start a thread for each core of the machine, in each of several trials, slow all
trials down. So a trial with a limit on cores is bound to as many processors, if possible not those
of other trials, and its thread pools have as many threads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
import contextlib
from dataclasses import dataclass
import importlib
import logging
import math
import os
import socket
import sys
import threading
from typing import Any

from optuna_quota._isolation.modules import after_import


_logger = logging.getLogger("optuna.quota.isolated")

# Libraries read these when they are loaded. Processes that the trial starts inherit them.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMEXPR_MAX_THREADS",
    "NUMBA_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "LOKY_MAX_CPU_COUNT",
    "PYTHON_CPU_COUNT",
)

# Prefix of the names of abstract sockets, which all processes of a machine or container see. A
# worker binds one for each processor of its trials; the kernel frees it when the worker dies.
_PREFIX = "\0optuna-quota/cpu/"


@dataclass(frozen=True)
class Cores:
    """The processors of one trial, none if processes can't be bound, and threads per pool."""

    cpus: tuple[int, ...]
    threads: int


def choose_cores(
    limit: float, allowed: Collection[int], trials: Mapping[int, int], taken: Collection[int] = ()
) -> Cores:
    """Return the cores of a trial: those that the fewest other trials use (pure).

    A part of a core counts as a whole processor. ``allowed`` is empty if unknown; ``trials`` has
    the number of this worker's trials by processor, ``taken`` the processors of other workers.
    """
    order = sorted(allowed, key=lambda cpu: (trials.get(cpu, 0) + (cpu in taken), cpu))
    cpus = tuple(sorted(order[: math.ceil(limit)]))
    threads = max(1, math.floor(limit))
    return Cores(cpus, min(threads, len(cpus)) if cpus else threads)


class CorePool:
    """The processors that this worker may use, and how many of its trials use each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trials: dict[int, int] = {}
        self._names: dict[int, socket.socket] = {}

    @contextlib.contextmanager
    def claim(self, limit: float | None) -> Iterator[Cores | None]:
        if limit is None:
            yield None
            return
        with self._lock:
            cores = self._take(limit)
        try:
            yield cores
        finally:
            with self._lock:
                for cpu in cores.cpus:
                    self._trials[cpu] -= 1
                    if not self._trials[cpu] and cpu in self._names:
                        self._names.pop(cpu).close()

    def _take(self, limit: float) -> Cores:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        taken: set[int] = set()
        while True:
            cores = choose_cores(limit, allowed, self._trials, taken)
            # Binding a name is atomic: who binds it has the processor.
            new = {cpu for cpu in cores.cpus if cpu not in self._names and cpu not in taken}
            refused = {cpu for cpu in new if not self._publish(cpu)}
            if not refused:
                break
            for cpu in new - refused:
                self._names.pop(cpu).close()
            taken |= refused
        for cpu in cores.cpus:
            self._trials[cpu] = self._trials.get(cpu, 0) + 1
        return cores

    def _publish(self, cpu: int) -> bool:
        """Claim a processor; return whether no trial of another worker uses it."""
        if not sys.platform.startswith("linux"):
            return True
        name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            name.bind(f"{_PREFIX}{cpu}")
        except OSError:
            name.close()
            return False
        self._names[cpu] = name
        return True

    def reset_after_fork(self) -> None:
        for name in self._names.values():
            name.close()
        self._lock, self._trials, self._names = threading.Lock(), {}, {}


core_pool = CorePool()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: core_pool.reset_after_fork())


def confine(cores: Cores) -> None:
    """Confine this process, its threads and the processes that it will start."""
    if cores.cpus:
        try:
            # Each thread has an affinity of its own, and hands it on.
            for thread in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(thread), cores.cpus)
        except OSError as error:
            _logger.info(f"The trial can't be bound to processors {cores.cpus}: {error}")
    for name in _THREAD_VARIABLES:
        if _number(os.environ.get(name)) > cores.threads:
            os.environ[name] = str(cores.threads)
    _limit_loaded_pools(cores.threads)
    after_import("torch", lambda torch: _limit_torch(torch, cores.threads))
    after_import(
        "numexpr", lambda numexpr: numexpr.set_num_threads(min(numexpr.nthreads, cores.threads))
    )


def _number(text: str | None) -> float:
    """Return a variable's number of threads, of a list by nesting level the outermost."""
    try:
        number = int((text or "").split(",")[0])
    except ValueError:
        return math.inf
    return number if number > 0 else math.inf


def threads_by_variables(environ: Mapping[str, str]) -> float:
    """Return the fewest threads that any of the variables allows."""
    return min(_number(environ.get(name)) for name in _THREAD_VARIABLES)


def _limit_loaded_pools(threads: int) -> None:
    try:
        pools: Any = importlib.import_module("threadpoolctl")
    except ImportError:
        return
    for library in pools.ThreadpoolController().lib_controllers:
        if library.num_threads is None or library.num_threads > threads:
            library.set_num_threads(threads)


def _limit_torch(torch: Any, threads: int) -> None:
    if torch.get_num_threads() > threads:
        torch.set_num_threads(threads)
    if torch.get_num_interop_threads() > threads:
        # Only before the first parallel work of the process.
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(threads)
