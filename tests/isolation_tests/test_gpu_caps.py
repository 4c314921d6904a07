"""Caps on GPU memory that the frameworks keep themselves."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from optuna_quota._isolation.gpu_caps import (
    cap_tensorflow,
    cap_torch,
    framework_gpu_memory,
    set_gpu_caps,
)
from tests.isolation_tests.trials import GIB


class FakeCuda:
    def __init__(self) -> None:
        self.fractions: dict[int, float] = {}

    def device_count(self) -> int:
        return 2

    def get_device_properties(self, device: int) -> Any:
        return type("Properties", (), {"total_memory": (device + 1) * 8 * GIB})

    def set_per_process_memory_fraction(self, fraction: float, device: int) -> None:
        self.fractions[device] = fraction

    def is_available(self) -> bool:
        return True


def test_gpu_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    fraction, preallocate = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"
    for name in ("TF_FORCE_GPU_ALLOW_GROWTH", "CUPY_GPU_MEMORY_LIMIT", fraction, preallocate):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    set_gpu_caps(None, 8.0 * GIB)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ
    monkeypatch.setattr("optuna_quota._isolation.gpu_caps.after_import", lambda *_: None)
    set_gpu_caps(2.0 * GIB, 8.0 * GIB)
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.2500"
    assert os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
    # What a trial needs would not be known otherwise, and its limit would be passed at once.
    assert os.environ[preallocate] == "false"
    assert os.environ["CUPY_GPU_MEMORY_LIMIT"] == str(2 * GIB)
    cuda = FakeCuda()
    cap_torch(cuda, 4.0 * GIB)
    assert cuda.fractions == {0: 0.5, 1: 0.25}


@pytest.mark.parametrize(
    ("jax", "cupy", "expected"),
    [
        ("0.1", str(GIB), ("0.1", str(GIB))),
        ("0.9", str(4 * GIB), ("0.2500", str(2 * GIB))),
        ("", "50%", ("0.2500", str(2 * GIB))),
    ],
)
def test_a_smaller_cap_of_the_user_stays(
    monkeypatch: pytest.MonkeyPatch, jax: str, cupy: str, expected: tuple[str, str]
) -> None:
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "CUPY_GPU_MEMORY_LIMIT")
    for name, value in zip(names, (jax, cupy), strict=True):
        monkeypatch.setenv(name, value)
    for name in ("TF_FORCE_GPU_ALLOW_GROWTH", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setattr("optuna_quota._isolation.gpu_caps.after_import", lambda *_: None)
    set_gpu_caps(2.0 * GIB, 8.0 * GIB)
    assert tuple(os.environ[name] for name in names) == expected


class FakeTensorFlow:
    """Two GPUs; as in TensorFlow, a capped one takes no setting of its memory growth."""

    def __init__(self) -> None:
        self.caps: dict[str, list[Any]] = {}
        self.config = SimpleNamespace(
            list_physical_devices=lambda kind: ["a", "b"],
            list_logical_devices=lambda kind: ["a", "b"],
            LogicalDeviceConfiguration=lambda memory_limit: memory_limit,
            set_logical_device_configuration=self.caps.__setitem__,
            get_logical_device_configuration=self.caps.get,
            experimental=SimpleNamespace(
                set_memory_growth=self.set_memory_growth,
                get_memory_info=lambda name: {"peak": {"GPU:0": 3, "GPU:1": 4}[name]},
            ),
        )

    def set_memory_growth(self, device: str, enable: bool) -> None:
        raise ValueError("Cannot set memory growth on device when virtual devices configured")


def test_tensorflow_is_capped_and_common_scripts_go_on() -> None:
    tensorflow = FakeTensorFlow()
    cap_tensorflow(tensorflow, 4.0 * GIB)
    assert tensorflow.caps == {"a": [4096.0], "b": [4096.0]}
    tensorflow.config.experimental.set_memory_growth("a", True)


def test_a_version_of_tensorflow_without_caps_is_left_alone() -> None:
    cap_tensorflow(SimpleNamespace(config=SimpleNamespace()), 4.0 * GIB)


@pytest.mark.parametrize(("is_started", "peak"), [(True, 7.0), (False, None)])
def test_the_counters_of_tensorflow(
    monkeypatch: pytest.MonkeyPatch, is_started: bool, peak: float | None
) -> None:
    context = SimpleNamespace(_context=SimpleNamespace(_initialized=is_started))
    for name in ("torch", "jax", "cupy"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "tensorflow", FakeTensorFlow())
    monkeypatch.setitem(sys.modules, "tensorflow.python.eager.context", context)
    assert framework_gpu_memory() == peak
