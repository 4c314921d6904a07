"""GPUs through the real pynvml and a fake driver."""

from __future__ import annotations

from collections.abc import Callable

from tests.metering_tests.conftest import FakeNvml


LOOK = """
from optuna_quota._doctor.gpus import judge_gpus, read_gpus
for finding in judge_gpus(*read_gpus()):
    print(f"{finding.check} | {finding.state} | {finding.found} | {finding.degrades}")
"""


def test_each_gpu_is_found(nvml: Callable[..., FakeNvml]) -> None:
    state = "device 0 GPU-0aaa 0 80000000000 1000 5000\ndevice 1 GPU-1aaa 0 40000000000 0 5000\n"
    first, second = nvml().run(LOOK, state).splitlines()
    assert first.startswith("GPU 0 | ok | ") and "74.5 GiB" in first
    assert second.startswith("GPU 1 | ok | ") and "37.3 GiB" in second


def test_a_driver_without_a_gpu_is_told(nvml: Callable[..., FakeNvml]) -> None:
    assert "the NVIDIA driver found no GPU" in nvml().run(LOOK, "")
