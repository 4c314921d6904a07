"""The GPUs that a process may use, MIG instances in place of what they are cut from."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
import functools
import os
from typing import TypeVar

from optuna_quota._metering import nvml
from optuna_quota._metering.nvml import GpuError
from optuna_quota._metering.nvml import NvmlDevice
from optuna_quota._metering.visible import GpuIdentity
from optuna_quota._metering.visible import visible_devices


Answer = TypeVar("Answer")

# Of the driver under Linux, and under Windows' subsystem for it.
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg")
_GPU_FILES = ("/dev/nvidia", "/dev/dxg")


@dataclass(frozen=True)
class VisibleGpus:
    """What CUDA shows to a process.

    Attributes:
        devices: The GPUs and MIG instances; all that may be meant where ``unresolved``.
        unresolved: The entries of ``CUDA_VISIBLE_DEVICES`` when it can't be known which GPUs they
            name.
    """

    devices: tuple[NvmlDevice, ...]
    unresolved: tuple[str, ...] = ()


def visible_gpus(environment: Mapping[str, str]) -> VisibleGpus:
    """Return the GPUs that CUDA shows under these environment variables.

    Raises:
        GpuError: If NVML can't be used, or the variables hide every GPU.
    """
    names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    return _visible_gpus(*(environment.get(name) for name in names))


def device_memory(environment: Mapping[str, str]) -> float | None:
    """Return the memory of each GPU or MIG instance that CUDA shows, in bytes.

    The smallest where they differ; None when unknown, also when it can't be known which are meant.
    """
    try:
        shown = visible_gpus(environment)
        totals = {float(device.memory()[1]) for device in shown.devices}
    except GpuError:
        return None
    return None if shown.unresolved and len(totals) > 1 else min(totals)


def has_gpu_open(pids: Iterable[int]) -> bool | None:
    """Return whether any of these processes has a GPU open; None when that can't be known."""
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


def forget_visible() -> None:
    """Let the driver be asked anew."""
    _visible_gpus.cache_clear()
    _inventory.cache_clear()


@functools.lru_cache(maxsize=64)
def _visible_gpus(visible: str | None, order: str | None) -> VisibleGpus:
    found = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": order}
    gpus = _inventory()
    shown = visible_devices(
        [gpu.names for gpu in gpus], {k: v for k, v in found.items() if v is not None}
    )
    devices: dict[str, NvmlDevice] = {}
    for position, part in shown.parts:
        whole = gpus[position].parts
        for device in whole if part is None else [whole[part]]:
            devices[device.identity] = device
    if not devices:
        hidden = not shown.parts
        reason = "CUDA_VISIBLE_DEVICES hides every GPU" if hidden else "no MIG instance was found"
        raise GpuError(reason, final=True)
    return VisibleGpus(tuple(devices.values()), shown.unresolved)


@dataclass(frozen=True)
class _Gpu:
    """One GPU: what it is called, and what is measured of it."""

    names: GpuIdentity
    parts: Sequence[NvmlDevice]


@functools.lru_cache(maxsize=1)
def _inventory() -> Sequence[_Gpu]:
    devices, failure = nvml.open_devices()
    if failure is not None:
        raise GpuError(failure, final=True)
    return [_look_at(device) for device in devices]


def _look_at(device: NvmlDevice) -> _Gpu:
    uuid, model = _ask(device.uuid, ""), _ask(device.name, "")
    if not _ask(device.is_partitioned, False):
        return _Gpu(GpuIdentity(uuid, model), [device])
    instances = _ask(device.instances, None)
    if instances is None:
        # They can't be reached: what the device itself tells is all there is.
        device.is_instance = True
        return _Gpu(GpuIdentity(uuid, model, ("",)), [device])
    uuids = [_ask(instance.uuid, "") for instance in instances]
    return _Gpu(GpuIdentity(uuid, model, uuids), instances)


def _ask(question: Callable[[], Answer], otherwise: Answer) -> Answer:
    try:
        return question()
    except GpuError as error:
        if error.final and not error.lost:
            raise
        return otherwise
