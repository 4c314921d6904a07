"""Limits that the kernel and frameworks enforce: RLIMIT_DATA, RLIMIT_CPU, cgroups, GPU caps.

By default the supervisor enforces the memory limit and no ``RLIMIT_DATA`` is set. The latter
counts private writable memory, touched or not (thread stacks, arenas, ``np.zeros``, private
mappings of files), and no shared memory; allocations beyond it fail. ``strict_memory=True`` sets
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import itertools
import logging
import math
import os
from pathlib import Path
import sys
from typing import Any

from optuna_quota._isolation.modules import after_import
from optuna_quota._metering.linux_process import LinuxProcess, MemorySnapshot, read_huge_pages


_logger = logging.getLogger("optuna.quota.isolated")

# Added to the kernel's own score of a process for the out-of-memory killer, in thousandths of all
# memory: a trial is killed before the study that started it.
OOM_SCORE = 800

# With less room, RLIMIT_DATA is not set: native libraries that can't allocate their first buffers
# (OpenBLAS: 32 MiB per thread) exit or hang where Python would raise. The supervisor alone
# enforces the limit then.
MIN_ROOM = 64 * 2**20
_BUFFER = 40 * 2**20


def has_room(memory: float, used: int, cores: int) -> bool:
    """Return whether RLIMIT_DATA leaves room, in bytes, for native libraries' threads."""
    return memory - used >= max(MIN_ROOM, min(cores * _BUFFER, memory / 2))


def data_limit(data: int, used: float, memory: float) -> int:
    """Return the RLIMIT_DATA with which the memory in use can't exceed a limit, in bytes.

    ``data`` is the memory that it counts now.
    """
    return min(data + max(0, math.floor(memory - used)), sys.maxsize)


def _status_sum(pid: int | str, *names: bytes) -> int | None:
    """Return the sum of sizes in a process's status, in bytes; None when unknown."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        sizes = [int(line.split()[1]) * 1024 for line in file if line.startswith(names)]
        return sum(sizes) if sizes else None
    return None


def limit_memory(memory: float) -> int | None:
    """Limit this process's memory; return the RLIMIT_DATA set, None if none was."""
    data = _status_sum("self", b"VmData:") if sys.platform == "linux" else None
    if data is None:
        return None
    import resource

    with contextlib.closing(LinuxProcess(os.getpid())) as process:
        used = process.proportional_memory().proportional
    if not has_room(memory, used, os.cpu_count() or 1):
        return None
    soft, (_, hard) = data_limit(data, used, memory), resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    # Soft, so that error handling and the supervisor can raise it again.
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return soft


def may_exceed(memory: float | None) -> bool:
    """Return whether this process may already exceed a memory limit; cheap and approximate.

    Memory that it shares with others counts in full here.
    """
    if memory is None or sys.platform != "linux":
        return False
    return (_status_sum("self", b"RssAnon:", b"RssShmem:", b"VmSwap:") or 0) > memory


def lift_memory_limit() -> None:
    """Raise the soft limit to the hard limit: handling an error needs memory."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


class DataLimit:
    """Adjusts a child's RLIMIT_DATA, at first ``soft``, to the memory that it may still allocate.

    Mapped memory that stays untouched for a while (thread stacks, arenas, a sparse array) does not
    count toward the limit, so the same amount is added. Not immediately: an array that is being
    filled is untouched for a moment.
    """

    PERIOD = 0.1
    # While there is something to add: a library allocates the buffers of its threads all at once,
    # and the trial's next allocation would fail because of them.
    FAST_PERIOD = 0.02
    MIN_CHANGE = 4 * 2**20
    WINDOW = 5

    def __init__(self, pid: int, memory: float, soft: int) -> None:
        self._pid = pid
        self._memory = memory
        self._soft = soft
        self._wanted: list[int] = []

    def update(self, used: float) -> float:
        """Adapt the limit to the memory in use, in bytes; return seconds until the next time."""
        data = _status_sum(self._pid, b"VmData:")
        if data is None:
            return self.PERIOD
        wanted = data_limit(data, used, self._memory)
        self._wanted = [*self._wanted, wanted][-self.WINDOW :]
        if len(self._wanted) == self.WINDOW and not self._set(min(self._wanted)):
            return self.PERIOD
        return self.FAST_PERIOD if wanted > self._soft + self.MIN_CHANGE else self.PERIOD

    def _set(self, soft: int) -> bool:
        import resource

        with contextlib.suppress(OSError, ValueError):
            now, hard = resource.prlimit(self._pid, resource.RLIMIT_DATA)
            # A limit that the trial has changed itself, or that was lifted at its end, stays.
            if now == self._soft != soft and (hard == resource.RLIM_INFINITY or soft <= hard):
                resource.prlimit(self._pid, resource.RLIMIT_DATA, (soft, hard))
                self._soft = soft
        return soft == self._soft


def limit_cpu_time(cpu_time: float, grace_period: float) -> None:
    """Let the kernel stop this process when its own CPU time, in seconds, is used up.

    A backstop: the metering, which measures the whole tree, is faster. The kernel counts whole
    seconds of one process. The grace period is the time from SIGXCPU to SIGKILL.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        times = os.times()
        soft = min(math.ceil(cpu_time + times.user + times.system) + 1, sys.maxsize)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        last = min(soft + math.ceil(grace_period) + 1, sys.maxsize)
        if hard != resource.RLIM_INFINITY:
            soft, last = min(soft, hard), min(last, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, last))


def raise_oom_score() -> None:
    """Let the kernel's out-of-memory killer prefer this process; always permitted."""
    score = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        if int(score.read_text()) < OOM_SCORE:
            score.write_text(str(OOM_SCORE))


def reset_peak() -> None:
    """Restart this process's peak, which includes what it needed to receive the objective."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def own_memory() -> MemorySnapshot | None:
    """Return this process's memory and its peak, None where /proc does not tell."""
    with contextlib.suppress(OSError), contextlib.closing(LinuxProcess(os.getpid())) as process:
        return process.snapshot(read_huge_pages())
    return None


# Control groups.

_MOUNT = Path("/sys/fs/cgroup")


def own_cgroup(mount: Path = _MOUNT) -> Path | None:
    """Return the folder of this process's control group (cgroup v2), None without one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                folder = mount / line[3:].lstrip("/")
                if (folder / "cgroup.procs").exists():
                    return folder
    return None


def find_delegated(start: Path | None, mount: Path = _MOUNT) -> Path | None:
    """Return the nearest group, from this one up, in which groups with a limit can be created."""
    while start is not None and (start == mount or mount in start.parents):
        if _is_delegated(start):
            return start
        start = start.parent
    return None


def _is_delegated(folder: Path) -> bool:
    try:
        controllers = (folder / "cgroup.subtree_control").read_text(encoding="utf-8").split()
    except OSError:
        return False
    # Moving a process requires a writable common ancestor of its old and new group.
    return (
        "memory" in controllers
        and os.access(folder, os.W_OK)
        and os.access(folder / "cgroup.procs", os.W_OK)
    )


_numbers = itertools.count()


class Cgroup:
    """The control group of one trial; raises OSError unless the folder is delegated.

    With it the kernel counts the memory of the whole tree, including shared memory and files in
    tmpfs, and kills the tree at once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / f"optuna-quota-{os.getpid()}-{next(_numbers)}"
        self._folder.mkdir()

    def add(self, pid: int) -> None:
        (self._folder / "cgroup.procs").write_text(str(pid))

    def limit_memory(self, room: float) -> None:
        """Set how much more than now the group may hold, in bytes.

        Pages that the trial shares with the fork server are charged to the fork server's group, so
        the limit is set by what may yet be added. Clean pages of files do not count: the kernel
        drops them when the group needs the room.
        """
        stat = self._table("memory.stat")
        held = sum(stat.get(name, 0) for name in ("anon", "shmem", "kernel"))
        (self._folder / "memory.max").write_text(str(max(0, held + int(room))))
        with contextlib.suppress(OSError):
            (self._folder / "memory.swap.max").write_text("0")

    def oom_kills(self) -> int:
        return self._table("memory.events").get("oom_kill", 0)

    def kill(self) -> bool:
        """Kill all its processes at once; return whether the kernel can (5.14 and later)."""
        try:
            (self._folder / "cgroup.kill").write_text("1")
        except OSError:
            return False
        return True

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _table(self, name: str) -> dict[str, int]:
        """Return the numbers of a file of lines such as ``anon 123``, none without the file."""
        try:
            text = (self._folder / name).read_text(encoding="utf-8")
        except OSError:
            return {}
        fields = (line.split() for line in text.splitlines())
        return {pair[0]: int(pair[1]) for pair in fields if len(pair) == 2}


# GPU memory. NVML shows what a process holds, not what it is about to allocate. In a framework
# with a cap, the allocation fails, and the error is recognized as a breach.


def set_gpu_caps(gpu_memory: float | None, device_memory: float | None) -> None:
    """Cap the frameworks at a trial's limit on GPU memory, in bytes.

    ``device_memory`` is that of the smallest GPU or MIG instance that the trial sees; None when
    unknown, and then only what needs no fraction is set.
    """
    # By default JAX takes three quarters of each device, TensorFlow all of it: what a trial
    # needs would stay unknown, a limit would be exceeded at once, and other trials find no room on
    # the device: of four with JAX two crashed. Trials in threads share what one process takes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    if gpu_memory is None:
        return
    if device_memory:
        fraction = math.floor(1e4 * min(1.0, gpu_memory / device_memory)) / 1e4
        _set_at_most("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction, f"{fraction:.4f}")
    # A share of the device, which CuPy accepts too ("50%"), may be larger.
    _set_at_most("CUPY_GPU_MEMORY_LIMIT", gpu_memory, str(int(gpu_memory)))
    after_import("torch.cuda", lambda module: cap_torch(module, gpu_memory))
    after_import("tensorflow", lambda module: cap_tensorflow(module, gpu_memory))


def _set_at_most(name: str, most: float, text: str) -> None:
    try:
        if float(os.environ[name]) <= most:
            return
    except (KeyError, ValueError):
        pass
    os.environ[name] = text


def cap_torch(cuda: Any, gpu_memory: float) -> None:
    """Cap torch's allocator on each device, in bytes, as soon as CUDA is used."""

    def cap() -> None:
        for device in range(cuda.device_count()):
            total = cuda.get_device_properties(device).total_memory
            cuda.set_per_process_memory_fraction(min(1.0, gpu_memory / total), device)

    # Torch's queue of calls at initialization: initializing CUDA here would take GPU memory in
    # trials that never use it.
    lazily = getattr(cuda, "_lazy_call", None)
    if lazily is not None:
        lazily(cap)
    elif cuda.is_available():
        cap()


def cap_tensorflow(tensorflow: Any, gpu_memory: float) -> None:
    """Cap TensorFlow's allocator on each device, in bytes.

    Listing the devices takes no GPU memory.
    """
    config = tensorflow.config
    try:
        for device in config.list_physical_devices("GPU"):
            cap = config.LogicalDeviceConfiguration(memory_limit=gpu_memory / 2**20)
            config.set_logical_device_configuration(device, [cap])
    except (AttributeError, RuntimeError, ValueError) as error:
        # Not supported by this version, or already initialized: the meter alone enforces it.
        _logger.info(f"TensorFlow got no cap on its GPU memory: {error}")
        return
    set_growth = config.experimental.set_memory_growth

    def set_memory_growth(device: Any, enable: bool) -> None:
        # On a device with a cap it raises an error; TF_FORCE_GPU_ALLOW_GROWTH does the same.
        if not config.get_logical_device_configuration(device):
            set_growth(device, enable)

    config.experimental.set_memory_growth = set_memory_growth


def framework_gpu_memory() -> float | None:
    """Return the peak of GPU memory by the counters of frameworks in use, in bytes."""
    found = []
    for name, count in _COUNTERS.items():
        module = sys.modules.get(name)
        if module is not None:
            # Whatever it raises, the trial's own result counts.
            with contextlib.suppress(Exception):
                found.append(float(count(module)))
    return sum(found) or None


def _torch_peak(torch: Any) -> Any:
    if not torch.cuda.is_initialized():
        return 0.0
    devices = range(torch.cuda.device_count())
    return sum(torch.cuda.max_memory_reserved(device) for device in devices)


def _jax_peak(jax: Any) -> Any:
    # Listing the devices would start the backend.
    if not sys.modules["jax._src.xla_bridge"]._backends:
        return 0.0
    counters = [d.memory_stats() for d in jax.local_devices() if d.platform in ("gpu", "cuda")]
    return sum((stats or {}).get("peak_bytes_in_use", 0) for stats in counters)


def _tensorflow_peak(tensorflow: Any) -> Any:
    # Listing the devices would start the runtime.
    context = sys.modules["tensorflow.python.eager.context"]._context
    if context is None or not context._initialized:
        return 0.0
    config = tensorflow.config
    names = [f"GPU:{i}" for i in range(len(config.list_logical_devices("GPU")))]
    return sum(config.experimental.get_memory_info(name)["peak"] for name in names)


_COUNTERS: Mapping[str, Callable[[Any], Any]] = {
    "torch": _torch_peak,
    "jax": _jax_peak,
    "tensorflow": _tensorflow_peak,
    # Its pool frees nothing by itself: its size is its peak.
    "cupy": lambda cupy: cupy.get_default_memory_pool().total_bytes(),
}
