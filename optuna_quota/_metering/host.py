"""What this process may use of its host, or of the container that it is in: memory, cores, GPUs.

In a cgroup with a limit, the kernel kills at that limit, whatever the host has. Limits of
ancestors apply as well, so the tightest one counts. Versions 1 and 2 of cgroups are supported,
also mixed. CUDA's environment variables say which GPUs are visible; MIG instances count as GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
from dataclasses import dataclass
import functools
import os
from pathlib import Path
import subprocess
import sys
from typing import TypeVar
import uuid

import psutil

from optuna_quota._metering import nvml
from optuna_quota._metering.meter import log_once
from optuna_quota._metering.nvml import answer_in_time, GpuError, NvmlDevice


# Where /proc and /sys are; tests pass another folder.
_ROOT = Path("/")


def host_memory_limit(root: Path = _ROOT) -> float:
    """Return the bytes of memory that all processes here may hold together."""
    texts = _settings(root, "memory", ["memory.limit_in_bytes"], "memory.max")
    limits = [limit for limit in map(_number, texts) if limit is not None]
    return min([float(psutil.virtual_memory().total), *limits])


def cpu_count(root: Path = _ROOT) -> float:
    """Return the cores that all processes here may keep busy together; may be a fraction.

    The minimum of the processors that this process may run on and the CPU quotas of its cgroup
    and the cgroup's ancestors.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    of_cpu = ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    return usable_cores(cores, _settings(root, "cpu", of_cpu, "cpu.max"))


def usable_cores(cores: float, quotas: Iterable[str]) -> float:
    """Return the cores that the processes of a cgroup may keep busy together (pure).

    Args:
        cores: The processors that this process may run on.
        quotas: Contents of ``cpu.max`` such as ``"150000 100000"``: microseconds of CPU time in
            each period, and microseconds of a period; ``"max"`` or -1 for no quota.
    """
    found = [float(cores)]
    for quota in quotas:
        fields = quota.split()
        if len(fields) == 2:
            budget, period = map(_number, fields)
            if budget is not None and period:
                found.append(budget / period)
    return min(found)


def _number(text: str) -> float | None:
    """Return a file's number; None for "max", -1, and the huge number for no limit in v1."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < 2**62 else None


def _settings(root: Path, controller: str, old: Sequence[str], new: str) -> Iterator[str]:
    """Yield what this process's cgroups set, by the names of files in version 1 and 2."""
    for folder in _folders(root, controller):
        yield " ".join(_text(folder / name) for name in old)
    for folder in _folders(root, ""):
        yield _text(folder / new)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and its ancestors; version 2 is under "".

    In a container the path may be the host's, while the mount has the container's own cgroup at
    its root: missing folders are skipped, and the root is always included.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller or "unified")
        mount = mount if controller or mount.is_dir() else mount.parent
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:depth])
            if depth == 0 or folder.is_dir():
                yield folder


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# GPUs.


@dataclass(frozen=True)
class GpuIdentity:
    """How CUDA's variables may name a GPU, and its devices: itself or its MIG instances."""

    uuid: str  # Such as ``"GPU-5a1b..."``, empty if unknown
    model: str  # The name of its model
    # The UUIDs of its MIG instances, ``"MIG-..."``, empty if unknown; None if it is not
    # partitioned
    instances: Sequence[str] | None = None
    devices: Sequence[NvmlDevice] = ()


@dataclass(frozen=True)
class Visible:
    """The positions of the GPUs that CUDA shows to a process."""

    # GPUs by position, each with the position of a MIG instance, or None for the whole GPU with
    # all of its instances; all possible ones if ``unresolved``
    parts: tuple[tuple[int, int | None], ...]
    # The entries of ``CUDA_VISIBLE_DEVICES`` if it is unknown which GPUs they name
    unresolved: tuple[str, ...] = ()


def visible_devices(
    gpus: Sequence[GpuIdentity], environment: Mapping[str, str], order: Sequence[str] = ()
) -> Visible:
    """Return the GPUs that CUDA shows under these environment variables (pure).

    As in CUDA, the list ends at the first entry that names nothing. Unless
    ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, CUDA numbers the fastest GPU first: with different models,
    numbers are ambiguous unless they name all GPUs.

    Args:
        gpus: All GPUs, in the order of their PCI bus.
        environment: Such as ``os.environ``.
        order: The UUIDs of all GPUs by CUDA's numbers, where known.
    """
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    everything = tuple((i, None) for i in range(len(gpus)))
    if wanted is None:
        return Visible(everything)
    if sorted(order) == sorted(gpu.uuid for gpu in gpus):
        places = {gpu.uuid: i for i, gpu in enumerate(gpus)}
        numbers = [places[uuid] for uuid in order]
    else:
        numbers, order = list(range(len(gpus))), ()
    is_ordered = (
        bool(order)
        or environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        or len({g.model for g in gpus}) <= 1
    )
    parts: dict[tuple[int, int | None], None] = {}
    entries: dict[str, None] = {}
    is_known = True
    for entry in (text.strip() for text in wanted.split(",")):
        part = _find(entry, gpus, numbers)
        if part is None and not _may_be_an_instance(entry, gpus):
            break
        entries[entry] = None
        is_known = is_known and part is not None and (is_ordered or not _is_number(entry))
        if part is not None:
            parts[part] = None
    if is_known or set(parts) == set(everything):
        return Visible(tuple(parts))
    return Visible(everything, tuple(entries))


def _find(
    entry: str, gpus: Sequence[GpuIdentity], numbers: Sequence[int]
) -> tuple[int, int | None] | None:
    """Return what an entry names, by GPUs in the order of their PCI bus; None for nothing."""
    if _is_number(entry):
        return (numbers[int(entry)], None) if int(entry) < len(gpus) else None
    found: list[tuple[int, int | None]] = []
    for i, gpu in enumerate(gpus):
        if entry and gpu.uuid.startswith(entry):
            found.append((i, None))
        uuids = gpu.instances or ()
        found += [(i, j) for j, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None


def _may_be_an_instance(entry: str, gpus: Sequence[GpuIdentity]) -> bool:
    return entry.startswith("MIG-") and not all(all(gpu.instances or ()) for gpu in gpus)


def _is_number(entry: str) -> bool:
    return entry.isascii() and entry.isdecimal()


Answer = TypeVar("Answer")

# The memory of one GPU is a resource named by this prefix and the GPU's UUID.
DEVICE = "gpu:"
# Seconds that a study waits for a driver to start: the answer is used for all its trials.
_STUDY_START_TIME = 60.0
# Of the driver under Linux, and under Windows' subsystem for it.
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg")
_GPU_FILES = ("/dev/nvidia", "/dev/dxg")


@dataclass(frozen=True)
class VisibleGpus:
    """The GPUs that CUDA shows to a process, or MIG instances; all if ``unresolved``."""

    devices: tuple[NvmlDevice, ...]
    unresolved: tuple[str, ...] = ()

    def totals(self) -> list[float]:
        """Return the bytes of memory of each; raises GpuError if they are unknown."""
        return answer_in_time(lambda: [float(gpu.memory()[1]) for gpu in self.devices])


def visible_gpus(environment: Mapping[str, str], *, within: float | None = None) -> VisibleGpus:
    """Return the GPUs that CUDA shows under these environment variables.

    Raises GpuError if NVML can't be used, does not answer in time, or the variables hide all GPUs.
    """
    names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    values = [environment.get(name) for name in names]
    return answer_in_time(lambda: _visible_gpus(*values), within)


def device_memory(environment: Mapping[str, str]) -> float | None:
    """Return the memory of each GPU or MIG instance that CUDA shows, in bytes.

    The smallest if they differ; None if it is unknown, or unknown which GPUs are visible.
    """
    totals, is_resolved = _total_memories(environment)
    return min(totals) if is_resolved or len(set(totals)) == 1 else None


def total_memory(environment: Mapping[str, str]) -> float | None:
    """Return the memory of all GPUs that CUDA shows together, in bytes; None if unknown."""
    totals, is_resolved = _total_memories(environment)
    return sum(totals) if is_resolved else None


def _total_memories(environment: Mapping[str, str]) -> tuple[list[float], bool]:
    """Return the bytes of each GPU, and whether exactly these are visible; none if unknown."""
    try:
        shown = visible_gpus(environment)
        return shown.totals(), not shown.unresolved
    except GpuError:
        return [], False


def memory_by_device(environment: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Return the bytes in use and in all of each GPU that CUDA shows, by identity, where known."""
    found = {}
    with contextlib.suppress(GpuError):
        for device in visible_gpus(environment).devices:
            # A lost GPU is left out.
            with contextlib.suppress(GpuError):
                found[device.identity] = answer_in_time(device.memory)
    return found


def free_memory(environment: Mapping[str, str]) -> list[float]:
    """Return the bytes that are free on each GPU or MIG instance that CUDA shows, where known."""
    return [float(total - used) for used, total in memory_by_device(environment).values()]


@dataclass(frozen=True)
class Gpu:
    """One GPU: its identifier as CUDA_VISIBLE_DEVICES takes it, and its memory in bytes."""

    uuid: str
    memory: float

    @property
    def resource(self) -> str:
        """The name of this GPU's memory as a resource."""
        return DEVICE + self.uuid


def memory_in_use(gpus: Sequence[Gpu]) -> dict[str, float]:
    """Return the bytes that all processes hold of these GPUs now, by UUID, where known."""
    known = memory_by_device(os.environ) if gpus else {}
    return {gpu.uuid: float(known[gpu.uuid][0]) for gpu in gpus if gpu.uuid in known}


def gpus_here() -> Sequence[Gpu]:
    """Return the GPUs that CUDA shows to this process, by the names that CUDA accepts.

    Without NVML, returns none and warns: each trial then sees all GPUs.
    """
    try:
        shown = visible_gpus(os.environ, within=_STUDY_START_TIME)
        totals = shown.totals()
        uuids = answer_in_time(lambda: [gpu.uuid() for gpu in shown.devices])
    except GpuError as error:
        message = f"Trials are not assigned GPUs of their own, and see all: {error.reason}."
        log_once("gpu: one a trial", message)
        return ()
    if not shown.unresolved:
        return [Gpu(uuid, total) for uuid, total in zip(uuids, totals, strict=True)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    log_once(
        "gpu: unresolved",
        f"CUDA_VISIBLE_DEVICES={visible} is ambiguous: the GPUs differ, and CUDA numbers the "
        "fastest first. Trials get these numbers unchanged, and the memory of the smallest GPU "
        "is assumed. Set CUDA_DEVICE_ORDER=PCI_BUS_ID, or use UUIDs.",
    )
    return [Gpu(entry, min(totals)) for entry in shown.unresolved]


def has_gpu_open(pids: Iterable[int]) -> bool | None:
    """Return whether any of these processes has a GPU open; None if unknown."""
    if not any(map(os.path.exists, _DRIVER_FILES)):
        return None
    try:
        return any(_has_gpu_open(pid) for pid in pids)
    except PermissionError:
        return None


def _has_gpu_open(pid: int) -> bool:
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            return any(os.readlink(entry.path).startswith(_GPU_FILES) for entry in entries)
    except (FileNotFoundError, ProcessLookupError):
        return False


@functools.lru_cache(maxsize=64)
def _visible_gpus(visible: str | None, order: str | None) -> VisibleGpus:
    found = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": order}
    gpus = _inventory()
    environment = {k: v for k, v in found.items() if v is not None}
    shown = visible_devices(gpus, environment)
    if any(map(_is_number, shown.unresolved)):
        shown = visible_devices(gpus, environment, _cuda_order(order))
    devices: dict[str, NvmlDevice] = {}
    for position, part in shown.parts:
        whole = gpus[position].devices
        for device in whole if part is None else [whole[part]]:
            devices[device.identity] = device
    if not devices:
        hidden = not shown.parts
        reason = "CUDA_VISIBLE_DEVICES hides every GPU" if hidden else "no MIG instance was found"
        raise GpuError(reason, final=True)
    return VisibleGpus(tuple(devices.values()), shown.unresolved)


# Seconds. To start CUDA takes a few on a machine with many GPUs.
_CUDA_TIMEOUT = 30.0
# In a process of its own: one that has started CUDA can't be forked for trials.
_CUDA_SCRIPT = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
count, device, uuid = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(16)
if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
    raise SystemExit(1)
for i in range(count.value):
    if cuda.cuDeviceGet(ctypes.byref(device), i) or cuda.cuDeviceGetUuid(uuid, device):
        raise SystemExit(1)
    print(uuid.raw.hex())
"""


@functools.lru_cache(maxsize=4)
def _cuda_order(order: str | None) -> Sequence[str]:
    """Return the UUIDs of all GPUs by CUDA's numbers, the fastest first; empty if unknown."""
    hidden = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    if order is not None:
        environment["CUDA_DEVICE_ORDER"] = order
    if not sys.executable:
        return ()
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CUDA_SCRIPT],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CUDA_TIMEOUT,
            check=True,
        )
        return [f"GPU-{uuid.UUID(digits)}" for digits in done.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()


def forget_gpus() -> None:
    """Discard the cached GPUs, after a fork."""
    for cached in (_visible_gpus, _inventory, _cuda_order):
        cached.cache_clear()
    nvml.forget_driver()


@functools.lru_cache(maxsize=1)
def _inventory() -> Sequence[GpuIdentity]:
    devices, failure = nvml.open_devices()
    if failure is not None:
        raise GpuError(failure, final=True)
    return [_inspect(device) for device in devices]


def _inspect(device: NvmlDevice) -> GpuIdentity:
    uuid, model = _get(device.uuid, ""), _get(device.name, "")
    if not _get(device.is_partitioned, False):
        return GpuIdentity(uuid, model, devices=[device])
    instances = _get(device.instances, None)
    if instances is None:
        # They can't be opened: what the device itself reports is all there is.
        device.is_instance = True
        return GpuIdentity(uuid, model, ("",), [device])
    uuids = [_get(instance.uuid, "") for instance in instances]
    return GpuIdentity(uuid, model, uuids, instances)


def _get(read: Callable[[], Answer], default: Answer) -> Answer:
    try:
        return read()
    except GpuError as error:
        if error.final and not error.lost:
            raise
        return default
