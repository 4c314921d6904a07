"""Which GPUs NVML shows, and what of a trial can be told on each."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import time
from typing import Any
from typing import Protocol

from optuna_quota import _units
from optuna_quota._doctor.finding import Finding
from optuna_quota._metering.nvml import GpuError
from optuna_quota._metering.nvml import open_devices


class Device(Protocol):
    """What is asked of a GPU."""

    index: int

    def name(self) -> str: ...
    def memory(self) -> tuple[int, int]: ...
    def processes(self) -> dict[int, int | None]: ...
    def samples(self, since: float) -> Sequence[Any]: ...
    def joules(self) -> float: ...
    def is_partitioned(self) -> bool: ...
    def instances(self) -> Sequence[Any]: ...


@dataclass(frozen=True)
class GpuFacts:
    """What NVML says of one GPU.

    Attributes:
        index: Its number in NVML's order.
        name: The model.
        memory: Bytes in all; None when unknown.
        instances: How many MIG instances it is cut into; 0 when it is whole.
        refused: Why something can't be read, by what it is needed for.
    """

    index: int
    name: str
    memory: float | None = None
    instances: int = 0
    refused: dict[str, str] = field(default_factory=dict)


def read_gpus() -> tuple[list[GpuFacts], str | None]:
    """Return the facts of each GPU, and why there is none."""
    devices, reason = open_devices()
    return [read_gpu(device) for device in devices], reason


def read_gpu(device: Device) -> GpuFacts:
    """Return the facts of one GPU, asking it once for each thing that metering will ask."""
    refused: dict[str, str] = {}

    def ask(what: str, question: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return question()
        except GpuError as error:
            refused[what] = error.reason
            return otherwise

    processes = ask("gpu_memory of a trial", device.processes, {})
    if any(held is None for held in processes.values()):
        refused["gpu_memory of a trial"] = "the driver hides what each process holds"
    ask("gpu_time", lambda: device.samples(time.time() - 1), [])
    ask("energy", device.joules, 0.0)
    cut = ask("MIG", device.is_partitioned, False)
    memory = ask("gpu_memory", device.memory, None)
    return GpuFacts(
        device.index,
        ask("name", device.name, "unknown model"),
        None if memory is None else float(memory[1]),
        len(ask("MIG", device.instances, [])) if cut else 0,
        refused,
    )


def judge_gpus(gpus: Sequence[GpuFacts], reason: str | None) -> list[Finding]:
    """Return what is known of GPU use, GPU by GPU.

    Args:
        gpus: The GPUs that NVML shows.
        reason: Why there are none; None when NVML answered.
    """
    if gpus:
        return [_judge_gpu(gpu) for gpu in gpus]
    return [
        Finding(
            "measuring",
            "GPUs",
            "missing",
            f"NVML shows none: {reason or 'it counts none'}.",
            "`gpu_memory` and `gpu_time` are unknown, never 0.",
            "Install NVIDIA's driver; start a container with `--gpus all`.",
        )
    ]


def _judge_gpu(gpu: GpuFacts) -> Finding:
    memory = "memory unknown" if gpu.memory is None else _units.format_bytes(gpu.memory)
    mig = f", cut into {gpu.instances} MIG instances" if gpu.instances else ""
    found = f"{gpu.name}, {memory}{mig}."
    if not gpu.refused:
        return Finding("measuring", f"GPU {gpu.index}", "ok", found)
    lacking = "; ".join(f"no {what}: {why}" for what, why in gpu.refused.items())
    return Finding(
        "measuring",
        f"GPU {gpu.index}",
        "degraded",
        found,
        f"{lacking[0].upper()}{lacking[1:]}.",
        "Update the driver; start a container with `--pid host` to see its processes.",
    )
